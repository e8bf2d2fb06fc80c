"""The training loop: resumed bit for bit, many as each alone, units folded at export, schedules, errors."""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from helpers.objective_registry import (
    D_IN,
    D_OUT,
    D_SAE,
    OBJECTIVES,
    SKIPS,
    TRANSCODERS,
    InMemory,
    recovered,
    true_features,
)
from torch.utils._python_dispatch import TorchDispatchMode

import saewb
from saewb.sae.activation_functions import normalized
from saewb.training import DENSITY_EDGES, TrainConfig, Trainee, Training
from saewb.training.dead_latents import DeadRows
from saewb.training.sparse_step import has_sparse_step
from saewb.training.step_metrics import RunUp

B = 50
CONFIG = TrainConfig(
    n_tokens=40 * B,
    batch_tokens=B,
    lr=3e-3,
    schedule="cosine",
    warmup_tokens=5 * B,
    decay_tokens=5 * B,
    dead_after_tokens=6 * B,
    normalization="constant",
    eval_every_tokens=15 * B,
)


def data(n=600, seed=0):
    _, x = true_features(16, D_IN, n, 0.1, seed)
    rng = torch.Generator().manual_seed(7)
    return {"x": x * 3 + 0.5, "y": torch.relu(x @ torch.randn(D_IN, D_OUT, generator=rng)) + 1.0}


def stream(values=None, seed=0, batch=B):
    return InMemory(values or data(), batch, seed)


def trainees():
    """All objectives as autoencoders of x and as transcoders from x to y, and those with skip matrices."""
    result = {name: Trainee(o, read="x") for name, o in OBJECTIVES.items()}
    result |= {f"{name}_transcoder": Trainee(o, read="x", write="y") for name, o in list(TRANSCODERS.items())[::4]}
    result |= {f"{name}_skip_transcoder": Trainee(o, read="x", write="y") for name, o in SKIPS.items()}
    return result


def run(training, n=None):
    steps = []
    for step in training:
        steps.append(step)
        if len(steps) == n:
            break
    return steps


def same(a, b):
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.fixture(scope="module")
def whole():
    """All SAEs trained at once from one stream: (figures by step, state after 20 steps as bytes, state at the end)."""
    training = Training(stream(), trainees(), CONFIG, held_out=data(200, seed=3))
    steps = run(training, 20)
    file = io.BytesIO()
    torch.save(training.state(), file)
    steps += run(training)
    return [step.saes for step in steps], file.getvalue(), training


def test_resume_is_bit_for_bit(whole):
    figures, saved, training = whole
    again = Training(stream(seed=0), trainees(), CONFIG, held_out=data(200, seed=3))
    again.restore(torch.load(io.BytesIO(saved), weights_only=True))
    steps = run(again)
    assert [step.step for step in steps] == list(range(21, 41))
    for step, want in zip(steps, figures[20:], strict=True):
        for name, f in step.saes.items():
            assert f.numbers() == want[name].numbers(), name
    assert same(again.state()["learners"], training.state()["learners"])
    for name, sae in again.saes.items():
        assert same(dict(sae.state_dict()), dict(training.saes[name].state_dict())), name


def test_dead_latents_took_part(whole):
    figures, _, _ = whole
    revived = [float(step["topk_free"].losses["aux"]) for step in figures]
    assert revived[0] == 0
    assert max(revived) > 0


@pytest.mark.parametrize("name", trainees())
def test_many_learn_what_each_learns_alone(whole, name):
    _, _, training = whole
    alone = Training(stream(), {"it": trainees()[name]}, CONFIG)
    run(alone)
    assert same(alone.state()["learners"]["it"], training.state()["learners"][name])


def test_losses_fall(whole):
    figures, _, _ = whole
    for name in figures[0]:
        first, last = (sum(float(f[name].losses["mse"]) for f in part) for part in (figures[:4], figures[-4:]))
        assert last < first, name


