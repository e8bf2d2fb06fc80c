"""sae-lens as the oracle: what saewb writes it reads and computes the same, and the other way round."""

from __future__ import annotations

import json
import logging
import warnings

import pytest
import torch
from helpers.architecture_registry import ARCHITECTURES, D_IN, D_OUT, D_SAE, activations, feed_forward

from saewb.pretrained.load import load_sae, save_sae
from saewb.sae.temporal import TemporalSAE

sae_lens = pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from sae_lens.registry import get_sae_class, get_sae_training_class  # noqa: E402  (after the check that it is there)
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402

NEAR = {"atol": 1e-5, "rtol": 1e-5}
OWN = (
    "topk_transcoder",
    "abstopk_skip_transcoder",
    "groupmax",
    "lineartopk",
    "lineartopk_transcoder",
)  # names that sae-lens does not have
WRITTEN = [name for name in ARCHITECTURES if name not in OWN]
TRANSCODERS = ["transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"]
PLAIN = ["standard", "gated", "topk", "abstopk", "jumprelu", "matching_pursuit", "temporal"]
NORMALIZATIONS = ["none", "layer_norm", "constant_norm_rescale"]


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("sae_lens").setLevel(logging.ERROR)  # it warns at each decode of a temporal SAE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        yield


def _oracle(folder):
    return sae_lens.SAE.load_from_disk(folder)


def _assert_same_function(ours, theirs, x, latent_scale=1.0):
    with torch.no_grad():
        a, b = ours.encode(x), theirs.encode(x)
        assert (b != 0).any()
        torch.testing.assert_close(a, b * latent_scale, **NEAR)
        # Its decode leaves out what is predicted, and what skips. It must come next: it needs the encode before it.
        if not isinstance(ours, TemporalSAE) and not getattr(ours.cfg, "skip", False):
            torch.testing.assert_close(ours.decode(a, x), theirs.decode(b), **NEAR)
        torch.testing.assert_close(ours(x), theirs(x), **NEAR)


@torch.no_grad()
def _randomized(module, seed=0):
    """Every parameter random, none zero; decoder rows that differ in norm but do not make a pursuit diverge."""
    rng = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.4)
        if name == "threshold":
            parameter.abs_()
        if name == "log_threshold":
            parameter.copy_(parameter - 1)
        if name == "W_dec" and "pursuit" in type(module).__name__.lower():
            parameter.div_(parameter.norm(dim=1, keepdim=True)).mul_(torch.linspace(0.8, 1.2, len(parameter))[:, None])
    return module


def _theirs(architecture, seed=0, **fields):
    cls, config = get_sae_class(architecture)
    base = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": "transcoder" not in architecture}
    extra = {"d_out": D_OUT} if "transcoder" in architecture else {}
    extra |= {"k": 5} if "topk" in architecture else {}
    if architecture == "temporal":
        extra = {"n_heads": 2, "bottleneck_factor": 3, "kval_topk": 4}
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.2.hook_resid_mid", model_name="gpt2", prepend_bos=False)
    return _randomized(cls(config(**{**base, **extra, "metadata": metadata, **fields})), seed)


# --- written here, read there


@pytest.mark.parametrize("name", WRITTEN)
def test_sae_lens_reads_what_saewb_writes(name, tmp_path):
    sae = ARCHITECTURES[name]()
    theirs = _oracle(save_sae(sae, tmp_path / "sae"))
    x = activations(2, 7)
    if sae.cfg.normalization == "centered":  # sae-lens says so, and leaves it to the language model's weights
        assert theirs.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
        x = x - x.mean(-1, keepdim=True)
    _assert_same_function(sae, theirs, x)
    assert theirs.cfg.metadata.hook_name == sae.cfg.hook
    assert theirs.cfg.metadata.model_name == "gpt2"
    assert theirs.cfg.metadata.hook_head_index == sae.cfg.head
    assert theirs.cfg.metadata.hook_name_out == sae.cfg.hook_out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sae_lens_reads_other_dtypes(dtype, tmp_path):
    sae = feed_forward(activation="jumprelu", pre_bias="tied").to(dtype)
    theirs = _oracle(save_sae(sae, tmp_path / "sae"))
    assert theirs.dtype == dtype
    x = activations(2, 7)
    assert torch.equal(sae.encode(x), theirs.encode(x))


def test_sae_lens_takes_its_version_6_path(tmp_path):
    folder = save_sae(feed_forward(activation="topk", k=5), tmp_path / "sae")
    with open(folder / "cfg.json") as file:
        cfg = json.load(file)
    handled = sae_lens.loading.pretrained_sae_loaders.handle_config_defaulting(dict(cfg))
    assert handled == cfg  # the older path renames and drops keys


def test_sae_lens_refuses_by_name_what_it_cannot_compute(tmp_path):
    folder = save_sae(ARCHITECTURES["topk_transcoder"](), tmp_path / "sae")
    with pytest.raises(KeyError, match="topk_transcoder"):
        _oracle(folder)


def test_hook_z_is_reshaped_there(tmp_path):
    sae = feed_forward(hook="blocks.1.attn.hook_z", pre_bias="tied")
    theirs = _oracle(save_sae(sae, tmp_path / "sae"))
    assert theirs.cfg.reshape_activations == "hook_z"
    x = activations(2, 7)
    heads = x.unflatten(-1, (4, 2))
    torch.testing.assert_close(theirs.encode(heads), sae.encode(x), **NEAR)
    torch.testing.assert_close(theirs(heads).flatten(-2), sae(x), **NEAR)


