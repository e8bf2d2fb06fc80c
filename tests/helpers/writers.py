"""What writes files, for attacks on it: how it is begun, called, and looked at after a failure.

`work` comes to the same result from whatever a failure left; `look` raises if something that was written is lost.
"""

import os
from contextlib import contextmanager

import torch

import saewb
from helpers import tiny_models
from helpers.fake_hub import hub
from saewb.training.run import _live
from saewb.training.run_folder import RunFolder

AT = "blocks.1.hook_resid_post"
MODEL = tiny_models.bridge


def _check(is_right):
    assert is_right


def _sae(seed):
    return tiny_models.sae(AT, "topk", k=4, d_sae=24, seed=seed)


def _stream():
    return saewb.stream_draws(lambda n, rng: torch.randn(n, 8, generator=rng), seed=3, batch_tokens=16)


class Save:
    """An SAE over an older one."""

    @staticmethod
    def prepare(folder):
        saewb.save_sae(_sae(0), folder / "sae")

    @staticmethod
    def work(folder):
        saewb.save_sae(_sae(1), folder / "sae", overwrite=True)
        return saewb.load_sae(folder / "sae").W_enc

    @staticmethod
    def look(folder):
        W = saewb.load_sae(folder / "sae").W_enc
        assert any(torch.equal(W, _sae(seed).W_enc) for seed in (0, 1))
        assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == ["sae"]


class Index:
    @staticmethod
    def prepare(folder):
        pass

    @staticmethod
    def work(folder):
        how = {"n_top": 2, "per_quantile": 1, "batch_size": 2, "save_every_s": 0.0, "n_logits": 0, "n_nearest": 0}
        index = saewb.build_index(MODEL(), _sae(0), tiny_models.tokens(rows=6), folder=folder / "index", **how)
        if not index.is_complete:  # Ctrl-C stops the pass
            raise KeyboardInterrupt
        saewb.load_index(folder / "index")
        return torch.cat([t.double().flatten() for _, t in sorted(index.tensors.items())])

    @staticmethod
    def look(folder):
        try:
            index = saewb.load_index(folder / "index")
            assert len(index.tensors) > 0  # of no tokens yet, if Ctrl-C came before the first batch
        except FileNotFoundError as error:
            _check("no index" in str(error))


class Cache:
    @staticmethod
    def prepare(folder):
        pass

    @staticmethod
    def work(folder):
        ids = tiny_models.tokens(rows=8)
        return saewb.cache_activations(MODEL(), ids, AT, folder / "cache", 40, shard_tokens=16)[0:40].values[AT]

    @staticmethod
    def look(folder):
        try:
            saewb.ActivationCache(folder / "cache")
        except FileNotFoundError as error:
            _check("no cache" in str(error) or "not finished" in str(error))


class Evaluations:
    @staticmethod
    def prepare(folder):
        pass

    @staticmethod
    def work(folder):
        saes = {"a": _sae(0), "b": _sae(1)}
        table = saewb.evaluate_many(MODEL(), saes, tiny_models.tokens(), folder=folder / "evals", at_once=1)
        return torch.tensor(table[["fvu", "l0", "ce_with_sae"]].to_numpy())

    @staticmethod
    def look(folder):
        pass


class Training:
    @staticmethod
    def prepare(folder):
        pass

    @staticmethod
    def work(folder):
        for run in list(_live):  # interrupted after `train` returned it and before it had a name
            run.stop()
        try:
            run = saewb.resume_run(folder / "run", tokens=_stream())
        except FileNotFoundError:
            how = {"n_tokens": 16 * 8, "batch_tokens": 16, "checkpoint_every_tokens": 48, "log_every_steps": 1}
            run = saewb.train(None, _stream(), saewb.TopK(d_sae=16, k=2), folder=folder / "run", **how)
        try:
            sae = run.wait().sae
        finally:
            run.stop()  # interrupted between two calls it goes on
        Training.look(folder)
        assert torch.equal(saewb.load_sae(folder / "run" / "saes" / "sae").W_dec, sae.W_dec)
        return sae.W_dec.detach()

    @staticmethod
    def look(folder):
        """The checkpoint and the SAE are of one step."""
        if not (folder / "run" / "run.json").is_file():
            return
        saewb.read_run(folder / "run")
        if (folder / "run" / "checkpoint.pt").is_file():
            writer = RunFolder(folder / "run")
            n_tokens = writer.read_checkpoint()["training"]["n_tokens"]
            writer.close()
            sae = saewb.load_sae(folder / "run" / "saes" / "sae")
            assert sae.cfg.metadata["n_training_tokens"] == n_tokens


class Download:
    """An SAE of a hub that is a thread here."""

    REPO = "some-one/their-saes"
    endpoint = ""

    @staticmethod
    def prepare(folder):
        pass

    @staticmethod
    def work(folder):
        with _client(folder):
            W = saewb.load_sae(Download.REPO, "deep/one").W_enc
        assert torch.equal(W, _wide().W_enc)
        return W

    @staticmethod
    def look(folder):
        """What of it counts as there is whole."""
        with _client(folder, offline=True):
            try:
                assert torch.equal(saewb.load_sae(Download.REPO, "deep/one").W_enc, _wide().W_enc)
            except FileNotFoundError as error:
                _check("not in the hub's cache" in str(error))


def _wide():
    return tiny_models.sae(AT, "topk", k=4, d_in=64, d_sae=256)


@contextmanager
def serve_download(folder):
    """The hub that `Download` asks."""
    saewb.save_sae(_wide(), folder / "published")
    files = {f"deep/one/{file.name}": file.read_bytes() for file in (folder / "published").iterdir()}
    with hub({Download.REPO: files}) as (endpoint, _):
        Download.endpoint = endpoint
        yield


@contextmanager
def _client(folder, offline=False):
    """huggingface_hub with a cache in this folder: constants that it takes from the environment at import."""
    from huggingface_hub import constants

    settings = {"ENDPOINT": Download.endpoint, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": offline}
    settings["HUGGINGFACE_CO_URL_TEMPLATE"] = Download.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    settings["HF_HUB_DISABLE_XET"] = settings["HF_HUB_DISABLE_PROGRESS_BARS"] = True
    before = {name: getattr(constants, name) for name in settings}
    os.environ["NO_PROXY"] = "127.0.0.1"
    for name, value in settings.items():
        setattr(constants, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(constants, name, value)


WRITERS = [Save, Index, Cache, Evaluations, Training]
