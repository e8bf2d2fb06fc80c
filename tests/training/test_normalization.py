"""Whitened training: the covariance in closed form, folded at export, resumed, and what cannot be whitened."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from helpers.objective_registry import D_IN, OBJECTIVES, InMemory

import saewb
from saewb.training import TrainConfig, Trainee, Training
from saewb.training.normalization import estimate_whitening

B = 50
CONFIG = TrainConfig(n_tokens=8 * B, batch_tokens=B, lr=3e-3, normalization="whitened", b_dec="mean")


def data(n=600, seed=0):
    """Correlated activations with a mean, whose directions differ in size by 10."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=rng)).Q * torch.logspace(0, 1, D_IN)
    return torch.randn(n, D_IN, generator=rng) @ mix.T + 5


def covariance(z):
    return torch.cov(z.double().T, correction=0)


def test_the_covariance_is_the_identity_and_the_way_back_is_exact():
    x = data()
    result = estimate_whitening("x", x.split(100), x.mean(0), shrinkage=0.0)
    z = (x - x.mean(0)).double() @ result.matrix.double()
    torch.testing.assert_close(covariance(z), torch.eye(D_IN, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(result.matrix, result.matrix.T)
    torch.testing.assert_close((z @ result.inverse.double()).float() + x.mean(0), x, rtol=1e-5, atol=1e-4)


def test_independent_directions_are_divided_by_their_deviation():
    x = torch.tensor([[1.0, 10.0], [-1.0, 10.0], [1.0, -10.0], [-1.0, -10.0]])
    result = estimate_whitening("x", [x], torch.zeros(2), shrinkage=0.0)
    torch.testing.assert_close(result.matrix, torch.diag(torch.tensor([1.0, 0.1])))
    # s = 1/2: variances 1 and 100 become 1/2 + 50.5 / 2 = 25.75 and 50 + 25.25 = 75.25
    result = estimate_whitening("x", [x], torch.zeros(2), shrinkage=0.5)
    torch.testing.assert_close(result.matrix, torch.diag(torch.tensor([25.75, 75.25]).rsqrt()))


def test_directions_that_do_not_vary_need_a_shrinkage():
    x = data()
    x[:, 0] = x[:, 1] + x[:, 2]  # one direction of D_IN is empty
    with pytest.raises(ValueError, match=r"1 of 8 directions of 'p' do not vary over 600 tokens[^$]*shrinkage=1e-3"):
        estimate_whitening("p", [x], x.mean(0), shrinkage=0.0)
    result = estimate_whitening("p", [x], x.mean(0), shrinkage=1e-3)
    values = torch.linalg.eigvalsh(covariance((x - x.mean(0)) @ result.matrix))
    own = torch.linalg.eigvalsh(covariance(x)).clamp(min=0)
    want = own / ((1 - 1e-3) * own + 1e-3 * own.sum() / D_IN)
    torch.testing.assert_close(values, want, rtol=1e-3, atol=1e-5)
    few = x[:4]  # fewer tokens than directions
    assert torch.isfinite(estimate_whitening("p", [few], few.mean(0), shrinkage=1e-3).matrix).all()


def trained(name="topk", values=None, **more):
    training = Training(
        InMemory({"x": data() if values is None else values}, B, 0), OBJECTIVES[name], replace(CONFIG, **more)
    )
    return training, [step.only.numbers() for step in training]


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "standard", "jumprelu_step", "gated"])
def test_losses_are_in_whitened_units_and_the_export_in_the_models(name, tmp_path):
    training, figures = trained(name)
    x = data()
    learner = training._trainers["sae"]
    assert float(learner.read.normalize(x).square().sum(1).mean()) == pytest.approx(D_IN, rel=0.15)
    assert figures[0]["losses/mse"] < 5 * D_IN  # in the model's units it would be hundreds
    sae = training.saes["sae"]
    assert sae.cfg.normalization == "none"
    assert sae.cfg.metadata["normalization"] == "whitened"
    saewb.save_sae(sae, tmp_path / "sae")
    back = saewb.load_sae(tmp_path / "sae")
    want = learner._forward(x)[1].detach()
    off = (back(x).detach() - want).norm(dim=1) / want.norm(dim=1)
    assert float(off.median()) < 1e-5
    assert float((off > 1e-4).float().mean()) < 0.02


def test_resume_is_bit_for_bit():
    training, figures = trained()
    half = Training(InMemory({"x": data()}, B, 0), OBJECTIVES["topk"], CONFIG)
    for step in half:
        if step.step == 3:
            break
    file = io.BytesIO()
    torch.save(half.state(), file)
    again = Training(InMemory({"x": data()}, B, 0), OBJECTIVES["topk"], CONFIG)
    again.restore(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert [step.only.numbers() for step in again] == figures[3:]
    for a, b in zip(again.saes["sae"].state_dict().values(), training.saes["sae"].state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["topk", "standard", "jumprelu_step"])
def test_fine_tuning_starts_where_the_sae_is(name):
    training, _ = trained(name)
    sae, x = training.saes["sae"], data()
    config = replace(CONFIG, n_tokens=B, estimate_tokens=8 * B, lr=1e-12)
    again = Training(InMemory({"x": x}, B, 0), Trainee(OBJECTIVES[name], init=sae), config)
    want, got = sae(x).detach(), again.saes["sae"](x).detach()
    off = (got - want).norm(dim=1) / want.norm(dim=1)
    assert float(off.median()) < (1e-4 if name != "topk" else 1)  # other estimates, other choices among the top k
    again = Training(InMemory({"x": x}, B, 0), Trainee(OBJECTIVES["standard"], init=sae), config)
    if name == "topk":
        with pytest.raises(ValueError, match="topk"):
            again.begin()


def test_pursuit_is_refused():
    with pytest.raises(ValueError, match="normalization='whitened' with 'sae', which does matching pursuit"):
        trained("pursuit")


def test_shrinkage_is_a_share():
    with pytest.raises(ValueError, match="shrinkage=2"):
        TrainConfig(n_tokens=100, batch_tokens=10, shrinkage=2)