def test_resume_after_200_steps_and_before_the_first():
    config = replace(CONFIG, n_tokens=200 * B, estimate_tokens=7 * B)
    result = {name: OBJECTIVES[name] for name in ("batchtopk", "standard_unit")}

    def fresh():
        return Training(stream({"x": data()["x"]}), result, config)

    once = fresh()
    run(once)
    for taken in (0, 3, 100):  # before the first step, while the estimate's batches are being used up, half way
        first = fresh()
        run(first, taken) if taken else None
        second = fresh()
        second.restore(first.state())
        assert second.n_steps == taken
        run(second)
        assert same(second.state()["learners"], once.state()["learners"]), taken


def test_held_out_is_measured_when_due_and_is_the_exports(whole):
    figures, _, training = whole
    due = [i + 1 for i, step in enumerate(figures) if step["topk"].held_out is not None]
    assert due == [15, 30, 40]
    held_out, saes = data(200, seed=3), training.saes
    for name, sae in saes.items():
        trainee, measured = trainees()[name], figures[-1][name].held_out
        y = held_out[trainee.write or "x"]
        assert measured.reconstruction.fvu == pytest.approx(saewb.metrics.fvu(y, sae(held_out["x"])).item(), rel=1e-4)
        assert measured.firing.l0 == pytest.approx(float(saewb.metrics.l0(sae.encode(held_out["x"]))), abs=0.02), name


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm"])
def test_a_token_of_zeros_stays_zero_and_finite(normalization):
    x = torch.zeros(2, 128)
    x[1, 0] = 1e-30
    assert normalized(x, normalization)[0].eq(0).all()
    assert normalized(x, normalization).isfinite().all()
    draws = lambda n, rng: torch.randn(n, 128, generator=rng) * (torch.arange(n) > 0)[:, None]  # noqa: E731
    stream = saewb.stream_draws(draws, seed=0, batch_tokens=32)
    how = {"n_tokens": 32 * 4, "batch_tokens": 32, "normalization": normalization}
    sae = saewb.train(None, stream, saewb.TopK(d_sae=16, k=4), **how).wait().sae
    assert sae(x).isfinite().all()


NORMALIZATIONS = ["none", "constant", "centered", "whitened", "layer_norm", "constant_norm"]


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_exports_are_in_the_models_units(normalization):
    """Data with a large mean and scale: what is exported does what training does, for SAEs and transcoders."""
    values = {"x": data()["x"] * 40 + 7, "y": data()["y"] * 0.02 - 1}
    result = {name: Trainee(o, read="x") for name, o in OBJECTIVES.items()}
    if normalization == "whitened":
        result.pop("pursuit")  # refused: test_normalization.py
    if normalization not in ("layer_norm", "constant_norm"):
        result |= {f"{name}_transcoder": Trainee(o, read="x", write="y") for name, o in SKIPS.items()}
        result |= {f"{name}_skip": Trainee(o, read="x") for name, o in SKIPS.items()}
    config = replace(CONFIG, n_tokens=6 * B, normalization=normalization, warmup_tokens=0, decay_tokens=0)
    training = Training(stream(values), result, config)
    run(training)
    for name, sae in training.saes.items():  # proved on a probe inside
        learner = training._trainers[name]
        latents, want = (t.detach() for t in learner._forward(values["x"]))
        off = (sae(values["x"]).detach() - want).norm(dim=1) / want.norm(dim=1)
        assert float(off.median()) < 1e-5
        assert float((off > 1e-4).float().mean()) < 0.02
        assert float(saewb.metrics.l0(sae.encode(values["x"]))) == pytest.approx(
            float(saewb.metrics.l0(latents)), abs=0.05
        )
        assert (sae.cfg.hook, sae.cfg.hook_out) == ("x", "y" if "transcoder" in name else None)
        assert sae.cfg.metadata["objective"]["objective"] == type(result[name].objective).__name__
        if normalization in ("none", "constant", "centered"):
            torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


def test_constant_factor_and_mean_are_those_of_the_first_tokens():
    values = data()
    first = next(iter(stream(values))).values["x"]
    for normalization, center in (("constant", 0), ("centered", first.mean(0))):
        config = replace(CONFIG, normalization=normalization, estimate_tokens=B, b_dec="mean")
        training = Training(stream(values), Trainee(OBJECTIVES["topk"], "x"), config)
        state = training.state()
        units = state["units"]["x"]
        assert units["factor"] == pytest.approx(D_IN**0.5 / float((first - center).norm(dim=1).mean()), rel=1e-6)
        inner = (first - center) * units["factor"]
        b_dec = state["learners"]["sae"]["params"]["b_dec"]
        torch.testing.assert_close(b_dec, inner.mean(0), rtol=1e-5, atol=1e-6)


