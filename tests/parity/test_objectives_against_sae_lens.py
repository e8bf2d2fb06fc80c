"""sae-lens' training SAEs as the oracle: the same loss terms and gradients on the same weights, batch and dead latents.

Where it is not right, a test shows both figures and the truth.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.objective_registry import D_IN, D_SAE, InMemory, batch, drawn, recovered, true_features

import saewb

sae_lens = pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")
from sae_lens.config import LoggingConfig, SAETrainerConfig  # noqa: E402  (after the check that it is there)
from sae_lens.saes.sae import TrainStepInput  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
DEAD = torch.isin(torch.arange(D_SAE), torch.tensor([0, 3, 7, 8, 15, 23]))
FREE = {"rows": "free", "init_norm": 0.5}
TERMS = {"mse": "mse_loss", "l1": "l1_loss", "l0": "l0_loss", "pre_act": "pre_act_loss"}
TERMS |= {"aux": "auxiliary_reconstruction_loss", "gate_mse": "auxiliary_reconstruction_loss"}
TERMS |= {"inner_mse_5": "inner_mse_loss_5", "inner_mse_12": "inner_mse_loss_12"}


def pairs():
    """By name: our objective, their architecture, their config's fields."""
    jump = {"jumprelu_bandwidth": 0.3}
    quadratic = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 4.0}
    tanh = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True, "pre_act_loss_coefficient": 0.01}
    our_tanh = {"sparsity": "tanh", "to_input": True, "pre_act": 0.01}
    widths = {"matryoshka_widths": [5, 12, D_SAE]}
    return {
        "standard": (saewb.Standard(D_SAE, l1=0.7, **FREE), "Standard", {"l1_coefficient": 0.7}),
        "standard l2": (
            saewb.Standard(D_SAE, p=2, l1=0.7, **FREE),
            "Standard",
            {"l1_coefficient": 0.7, "lp_norm": 2.0},
        ),
        "standard l0.5": (
            saewb.Standard(D_SAE, p=0.5, l1=0.7, **FREE),
            "Standard",
            {"l1_coefficient": 0.7, "lp_norm": 0.5},
        ),
        "gated": (saewb.Gated(D_SAE, l1=0.7, frozen=False, **FREE), "Gated", {"l1_coefficient": 0.7}),
        "topk": (saewb.TopK(D_SAE, k=4, aux=0.5, **FREE), "TopK", {"k": 4, "aux_loss_coefficient": 0.5}),
        "abstopk": (saewb.AbsTopK(D_SAE, k=4, aux=0.5, **FREE), "AbsTopK", {"k": 4, "aux_loss_coefficient": 0.5}),
        "batchtopk": (saewb.BatchTopK(D_SAE, k=3.5, aux=1.0, **FREE), "BatchTopK", {"k": 3.5}),
        "matryoshka": (
            saewb.Matryoshka(D_SAE, k=3.5, widths=(5, 12), aux=1.0, **FREE),
            "MatryoshkaBatchTopK",
            {"k": 3.5, **widths},
        ),
        "matryoshka by level": (
            saewb.Matryoshka(D_SAE, k=3.5, widths=(5, 12), aux=1.0, aux_by_level=True, **FREE),
            "MatryoshkaBatchTopK",
            {"k": 3.5, "use_matryoshka_aux_loss": True, **widths},
        ),
        "jumprelu": (saewb.JumpReLU(D_SAE, l0=0.7, bandwidth=0.3, **FREE), "JumpReLU", {**jump, "l0_coefficient": 0.7}),
        "jumprelu tanh": (
            saewb.JumpReLU(D_SAE, l0=0.7, bandwidth=0.3, **our_tanh, **FREE),
            "JumpReLU",
            {**jump, **tanh, "l0_coefficient": 0.7},
        ),
        "jumprelu quadratic": (
            saewb.JumpReLU(D_SAE, l0=0.7, bandwidth=0.3, sparsity="quadratic", target_l0=4.0, **FREE),
            "JumpReLU",
            {**jump, **quadratic, "l0_coefficient": 0.7},
        ),
        "pursuit": (saewb.MatchingPursuit(D_SAE, max_iterations=4), "MatchingPursuit", {"max_iterations": 4}),
    }