# --- written there, read here


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", PLAIN)
def test_saewb_reads_what_sae_lens_writes(architecture, tied, normalization, tmp_path):
    theirs = _theirs(architecture, normalize_activations=normalization, apply_b_dec_to_input=tied)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    _assert_same_function(ours, theirs, activations(2, 7))
    assert (ours.cfg.hook, ours.cfg.model) == ("blocks.2.hook_resid_mid", "gpt2")
    assert ours.cfg.metadata["prepend_bos"] is False
    _assert_same_function(ours, _oracle(save_sae(ours, tmp_path / "back")), activations(2, 7, seed=1))


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_saewb_reads_transcoders(architecture, tmp_path):
    theirs = _theirs(architecture)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    assert ours.cfg.is_transcoder
    _assert_same_function(ours, theirs, activations(2, 7))


@pytest.mark.parametrize(
    "fields",
    [
        {"tied_weights": False},
        {"tied_weights": False, "apply_b_dec_to_input": False},
        {"sae_diff_type": "relu"},
        {"kval_topk": None},
        {"n_attn_layers": 2},
        {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.1},
        {"activation_normalization_factor": 0.1},  # without the mode, it does nothing
    ],
)
def test_saewb_reads_temporal_variants(fields, tmp_path):
    theirs = _theirs("temporal", **fields)
    theirs.save_model(tmp_path)
    _assert_same_function(load_sae(tmp_path), theirs, activations(2, 7))


@pytest.mark.parametrize(
    "fields", [{"residual_threshold": 1.0}, {"max_iterations": 3}, {"stop_on_duplicate_support": False}]
)
def test_saewb_reads_pursuit_variants(fields, tmp_path):
    theirs = _theirs("matching_pursuit", **fields)
    theirs.save_model(tmp_path)
    _assert_same_function(load_sae(tmp_path), theirs, activations(40))


@pytest.mark.parametrize("architecture", ["topk", "abstopk"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_rescaling_by_decoder_norm_is_folded(architecture, normalization, tmp_path):
    theirs = _theirs(architecture, rescale_acts_by_decoder_norm=True, normalize_activations=normalization)
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path)
    torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(D_SAE))
    _assert_same_function(ours, theirs, activations(2, 7))


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "matching_pursuit"])
def test_a_factor_given_is_folded_as_sae_lens_folds_its_catalogues(architecture, tmp_path):
    theirs = _theirs(architecture, normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path)
    ours = load_sae(tmp_path, scaling_factor=0.3)
    theirs.fold_activation_norm_scaling_factor(0.3)
    _assert_same_function(ours, theirs, activations(2, 7))


# --- training checkpoints


def _training(architecture, **fields):
    cls, config = get_sae_training_class(architecture)
    extra = {"k": 5} if "topk" in architecture else {}
    extra |= {"matryoshka_widths": [6, D_SAE]} if "matryoshka" in architecture else {}
    module = _randomized(cls(config(d_in=D_IN, d_sae=D_SAE, **{**extra, **fields})))
    if "batchtopk" in architecture:
        module.topk_threshold = torch.tensor(0.6, dtype=torch.float64)
    return module


CHECKPOINTS = [
    "standard",
    "gated",
    "topk",
    "abstopk",
    "jumprelu",
    "batchtopk",
    "matryoshka_batchtopk",
    "matching_pursuit",
]


@pytest.mark.parametrize("architecture", CHECKPOINTS)
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_is_read_as_its_final_export(architecture, tied, tmp_path):
    trained = _training(architecture, apply_b_dec_to_input=tied)
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "final")
    ours, final = load_sae(tmp_path / "checkpoint"), _oracle(tmp_path / "final")
    _assert_same_function(ours, final, activations(2, 7))
    assert ours.cfg.metadata["training_architecture"] == architecture
    _assert_same_function(load_sae(tmp_path / "final"), final, activations(2, 7))


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "matryoshka_batchtopk"])
@pytest.mark.parametrize("rescale", [True, False])
def test_a_checkpoint_without_rescaling(architecture, rescale, tmp_path):
    trained = _training(architecture, rescale_acts_by_decoder_norm=rescale)
    trained.save_model(tmp_path / "checkpoint")
    trained.save_inference_model(tmp_path / "final")
    _assert_same_function(load_sae(tmp_path / "checkpoint"), _oracle(tmp_path / "final"), activations(2, 7))


@pytest.mark.parametrize("architecture", CHECKPOINTS)
def test_a_checkpoints_own_factor_is_folded(architecture, tmp_path):
    trained = _training(architecture, normalize_activations="expected_average_only_in")
    trained.save_model(tmp_path / "checkpoint")
    ActivationScaler(scaling_factor=0.4).save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    trained.fold_activation_norm_scaling_factor(0.4)
    trained.save_inference_model(tmp_path / "final")
    _assert_same_function(load_sae(tmp_path / "checkpoint"), _oracle(tmp_path / "final"), activations(2, 7))


@pytest.mark.parametrize("architecture", [name for name in CHECKPOINTS if name != "matching_pursuit"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoints_own_whitening_is_folded(architecture, tied, tmp_path):
    trained = _training(architecture, normalize_activations="covariance_whitening", apply_b_dec_to_input=tied)
    trained.save_model(tmp_path / "checkpoint")
    scaler, seeds = ActivationScaler(), iter(range(10))
    mix = torch.linspace(0.5, 2.0, D_IN)
    scaler.estimate_whitening(D_IN, iter(lambda: activations(50, seed=next(seeds)) * mix, None), 10)
    scaler.save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    w = scaler.whitening
    trained.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)
    trained.save_inference_model(tmp_path / "final")
    ours = load_sae(tmp_path / "checkpoint")
    assert ours.cfg.pre_bias == ("tied" if tied else "own")
    _assert_same_function(ours, _oracle(tmp_path / "final"), activations(2, 7) * mix)