def test_an_export_that_differs_is_not_handed_out(monkeypatch):
    training = Training(stream(), Trainee(OBJECTIVES["topk_free"], "x"), CONFIG)
    run(training, 3)
    whole = training.saes["sae"]
    monkeypatch.setattr("saewb.training.trainer.to_model", lambda sae, read, write: sae)  # the factor forgotten
    with pytest.raises(RuntimeError, match="differs from training by more than 1e-05 on .* of 50 rows"):
        _ = training.saes
    assert isinstance(whole, saewb.SAE)


@pytest.mark.parametrize("name", ["topk", "abstopk_free", "batchtopk", "jumprelu_step", "gated", "standard", "pursuit"])
def test_fine_tuning_starts_where_the_sae_is(name):
    values = {"x": data()["x"]}
    first = Training(stream(values), OBJECTIVES[name], CONFIG)
    run(first)
    sae = first.saes["sae"]
    for normalization in ("none", "constant", "centered"):
        # L0 of BatchTopK comes from a threshold that is measured anew, hence a step with no learning rate to speak of.
        config = replace(CONFIG, n_tokens=B, lr=1e-12, normalization=normalization, warmup_tokens=0, decay_tokens=0)
        go_on = Training(stream(values), Trainee(OBJECTIVES[name], init=sae), config)
        if name == "batchtopk":
            run(go_on)
            assert go_on.saes["sae"].W_dec.allclose(sae.W_dec, atol=1e-5)
        else:
            want, got = sae(values["x"]).detach(), go_on.saes["sae"](values["x"]).detach()
            assert float(((got - want).norm(dim=1) / want.norm(dim=1)).quantile(0.98)) < 1e-4, normalization


def test_fine_tuning_refuses_other_widths():
    sae = saewb.SAE(saewb.SAEConfig(d_in=D_IN, d_sae=12, activation="topk", k=4, pre_bias="tied"))
    training = Training(stream(), Trainee(OBJECTIVES["topk"], "x", init=sae), CONFIG)
    with pytest.raises(ValueError, match="8, 12, 8.\n  want: 8, 24, 8"):
        run(training)


def test_every_objective_recovers_the_features():
    features, x = true_features(24, 16, 50_000, 0.06)
    result = {
        "standard": saewb.Standard(24, l1=0.2),
        "gated": saewb.Gated(24, l1=0.4),
        "topk": saewb.TopK(24, k=2),
        "abstopk": saewb.AbsTopK(24, k=2),
        "batchtopk": saewb.BatchTopK(24, k=1.5),
        "matryoshka": saewb.Matryoshka(24, k=1.5, widths=(12,)),
        "jumprelu_step": saewb.JumpReLU(24, l0=0.03, bandwidth=0.3, init_threshold=0.1),
        "jumprelu_tanh": saewb.JumpReLU(24, l0=0.03, bandwidth=1.0, init_threshold=0.1, sparsity="tanh", to_input=True),
        "pursuit": saewb.MatchingPursuit(24, max_iterations=3, residual_threshold=0.3),
    }
    how = {"lr": 1e-2, "decay_tokens": 12_000, "dead_after_tokens": 5_000, "normalization": "none"}
    config = TrainConfig(n_tokens=300 * 128, batch_tokens=128, **how)
    training = Training(InMemory({"x": x}, 128), result, config)
    run(training)
    scores = {name: recovered(sae.W_dec, features) for name, sae in training.saes.items()}
    print({name: round(score, 3) for name, score in scores.items()})
    assert min(scores.values()) > 0.9
    assert sorted(scores.values())[3] > 0.98