def their_sae(kind, fields, d_in=D_IN, d_sae=D_SAE):
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=d_in, d_sae=d_sae, dtype="float64", **fields)
    return getattr(sae_lens, f"{kind}TrainingSAE")(config)


def copied(theirs, params):
    with torch.no_grad():
        for name, p in params.named_parameters():
            target = getattr(theirs, name)
            target.data = p.detach().clone().to(target.dtype).contiguous()
    return theirs


def both(name, dead=DEAD, params=None):
    """(our losses, their step's output, our parameters, theirs), after both backward passes."""
    objective, kind, fields = pairs()[name]
    params = drawn(objective) if params is None else params
    if "threshold" in dict(params.named_parameters()):
        params.threshold.data = params.threshold.float().double()  # theirs is float32 whatever the rest
    x = batch()
    theirs = copied(their_sae(kind, fields), params)
    state = objective.initial_state().with_dead(dead)
    state = replace(state, coefficients={n: c.double() for n, c in state.coefficients.items()})
    ours = objective.losses(params, x, x, state)
    ours.total.backward()
    values = {n: c.value for n, c in objective.coefficients().items()}
    out = theirs.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients=values, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=True)
    )
    out.loss.backward()
    return ours, out, params, theirs


@pytest.mark.parametrize("dead", [DEAD, torch.zeros_like(DEAD)], ids=["some dead", "none dead"])
@pytest.mark.parametrize("name", pairs())
def test_same_terms_and_gradients(name, dead):
    ours, out, params, theirs = both(name, dead)
    if name == "matryoshka by level" and not dead.any():
        assert float(ours.terms["aux"]) == 0
    # float32 thresholds, and squared errors that torch sums in another order
    for term, value in ours.terms.items():
        assert value.item() == pytest.approx(out.losses[TERMS[term]].item(), rel=1e-6, abs=1e-12), term
    assert ours.total.item() == pytest.approx(out.loss.item(), rel=1e-6)
    assert torch.equal(ours.fired, (out.feature_acts != 0).sum(0))
    for p, parameter in params.named_parameters():
        theirs_grad = getattr(theirs, p).grad
        torch.testing.assert_close(
            parameter.grad, theirs_grad.double(), rtol=1e-5, atol=1e-7, msg=lambda m, p=p: f"{p}: {m}"
        )


def test_their_gate_reconstruction_moves_the_decoder():
    """The paper's third term has a frozen decoder (eq. 8). Theirs is not: its gradient reaches W_dec."""
    _, _, params, theirs = both("gated")
    for p in theirs.parameters():
        p.grad = None
    x = batch()
    step = TrainStepInput(
        sae_in=x, coefficients={"l1": 0.7}, dead_neuron_mask=None, n_training_steps=1, is_logging_step=True
    )
    theirs.training_forward_pass(step).losses["auxiliary_reconstruction_loss"].backward()
    moved = theirs.W_dec.grad.norm().item()
    objective = saewb.Gated(D_SAE, l1=0.7, **FREE)
    for p in params.parameters():
        p.grad = None
    state = replace(objective.initial_state(), coefficients={"l1": torch.tensor(0.7).double()})
    objective.losses(params, x, x, state).terms["gate_mse"].backward()
    print(f"gradient of the gate's reconstruction by W_dec: sae-lens {moved:.3f}, saewb none; paper none")
    assert moved > 0.1
    assert params.W_dec.grad is None
    torch.testing.assert_close(params.W_enc.grad, theirs.W_enc.grad, rtol=1e-9, atol=1e-12)


