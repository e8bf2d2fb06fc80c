"""Cross-layer transcoders on disk: circuit-tracer's layout and Gemma Scope 2's, and that they are not read whole."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.format_fixtures import D, F, O, assert_layers_formula, gemma, inputs, mntss, numbers, save_config

from saewb.errors import FormatError
from saewb.interventions.attachment import attach
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.circuit_tracer import CircuitTracerCrossLayer
from saewb.pretrained.formats.gemma_scope_2 import GemmaScope2CrossLayer
from saewb.pretrained.load import load_sae
from saewb.sae.cross_layer import CrossLayerTranscoder

# --- circuit-tracer


@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_arithmetic(threshold, skip, tmp_path):
    written = mntss(tmp_path, threshold=threshold, skip=skip)
    clt = read(written.place, dtype=torch.float32)
    assert isinstance(clt, CrossLayerTranscoder)
    assert_layers_formula(clt, written)
    assert (clt.cfg.d_in, clt.cfg.d_sae, clt.cfg.d_out) == (D, (F,) * 3, O)
    assert clt.cfg.hooks[1:] == ("blocks.1.hook_resid_mid", "blocks.2.hook_resid_mid")
    assert clt.cfg.hooks_out[0] == "blocks.0.hook_mlp_out"
    assert clt.cfg.model == "google/gemma-2-2b"
    assert repr(load_sae(tmp_path)) == repr(read(tmp_path))


def test_only_biases_and_thresholds_are_converted(tmp_path):
    clt = read(mntss(tmp_path).place, dtype=torch.float32)
    assert {name: of[0].dtype for name, of in clt._modules.items()} == {
        "W_enc": torch.bfloat16,
        "W_dec": torch.bfloat16,
        "b_enc": torch.float32,
        "b_dec": torch.float32,
        "threshold": torch.float32,
    }
    assert read(tmp_path).dtype == torch.bfloat16
    assert read(tmp_path, device="cpu").device == torch.device("cpu")


@pytest.mark.parametrize("name", ["1", "W_enc_1.safetensors"])
@pytest.mark.parametrize("threshold", [True, False])
def test_one_layer_encodes_and_its_rows_are_all_it_writes(name, threshold, tmp_path):
    """sae-lens leaves the thresholds out, and its latents are others."""
    written = mntss(tmp_path, threshold=threshold, skip=True)
    sae, x = read(tmp_path / name, dtype=torch.float32), inputs(6)
    zs, _ = written.expected([x, x, x])
    np.testing.assert_allclose(sae.encode(torch.from_numpy(x).float()).detach(), zs[1], atol=1e-5, rtol=1e-5)
    rows = numbers(written.stored["W_dec_1"])["W_dec_1"].sum(1)
    np.testing.assert_allclose(sae.W_dec.detach(), rows, atol=1e-5, rtol=1e-5)
    assert (sae.cfg.hook, sae.cfg.hook_out) == ("blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out")
    if threshold:
        ignoring = np.maximum(x @ numbers(written.stored["W_enc_1"])["W_enc_1"].T + sae.b_enc.detach().numpy(), 0)
        assert np.abs(ignoring - zs[1]).max() > 0.5


def test_one_layer_is_not_attached(tmp_path):
    mntss(tmp_path, d_in=tiny_models.D_MODEL, d_out=tiny_models.D_MODEL)
    with pytest.raises(ValueError, match="one layer of a cross-layer transcoder"):
        attach(tiny_models.bridge(), read(tmp_path / "1"))


@pytest.mark.parametrize("layout", ["mntss", "gemma"])
def test_the_whole_is_attached(layout, tmp_path):
    if layout == "mntss":
        written = mntss(tmp_path, d_in=tiny_models.D_MODEL, d_out=tiny_models.D_MODEL)
    else:
        written = gemma(tmp_path, "clt", d_out=tiny_models.D_MODEL)
    clt, model, tokens = load_sae(written.place, dtype=torch.float32), tiny_models.bridge(), tiny_models.tokens()
    with torch.no_grad(), attach(model, clt) as attached:
        _, cache = model.run_with_cache(tokens)
        xs = [cache[f"{hook}.hook_sae_input"].double().numpy() for hook in clt.cfg.hooks_out]
        zs, ys = written.expected(xs)
        for hook, z, y in zip(clt.cfg.hooks_out, zs, ys, strict=True):
            np.testing.assert_allclose(attached.latents[hook], z, atol=1e-4, rtol=1e-4)
            np.testing.assert_allclose(cache[hook], y, atol=1e-4, rtol=1e-4)


def test_without_a_configuration(tmp_path):
    mntss(tmp_path, config=None)
    clt = read(tmp_path, Provenance(model="gpt2"))
    assert (clt.cfg.hooks[0], clt.cfg.hooks_out[0], clt.cfg.model) == (
        *("blocks.0.hook_resid_mid", "blocks.0.hook_mlp_out"),
        "gpt2",
    )


def test_every_tensor_of_every_layer_is_accounted_for(tmp_path):
    written = mntss(tmp_path)
    for file, tensors in written.stored.items():
        for name in tensors:
            if "threshold" not in name:
                written.save({file: {n: t for n, t in tensors.items() if n != name} or {"none": torch.ones(1)}})
                with pytest.raises(FormatError, match=name):
                    read(tmp_path)
            written.save({file: {**tensors, name: tensors[name][1:].contiguous()}})
            with pytest.raises(FormatError, match="instead of|differ"):
                read(tmp_path)
        written.save({file: {**tensors, "more": torch.ones(1)}})
        with pytest.raises(FormatError, match="more left over"):
            read(tmp_path)
        written.save({file: tensors})
    read(tmp_path)


def test_layers_that_differ(tmp_path):
    written = mntss(tmp_path)
    without = {n: t for n, t in written.stored["W_enc_1"].items() if "threshold" not in n}
    written.save({"W_enc_1": without})
    with pytest.raises(FormatError, match="layers differ in what they have: layer 1"):
        read(tmp_path)
    written.save({"W_enc_1": written.stored["W_enc_1"]})
    (tmp_path / "W_dec_2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="W_dec_2"):
        read(tmp_path)
    (tmp_path / "W_enc_2.safetensors").unlink()
    with pytest.raises(FormatError, match="W_dec_0"):  # it writes to a layer that is not there
        read(tmp_path)


@pytest.mark.parametrize("text", ["model_name: 3", "- a", "feature_input_hook: []", "{{{"])
def test_a_configuration_that_does_not_fit(text, tmp_path):
    mntss(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(FormatError):
        read(tmp_path)


def test_recognized(tmp_path):
    mntss(tmp_path)
    for place in (tmp_path, tmp_path / "2", tmp_path / "W_enc_0.safetensors"):
        assert type(detect(place)) is CircuitTracerCrossLayer
    assert not CircuitTracerCrossLayer().detect(tmp_path / "3")
    assert CircuitTracerCrossLayer().patterns("") == ["W_enc_*.safetensors", "W_dec_*.safetensors", "config.yaml"]
    assert CircuitTracerCrossLayer().patterns("3") == ["W_enc_3.safetensors", "W_dec_3.safetensors", "config.yaml"]


# --- Gemma Scope 2


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("config", [True, False])
def test_gemma_arithmetic(kind, affine, config, tmp_path):
    written = gemma(tmp_path, kind, affine=affine, config=config)
    clt = read(written.place)
    assert_layers_formula(clt, written)
    layers = (0, 1, 2) if kind == "clt" else (5, 9, 12)
    site, site_out = ("mlp.hook_in", "hook_mlp_out") if kind == "clt" else ("hook_resid_post",) * 2
    assert clt.cfg.hooks == tuple(f"blocks.{layer}.{site}" for layer in layers)
    assert clt.cfg.hooks_out == tuple(f"blocks.{layer}.{site_out}" for layer in layers)
    assert clt.cfg.model == ("google/gemma-3-270m" if config else None)
    named = Provenance(repo="google/gemma-scope-2-1b-it", path=written.place.relative_to(tmp_path).as_posix())
    assert read(written.place, named).cfg.model == ("google/gemma-3-270m" if config else "google/gemma-3-1b-it")


def test_gemma_model_names_are_made_one(tmp_path):
    assert read(gemma(tmp_path, model_name="gemma-v3-1b-pt").place).cfg.model == "google/gemma-3-1b-pt"


def test_what_writes_backwards_is_refused(tmp_path):
    written = gemma(tmp_path, "crosscoder")
    backwards = written.stored["params_layer_2"]
    backwards["w_dec"][:, 0] = 0.3
    written.save({"params_layer_2": backwards})
    with pytest.raises(FormatError, match=r"params_layer_2.safetensors writes to layers before its own, 2"):
        read(written.place)


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "topk"},
        {"width": 10**15},
        {"hf_hook_point_in": "model.layers.{0,1}.output"},
        {"hf_hook_point_in": "model.layers.{a,b,c}.output"},
        {"hf_hook_point_in": "model.layers.{all}.self_attn.output"},
        {"hf_hook_point_in": "model.layers.3.output"},
        {"model_name": []},
        {"type": 1},
    ],
)
def test_gemma_config_that_does_not_fit(change, tmp_path):
    with pytest.raises(FormatError):
        read(gemma(tmp_path, **change).place)


def test_gemma_tensors_are_accounted_for(tmp_path):
    written = gemma(tmp_path, affine=True)
    file, tensors = "params_layer_1", written.stored["params_layer_1"]
    for name in tensors:
        written.save({file: {n: t for n, t in tensors.items() if n != name}})
        with pytest.raises(FormatError, match=name.replace("affine_skip_connection", "W_skip|differ")):
            read(written.place)
        written.save({file: {**tensors, name: tensors[name][1:].contiguous()}})
        with pytest.raises(FormatError):
            read(written.place)
    written.save({file: tensors})
    (written.place / "params_layer_1.safetensors").unlink()
    with pytest.raises((FormatError, FileNotFoundError)):
        read(written.place)


def test_gemma_recognized(tmp_path):
    written = gemma(tmp_path)
    assert type(detect(written.place)) is GemmaScope2CrossLayer
    assert GemmaScope2CrossLayer().patterns("clt/a") == ["clt/a/config.json", "clt/a/params_layer_*.safetensors"]
    save_config(tmp_path / "config.json", {})
    assert not GemmaScope2CrossLayer().detect(tmp_path)


# --- size

_PEAK = """
import resource, sys, torch
from pathlib import Path
from saewb.pretrained.formats import read

