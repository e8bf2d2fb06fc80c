"""sae-lens as the oracle for the layouts of others, where it is right; and where it is not, what it does instead."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from helpers.format_tensors import D, F, O, inputs, weights
from pretrained.formats import (
    test_gemma_scope,
    test_gemma_scope_2,
    test_llama_scope,
    test_single_files,
    test_temporal_conf,
)

from saewb.pretrained.formats import Provenance, read

sae_lens = pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from huggingface_hub.errors import EntryNotFoundError  # noqa: E402  (after the check that sae-lens is there)
from sae_lens.loading import pretrained_sae_loaders as theirs  # noqa: E402
from safetensors import safe_open  # noqa: E402

WIDTHS = {"d_in": D, "d_sae": F}


@pytest.fixture
def oracle(monkeypatch):
    """What sae-lens makes of files on disk: its loader with the download replaced, then what from_pretrained does."""
    logging.getLogger("sae_lens").setLevel(logging.ERROR)

    def load(name, root, repo, path, factor=None, **overrides):
        def local(repo_id=None, filename=None, subfolder=None, **_):
            result = root / (subfolder or "") / filename
            if not result.is_file():
                raise EntryNotFoundError(f"no {filename}")
            return str(result)

        def shapes(repo_id, filename, **_):
            with safe_open(root / filename, framework="pt") as file:
                return {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118

        monkeypatch.setattr(theirs, "hf_hub_download", local)
        monkeypatch.setattr(theirs, "get_safetensors_tensor_shapes", shapes)
        overrides = {"dtype": "float32", "device": "cpu", **overrides}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cfg, state, _ = theirs.NAMED_PRETRAINED_SAE_LOADERS[name](repo, path, "cpu", False, overrides)
            cfg = theirs.handle_config_defaulting(cfg)
            sae = sae_lens.SAE.from_dict(cfg)
            sae.process_state_dict_for_loading(state)
            sae.load_state_dict(state)
            sae = sae.to(torch.float32)
        if factor is not None:
            sae.fold_activation_norm_scaling_factor(factor)
        return sae

    return load


def assert_same(ours, oracles, x, out=True):
    with torch.no_grad():
        theirs = oracles.encode(x)
        assert 0.02 < (theirs != 0).float().mean() < 0.98
        torch.testing.assert_close(ours.encode(x), theirs, atol=1e-5, rtol=1e-5)
        if out:
            torch.testing.assert_close(ours(x), oracles(x), atol=1e-5, rtol=1e-5)
    metadata = oracles.cfg.metadata
    assert metadata.hook_name == ours.cfg.hook
    assert metadata.model_name == ours.cfg.model
    assert metadata.context_size == ours.cfg.metadata.get("context_size")
    assert metadata.dataset_path == ours.cfg.metadata.get("dataset_path")
    assert metadata.hook_name_out == ours.cfg.hook_out


def x_of(rows=50, **kind):
    return torch.from_numpy(inputs(rows, **kind))


@pytest.mark.parametrize("site", ["res", "mlp"])
def test_gemma_scope_saes(site, oracle, tmp_path):
    repo, path = f"google/gemma-scope-2b-pt-{site}", test_gemma_scope.PATH
    test_gemma_scope.written(tmp_path / path)
    ours = read(tmp_path / path, Provenance(repo=repo, path=path))
    assert_same(ours, oracle("gemma_2", tmp_path, repo, path, **WIDTHS), x_of())


def test_gemma_scope_embedding_but_for_its_bias(oracle, tmp_path):
    """It multiplies W_dec with sqrt(d) and not b_dec, so its output is off by a constant unless b_dec is zero."""
    repo, path = "google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6"
    test_gemma_scope.written(tmp_path / path)
    ours, oracles = (
        read(tmp_path / path, Provenance(repo=repo, path=path)),
        oracle("gemma_2", tmp_path, repo, path, **WIDTHS),
    )
    x = x_of(scale=D**0.5)
    assert_same(ours, oracles, x, out=False)
    off = (ours(x) - oracles(x)).detach()
    torch.testing.assert_close(off, (oracles.b_dec * (D**0.5 - 1)).detach().expand_as(off), atol=1e-4, rtol=1e-5)
    w = test_gemma_scope.published_weights()
    test_gemma_scope.written(tmp_path / path, w | {"b_dec": np.zeros(D, np.float32)})
    ours, oracles = (
        read(tmp_path / path, Provenance(repo=repo, path=path)),
        oracle("gemma_2", tmp_path, repo, path, **WIDTHS),
    )
    assert_same(ours, oracles, x)


def test_gemma_scope_transcoders(oracle, tmp_path):
    repo, path = "google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_54"
    test_gemma_scope.written(tmp_path / path, test_gemma_scope.published_weights(d_out=O))
    ours = read(tmp_path / path, Provenance(repo=repo, path=path))
    assert_same(ours, oracle("gemma_2_transcoder", tmp_path, repo, path, **WIDTHS, d_out=O), x_of())


@pytest.mark.parametrize("site", ["resid_post", "mlp_out", "attn_out"])
@pytest.mark.parametrize("config", [None, "there"])
def test_gemma_scope_2_saes(site, config, oracle, tmp_path):
    path, repo = f"{site}/layer_17_width_16k_l0_big", test_gemma_scope_2.REPO
    text = None
    if config:
        point = {"resid_post": "output", "attn_out": "self_attn.o_proj.input"}.get(
            site, "post_feedforward_layernorm.output"
        )
        hooks = dict.fromkeys(("hf_hook_point_in", "hf_hook_point_out"), f"model.layers.17.{point}")
        text = test_gemma_scope_2.CONFIG | hooks
    test_gemma_scope_2.written(tmp_path / path, config=text)
    ours = read(tmp_path / path, Provenance(repo=repo, path=path))
    oracles = oracle("gemma_3", tmp_path, repo, path)
    assert_same(ours, oracles, x_of())
    assert ours.cfg.metadata["hf_hook_name"] == oracles.cfg.metadata.hf_hook_name


@pytest.mark.parametrize("affine", [False, True])
def test_gemma_scope_2_transcoders_but_for_the_point_they_read(affine, oracle, tmp_path):
    """It says hook_mlp_in, the residual stream before the norm."""
    path, repo = test_gemma_scope_2.PATHS["affine" if affine else "transcoder"], test_gemma_scope_2.REPO
    w = test_gemma_scope_2.made(d_out=O, **({"affine": (D, O)} if affine else {}))
    test_gemma_scope_2.written(tmp_path / path, w, None)
    ours = read(tmp_path / path, Provenance(repo=repo, path=path))
    oracles = oracle("gemma_3", tmp_path, repo, path)
    assert oracles.cfg.metadata.hook_name == "blocks.17.hook_mlp_in"
    assert ours.cfg.hook == "blocks.17.mlp.hook_in"
    oracles.cfg.metadata.hook_name = ours.cfg.hook
    assert_same(ours, oracles, x_of())


def test_one_layer_of_a_cross_layer_transcoder(oracle, tmp_path):
    w = test_gemma_scope_2.made(d_out=O)
    w |= {"W_dec": np.random.default_rng(1).standard_normal((F, 3, O)).astype(np.float32)}
    path, repo = "clt/width_262k_l0_big/params_layer_2", test_gemma_scope_2.REPO
    test_gemma_scope_2.written((tmp_path / path).parent, w, None, name="params_layer_2.safetensors")
    ours = read(tmp_path / path, Provenance(repo=repo, path=path))
    oracles = oracle("gemma_3", tmp_path, repo, path)
    oracles.cfg.metadata.hook_name = ours.cfg.hook
    assert_same(ours, oracles, x_of())


def test_llama_scope_with_unit_rows(oracle, tmp_path):
    w, hyper = test_llama_scope.made(), test_llama_scope.HYPER
    w["W_dec"] = (
        np.eye(F, D, dtype=np.float32) + np.eye(F, D, -D, dtype=np.float32) + np.eye(F, D, -2 * D, dtype=np.float32)
    )
    repo, path = test_llama_scope.REPO, test_llama_scope.PATH
    test_llama_scope.written(tmp_path / path, w, hyper)
    factor = D**0.5 / hyper["dataset_average_activation_norm"]["in"]
    ours = read(tmp_path / path, Provenance(repo=repo, path=path), dtype=torch.float32)
    assert_same(ours, oracle("llama_scope", tmp_path, repo, path, factor), x_of(scale=2.0))


def test_llama_scope_with_other_rows_is_not_what_sae_lens_computes(oracle, tmp_path):
    w, hyper = test_llama_scope.made(), test_llama_scope.HYPER
    repo, path = test_llama_scope.REPO, test_llama_scope.PATH
    test_llama_scope.written(tmp_path / path, w, hyper)
    factor = D**0.5 / hyper["dataset_average_activation_norm"]["in"]
    ours = read(tmp_path / path, Provenance(repo=repo, path=path), dtype=torch.float32)
    oracles = oracle("llama_scope", tmp_path, repo, path, factor)
    x = inputs(scale=2.0)
    latents, out = test_llama_scope.native(w, x, hyper)
    with torch.no_grad():
        got = torch.from_numpy(x)
        np.testing.assert_allclose(ours(got).numpy(), out, atol=1e-4)
        assert np.abs(oracles.encode(got).numpy() - latents).max() > 1
        assert np.abs(oracles(got).numpy() - out).max() > 0.01


def test_llama_scope_r1_with_unit_rows(oracle, tmp_path):
    f = 3.345622
    w = test_llama_scope.made_r1(f)
    w["threshold"] /= test_llama_scope.norms_of(w)
    w["W_dec"] /= test_llama_scope.norms_of(w)[:, None]
    repo, path = test_llama_scope.R1_REPO, test_llama_scope.R1_PATH
    config = test_llama_scope.R1 | {"expansion_factor": F / D}
    test_llama_scope.written_r1(tmp_path / path, w, config)
    ours = read(tmp_path / path, Provenance(repo=repo, path=path, scaling_factor=f))
    oracles = oracle("llama_scope_r1_distill", tmp_path, repo, path, f, d_sae=F)
    assert oracles.cfg.metadata.model_name == "meta-llama/Llama-3.1-8B"  # the base model's: ours is the distilled one's
    oracles.cfg.metadata.model_name = ours.cfg.model
    assert_same(ours, oracles, x_of())


@pytest.mark.parametrize("sae", [{}, {"tied_weights": False, "n_attn_layers": 2}, {"kval_topk": None}])
def test_temporal(sae, oracle, tmp_path):
    content, facts = test_temporal_conf.conf(**sae), test_temporal_conf.FACTS
    w = test_temporal_conf.weights(content["sae"]["tied_weights"], content["sae"]["n_attn_layers"])
    test_temporal_conf.written(tmp_path / facts.path, w, content)
    ours = read(tmp_path / facts.path, facts, dtype=torch.float32)
    oracles = oracle("temporal", tmp_path, facts.repo, facts.path, **facts.overrides)
    x = x_of(14, d_in=8, scale=450.0).view(2, 7, 8)
    assert_same(ours, oracles, x)


def test_hook_z(oracle, tmp_path):
    name = test_single_files.HOOK_Z
    ours = read(test_single_files.written_hook_z(tmp_path))
    oracles = oracle("connor_rob_hook_z", tmp_path, "ckkissane/attn-saes-gpt2-small-all-layers", name)
    x = x_of()
    with torch.no_grad():
        heads = x.view(5, 10, 4, D // 4)
        torch.testing.assert_close(ours.encode(x).view(5, 10, F), oracles.encode(heads), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours(x).view_as(heads), oracles(heads), atol=1e-5, rtol=1e-5)
    assert oracles.cfg.metadata.hook_name == ours.cfg.hook
    assert oracles.cfg.metadata.model_name == ours.cfg.model


def test_goodfire(oracle, tmp_path):
    repo, name = test_single_files.GOODFIRE_REPO, test_single_files.GOODFIRE
    place = test_single_files.written_goodfire(tmp_path, weights())
    ours = read(place, Provenance(repo=repo, path=name), dtype=torch.float32)
    assert_same(ours, oracle("goodfire", tmp_path, repo, name, **WIDTHS), x_of())
