"""Every objective against an implementation written from its formulas, token by token, in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.objective_registry import D_IN, D_OUT, D_SAE, OBJECTIVES, SKIPS, TRANSCODERS, batch, drawn
from torch import Tensor

import saewb
from saewb.training.objectives import (
    Coefficient,
    Params,
    constrain,
    project_gradient,
)
from saewb.training.objectives.sparsity_coefficient import coefficient_warnings

CASES = (
    [(name, o, None) for name, o in OBJECTIVES.items()]
    + [(f"{name}_transcoder", o, D_OUT) for name, o in TRANSCODERS.items()]
    + [(f"{name}_skip", o, None) for name, o in SKIPS.items()]
    + [(f"{name}_skip_transcoder", o, D_OUT) for name, o in SKIPS.items()]
)
cases = pytest.mark.parametrize(("objective", "d_out"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
DEAD = torch.isin(torch.arange(D_SAE), torch.tensor([0, 3, 7, 8, 15, 23]))


def set_up(objective, d_out, dtype=torch.float64):
    x = batch(dtype=dtype)
    y = x if d_out is None else batch(d=d_out, dtype=dtype, seed=9)
    state = objective.initial_state().with_dead(DEAD)
    coefficients = {name: c.to(dtype) for name, c in state.coefficients.items()}
    return drawn(objective, d_out, dtype), x, y, replace(state, coefficients=coefficients)


# --- the independent implementation: one token at a time, sorted by Python ---


def estimator(value: Tensor, slope: Tensor, theta: Tensor) -> Tensor:
    """`value`, whose gradient by theta is `slope`."""
    return value + slope.detach() * (theta - theta.detach())


def largest(scores: list[float], k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:k]


def plain_latents(objective, w, rows):
    """Pre-activations and latents `[tokens, d_sae]`, by the formulas."""
    pre = torch.stack([w["W_enc"].T @ h + w.get("b_enc", 0) for h in rows]) if "W_enc" in w else None
    length = w["W_dec"].square().sum(1).sqrt()
    kind, n = type(objective).__name__, len(rows)
    zero = torch.zeros((), dtype=torch.float64)
    if kind == "Standard":
        return pre, torch.where(pre > 0, pre, zero)
    if kind == "Gated":
        u = pre
        gate = u + w["b_gate"]
        magnitude = u * w["r_mag"].exp() + w["b_mag"]
        return gate, torch.where((gate > 0) & (magnitude > 0), magnitude, zero)
    if kind == "JumpReLU":
        theta = w["log_threshold"].exp() if objective.threshold == "log" else w["threshold"]
        on, band = pre > theta, (pre - theta).abs() < objective.bandwidth / 2
        slope = torch.where(band, -theta / objective.bandwidth, zero)
        latents = estimator(torch.where(on, pre, zero), slope, theta.expand_as(pre))
        if objective.to_input:
            latents = estimator(latents, -slope, pre)
        return pre, latents
    if kind in ("TopK", "AbsTopK"):
        keep = torch.zeros_like(pre)
        for t in range(n):
            score = (pre[t] * length).tolist()
            score = [abs(s) for s in score] if kind == "AbsTopK" else score
            for i in largest(score, objective.k):
                keep[t, i] = 1.0 if kind == "AbsTopK" or pre[t, i] > 0 else 0.0
        return pre, pre * keep
    if kind in ("BatchTopK", "Matryoshka"):
        score = (pre * length).flatten().tolist()
        keep = torch.zeros(n * D_SAE, dtype=torch.float64)
        for place in largest(score, int(objective.k * n)):
            keep[place] = 1.0 if score[place] > 0 else 0.0
        return pre, pre * keep.view_as(pre)
    latents = []
    for h in rows:
        residual, row, seen = h, torch.zeros(D_SAE, dtype=torch.float64), set()
        for _ in range(objective.max_iterations):
            scores = [float(residual @ r) for r in w["W_dec"]]
            best = largest(scores, 1)[0]
            value = (residual @ w["W_dec"][best]).clamp_min(0)
            row = row + value * torch.nn.functional.one_hot(torch.tensor(best), D_SAE)
            residual = residual - value * w["W_dec"][best]
            if float(value) == 0 or best in seen or float(residual.norm()) < objective.residual_threshold:
                break
            seen.add(best)
        latents.append(row)
    return None, torch.stack(latents)


def plain_aux(objective, w, pre, y, recon, low, high):
    """AuxK among the dead latents low..high, token by token."""
    dead = [i for i in range(low, high) if DEAD[i]]
    if not dead:
        return torch.zeros((), dtype=torch.float64)
    k_aux = objective.k_aux or y.shape[1] // 2
    total = 0
    for t in range(len(y)):
        score = [float(pre[t, i] * w["W_dec"][i].norm()) for i in dead]
        score = [abs(s) for s in score] if type(objective) is saewb.AbsTopK else score
        model = torch.zeros(y.shape[1], dtype=torch.float64)
        for j in largest(score, min(k_aux, len(dead))):
            z = pre[t, dead[j]]
            z = z.clamp_min(0) if getattr(objective, "aux_relu", False) else z
            model = model + z * w["W_dec"][dead[j]]
        total = total + ((y[t] - recon[t]).detach() - model).square().sum()
    return objective.aux * min(len(dead) / k_aux, 1.0) * total / len(y)


def plain_losses(objective, w, pre_bias, x, y, coefficients):
    rows = x - w["b_dec"] if pre_bias == "tied" else x
    pre, latents = plain_latents(objective, w, rows)
    length, kind = w["W_dec"].square().sum(1).sqrt(), type(objective).__name__
    offset = w["b_dec"] + (x @ w["W_skip"] if "W_skip" in w else 0)
    recon = latents @ w["W_dec"] + offset

    def error(estimate):
        return ((y - estimate) ** 2).sum(1).mean()

    terms = {"mse": error(recon)}
    if kind == "Standard":
        p = objective.p
        sums = [sum((a * n) ** p for a, n in zip(row, length, strict=True) if a.item() > 0) for row in latents]
        terms["l1"] = coefficients["l1"] * sum(s ** (1 / p) for s in sums if s.item() > 0) / len(x)
    if kind == "Gated":
        positive = torch.where(pre > 0, pre, 0)
        terms["l1"] = coefficients["l1"] * (positive * length).sum(1).mean()
        decoder, shift = (w["W_dec"].detach(), offset.detach()) if objective.frozen else (w["W_dec"], offset)
        terms["gate_mse"] = error(positive @ decoder + shift)
    if kind in ("TopK", "AbsTopK", "BatchTopK") and objective.aux:
        terms["aux"] = plain_aux(objective, w, pre, y, recon, 0, D_SAE)
    if kind == "Matryoshka":
        terms |= {f"inner_mse_{m}": error(latents[:, :m] @ w["W_dec"][:m] + offset) for m in objective.widths}
        limits = [0, *objective.widths, D_SAE] if objective.aux_by_level else [0, D_SAE]
        terms["aux"] = sum(
            plain_aux(objective, w, pre, y, latents[:, :b] @ w["W_dec"][:b] + offset, a, b) for a, b in pairwise(limits)
        )
    if kind == "JumpReLU":
        theta = w["log_threshold"].exp() if objective.threshold == "log" else w["threshold"]
        terms["l0"] = coefficients["l0"] * plain_sparsity(objective, pre, latents, theta, length)
        if objective.pre_act:
            who = slice(None) if objective.pre_act_on == "all" else DEAD
            below = torch.where(pre < theta, theta - pre, 0) * length
            terms["pre_act"] = objective.pre_act * below[:, who].sum(1).mean()
    return terms, recon, latents


def plain_sparsity(objective, pre, latents, theta, length):
    if objective.sparsity == "tanh":
        return torch.tanh(objective.tanh_scale * latents * length).sum(1).mean()
    band = (pre - theta).abs() < objective.bandwidth / 2
    slope = torch.where(band, -torch.ones_like(pre) / objective.bandwidth, 0)
    on = estimator((pre > theta).double(), slope, theta.expand_as(pre))
    on = estimator(on, -slope, pre) if objective.to_input else on
    l0 = on.sum(1)
    if objective.sparsity == "step":
        return l0.mean()
    return (2 / objective.target_l0 * (l0 - objective.target_l0) ** 2).mean()


@cases
def test_losses_and_gradients_are_those_of_the_formulas(objective, d_out):
    params, x, y, state = set_up(objective, d_out)
    losses = objective.losses(params, x, y, state)
    losses.total.backward()
    w = {name: p.detach().clone().requires_grad_() for name, p in params.named_parameters()}
    terms, recon, latents = plain_losses(objective, w, params.pre_bias, x, y, state.coefficients)
    assert set(losses.terms) == set(terms)
    for name, term in terms.items():
        assert float(losses.terms[name]) == pytest.approx(float(term), rel=1e-10), name
    total = sum(terms.values())
    total.backward()
    assert float(losses.total) == pytest.approx(float(total), rel=1e-10)
    for name, p in params.named_parameters():
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert float(losses.l0) == pytest.approx(float((latents != 0).sum(1).double().mean()))
    assert torch.equal(losses.fired, (latents != 0).sum(0))
    variance = (y - y.mean(0)).square().sum()
    assert float(losses.fvu) == pytest.approx(float((y - recon).square().sum() / variance), rel=1e-10)


@cases
def test_export_does_what_training_does(objective, d_out):
    params, x, y, state = set_up(objective, d_out, torch.float32)
    losses = objective.losses(params, x, y, state)
    if "kept_min" in losses.extra:
        state = state.next_threshold(losses.extra["kept_min"], 0.01).next_threshold(torch.tensor(0.3), 0.01)
    sae = objective.to_sae(params, state)
    latents = objective.latents(params, x, state)
    torch.testing.assert_close(sae(x), params.decode(latents, x), rtol=1e-5, atol=1e-5)
    assert torch.equal((sae.encode(x) != 0).sum(1), (latents != 0).sum(1))
    torch.testing.assert_close(sae.encode(x), latents * (params.norms() if objective.rows == "free" else 1))
    norms = sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    before = sae(x)
    with torch.no_grad():
        for p in params.parameters():
            p.add_(1)
    assert torch.equal(sae(x), before), "an export shares memory with the training"


@cases
def test_start_is_seeded_and_laid_out_by_latent(objective, d_out):
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a, b, other = (objective.init_params(D_IN, d_out, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.W_dec, other.W_dec)
    assert (a.d_in, a.d_sae, a.d_out) == (D_IN, D_SAE, d_out or D_IN)
    assert a.pre_bias == ("none" if d_out else "tied")
    torch.testing.assert_close(a.norms(), torch.full((D_SAE,), objective.init_norm))
    if "W_enc" in dict(a.named_parameters()):
        assert a.W_enc.shape == (D_IN, D_SAE)
        assert a.W_enc.T.is_contiguous()
        assert d_out is not None or torch.equal(a.W_enc.T, a.W_dec)


@cases
def test_resume_goes_on_from_an_export(objective, d_out):
    params, x, _, state = set_up(objective, d_out, torch.float32)
    if isinstance(objective, (saewb.BatchTopK, saewb.Matryoshka)):
        state = state.next_threshold(torch.tensor(0.4), 0.01)
    sae = objective.to_sae(params, state)
    again = objective.from_sae(sae)
    torch.testing.assert_close(objective.to_sae(again, state)(x), sae(x), rtol=1e-5, atol=1e-5)
    assert again.W_dec.data_ptr() != sae.W_dec.data_ptr()


def test_resume_refuses_another_architecture():
    relu = saewb.SAE(saewb.SAEConfig(d_in=8, d_sae=24, pre_bias="tied"))
    with pytest.raises(ValueError, match="cannot go on from SAE\\(relu"):
        saewb.TopK(24, k=4).from_sae(relu)
    with pytest.raises(ValueError, match="k=5"):
        saewb.TopK(24, k=5).from_sae(saewb.SAE(saewb.SAEConfig(d_in=8, d_sae=24, activation="topk", k=4)))
    with pytest.raises(ValueError, match="layer_norm"):
        saewb.Standard(24).from_sae(saewb.SAE(saewb.SAEConfig(d_in=8, d_sae=24, normalization="layer_norm")))
    with pytest.raises(ValueError, match="PursuitSAE"):
        saewb.MatchingPursuit(24).from_sae(relu)


def test_matching_pursuit_cannot_be_a_transcoder():
    with pytest.raises(ValueError, match="reads with its decoder rows"):
        saewb.MatchingPursuit(24).init_params(8, 6)


# --- dead latents ---


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka", "matryoshka_by_level", "jumprelu_tanh"])
def test_auxiliary_loss_needs_the_dead(name):
    objective = OBJECTIVES[name]
    assert objective.revives_dead
    params, x, y, state = set_up(objective, None)
    term = "pre_act" if "jumprelu" in name else "aux"
    none = state.with_dead(torch.zeros_like(DEAD))
    assert float(objective.losses(params, x, y, none).terms[term]) == 0
    # A latent that fired since the host looked takes no part, as if it had not been on the list at all.
    revived = DEAD.clone()
    revived[[3, 15]] = False
    stale = replace(state, dead=revived)
    now = state.with_dead(revived)
    got, want = (objective.losses(params, x, y, s).terms[term] for s in (stale, now))
    assert float(got) == pytest.approx(float(want), rel=1e-12)
    assert float(got) > 0


def test_auxiliary_loss_is_zero_for_a_perfect_second_opinion():
    """Two latents, one dead: if that one writes what is missing, the loss is 0; b_dec is not in it."""
    W = torch.eye(2, dtype=torch.float64)
    tensors = {"W_enc": W, "W_dec": W, "b_enc": torch.zeros(2).double(), "b_dec": torch.tensor([5.0, -7.0]).double()}
    x = torch.tensor([[8.0, -3.0]], dtype=torch.float64)  # centered (3, 4): k=1 keeps latent 1, misses latent 0
    objective = saewb.TopK(2, k=1, aux=1.0)
    state = objective.initial_state().with_dead(torch.tensor([True, False]))
    losses = objective.losses(Params(tensors, "tied"), x, x, state)
    assert float(losses.terms["mse"]) == 9.0
    assert float(losses.terms["aux"]) == 0.0


def test_objectives_that_do_not_look_at_the_dead():
    assert not any(OBJECTIVES[name].revives_dead for name in ("standard", "gated", "abstopk_free", "pursuit"))
    assert not OBJECTIVES["jumprelu_quadratic"].revives_dead  # over all latents


# --- rows, thresholds, coefficients ---


def test_projected_gradient_keeps_row_lengths_to_first_order():
    params = drawn(saewb.TopK(D_SAE, k=4))
    params.W_dec.grad = torch.randn(params.W_dec.shape, dtype=torch.float64)
    away = params.W_dec.grad.clone()
    project_gradient(params)
    torch.testing.assert_close(
        (params.W_dec.grad * params.W_dec).sum(1), torch.zeros(D_SAE).double(), atol=1e-12, rtol=0
    )
    difference = away - params.W_dec.grad  # along the rows only
    torch.testing.assert_close(difference, (difference * params.W_dec).sum(1, keepdim=True) * params.W_dec)


def test_constrain():
    params = drawn(saewb.JumpReLU(D_SAE, rows="free", init_norm=0.5))
    with torch.no_grad():
        params.threshold[0], params.W_dec[1] = -1.0, 0.0
    directions = torch.nn.functional.normalize(params.W_dec.detach(), dim=1)
    constrain(params, "unit")
    assert float(params.threshold[0]) == 0
    torch.testing.assert_close(params.W_dec.detach(), directions)  # the row of zeros stays


def test_threshold_is_a_mean_then_an_exponential_one():
    state = saewb.BatchTopK(4, k=1).initial_state()
    seen = [0.5, 1.5, math.inf, 1.0]
    for value in seen[:2]:
        state = state.next_threshold(torch.tensor(value), rate=0.01)
    assert float(state.threshold) == pytest.approx(1.0)
    assert float(state.next_threshold(torch.tensor(math.inf), rate=0.01).threshold) == pytest.approx(1.0)
    state = replace(state, n_thresholds=1000)
    assert float(state.next_threshold(torch.tensor(2.0), rate=0.01).threshold) == pytest.approx(1.01)


def test_coefficients_in_closed_form():
    c = Coefficient(2.0, warmup_tokens=400, target_l0=10.0)
    assert [c.warmup_factor(n) for n in (0, 100, 400, 10**9)] == [0, 0.25, 1, 1]
    assert Coefficient(2.0).warmup_factor(0) == 1
    value = torch.tensor(2.0)
    assert float(c.control(value, torch.tensor(10.0), batch=100, tau=1000)) == pytest.approx(2.0)
    assert float(c.control(value, torch.tensor(20.0), batch=100, tau=1000)) == pytest.approx(2 * 2**0.1)
    assert float(c.control(value, torch.tensor(1e9), batch=100, tau=1000)) == pytest.approx(2 * math.exp(0.1))
    assert float(c.control(value, torch.tensor(0.0), batch=100, tau=1000)) == pytest.approx(2 * math.exp(-0.1))
    assert float(c.control(torch.tensor(2e4), torch.tensor(99.0), batch=100, tau=100)) == pytest.approx(2e4)


FIXED = Coefficient(1.0)


def test_warnings_on_coefficients():
    def warn(coefficient=FIXED, value=1.0, n_tokens=1000, l0=8.0, in_band=None):
        result = coefficient_warnings(coefficient, "l0", value, n_tokens=n_tokens, l0=l0, d_sae=D_SAE, in_band=in_band)
        return [str(w) for w in result]

    assert warn() == []
    assert "nearly nothing is on; try 0.1" in warn(l0=0.2)[0]
    assert "has no effect: L0 is 20 of 24 latents; try 10" in warn(l0=20.0)[0]
    assert "no gradient; widen the bandwidth" in warn(in_band=0.0)[0]
    assert warn(in_band=0.01) == []
    aimed = Coefficient(1.0, warmup_tokens=2000, target_l0=4.0)
    assert warn(aimed, value=1e4, n_tokens=3000) == [
        "coefficient l0=1e+04: at the end of its range, L0 8.0, target 4; try another target"
    ]
    assert warn(aimed, value=1e4, n_tokens=1999) == []


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: saewb.TopK(24, k=25), "TopK got k=25.\n  want: 1 to d_sae=24"),
        (lambda: saewb.AbsTopK(24, k=0), "AbsTopK got k=0"),
        (lambda: saewb.TopK(0), "d_sae=0.\n  want: a positive integer"),
        (lambda: saewb.TopK(64, rows="unit", init_norm=0.1), "init_norm=0.1.\n  want: 1 with rows='unit'"),
        (lambda: saewb.TopK(64, rows="short"), "rows='short'"),
        (lambda: saewb.TopK(64, aux=-1), "aux=-1"),
        (lambda: saewb.BatchTopK(64, k_aux=0), "k_aux=0"),
        (lambda: saewb.BatchTopK(64, threshold_rate=0), "threshold_rate=0"),
        (lambda: saewb.BatchTopK(64, k=65), "k=65"),
        (lambda: saewb.Matryoshka(64), r"widths=\(\)"),
        (lambda: saewb.Matryoshka(64, widths=(8, 8)), "rising widths from 1 to 63"),
        (lambda: saewb.Matryoshka(64, widths=(8, 65)), "below d_sae"),
        (lambda: saewb.Matryoshka(64, widths=(64,)), "below d_sae"),
        (lambda: saewb.Standard(64, l1=0), "Standard got l1=0"),
        (lambda: saewb.Standard(64, p=0), "p=0"),
        (lambda: saewb.Gated(64, target_l0=-1), "target_l0=-1"),
        (lambda: saewb.Gated(64, warmup_tokens=-1), "warmup_tokens=-1"),
        (lambda: saewb.JumpReLU(64, sparsity="quadratic"), "target_l0=None.\n  want: latents per token, for"),
        (lambda: saewb.JumpReLU(64, target_l0=65), "up to d_sae=64"),
        (lambda: saewb.JumpReLU(64, sparsity="l1"), "'step', 'tanh', 'quadratic'"),
        (lambda: saewb.JumpReLU(64, bandwidth=0), "bandwidth=0"),
        (lambda: saewb.JumpReLU(64, init_l0=0), "init_l0=0.\n  want: 0 to d_sae=64"),
        (lambda: saewb.JumpReLU(64, init_l0=64), "init_l0=64"),
        (lambda: saewb.JumpReLU(64, init_l0=8, init_threshold=1.0), "and no init_threshold"),
        (lambda: saewb.JumpReLU(64, threshold="log", init_threshold=0), "more than 0 with threshold='log'"),
        (lambda: saewb.JumpReLU(64, pre_act_on="living"), "'dead' or 'all'"),
        (lambda: saewb.MatchingPursuit(64, max_iterations=0), "max_iterations=0"),
    ],
)
def test_wrong_fields(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# -- thresholds from data --------------------------------------------------------------------------------------------


def test_thresholds_by_hand():
    objective = saewb.JumpReLU(2, init_l0=1.25)  # of 4 tokens 5 activations: 3 of the first latent, 2 of the second
    params = objective.init_params(2)
    with torch.no_grad():
        params.W_enc.copy_(torch.eye(2))
    x = torch.tensor([[1.0, 9.0], [2.0, 7.0], [3.0, 1.0], [5.0, 4.0]])
    objective.fit_thresholds(params, [x[:1], x[1:]])
    assert params.threshold.tolist() == [1.5, 5.5]
    assert (x > params.threshold).sum(0).tolist() == [3, 2]


@pytest.mark.parametrize("threshold", ["direct", "log"])
@pytest.mark.parametrize("l0", [0.01, 0.5, 3.7, 5.0])
def test_thresholds_give_the_first_tokens_the_l0_that_is_asked_for(l0, threshold, monkeypatch):
    monkeypatch.setattr(saewb.training.objectives.jumprelu, "_PRE_ACTS_AT_ONCE", 5 * 640)  # five latents at a time
    objective = saewb.JumpReLU(32, init_l0=l0, threshold=threshold)
    params = objective.init_params(8, seed=1)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        params.b_dec.copy_(torch.randn(8, generator=rng))
        params.b_enc.copy_(torch.randn(32, generator=rng) / 4)
    x = torch.randn(640, 8, generator=rng) * torch.arange(1, 9) + 1
    objective.fit_thresholds(params, x.split(100))
    fired = objective.losses(params, x, x, objective.initial_state()).fired
    assert int(fired.sum()) == round(640 * l0)
    assert int(fired.max() - fired.min()) <= 1


def test_where_thresholds_start():
    start_l0 = lambda **how: saewb.JumpReLU(64, **how).start_l0  # noqa: E731
    assert start_l0() is None
    assert start_l0(target_l0=5) == 15
    assert start_l0(target_l0=30) == 32
    assert start_l0(target_l0=5, init_l0=5) == start_l0(init_l0=5) == 5
    assert start_l0(target_l0=5, init_threshold=0.01) is None
    below = saewb.JumpReLU(4, init_l0=3.9)  # which would take thresholds below 0
    params = below.init_params(4)
    below.fit_thresholds(params, [torch.randn(100, 4, generator=torch.Generator().manual_seed(0))])
    assert params.threshold.tolist() == [0.0] * 4


def test_widths_may_end_with_d_sae_as_in_sae_lens():
    assert saewb.Matryoshka(64, k=4, widths=(8, 64)) == saewb.Matryoshka(64, k=4, widths=(8,))
    assert saewb.Matryoshka(64, k=4, widths=(8, 16, 64)).widths == (8, 16)
