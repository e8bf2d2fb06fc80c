"""The libraries that the layouts come from as oracles: files they save, read and computed the same.

Both are installed without what only their training needs, so only the modules with their SAE classes are imported:
`pip install --no-deps eai-sparsify==1.3.3 dictionary-learning==0.1.0 natsort simple-parsing docstring-parser`
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import sys
import types

import pytest
import torch
from helpers.format_fixtures import DICT_CLASSES, SPARSIFY, D, F, K, dictionary_learning, inputs, sparsify

from saewb.pretrained.formats import read

X = torch.from_numpy(inputs(20)).float()
NEAR = {"atol": 2e-5, "rtol": 1e-5}


def _module(package, name, needs=()):
    """`package.name`, without running the package's own __init__; or skip."""
    spec = importlib.util.find_spec(package)
    missing = [other for other in (package, *needs) if importlib.util.find_spec(other) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}; this file's first lines say how")
    for part in [package, *(f"{package}.{inner}" for inner in name.split(".")[:-1])]:
        if part not in sys.modules:
            bare = types.ModuleType(part)
            bare.__spec__ = importlib.machinery.ModuleSpec(part, None, is_package=True)
            bare.__path__ = [spec.submodule_search_locations[0] + part[len(package) :].replace(".", "/")]
            bare.__spec__.submodule_search_locations = bare.__path__
            sys.modules[part] = bare
    return importlib.import_module(f"{package}.{name}")


def _randomized(module, seed=0):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.4)
            if "threshold" in name:
                parameter.copy_(parameter.abs() * 3 + 0.1)
    return module


# --- dictionary_learning

_HOMES = {
    "AutoEncoderTopK": "trainers.top_k",
    "BatchTopKSAE": "trainers.batch_top_k",
    "MatryoshkaBatchTopKSAE": "trainers.matryoshka_batch_top_k",
}


def _dictionary(kind):
    cls = getattr(_module("dictionary_learning", _HOMES.get(kind, "dictionary"), ["einops"]), kind)
    options = {"k": K} if "TopK" in kind else {}
    if kind == "MatryoshkaBatchTopKSAE":
        options["group_sizes"] = [8, 12, 20]
    result = _randomized(cls(D, F, **options))
    if kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        result.threshold.fill_(1.25)
    return result


@pytest.mark.parametrize("kind", DICT_CLASSES)
def test_dictionary_learning(kind, tmp_path):
    native = _dictionary(kind)
    dictionary_learning(tmp_path, kind)  # for its config.json
    torch.save(native.state_dict(), tmp_path / "ae.pt")
    ours = read(tmp_path)
    with torch.no_grad():
        latents = native.encode(X)
        assert 0.02 < (latents != 0).float().mean() < 0.9
        torch.testing.assert_close(ours.encode(X), latents, **NEAR)
        torch.testing.assert_close(ours.decode(latents), native.decode(latents), **NEAR)
        torch.testing.assert_close(ours(X), native(X), **NEAR)


def test_its_normalized_decoder_is_ours_folded(tmp_path):
    native = _dictionary("AutoEncoder")
    dictionary_learning(tmp_path, "AutoEncoder")
    torch.save(native.state_dict(), tmp_path / "ae.pt")
    native.normalize_decoder()
    with torch.no_grad():
        torch.testing.assert_close(read(tmp_path).fold_decoder_norm().encode(X), native.encode(X), **NEAR)


def test_the_fixtures_are_what_it_saves(tmp_path):
    for kind in DICT_CLASSES:
        native = _dictionary(kind).state_dict()
        written = dictionary_learning(tmp_path / kind, kind).stored
        assert {n: (t.shape, t.dtype) for n, t in native.items()} == {n: (t.shape, t.dtype) for n, t in written.items()}


# --- sparsify


def _sparse_coder():
    needs = ["einops", "natsort", "simple_parsing", "docstring_parser", "accelerate", "transformers"]
    return _module("sparsify", "sparse_coder", needs).SparseCoder


@pytest.mark.parametrize("variant", [variant for variant in SPARSIFY if variant != "signed"])  # no longer in it
def test_sparsify(variant, tmp_path):
    written = sparsify(tmp_path, variant)
    native, ours = _sparse_coder().load_from_disk(written.place), read(written.place)
    with torch.no_grad():
        top = native.encode(X)
        latents = torch.zeros(len(X), ours.cfg.d_sae).scatter_(1, top.top_indices, top.top_acts)
        torch.testing.assert_close(ours.encode(X), latents, **NEAR)
        native.cfg.multi_topk = False  # with it `forward` returns what its loss makes of 4 k latents
        torch.testing.assert_close(ours(X), native(X).sae_out, **NEAR)


def test_what_sparsify_saves(tmp_path):
    coder = _sparse_coder()
    config = _module("sparsify", "config").SparseCoderConfig(expansion_factor=3, k=K, skip_connection=True)
    native = _randomized(coder(D, config))
    native.save_to_disk(tmp_path / "layers.5.mlp")
    assert set(json.loads((tmp_path / "layers.5.mlp/cfg.json").read_text())) <= {*SPARSIFY["transcode"][1], "d_in"}
    ours = read(tmp_path / "layers.5.mlp")
    assert ours.cfg.d_sae == 3 * D
    with torch.no_grad():
        torch.testing.assert_close(ours(X), native(X).sae_out, **NEAR)