def peak():  # of memory that is not a file's, since the last call of it
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines["RssAnon"].split()[0]) * 1024

torch.set_num_threads(1)
x = torch.zeros(8, {d})
x[:, 0] = 1
before = peak()
clt = read(Path({place!r}), dtype=torch.float32)
opened = peak() - before
latents = clt.encode([x] * {n})
clt.decode(latents)
print(opened, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_large_one_is_opened_and_run_without_being_held(tmp_path):
    """112 MiB of bfloat16; a reader that converted it would hold 224."""
    n, d, f = 4, 256, 16384
    for i in range(n):
        enc = {f"W_enc_{i}": torch.zeros(f, d, dtype=torch.bfloat16), f"b_enc_{i}": torch.zeros(f)}
        enc[f"W_enc_{i}"][:40] = 0.1
        _save(tmp_path / f"W_enc_{i}.safetensors", {**enc, f"b_dec_{i}": torch.zeros(d)})
        _save(tmp_path / f"W_dec_{i}.safetensors", {f"W_dec_{i}": torch.zeros(f, n - i, d, dtype=torch.bfloat16)})
    code = _PEAK.format(place=str(tmp_path), n=n, d=d)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    opened, after = map(int, out.split())
    assert opened < 8 << 20, f"{opened >> 20} MiB to open it"
    assert after < 56 << 20, f"{after >> 20} MiB to run it"  # one encoder in float32 is 16 MiB


def _save(path, tensors):
    from safetensors.torch import save_file

    save_file(tensors, path)