def test_their_threshold_starts_from_zero():
    """After n batches theirs is 1 - 0.99^n of the smallest activation kept: saved early, it lets too much through."""
    objective, kind, fields = pairs()["batchtopk"]
    params = drawn(objective)
    theirs, state = copied(their_sae(kind, fields), params), objective.initial_state()
    for seed in range(20):
        x = batch(n=200, seed=seed)
        state = state.next_threshold(objective.losses(params, x, x, state).extra["kept_min"].detach(), 0.01)
        theirs.training_forward_pass(
            TrainStepInput(
                sae_in=x, coefficients={}, dead_neuron_mask=None, n_training_steps=seed, is_logging_step=True
            )
        )
    truth = state.threshold.item()  # the weights did not change: the mean is the answer
    assert theirs.topk_threshold.item() == pytest.approx((1 - 0.99**20) * truth, rel=0.02)
    x = batch(n=2000, seed=99)
    with torch.no_grad():
        l0 = (objective.latents(params, x, state) != 0).sum(1).double().mean().item()
        scores = torch.relu(params.pre_acts(x)) * params.norms()
        theirs_l0 = (scores > theirs.topk_threshold).sum(1).double().mean().item()
    print(f"after 20 batches, k=3.5: L0 by our threshold {l0:.2f}, by theirs {theirs_l0:.2f}")
    assert l0 == pytest.approx(3.5, rel=0.05)
    assert theirs_l0 > 1.5 * 3.5


def test_their_auxiliary_loss_needs_two_dimensions():
    """k_aux = d_in // 2 is 0 for one dimension."""
    theirs = their_sae("TopK", {"k": 1}, d_in=1, d_sae=4)
    x, dead = batch(d=1), torch.tensor([True, False, False, False])
    step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=1, is_logging_step=True)
    with pytest.raises(ZeroDivisionError):
        theirs.training_forward_pass(step)
    objective = saewb.TopK(4, k=1)
    losses = objective.losses(
        objective.init_params(1, dtype=torch.float64), x, x, objective.initial_state().with_dead(dead)
    )
    assert losses.total.isfinite()


@pytest.mark.parametrize(
    ("ours", "kind", "fields"),
    [
        (saewb.Standard(24, l1=0.2), "Standard", {"l1_coefficient": 0.2}),
        (saewb.TopK(24, k=2), "TopK", {"k": 2}),
        (saewb.BatchTopK(24, k=1.5), "BatchTopK", {"k": 1.5}),
        (
            saewb.JumpReLU(24, l0=0.03, bandwidth=0.3, init_threshold=0.1),
            "JumpReLU",
            {"l0_coefficient": 0.03, "jumprelu_bandwidth": 0.3, "jumprelu_init_threshold": 0.1},
        ),
    ],
    ids=["standard", "topk", "batchtopk", "jumprelu"],
)
def test_recovery_on_the_same_budget(ours, kind, fields, tmp_path):
    """Their trainer and ours on the same data, steps and learning rate: features found, as mean max cosine."""
    features, x = true_features(24, 16, 30_000, 0.06)
    n, b, lr = 200 * 128, 128, 1e-2
    config = saewb.TrainConfig(n_tokens=n, batch_tokens=b, lr=lr, decay_tokens=8_000, dead_after_tokens=5_000)
    training = saewb.Training(InMemory({"x": x}, b), ours, config)
    for _ in training:
        pass
    score = recovered(training.saes["sae"].W_dec, features)
    torch.manual_seed(0)
    result = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=16, d_sae=24, **fields)
    theirs = getattr(sae_lens, f"{kind}TrainingSAE")(result)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=n,
            device="cpu",
            autocast=False,
            lr=lr,
            lr_end=lr / 10,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=8_000 // b,
            n_restart_cycles=1,
            train_batch_size_samples=b,
            dead_feature_window=5_000 // b,
            feature_sampling_window=2000,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=theirs,
        data_provider=(rows.values["x"] for rows in InMemory({"x": x}, b)),
    )
    trainer.fit()
    peer = recovered(theirs.W_dec, features)
    print(f"{kind}: mean max cosine saewb {score:.3f}, sae-lens {peer:.3f}")
    assert score > peer - 0.02
