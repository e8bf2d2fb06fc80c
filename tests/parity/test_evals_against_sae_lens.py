"""sae-lens' run_evals as the oracle where it is right; and where it is not, a test that says how, with the closed form.

Both count a loss by the token it is predicted from; saewb leaves out predictions of a special token as well, which is
the same thing where special tokens stand in front of a row only.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.transformer_lens_3 import tiny_hooked

from saewb.data.tokens import pack
from saewb.evals.evaluation import evaluate
from saewb.metrics import ReconstructionStream, fvu
from saewb.sae.sae import SAE, SAEConfig
from saewb.tiny import held_out_texts

sae_lens = pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from sae_lens.evals import (  # noqa: E402  (after the check that it is there)
    ExplainedVarianceCalculator,
    get_eval_everything_config,
    get_recons_loss,
    run_evals,
)
from sae_lens.training.activation_scaler import ActivationScaler  # noqa: E402

RESID, MLP, Z = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
SHARED = {
    "ce_clean": "ce_loss_without_sae",
    "ce_with_sae": "ce_loss_with_sae",
    "ce_zero_ablated": "ce_loss_with_ablation",
    "ce_recovered_zero": "ce_loss_score",
    "kl": "kl_div_with_sae",
    "kl_zero_ablated": "kl_div_with_ablation",
    "kl_recovered_zero": "kl_div_score",
    "l0": "l0",
    "l1": "l1",
    "mse": "mse",
    "explained_variance": "explained_variance",
    "cosine": "cossim",
    "l2_in": "l2_norm_in",
    "l2_out": "l2_norm_out",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
}

OF_ABLATION = {"ce_zero_ablated", "ce_recovered_zero", "kl_zero_ablated", "kl_recovered_zero"}
BY_LATENT = {
    "density": "feature_density",
    "consistent_activation": "consistent_activation_heuristic",
    "encoder_norm": "encoder_norm",
    "encoder_bias": "encoder_bias",
    "encoder_decoder_cosine": "encoder_decoder_cosine_sim",
}


def twin(ours):
    """The same weights as sae-lens' own class."""
    activation, names = (
        ours.cfg.activation,
        {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk", "abstopk": "abstopk"},
    )
    cfg_class = sae_lens.registry.get_sae_class(names[activation])
    extra = {} if ours.cfg.k is None else {"k": ours.cfg.k}
    cfg = cfg_class[1](d_in=ours.cfg.d_in, d_sae=ours.cfg.d_sae, apply_b_dec_to_input=False, **extra)
    cfg.metadata.hook_name = ours.cfg.hook
    theirs = cfg_class[0](cfg)
    theirs.load_state_dict(ours.state_dict())
    return theirs


def store(*batches):
    """What run_evals asks of an ActivationsStore: batches of tokens, from the start again after a reset."""
    left = list(batches)

    def reset():
        left[:] = batches

    return SimpleNamespace(
        get_batch_tokens=lambda n: left.pop(0),
        reset_input_dataset=reset,
        store_batch_size_prompts=len(batches[0]),
        context_size=batches[0].shape[1],
    )


def theirs_on(model, ours, *batches, special=()):
    n = len(batches)
    config = get_eval_everything_config(n_eval_reconstruction_batches=n, n_eval_sparsity_variance_batches=n)
    scores, by_latent = run_evals(
        twin(ours), store(*batches), model, ActivationScaler(), config, exclude_special_tokens=list(special)
    )
    return {name: value for group in scores.values() for name, value in group.items()}, by_latent


@pytest.mark.parametrize("hook", [RESID, MLP, Z])
@pytest.mark.parametrize(("activation", "k"), [("relu", None), ("jumprelu", None), ("topk", 4), ("abstopk", 4)])
def test_all_tokens(model, hook, activation, k):
    ours, ids = tiny_models.sae(hook, activation=activation, k=k), tiny_models.tokens(12, 9)
    evaluation = evaluate(model, ours, ids, batch_size=6, skip_special_tokens=False)
    theirs, by_latent = theirs_on(model, ours, ids)
    for name in SHARED.keys() - {"ce_recovered_zero"}:
        assert getattr(evaluation, name) == pytest.approx(theirs[SHARED[name]], rel=1e-4, abs=1e-5), name
    # what the losses' last digits (float32 there) may make of a quotient of small differences
    near = 1e-5 / abs(evaluation.ce_zero_ablated - evaluation.ce_clean)
    assert evaluation.ce_recovered_zero == pytest.approx(theirs["ce_loss_score"], rel=1e-4, abs=near)
    density = np.array(by_latent["feature_density"])
    assert evaluation.dead_frac == (density == 0).mean()
    assert evaluation.dense_frac == (density > 0.1).mean()
    for name, their_name in BY_LATENT.items():
        mine, want = getattr(evaluation.latents, name).numpy(), np.array(by_latent[their_name], dtype=float)
        np.testing.assert_allclose(mine, want, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("hook", [RESID, MLP, Z])
def test_special_tokens_masked(model, hook):
    """All but ablation: see `test_ablation_of_masked_tokens`."""
    ours, ids = tiny_models.sae(hook), tiny_models.tokens(12, 9)
    evaluation = evaluate(model, ours, ids, batch_size=6)
    theirs, _ = theirs_on(model, ours, ids, special=[1, 2, 3])
    for name in SHARED.keys() - OF_ABLATION:
        assert getattr(evaluation, name) == pytest.approx(theirs[SHARED[name]], rel=1e-4, abs=1e-5), name


def test_special_tokens_in_the_middle_of_rows(model):
    """Figures without a target are the same there too; a loss is the mean of sae-lens' own, text from text."""
    ours, ids = tiny_models.sae(RESID), tiny_models.tokens(12, 9)
    ids[2, 4], ids[5, 8], ids[7, 1] = 1, 2, 3
    evaluation = evaluate(model, ours, ids, batch_size=6)
    theirs, _ = theirs_on(model, ours, ids, special=[1, 2, 3])
    for name in SHARED.keys() - {"ce_clean", "ce_with_sae"} - OF_ABLATION:
        assert getattr(evaluation, name) == pytest.approx(theirs[SHARED[name]], rel=1e-4, abs=1e-5), name
    per_token = get_recons_loss(twin(ours), model, ActivationScaler(), ids, False, True, ignore_tokens=[1, 2, 3])
    text = ids > 3
    both = text[:, :-1] & text[:, 1:]
    assert evaluation.ce_clean == pytest.approx(per_token["ce_loss_without_sae"][both].mean().item(), rel=1e-5)
    assert evaluation.ce_with_sae == pytest.approx(per_token["ce_loss_with_sae"][both].mean().item(), rel=1e-5)


def test_on_the_embedded_model_and_text():
    model = tiny_hooked()
    ids = pack([document.text for document in held_out_texts()[:20]], model.tokenizer, 64)[:16]
    ours = SAE(SAEConfig(d_in=128, d_sae=512, activation="topk", k=8, hook="blocks.2.hook_resid_post"))
    evaluation = evaluate(model, ours, ids, skip_special_tokens=False)
    theirs, _ = theirs_on(model, ours, ids)
    for name, their_name in SHARED.items():
        assert getattr(evaluation, name) == pytest.approx(theirs[their_name], rel=1e-4, abs=1e-5), name
    assert (
        evaluation.ce_clean < 4.5 < 7 < evaluation.ce_zero_ablated
    )  # a model that knows some English, and one that does not


# -- where sae-lens 6.54.12 is wrong ---------------------------------------------------------------------------------


def test_ablation_of_masked_tokens(model):
    """It zeroes masked tokens too, which its SAE leaves alone: an SAE that writes zero seems to recover something."""
    ours, ids = tiny_models.sae(RESID), tiny_models.tokens(12, 9)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    theirs, _ = theirs_on(model, ours, ids, special=[1, 2, 3])
    assert abs(theirs["ce_loss_score"]) > 0.01
    evaluation = evaluate(model, ours, ids)
    assert evaluation.ce_recovered_zero == 0
    assert evaluation.ce_zero_ablated == pytest.approx(theirs["ce_loss_with_sae"], rel=1e-5)


def test_explained_variance_of_data_far_from_zero():
    """It takes ||x||² in float32: with mean 1e4 and standard deviation 1 the mean predictor does not score 0."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) + 1e4
    mean = x.double().mean(0).float().expand_as(x)
    theirs, ours = ExplainedVarianceCalculator(), ReconstructionStream()
    for a, b in zip(x.split(512), mean.split(512), strict=True):
        theirs.add_batch(b, a)
        ours.update(a, b)
    assert abs(theirs.compute()) > 1e-3
    assert ours.result().explained_variance == pytest.approx(0, abs=1e-6)
    assert fvu(x, mean).item() == pytest.approx(1, abs=1e-6)


def test_relative_reconstruction_bias_over_batches_of_different_scale(model):
    """It averages a ratio per batch, whatever the batch weighs; both sums come before the ratio here."""
    ours = tiny_models.sae(RESID)
    first, second = tiny_models.tokens(6, 9), tiny_models.tokens(6, 9, seed=3)
    both = torch.cat([first, second])
    theirs, _ = theirs_on(model, ours, first, second)
    at_once, _ = theirs_on(model, ours, both)
    evaluation = evaluate(model, ours, both, batch_size=6, skip_special_tokens=False)
    assert evaluation.relative_reconstruction_bias == pytest.approx(at_once["relative_reconstruction_bias"], rel=1e-5)
    assert theirs["relative_reconstruction_bias"] != pytest.approx(at_once["relative_reconstruction_bias"], rel=1e-5)


def test_cosine_of_a_reconstruction_that_is_zero(model):
    """It divides by the length of the reconstruction: one token on which nothing fires makes the mean nan."""
    ours, ids = tiny_models.sae(RESID), tiny_models.tokens(12, 9)
    with torch.no_grad():
        ours.b_dec.zero_()
        ours.b_enc.fill_(-1e6)
    theirs, _ = theirs_on(model, ours, ids)
    assert np.isnan(theirs["cossim"])
    assert evaluate(model, ours, ids).cosine == 0
