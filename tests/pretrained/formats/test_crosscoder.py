"""Crosscoder files: saewb's own bit for bit, published ones against the arithmetic of their libraries."""

import json

import numpy as np
import pytest
import torch
from sae.test_crosscoder import activations, crosscoder
from safetensors.torch import load_file, save_file

import saewb
from saewb.errors import FormatError
from saewb.pretrained.formats.crosscoder import CODES, write_dictionary_learning

N, D, F = 2, 6, 20


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def fork_tensors(code=1, threshold=0.7, normalizer=True):
    """As `BatchTopKCrossCoder` of dictionary_learning's fork saves itself."""
    tensors = {
        "encoder.weight": drawn(N, D, F, seed=0),
        "encoder.bias": drawn(F, seed=1),
        "decoder.weight": drawn(N, F, D, seed=2),
        "decoder.bias": drawn(N, D, seed=3),
        "code_normalization_id": torch.tensor(code),
        "k": torch.tensor(5, dtype=torch.int32),
        "threshold": torch.tensor(threshold),
        "target_rms": torch.tensor(1.5),
        "activation_mean": drawn(N, D, seed=4),
        "activation_std": drawn(N, D, seed=5).abs() + 0.5,
    }
    if not normalizer:
        tensors["activation_mean"] *= torch.nan
        tensors["activation_std"] *= torch.nan
        return tensors | {"activation_global_scale": torch.ones(N)}
    return tensors | {"activation_global_scale": 1.5 / (tensors["activation_std"].square().sum(1) + 1e-8).sqrt()}