@pytest.mark.parametrize(
    "objective",
    [
        saewb.Standard(24, l1=5.0, target_l0=2.0),
        saewb.JumpReLU(24, l0=1e-4, bandwidth=0.3, init_threshold=0.1, target_l0=2.0),
    ],
    ids=["l1 from far above", "l0 from far below"],
)
def test_controller_steers_to_the_target(objective):
    _, x = true_features(24, 16, 20_000, 0.08)
    config = TrainConfig(n_tokens=300 * 128, batch_tokens=128, lr=1e-2, control_tokens=3000)
    training = Training(InMemory({"x": x}, 128), objective, config, held_out={"x": x[:4000]})
    steps = run(training)
    assert abs(float(steps[0].only.l0) - 2.0) > 1
    assert float(torch.stack([step.only.l0 for step in steps[-40:]]).mean()) == pytest.approx(2.0, rel=0.1)
    assert steps[-1].warnings == {}


def test_a_coefficient_that_saturates_is_reported():
    training = Training(stream(), Trainee(saewb.Standard(D_SAE, l1=500.0), "x"), replace(CONFIG, lr=3e-2))
    last = run(training)[-1]
    assert [w.name for w in last.warnings["sae"]] == ["l1"]
    assert "nearly nothing is on" in str(last.only.warnings[0])


def test_a_loss_that_is_no_number_is_reported():
    values = {"x": torch.full((200, D_IN), 1e30)}
    step = run(Training(stream(values), OBJECTIVES["topk"], replace(CONFIG, normalization="none")), 1)[0]
    assert "the loss is " in str(step.only.warnings[0])


def test_resume_over_a_shuffled_stream_of_tensors():
    """The real stream, its state in a file."""

    def fresh():
        real = saewb.stream_tensors(data(), batch_tokens=B, repeat=True, shuffle_seed=4)
        return Training(real, {"a": Trainee(OBJECTIVES["batchtopk"], "x", "y")}, CONFIG)

    whole, again = fresh(), fresh()
    run(whole, 15)
    file = io.BytesIO()
    torch.save(whole.state(), file)
    run(whole)
    file.seek(0)
    again.restore(torch.load(file, weights_only=True))
    run(again)
    assert again.n_steps == 40
    assert same(again.state()["learners"], whole.state()["learners"])


