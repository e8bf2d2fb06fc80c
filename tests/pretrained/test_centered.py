"""SAEs of models with centered writing weights: the same on the model as published and on the one with its mean out."""

from __future__ import annotations

import copy
import functools
import json
from dataclasses import replace

import pytest
import torch
from helpers.architecture_registry import activations, feed_forward
from helpers.tiny_models import BOS, D_MODEL, HEADS, VOCAB, tokenizer, tokens
from helpers.tiny_models import sae as small_sae
from helpers.transformer_lens_3 import GONE, has_hooked_transformer

from saewb.errors import FormatError
from saewb.interventions.attachment import attach
from saewb.pretrained.formats import Provenance, read
from saewb.pretrained.load import load_sae, save_sae
from saewb.sae.config import SAEConfig
from saewb.sae.sae import SAE

POINTS = ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.0.hook_mlp_out"]
POINTS += ["blocks.1.hook_attn_out"]
LAYERS = 3


@functools.cache
def _hf():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=D_MODEL,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        bos_token_id=BOS,
        eos_token_id=2,
        tie_word_embeddings=False,  # so that centering the embedding leaves the unembedding alone
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config).eval()
        for parameter in model.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, mean=0.1, std=0.3)  # a mean to be taken out
            else:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def _centered_hf():
    """The same function with the mean over d_model out of every weight that writes into the residual stream."""
    model = copy.deepcopy(_hf())
    body = model.transformer
    written = [body.wte.weight, body.wpe.weight]
    for block in body.h:
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            written += [layer.weight, layer.bias]
    with torch.no_grad():
        for weight in written:  # d_model is the last axis of all of them
            weight -= weight.mean(-1, keepdim=True)
    return model


def _bridge(hf):
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        "small-gpt2", hf_model=copy.deepcopy(hf), tokenizer=tokenizer(), device="cpu", dtype=torch.float32
    )