def fork(tensors, x):
    """f and x_hat `[tokens, points, d]` of the fork's `encode` and `decode`, in numpy."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    if not np.isnan(t["activation_mean"]).any():
        u = (x - t["activation_mean"]) * t["activation_global_scale"][:, None]
    else:
        u = x
    f = np.maximum(np.einsum("tnd,ndf->tf", u, t["encoder.weight"]) + t["encoder.bias"], 0)
    blocks = np.linalg.norm(t["decoder.weight"], axis=2)
    whole = np.sqrt((t["decoder.weight"] ** 2).sum((0, 2)))
    length = {1: blocks.sum(0), 2: whole, 3: whole + 0.1 * blocks.sum(0), 4: 1.0}[int(t["code_normalization_id"])]
    f = f * (f * length > t["threshold"])
    y = np.einsum("tf,nfd->tnd", f, t["decoder.weight"]) + t["decoder.bias"]
    if not np.isnan(t["activation_mean"]).any():
        y = y / (t["activation_global_scale"][:, None] + 1e-8) + t["activation_mean"]
    return f, y


def published(folder, tensors, file="model.safetensors", **config):
    folder.mkdir()
    config = {"activation_dim": D, "dict_size": F, "num_layers": N, "code_normalization": "CROSSCODER", **config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / file) if file.endswith("safetensors") else torch.save(tensors, folder / file)
    return folder


@pytest.mark.parametrize("file", ["model.safetensors", "ae.pt"])
@pytest.mark.parametrize(
    ("code", "threshold", "normalizer"), [(1, 0.7, True), (2, 0.7, False), (3, 0.2, True), (4, -1.0, True)]
)
def test_dictionary_learning(tmp_path, file, code, threshold, normalizer):
    tensors = fork_tensors(code, threshold, normalizer)
    cross = saewb.load_sae(published(tmp_path / "x", tensors, file))
    x = np.random.default_rng(0).normal(0.2, 1.3, (50, N, D))
    f, y = fork(tensors, x)
    both = torch.from_numpy(x.reshape(50, -1)).float()
    np.testing.assert_allclose(cross.encode(both).detach(), f, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cross(both).detach().reshape(50, N, D), y, rtol=1e-4, atol=1e-5)
    assert cross.cfg.metadata["code"] == CODES[code]
    assert cross.cfg.activation == ("relu" if threshold < 0 else "jumprelu")
    if file.endswith("safetensors"):
        written = write_dictionary_learning(cross, tmp_path / "again")
        again = load_file(written / "model.safetensors")
        f2, y2 = fork({"threshold": torch.tensor(-1.0), **again}, x)
        np.testing.assert_allclose(f2, f, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(y2, y, rtol=1e-4, atol=1e-5)
        assert torch.allclose(saewb.load_sae(written)(both), cross(both), atol=1e-5)


def test_a_compiled_module_has_a_prefix(tmp_path):
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in fork_tensors().items()}
    assert saewb.load_sae(published(tmp_path / "x", tensors)).d_sae == F


def replication_tensors():
    t = {"W_enc": drawn(N, D, F, seed=0), "W_dec": drawn(F, N, D, seed=1), "b_enc": drawn(F, seed=2)}
    return t | {"b_dec": drawn(N, D, seed=3)}


def replication(folder, tensors):
    folder.mkdir()
    torch.save(tensors, folder / "cc_weights.pt")
    (folder / "cfg.json").write_text(json.dumps({"d_in": D, "dict_size": F, "hook_point": "blocks.14.hook_resid_pre"}))
    return folder


def test_replication(tmp_path):
    t = replication_tensors()
    cross = saewb.load_sae(replication(tmp_path / "blocks.14.hook_resid_pre", t)).with_scale({"a": 0.28, "b": 0.24})
    w, x = {n: v.numpy() for n, v in t.items()}, np.random.default_rng(0).normal(0, 3, (40, N, D))
    factor = np.array([0.28, 0.24])[:, None]
    z = np.maximum(np.einsum("tnd,ndf->tf", x * factor, w["W_enc"]) + w["b_enc"], 0)
    y = (np.einsum("tf,fnd->tnd", z, w["W_dec"]) + w["b_dec"]) / factor
    both = torch.from_numpy(x.reshape(40, -1)).float()
    np.testing.assert_allclose(cross.encode(both).detach(), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cross(both).detach().reshape(40, N, D), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_own_layout_is_exact(tmp_path, activation):
    cross = crosscoder(activation, torch.float32).with_config(metadata={"k": 3}, model="tiny")
    again = saewb.load_sae(saewb.save_sae(cross, tmp_path / "x"))
    assert again.cfg == cross.cfg
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in cross.named_parameters())
    x = activations(dtype=torch.float32)
    assert torch.equal(again(x), cross(x))
    saewb.save_sae(cross, tmp_path / "x", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["crosscoder.json", "crosscoder.safetensors"]
    with pytest.raises(TypeError, match="metadata"):
        saewb.save_sae(cross.with_config(metadata={"x": object()}), tmp_path / "y")


def test_damage_is_a_format_error(tmp_path):
    with pytest.raises(FormatError, match="decoupled"):
        saewb.load_sae(published(tmp_path / "a", fork_tensors(code=5)))
    with pytest.raises(FormatError, match="dict_size=21"):
        saewb.load_sae(published(tmp_path / "b", fork_tensors(), dict_size=21))
    with pytest.raises(FormatError, match=r"decoder\.weight"):
        saewb.load_sae(published(tmp_path / "c", fork_tensors() | {"decoder.weight": drawn(N, F, D + 1, seed=0)}))
    with pytest.raises(FormatError, match="code_normalization_id is 9"):
        saewb.load_sae(published(tmp_path / "d", fork_tensors(code=9)))
    own = saewb.save_sae(crosscoder(dtype=torch.float32), tmp_path / "own")
    config = json.loads((own / "crosscoder.json").read_text())
    for change in ({"saewb_crosscoder": 9}, {"widths": [5, 8]}, {"points": "ab"}, {"extra": 1}, {"activation": "x"}):
        (own / "crosscoder.json").write_text(json.dumps(config | change))
        with pytest.raises(FormatError):
            saewb.load_sae(own)


def test_what_the_published_layout_cannot_express(tmp_path):
    with pytest.raises(ValueError, match="points of one width"):
        write_dictionary_learning(crosscoder(dtype=torch.float32), tmp_path / "a")
    square = crosscoder(dtype=torch.float32, widths=(6, 6)).with_scale({"a": 1.0, "b": 2.0})
    with pytest.raises(ValueError, match="thresholds differ"):
        write_dictionary_learning(square, tmp_path / "a")
    assert not any(tmp_path.iterdir())