class Waits(TorchDispatchMode):
    """Notes the operations that on a GPU make the host wait for a result."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if indexed or any(name.startswith(w) for w in self.WAITING):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "pursuit"])
def test_a_step_does_not_wait_for_the_device(name):
    """But where it counts the dead, every `look_every_steps`. (A pursuit waits: it stops when all tokens are done.)"""
    config = replace(CONFIG, step="plain", n_tokens=20 * B, warmup_tokens=0, decay_tokens=0, look_every_steps=4)
    training = Training(stream(), Trainee(OBJECTIVES[name], "x"), config)
    steps = iter(training)
    waits = []
    for _ in range(20):
        with Waits() as mode:
            next(steps)
        waits.append(len(mode.seen))
    looking = [i for i, n in enumerate(waits) if n and i]  # the first step also estimates the factor
    assert looking == ([8, 12, 16] if OBJECTIVES[name].revives_dead else [])
    assert max(waits[1:]) <= 1


def test_dead_latents_are_listed_at_the_next_look_where_counting_would_wait():
    """Each look lists those of the look before, also after a resume; where nothing waits, those of now."""
    masks = [torch.tensor(mask).bool() for mask in ([0, 1, 1, 0], [1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1])]
    late, now = (DeadRows(4, torch.device("cpu"), waits=waits) for waits in (False, True))
    listed = []
    for mask in masks:
        resumed = DeadRows(4, torch.device("cpu"), waits=False)
        resumed.restore(**late.state())
        for one in (late, resumed, now):
            one.look(mask)
        assert now.rows.tolist() == mask.nonzero()[:, 0].tolist()
        assert (resumed.rows.tolist(), resumed.mask.tolist()) == (late.rows.tolist(), late.mask.tolist())
        assert late.rows.tolist() == late.mask.nonzero()[:, 0].tolist()
        listed.append(late.rows.tolist())
    assert listed == [[], [1, 2], [0, 3], []]


SPARSE = {name: Trainee(o, "x") for name, o in OBJECTIVES.items() if has_sparse_step(o)}


def test_sparse_steps_resume_bit_for_bit_and_are_the_plain_ones():
    def fresh(step):
        config = replace(CONFIG, step=step, n_tokens=24 * B, warmup_tokens=0, decay_tokens=0)
        return Training(stream(), SPARSE, config)

    whole, plain, again = fresh("sparse"), fresh("plain"), fresh("sparse")
    first = run(whole, 12)
    again.restore(whole.state())
    run(whole), run(again)
    assert same(whole.state()["learners"], again.state()["learners"])
    for a, b in zip(first[:6], run(plain, 6), strict=True):
        for name in SPARSE:
            assert a.saes[name].numbers() == pytest.approx(b.saes[name].numbers(), rel=2e-3, abs=1e-4), (name, a.step)


def test_figures_are_read_at_once():
    step = run(Training(stream(), Trainee(OBJECTIVES["jumprelu_step"], "x"), CONFIG), 1)[0]
    numbers = step.only.numbers()
    assert set(numbers) == {
        *("loss", "l0", "fvu", "dead_frac", "n_dense", "lr"),
        *("losses/mse", "losses/l0", "coefficients/l0", "extra/in_band"),
    }
    assert numbers["loss"] == pytest.approx(numbers["losses/mse"] + numbers["losses/l0"])
    assert numbers["lr"] == CONFIG.rate(0)
    assert step.n_tokens == B


def test_dense_and_dead_are_counted():
    """Two latents that are always on and two that never are."""
    values = {"x": torch.ones(400, 2)}
    sae = saewb.SAE(saewb.SAEConfig(d_in=2, d_sae=4, pre_bias="tied"))
    with torch.no_grad():
        sae.b_enc.copy_(torch.tensor([50.0, 50.0, -50.0, -50.0]))
    config = TrainConfig(n_tokens=400, batch_tokens=B, lr=1e-9, dead_after_tokens=3 * B, normalization="none")
    steps = run(Training(stream(values), Trainee(saewb.Standard(4), init=sae), config))
    assert [float(step.only.dead_frac) for step in steps] == [0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert [int(step.only.n_dense) for step in steps] == [2] * 8


def test_latents_are_counted_by_how_frequent_they_are():
    """On all tokens, on half of them, on one in 400 and on none."""
    values = torch.zeros(400, 4)
    values[:, 0], values[::2, 1], values[7, 2] = 1.0, 1.0, 1.0
    sae = saewb.SAE(saewb.SAEConfig(d_in=4, d_sae=4, pre_bias="none"))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.b_enc.fill_(-0.5)
    config = TrainConfig(n_tokens=400, batch_tokens=B, lr=1e-9, density_tokens=10**6)
    (*_, last) = run(Training(stream({"x": values}), Trainee(saewb.Standard(4), init=sae), config))
    numbers, counts = last.only.numbers_and_density()
    assert numbers == last.only.numbers()
    edges = [0.0, *DENSITY_EDGES, math.inf]
    for i, (low, high) in enumerate(pairwise(edges)):
        assert counts[i] == sum(low <= share < high for share in (1.0, 0.5, 1 / 400, 0.0)), (low, high)
    torch.testing.assert_close(last.only.densities, torch.tensor([1.0, 0.5, 1 / 400, 0.0]))


def test_rows_stay_unit_and_thresholds_positive(whole):
    _, _, training = whole
    for name, saved in training.state()["learners"].items():
        norms = saved["params"]["W_dec"].norm(dim=1)
        if trainees()[name].objective.rows == "unit":
            torch.testing.assert_close(norms, torch.ones(D_SAE), rtol=1e-6, atol=1e-6)
        if "threshold" in saved["params"]:
            assert float(saved["params"]["threshold"].min()) >= 0


def test_the_step_is_adam_on_the_objectives_gradient():
    """One objective with free rows, ten steps, against torch's own unfused Adam on the losses."""
    objective, values = OBJECTIVES["topk_free"], {"x": data()["x"]}
    config = replace(CONFIG, n_tokens=10 * B, normalization="none", warmup_tokens=0, decay_tokens=0, clip=0.5)
    config = replace(config, dead_after_tokens=CONFIG.n_tokens)
    training = Training(stream(values), objective, config)
    params, state = objective.init_params(D_IN), objective.initial_state()
    adam = torch.optim.Adam(params.parameters(), fused=False, foreach=False)
    for i, batch in zip(range(10), stream(values), strict=False):
        adam.param_groups[0]["lr"] = config.rate(i * B)
        adam.zero_grad()
        objective.losses(params, batch.values["x"], batch.values["x"], state).total.backward()
        torch.nn.utils.clip_grad_norm_(params.parameters(), 0.5)
        adam.step()
    run(training)
    for name, p in params.named_parameters():
        got = training.state()["learners"]["sae"]["params"][name]
        torch.testing.assert_close(got, p.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("autocast", [torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_autocast_trains(name, autocast):
    config = replace(CONFIG, n_tokens=4 * B, autocast=autocast, warmup_tokens=0, decay_tokens=0)
    training = Training(stream(), Trainee(OBJECTIVES[name], "x"), config)
    steps = run(training)
    assert all(math.isfinite(step.only.numbers()["loss"]) for step in steps)
    assert training.saes["sae"].dtype == torch.float32


def test_losses_are_compiled_if_asked(monkeypatch):
    """Dynamo itself takes seconds and does not get on with the shape checks of these tests: a stand-in for it."""
    items, calls = [], []

    def compiled(function, backend):
        items.append(backend)
        return lambda *args: calls.append(1) or function(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    steps = run(Training(stream(), Trainee(OBJECTIVES["standard"], "x"), replace(CONFIG, compile="inductor")), 3)
    assert (items, len(calls)) == (["inductor"], 3)
    plain = run(Training(stream(), Trainee(OBJECTIVES["standard"], "x"), CONFIG), 3)
    assert [step.only.numbers() for step in steps] == [step.only.numbers() for step in plain]


# --- schedules ---


def rates(n_steps=10, **fields):
    config = TrainConfig(n_tokens=n_steps * 10, batch_tokens=10, lr=1.0, **fields)
    return [round(config.rate(10 * i), 6) for i in range(n_steps)]


def test_schedules_in_closed_form():
    assert rates() == [1.0] * 10
    assert rates(warmup_tokens=40)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates(decay_tokens=40)[5:] == [1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(schedule="linear", lr_end=0.0) == [round(1 - i / 10, 6) for i in range(10)]
    assert rates(schedule="linear", lr_end=0.5)[5] == 0.75
    cosine = [0.1 + 0.9 * (1 + math.cos(math.pi * i / 10)) / 2 for i in range(10)]
    assert rates(schedule="cosine") == [round(c, 6) for c in cosine]
    half = [(1 + math.cos(math.pi * i / 5)) / 2 for i in range(5)]
    assert rates(schedule="restarts", n_cycles=2, lr_end=0.0) == [round(c, 6) for c in half] * 2
    # Warm-up, then cosine over what is left, then from lr_end to 0: at its last step one batch is left.
    mixed = rates(schedule="cosine", warmup_tokens=20, decay_tokens=40, lr_end=0.5)
    assert mixed[:2] == [0.5, 1.0]
    assert mixed[4] == round(0.5 + 0.5 * (1 + math.cos(math.pi / 2)) / 2, 6)
    assert mixed[6:] == [0.5, 0.375, 0.25, 0.125]


def test_an_sae_may_have_its_own_rate_and_seed():
    topk = OBJECTIVES["topk"]
    result = {"a": Trainee(topk, "x"), "b": Trainee(topk, "x", lr=6e-3), "c": Trainee(topk, "x", seed=1)}
    training = Training(stream(), result, replace(CONFIG, weight_decay=0.1))
    step = run(training, 1)[0]
    assert step.saes["b"].lr == pytest.approx(2 * step.saes["a"].lr)
    assert float(step.saes["a"].loss) == float(step.saes["b"].loss) != float(step.saes["c"].loss)
    run(training)
    assert not torch.equal(training.saes["a"].W_dec, training.saes["b"].W_dec)


def test_whole_batches_only():
    config = TrainConfig(n_tokens=119, batch_tokens=B)
    assert config.n_steps == 2
    assert run(Training(stream(), Trainee(OBJECTIVES["topk"], "x"), config))[-1].n_tokens == 100


# --- errors ---


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"n_tokens": 0}, "n_tokens=0.\n  want: a positive integer"),
        ({"n_tokens": 1e6}, "n_tokens=1000000.0"),
        ({"batch_tokens": 2000}, "at most n_tokens=1000"),
        ({"warmup_tokens": 800, "decay_tokens": 300}, "together at most n_tokens=1000"),
        ({"warmup_tokens": -1}, "warmup_tokens=-1"),
        ({"lr": 0}, "lr=0"),
        ({"lr_end": 1.0}, "lr_end=1.0.\n  want: 0 to lr=0.0003"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"eps": 0}, "eps=0"),
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"schedule": "cosin"}, "one of 'constant', 'linear', 'cosine', 'restarts'"),
        ({"normalization": "expected"}, "'centered'"),
        ({"step": "fast"}, "'sparse'"),
        ({"b_dec": "median"}, "'zeros' or 'mean'"),
        ({"clip": 0}, "clip=0"),
        ({"autocast": torch.float16}, "torch.bfloat16 or None; float16 loses"),
        ({"dense_above": 1.5}, "dense_above=1.5"),
        ({"dead_after_tokens": 0}, "dead_after_tokens=0.\n  want: a positive integer, or None"),
        ({"eval_every_tokens": 0.5}, "eval_every_tokens=0.5"),
    ],
)
def test_wrong_config(fields, text):
    with pytest.raises(ValueError, match=text):
        TrainConfig(**{"n_tokens": 1000, "batch_tokens": 100, **fields})