def _hooked(hf):
    """As TransformerLens 3.x loads a GPT-2: writing weights centered by its own code."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    cfg = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=D_MODEL,
        n_ctx=64,
        d_head=D_MODEL // HEADS,
        n_heads=HEADS,
        d_mlp=4 * D_MODEL,
        d_vocab=VOCAB,
        act_fn="gelu_new",
        normalization_type="LNPre",
        eps=hf.config.layer_norm_epsilon,
        original_architecture="GPT2LMHeadModel",
        model_name="small-gpt2",
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=copy.deepcopy(tokenizer()))
    model.load_and_process_state_dict(
        convert_gpt2_weights(hf, cfg), fold_ln=True, center_writing_weights=True, center_unembed=False
    )
    return model.eval()


@functools.cache
def _model(kind):
    if kind == "processed" and not has_hooked_transformer():
        pytest.skip(GONE)
    return {
        "raw": lambda: _bridge(_hf()),
        "centered": lambda: _bridge(_centered_hf()),
        "processed": lambda: _hooked(_hf()),
    }[kind]()


def _latents(model, sae):
    with attach(model, sae) as attached:
        logits = model(tokens())
        return attached.latents[sae].clone(), logits


def test_centering_the_weights_by_hand_does_not_change_the_function():
    raw, centered = _hf()(tokens()).logits, _centered_hf()(tokens()).logits
    torch.testing.assert_close(raw, centered, atol=1e-4, rtol=1e-4)
    _, cache = _model("raw").run_with_cache(tokens())
    _, other = _model("centered").run_with_cache(tokens())
    x, y = cache["blocks.1.hook_resid_post"], other["blocks.1.hook_resid_post"]
    assert (x - y).abs().max() > 0.1  # what SAEs read differs, by the mean and nothing else
    torch.testing.assert_close(x - x.mean(-1, keepdim=True), y, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("there", ["centered", "processed"])
@pytest.mark.parametrize("hook", POINTS)
@pytest.mark.parametrize("pre_bias", ["tied", "none"])
def test_on_the_model_as_published_it_is_what_it_was_on_the_centered_one(hook, there, pre_bias):
    plain = small_sae(hook, pre_bias=pre_bias)  # as trained: it reads what the centered model has
    sae = plain.with_config(normalization="centered")
    want, want_logits = _latents(_model(there), plain)
    wrong, wrong_logits = _latents(_model("raw"), plain)
    assert (wrong - want).abs().max() > 0.05  # without the centering it is another SAE
    for kind in ("raw", there):
        got, logits = _latents(_model(kind), sae)
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(logits, want_logits, atol=2e-3, rtol=1e-3)
    assert (wrong_logits - want_logits).abs().max() > 0.01


def test_it_gives_the_mean_back():
    sae, x = feed_forward(normalization="centered"), activations(3)
    torch.testing.assert_close(sae(x + 5), sae(x) + 5, atol=1e-5, rtol=1e-5)
    assert torch.allclose(sae.encode(x + 5), sae.encode(x), atol=1e-5)


# --- files


def _file(folder, changes=None, **fields):
    sae = feed_forward(**fields)
    save_sae(sae, folder)
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (changes or {})))
    return sae


def test_the_file_says_it_as_sae_lens_does(tmp_path):
    _file(tmp_path / "a", normalization="centered")
    raw = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert raw["normalize_activations"] == "none"
    assert raw["metadata"]["model_from_pretrained_kwargs"] == {"center_writing_weights": True}
    sae = load_sae(tmp_path / "a")
    assert sae.cfg == feed_forward(normalization="centered").cfg


@pytest.mark.parametrize("old", [False, True])
def test_an_override_of_the_catalogue_makes_it_centered(tmp_path, old):
    """In files of version 6 such keys belong into `metadata`; sae-lens loses them there."""
    plain = _file(tmp_path / "a")
    if old:  # flat, as versions before 6 wrote it
        path = tmp_path / "a" / "cfg.json"
        raw = json.loads(path.read_text())
        metadata = raw.pop("metadata")
        path.write_text(json.dumps(raw | {"hook_point": metadata["hook_name"], "model_name": "gpt2-small"}))
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    sae = read(tmp_path / "a", Provenance(overrides=kwargs))
    assert sae.cfg.normalization == "centered"
    assert load_sae(tmp_path / "a").cfg.normalization == "none"
    x = activations(3)
    torch.testing.assert_close(
        sae(x), plain(x - x.mean(-1, keepdim=True)) + x.mean(-1, keepdim=True), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("fields", "want"),
    [
        ({"hook": "blocks.1.attn.hook_z"}, "none"),  # not of the residual stream
        ({"model": "google/gemma-2-2b"}, "none"),  # an RMSNorm keeps the mean, so TransformerLens does too
        ({"normalization": "layer_norm"}, "layer_norm"),  # takes the mean out, and gives it back, itself
        ({"hook": None}, "centered"),
    ],
)
def test_where_the_flag_means_nothing_it_does_nothing(tmp_path, fields, want):
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    _file(tmp_path / "a", kwargs, **fields)
    assert load_sae(tmp_path / "a").cfg.normalization == want


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    for fields in ({"hook": "blocks.1.attn.hook_z"}, {"model": "google/gemma-2-2b"}):
        with pytest.raises(ValueError, match="no normalization 'centered'"):
            save_sae(feed_forward(normalization="centered", **fields), tmp_path / "a")
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    _file(tmp_path / "b", kwargs, normalization="constant_norm")
    with pytest.raises(FormatError, match="centered writing weights together with"):
        load_sae(tmp_path / "b")
    with pytest.raises(ValueError, match="normalization"):
        SAEConfig(d_in=4, d_sae=8, d_out=6, normalization="centered")


def test_taking_the_centering_off_survives_saving(tmp_path):
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": True}}
    _file(tmp_path / "a", kwargs)
    sae = load_sae(tmp_path / "a")
    assert sae.cfg.metadata["model_from_pretrained_kwargs"] == {"fold_ln": True}
    off = sae.with_config(normalization="none", metadata=kwargs)
    assert load_sae(save_sae(off, tmp_path / "b")).cfg.normalization == "none"
    assert load_sae(save_sae(sae, tmp_path / "c")).cfg == sae.cfg


def test_a_transcoder_reads_centered_by_its_weights(tmp_path):
    result = SAE(SAEConfig(8, 24, d_out=6, skip=True, hook="blocks.0.hook_resid_mid", hook_out="b", model="gpt2"))
    with torch.no_grad():
        result.W_skip.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    save_sae(result, tmp_path / "a")
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    sae, x = read(tmp_path / "a", Provenance(overrides=kwargs)), activations(5)
    assert sae.cfg.normalization == "none"
    torch.testing.assert_close(sae(x), result(x - x.mean(-1, keepdim=True)), atol=1e-5, rtol=1e-5)
    again = load_sae(save_sae(sae, tmp_path / "b"))
    torch.testing.assert_close(again(x), sae(x), atol=1e-5, rtol=1e-5)


def test_a_factor_folds_into_a_centered_one():
    sae, x = feed_forward(normalization="centered", pre_bias="tied"), activations(4)
    plain = SAE.from_tensors(replace(sae.cfg, normalization="none"), dict(sae.state_dict()))
    mean = x.mean(-1, keepdim=True)
    want = plain(3 * (x - mean)) / 3 + mean
    torch.testing.assert_close(sae.fold_scaling(3.0)(x), want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="one factor"):
        sae.fold_scaling(3.0, 2.0)
