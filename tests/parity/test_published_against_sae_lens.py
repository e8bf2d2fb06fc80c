"""sae-lens' own readers as the oracle, on layouts it reads right; where it is wrong, that it still is."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from helpers.format_fixtures import (
    DICT_CLASSES,
    QWEN,
    D,
    F,
    deepseek_r1,
    dictionary_learning,
    inputs,
    mntss,
    mwhanna,
    qwen_scope,
    sparsify,
)

from saewb.pretrained.formats import Provenance, read

sae_lens = pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from sae_lens.loading import pretrained_sae_loaders as loaders  # noqa: E402  (after the check that it is there)
from sae_lens.registry import get_sae_class  # noqa: E402

X = torch.from_numpy(inputs(2, 6)).float()
NEAR = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(autouse=True)
def _from_disk(monkeypatch, tmp_path):
    """sae-lens asks the hub for files; here they come from `tmp_path`, whatever the repository is called."""

    def hf_hub_download(repo_id, filename, **options):
        if not (tmp_path / filename).is_file():
            raise loaders.EntryNotFoundError(filename)
        return str(tmp_path / filename)

    def shapes(repo_id, filename):
        header = (tmp_path / filename).read_bytes()
        size = int.from_bytes(header[:8], "little")
        return {n: t["shape"] for n, t in json.loads(header[8 : 8 + size]).items() if n != "__metadata__"}

    monkeypatch.setattr(loaders, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def theirs(loader, repo, path, **overrides):
    """The SAE that sae-lens makes of these files, by the steps of its `from_pretrained`."""
    cfg, state, _ = loader(repo, path, "cpu", False, {"dtype": "float32", **overrides})
    cfg = loaders.handle_config_defaulting(cfg)
    cls, config = get_sae_class(cfg["architecture"])
    sae = cls(config.from_dict(cfg))
    sae.load_state_dict(state)
    return sae.float()


def assert_same(ours, oracle):
    with torch.no_grad():
        latents = oracle.encode(X)
        assert (latents != 0).any()
        torch.testing.assert_close(ours.encode(X), latents, **NEAR)
        torch.testing.assert_close(ours(X), oracle(X), **NEAR)
    metadata = oracle.cfg.metadata
    assert ours.cfg.hook == metadata.hook_name
    assert ours.cfg.model == metadata.model_name
    for name in ("context_size", "dataset_path", "model_from_pretrained_kwargs"):
        expected = metadata.get(name)
        assert expected in (None, {}) or ours.cfg.metadata.get(name) == expected


@pytest.mark.parametrize("kind", [kind for kind in DICT_CLASSES if kind != "AutoEncoderNew"])
@pytest.mark.parametrize("threshold", [1.5, -1.0])
def test_dictionary_learning(kind, threshold, tmp_path):
    dictionary_learning(tmp_path / "a", kind, threshold=threshold)
    oracle = theirs(loaders.dictionary_learning_sae_huggingface_loader_1, "canrager/lm_sae", "a")
    assert_same(read(tmp_path / "a"), oracle)


def test_it_cannot_read_an_auto_encoder_new(tmp_path):
    dictionary_learning(tmp_path / "a", "AutoEncoderNew")
    with pytest.raises((RuntimeError, AttributeError)):
        theirs(loaders.dictionary_learning_sae_huggingface_loader_1, "canrager/lm_sae", "a")
    read(tmp_path / "a")


def test_deepseek_r1(tmp_path, monkeypatch):
    written = deepseek_r1(tmp_path)
    real = loaders.get_deepseek_r1_config_from_hf
    monkeypatch.setattr(  # it knows no other widths
        loaders, "get_deepseek_r1_config_from_hf", lambda *a: {**real(*a), "d_in": D, "d_sae": F, "dtype": "float32"}
    )
    repo = "qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19"
    oracle = theirs(loaders.deepseek_r1_sae_huggingface_loader, repo, written.place.name)
    assert_same(read(written.place, dtype=torch.float32), oracle)


def test_qwen_scope(tmp_path, monkeypatch):
    written = qwen_scope(tmp_path)
    name, k = "Qwen3-1.7B-Base", QWEN["k"]
    monkeypatch.setattr(loaders, "_parse_qwen_scope_repo_id", lambda repo: (name, F, k))
    monkeypatch.setitem(loaders.QWEN_SCOPE_MODEL_INFO, name, (f"Qwen/{name}", D))
    oracle = theirs(loaders.qwen_scope_sae_huggingface_loader, f"Qwen/SAE-Res-{name}-W32K-L0_50", written.place.name)
    ours = read(written.place)
    assert_same(ours, oracle)
    assert ours.cfg.metadata["hf_hook_name"] == oracle.cfg.metadata.hf_hook_name


def test_mwhanna(tmp_path):
    written = mwhanna(tmp_path)
    oracle = theirs(loaders.mwhanna_transcoder_huggingface_loader, "mwhanna/qwen3-4b-transcoders", written.place.name)
    ours = read(written.place, dtype=torch.float32)
    # The context it gives is the batch size of the training run: the only thing not taken over.
    assert oracle.cfg.metadata.context_size == 8192
    oracle.cfg.metadata.context_size = None
    assert_same(ours, oracle)
    assert ours.cfg.hook_out == oracle.cfg.metadata.hook_name_out


@pytest.mark.parametrize("extra", [{"skip": True}, {"threshold": "activation_function.threshold"}])
def test_it_cannot_read_other_mwhanna_transcoders(extra, tmp_path):
    written = mwhanna(tmp_path, **extra)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        theirs(loaders.mwhanna_transcoder_huggingface_loader, "mwhanna/qwen3-4b-transcoders", written.place.name)


@pytest.mark.parametrize("threshold", [True, False])
def test_one_layer_of_a_cross_layer_transcoder(threshold, tmp_path):
    mntss(tmp_path, threshold=threshold, d_out=D)
    oracle = theirs(loaders.mntss_clt_layer_huggingface_loader, "mntss/clt-gemma-2-2b-426k", "1")
    ours = read(tmp_path / "1", Provenance(repo="mntss/clt-gemma-2-2b-426k", path="1"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(ours.W_dec, oracle.W_dec, **NEAR)
        torch.testing.assert_close(ours.b_dec, oracle.b_dec, **NEAR)
    if not threshold:
        assert_same(ours, oracle)
        return
    with torch.no_grad():  # it leaves the thresholds out
        pre = X @ oracle.W_enc + oracle.b_enc
        torch.testing.assert_close(oracle.encode(X), pre.relu(), **NEAR)
        torch.testing.assert_close(ours.encode(X), pre.relu() * (pre > ours.threshold), **NEAR)
        assert (ours.encode(X) - oracle.encode(X)).abs().max() > 0.5


def test_it_cannot_read_a_file_of_sparsify(tmp_path):
    written = sparsify(tmp_path, "pythia")
    with pytest.raises(RuntimeError, match="size mismatch"):
        theirs(loaders.sparsify_huggingface_loader, "EleutherAI/sae-pythia-70m-32k", written.place.name)