@pytest.mark.parametrize("dtype", [torch.get_autocast_dtype("cuda"), torch.float32, True])
def test_autocast_names_the_dtype_that_works(dtype):
    """float16 is torch's own default for autocast on a GPU."""
    with pytest.raises(
        ValueError, match=r"autocast=(torch\.float|True).*\n  want: .*\n  fix: +autocast=torch\.bfloat16"
    ):
        TrainConfig(n_tokens=1000, batch_tokens=100, autocast=dtype)


def test_unknown_config_field():
    with pytest.raises(TypeError, match="learning_rate"):
        TrainConfig(n_tokens=1000, learning_rate=1.0)


def test_wrong_streams_and_points():
    topk = OBJECTIVES["topk"]
    with pytest.raises(ValueError, match="'sae' does not say which of 2 points it reads"):
        run(Training(stream(), topk, CONFIG))
    with pytest.raises(ValueError, match="no point 'xx', which 'a' asks for.\n  near: .*\n?.*want: x, y|no point 'xx'"):
        run(Training(stream(), {"a": Trainee(topk, read="xx")}, CONFIG))
    with pytest.raises(ValueError, match="no point 'z'"):
        run(Training(stream(), {"a": Trainee(topk, read="x", write="z")}, CONFIG))
    with pytest.raises(ValueError, match="yields 25 tokens per batch, the config asks for 50.*\n.*\n.*batch_tokens=25"):
        run(Training(stream(batch=25), Trainee(topk, "x"), CONFIG))
    with pytest.raises(ValueError, match="the stream ended after 600 tokens, of n_tokens=2000"):
        run(Training(InMemory(data(), B, epochs=1), Trainee(topk, "x"), CONFIG))
    with pytest.raises(ValueError, match="the stream is empty"):
        run(Training(InMemory(data(10), B, epochs=1), Trainee(topk, "x"), CONFIG))
    with pytest.raises(ValueError, match="held_out has no activations of 'y'"):
        run(Training(stream(), Trainee(topk, "x", "y"), CONFIG, held_out={"x": data()["x"]}))
    with pytest.raises(ValueError, match="no length to normalize by at 'x': all 400 tokens are the same"):
        run(Training(stream({"x": torch.zeros(400, 8)}), topk, CONFIG))
    with pytest.raises(ValueError, match="Training got no SAE"):
        Training(stream(), {}, CONFIG)


