"""Each file operation of whatever writes fails once: by a kill, a full disk, an interrupt. What is there opens; called
again it comes to what it would have been.
"""

import os

import pytest
import torch
from helpers import faults, tiny_models

import saewb
from saewb._files import is_locked
from saewb.errors import FormatError
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
        assert index.is_complete
        saewb.load_index(folder / "index")
        return torch.cat([t.double().flatten() for _, t in sorted(index.tensors.items())])

    @staticmethod
    def look(folder):
        try:
            assert saewb.load_index(folder / "index").n_tokens > 0
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
        try:
            run = saewb.resume_run(folder / "run", tokens=_stream())
        except FileNotFoundError:
            how = {"n_tokens": 16 * 8, "batch_tokens": 16, "checkpoint_every_tokens": 48, "log_every_steps": 1}
            run = saewb.train(None, _stream(), saewb.TopK(d_sae=16, k=2), folder=folder / "run", **how)
        sae = run.wait().sae
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


WRITERS = [Save, Index, Cache, Evaluations, Training]


def _orphans(folder):
    temporary = (".new", ".old", ".replacing")
    return [path for path in folder.rglob("*") if path.name.endswith(temporary) or is_locked(path.parent)]


def _attack(writer, tmp_path, how, stride, start=0):
    """Fail every `stride`-th operation; the number of them."""
    writer.prepare(whole := _new(tmp_path / "whole"))
    expected, n, tries = writer.work(whole), start, 0
    while True:
        writer.prepare(folder := _new(tmp_path / f"{n}"))
        failed = _fail(writer, folder, n, how)
        writer.look(folder)
        assert torch.equal(writer.work(folder), expected), f"operation {n}"
        if how == "kill" and failed:
            assert _orphans(folder) == [], f"operation {n}"
        if not failed:
            return tries
        n, tries = n + stride, tries + 1


def _new(folder):
    folder.mkdir()
    return folder


def _fail(writer, folder, n, how):
    if how == "kill":
        return faults.killed_at(folder, n, lambda: writer.work(folder))
    fail = faults.interrupt if how == "interrupt" else faults.full_disk
    with faults.failing(folder, n, fail, persistent=how == "full disk") as layer:
        try:
            writer.work(folder)
        except (OSError, KeyboardInterrupt, FormatError):  # the last: an error while reading
            pass
        except RuntimeError as error:
            _check("cannot" in str(error) or "SAE" in str(error))
    return layer.count > n


@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_a_kill_loses_nothing_that_was_written(writer, tmp_path):
    assert _attack(writer, tmp_path, "kill", stride=29, start=5) > 0


@pytest.mark.attack
@pytest.mark.parametrize("how", ["kill", "full disk", "one error", "interrupt"])
@pytest.mark.parametrize("writer", WRITERS, ids=lambda writer: writer.__name__)
def test_every_file_operation_fails(writer, how, tmp_path):
    print(writer.__name__, how, _attack(writer, tmp_path, how, stride=1), "operations")