def test_per_token_scale_refused_where_it_says_nothing():
    config = replace(CONFIG, normalization="layer_norm")
    for trainee in (Trainee(OBJECTIVES["topk"], "x", "y"), Trainee(SKIPS["topk"], "x")):
        with pytest.raises(ValueError, match="says nothing about y"):
            Training(stream(), trainee, config)


def test_sparse_step_refused_where_there_is_none():
    with pytest.raises(ValueError, match="MatchingPursuit has no sparse step"):
        run(Training(stream(), Trainee(OBJECTIVES["pursuit"], "x"), replace(CONFIG, step="sparse")))


def test_only_needs_one():
    step = run(Training(stream(), {n: Trainee(OBJECTIVES["topk"], "x") for n in "ab"}, CONFIG), 1)[0]
    with pytest.raises(ValueError, match="this step has 2 SAEs.\n  want: 'a', 'b'"):
        _ = step.only


def test_restore_refuses_another_training():
    state = Training(stream(), Trainee(OBJECTIVES["topk"], "x"), CONFIG).state()
    with pytest.raises(ValueError, match="the state is of other SAEs"):
        Training(stream(), Trainee(OBJECTIVES["abstopk"], "x"), CONFIG).restore(state)
    with pytest.raises(ValueError, match="the state was made with lr=0.003, now 0.1"):
        Training(stream(), Trainee(OBJECTIVES["topk"], "x"), replace(CONFIG, lr=0.1)).restore(state)
    longer = Training(stream(), Trainee(OBJECTIVES["topk"], "x"), replace(CONFIG, n_tokens=60 * B))
    longer.restore(state)
    assert run(longer)[-1].step == 60


# -- thresholds from data --------------------------------------------------------------------------------------------


def skewed(seed=0):
    x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, 9) + 1
    return saewb.stream_tensors({"h": x}, batch_tokens=64, repeat=True)


@pytest.mark.parametrize("normalization", ["none", "centered", "whitened", "layer_norm"])
@pytest.mark.parametrize("b_dec", ["zeros", "mean"])
def test_thresholds_are_taken_from_the_tokens_that_estimates_are(normalization, b_dec):
    how = {"n_tokens": 256, "batch_tokens": 64, "normalization": normalization, "b_dec": b_dec}
    objectives = {"a": saewb.JumpReLU(24, target_l0=1.5), "b": saewb.JumpReLU(24, init_l0=2.5, threshold="log")}
    steps = iter(saewb.Training(skewed(), objectives, saewb.TrainConfig(estimate_tokens=64, **how)))
    first = next(steps)  # the batch they are taken from, before weights change
    assert [float(first.saes[name].l0) for name in "ab"] == pytest.approx([4.5, 2.5], abs=1 / 64)
    wide = saewb.Training(skewed(), objectives, saewb.TrainConfig(**how))
    purpose = "the normalization" if normalization in ("centered", "whitened") else "on the first tokens"
    assert wide.ahead == RunUp(f"estimating {purpose}", 0, 256)
    assert float(next(iter(wide)).saes["a"].l0) == pytest.approx(4.5, rel=0.25)


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_thresholds_from_data_resume_bit_for_bit(at):
    config = saewb.TrainConfig(n_tokens=640, batch_tokens=64, estimate_tokens=256, normalization="none")
    result = lambda: saewb.Training(skewed(), saewb.JumpReLU(24, l0=0.1, target_l0=3.0, bandwidth=1.0), config)  # noqa: E731
    whole, half, again = result(), result(), result()
    for _ in whole:
        pass
    for _ in itertools.islice(half, at):
        pass
    again.restore(half.state())
    for _ in again:
        pass
    for (name, a), b in zip(again.saes["sae"].named_parameters(), whole.saes["sae"].parameters(), strict=True):
        assert torch.equal(a, b), name


def test_an_sae_to_go_on_from_keeps_its_thresholds():
    config = saewb.TrainConfig(n_tokens=128, batch_tokens=64, lr=1e-12)
    first = saewb.Training(skewed(), saewb.JumpReLU(24, init_threshold=1.0), config)
    for _ in first:
        pass
    sae = first.saes["sae"]
    on = saewb.Training(skewed(), saewb.Trainee(saewb.JumpReLU(24, target_l0=3.0), init=sae), config)
    torch.testing.assert_close(on.saes["sae"].threshold, sae.threshold)
