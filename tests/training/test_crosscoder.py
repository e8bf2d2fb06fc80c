"""Training on several points at once: gradients, annealing, exclusive latents, resuming, planted features."""

from dataclasses import replace

import pytest
import torch
from helpers.objective_registry import InMemory
from torch.nn.functional import normalize

import saewb
from saewb.training import sparse_step as sparse
from saewb.training.objectives.crosscoder import CrossCoderObjective

D_SAE, WIDTHS = 40, (4, 5)
OBJECTIVES = {
    "crosscoder": saewb.CrossCoder(D_SAE, k=3.0),
    "sae": saewb.CrossCoder(D_SAE, k=3.0, code="sae", rows="free", init_norm=0.4),
    "mixed": saewb.CrossCoder(D_SAE, k=2.5, code="mixed", rows="free", aux_relu=True),
    "none": saewb.CrossCoder(D_SAE, k=3.0, code="none", rows="free", init_norm=0.7, aux=0.0),
    "exclusive": saewb.CrossCoder(D_SAE, k=3.0, exclusive=0.2),
    "l1": saewb.L1CrossCoder(D_SAE, l1=0.4, shared=0.3, exclusive=0.1),
    "l1 unit": saewb.L1CrossCoder(D_SAE, l1=0.4, rows="unit", init_norm=1.0),
}


def problem(objective, tokens=31, seed=0, dead=0.2):
    rng = torch.Generator().manual_seed(seed)
    params = objective.init_params(sum(WIDTHS), blocks=WIDTHS, seed=seed, dtype=torch.float64)
    with torch.no_grad():
        for p in params.parameters():
            p.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype), alpha=0.15)
    x = torch.randn(tokens, sum(WIDTHS), generator=rng, dtype=torch.float64)
    state = objective.initial_state().with_dead(torch.rand(D_SAE, generator=rng) < dead)
    return params, x, replace(state, coefficients={n: c.double() for n, c in state.coefficients.items()})


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dead", [0.0, 0.3])
def test_sparse_step_is_autograd(name, dead):
    objective = OBJECTIVES[name]
    params, x, state = problem(objective, dead=dead)
    want = objective.losses(params, x, x, state)
    want.total.backward()
    gradients = {n: p.grad.clone() for n, p in params.named_parameters()}
    params.zero_grad(set_to_none=True)
    got = sparse.sparse_step(objective, params, x, x, state, max_density=1.0)
    assert {n: float(v) for n, v in got.terms.items()} == pytest.approx(
        {n: float(v.detach()) for n, v in want.terms.items()}
    )
    assert torch.equal(got.fired, want.fired)
    for n, p in params.named_parameters():
        torch.testing.assert_close(p.grad, gradients[n], rtol=1e-9, atol=1e-11, msg=lambda m, n=n: f"d {n}: {m}")


def test_the_losses_in_closed_form():
    """Two latents of known blocks: what is selected, and what the penalty is."""
    objective = saewb.CrossCoder(2, k=1.0, rows="free", aux=0.0)
    params = objective.init_params(4, dtype=torch.float64)
    with torch.no_grad():
        params.W_enc.copy_(torch.eye(4)[:, [0, 2]])
        params.W_dec.copy_(torch.tensor([[3.0, 0, 0, 0], [2.0, 0, 2.0, 0]]))
    x = torch.tensor([[1.0, 0, 0.9, 0]], dtype=torch.float64)  # c = 3, 4; lengths 3, 3.6 over "crosscoder"
    state = objective.initial_state()
    fired = {
        c: replace(objective, code=c).losses(params, x, x, state).fired.tolist() for c in ("crosscoder", "sae", "none")
    }
    assert fired == {"crosscoder": [0, 1], "sae": [1, 0], "none": [1, 0]}
    l1 = saewb.L1CrossCoder(2, l1=0.5, shared=0.5, shared_l1=0.2)
    terms = l1.losses(params, x, x, l1.initial_state()).terms
    assert float(terms["l1"].detach()) == pytest.approx(0.5 * (0.2 * 1 * 3 + 0.9 * 4))


def test_starts_from_the_same_rows_at_points_of_one_width():
    params = saewb.CrossCoder(D_SAE, k=2.0).init_params(10, blocks=(5, 5))
    a, b = params.W_dec.split(5, dim=1)
    assert torch.equal(a, b)
    assert torch.equal(params.W_enc.T, params.W_dec)
    assert params.norms().tolist() == pytest.approx([1.0] * D_SAE)
    with pytest.raises(ValueError, match="points whose widths add up"):
        saewb.CrossCoder(D_SAE).init_params(10, blocks=(5, 4))


def test_k_falls_linearly_and_then_stays():
    objective = saewb.TopK(64, k=4, k_start=20, k_anneal_tokens=800)
    assert [objective.k_at(n) for n in (0, 100, 400, 799, 800, 10**9)] == [20, 18, 12, 4, 4, 4]
    assert saewb.BatchTopK(64, k=4.0, k_start=5.0, k_anneal_tokens=100).k_at(50) == 4.5
    for wrong in ({"k_start": 2}, {"k_start": 65, "k_anneal_tokens": 1}, {"k_start": 20}, {"k_anneal_tokens": 5}):
        with pytest.raises(ValueError, match="k_start|k_anneal_tokens"):
            saewb.TopK(64, k=4, **wrong)


@pytest.mark.parametrize("kind", [saewb.TopK, saewb.BatchTopK, saewb.AbsTopK])
@pytest.mark.parametrize("step", ["plain", "sparse"])
def test_annealing_activates_as_many_latents_as_it_says(kind, step):
    data = {"x": torch.randn(512, 8, generator=torch.Generator().manual_seed(0))}
    objective = kind(64, k=2, k_start=10, k_anneal_tokens=400, aux=0.0)
    config = saewb.TrainConfig(n_tokens=600, batch_tokens=100, step=step)
    training = saewb.Training(InMemory(data, 100), objective, config)
    l0 = [float(s.only.l0) for s in training]
    assert l0 == pytest.approx([10, 8, 6, 4, 2, 2], abs=0 if kind is saewb.BatchTopK else 0.8)
    if kind is saewb.BatchTopK:  # the threshold is of the two batches after annealing alone
        trainer = training._trainers["sae"]
        assert trainer.objective_state.n_thresholds == 2
    else:
        assert training.saes["sae"].cfg.k == 2


def stream(values, batch=64):
    return saewb.stream_tensors(values, batch_tokens=batch, repeat=True, shuffle_seed=3)


def data(n=500):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=rng)
    return {"a": 3 * x + 1, "b": torch.cat([x, torch.randn(n, 1, generator=rng)], 1)}


CONFIG = saewb.TrainConfig(n_tokens=640, batch_tokens=64, dead_after_tokens=100, lr=3e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_resume_is_bit_for_bit(name):
    objective = replace(OBJECTIVES[name], points=("a", "b"))
    if name == "crosscoder":
        objective = replace(objective, k_start=9.0, k_anneal_tokens=400)
    whole = saewb.Training(stream(data()), objective, CONFIG)
    for _ in whole:
        pass
    first = saewb.Training(stream(data()), objective, CONFIG)
    steps = iter(first)
    for _ in range(4):
        next(steps)
    second = saewb.Training(stream(data()), objective, CONFIG)
    second.restore(first.state())
    for _ in second:
        pass
    a, b = whole.saes["sae"], second.saes["sae"]
    assert a.cfg == b.cfg
    assert all(torch.equal(p, b.get_parameter(n)) for n, p in a.named_parameters())


def test_states_from_before_annealing_resume():
    training = saewb.Training(stream({"a": data()["a"]}), saewb.TopK(8, k=2), CONFIG)
    next(iter(training))
    state = training.state()
    for name in ("k_start", "k_anneal_tokens"):
        del state["trainees"]["sae"][name]
    again = saewb.Training(stream({"a": data()["a"]}), saewb.TopK(8, k=2), CONFIG)
    again.restore(state)
    assert again.n_steps == 1
    annealed = saewb.TopK(8, k=2, k_start=4, k_anneal_tokens=100)
    with pytest.raises(ValueError, match="other SAEs"):
        saewb.Training(stream({"a": data()["a"]}), annealed, CONFIG).restore(state)


def test_exclusive_latents_never_touch_the_other_point():
    objective = saewb.CrossCoder(D_SAE, k=3.0, exclusive=0.2)
    training = saewb.Training(stream(data()), objective, CONFIG)
    for _ in training:
        pass
    cross = training.saes["sae"]
    a, b = cross.norms()
    assert b[:8].abs().max() == 0 == a[8:16].abs().max()
    assert a[:8].min() > 0 < b[8:16].min()
    assert cross.W_enc[4:, :8].abs().max() == 0 == cross.W_enc[:4, 8:16].abs().max()
    params = training._trainers["sae"].params
    for latents, others in objective._forbidden(params.blocks):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert training._trainers["sae"]._optimizer.state[params.W_dec][moment][latents, others].abs().sum() == 0


def test_points_are_normalized_each_by_itself_and_measured_in_the_models_units(tmp_path):
    values = data()
    run = saewb.train(
        None, stream(values), saewb.CrossCoder(D_SAE, k=3.0), n_tokens=640, batch_tokens=64, folder=tmp_path / "run",
        held_out=values, lr=3e-3, checkpoint_every_tokens=320,
    ).wait()  # fmt: skip
    cross = run.sae
    assert cross.cfg.points == ("a", "b")
    assert cross.cfg.widths == (4, 5)
    u = cross.split(cross.normalize_input(values))
    assert float(u["a"].norm(dim=1).mean().detach()) == pytest.approx(2.0, rel=0.1)
    assert float(u["b"].norm(dim=1).mean().detach()) == pytest.approx(5**0.5, rel=0.1)
    last, recons = run.history.iloc[-1], cross.split(cross(values).detach())
    for point, x in values.items():
        fvu = (recons[point] - x).square().sum() / (x - x.mean(0)).square().sum()
        assert last[f"held_out/{point}/fvu"] == pytest.approx(float(fvu), rel=1e-4)
    loaded = saewb.load_sae(tmp_path / "run" / "saes" / "sae")
    assert all(torch.equal(p, loaded.get_parameter(n)) for n, p in cross.named_parameters())
    again = saewb.resume_run(tmp_path / "run", tokens=stream(values), held_out=values, n_tokens=704).wait()
    assert again.state == "finished"
    assert "saewb.CrossCoder(d_sae=40, k=3.0, points=('a', 'b'))" in again.code
    assert "hook=" not in again.code


def test_training_goes_on_from_a_crosscoder():
    values = data()
    training = saewb.Training(stream(values), saewb.CrossCoder(D_SAE, k=3.0), CONFIG)
    for _ in training:
        pass
    cross = training.saes["sae"]
    other = {"a": values["a"] * 1.1 + 0.5, "b": values["b"]}  # another mean and scale
    trainee = saewb.Trainee(saewb.CrossCoder(D_SAE, k=3.0), init=cross)
    began = saewb.Training(stream(other), trainee, CONFIG)
    began.begin()
    x, trainer = cross.join(other), began._trainers["sae"]
    acts = torch.relu(trainer.params.pre_acts(trainer.read.normalize(x)))
    torch.testing.assert_close(
        acts, torch.relu(cross.normalize_input(x) @ cross.W_enc + cross.b_enc), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match="cannot go on from"):
        saewb.L1CrossCoder(D_SAE).from_sae(cross)


def test_wrong_points_say_what_to_type():
    with pytest.raises(ValueError, match="two or more different names"):
        saewb.CrossCoder(D_SAE, points=("a",))
    with pytest.raises(ValueError, match="the stream has no point 'c'"):
        saewb.Training(stream(data()), saewb.CrossCoder(D_SAE, points=("a", "c")), CONFIG).begin()
    with pytest.raises(ValueError, match="two points or more"):
        saewb.Training(stream({"a": data()["a"]}), saewb.CrossCoder(D_SAE), CONFIG).begin()
    with pytest.raises(ValueError, match=r"one, or saewb\.CrossCoder"):
        saewb.Training(stream(data()), saewb.Trainee(saewb.TopK(8, k=1), read=("a", "b")), CONFIG).begin()
    with pytest.raises(ValueError, match="one factor for each point"):
        saewb.Training(stream(data()), saewb.CrossCoder(D_SAE), replace(CONFIG, normalization="whitened"))
    with pytest.raises(ValueError, match="exclusive"):
        saewb.CrossCoder(D_SAE, exclusive=0.6)
    assert all(issubclass(type(o), CrossCoderObjective) for o in OBJECTIVES.values())


def planted(n, shared, exclusive, weak=0, d=32, p=0.05, seed=0):
    """Features of both models, of each alone, and weak in the first: directions of both, activations of both."""
    rng = torch.Generator().manual_seed(seed)
    of_a = normalize(torch.randn(shared + 2 * exclusive + weak, d, generator=rng), dim=1)
    of_b = of_a.clone()
    of_b[shared : shared + exclusive] = 0
    of_a[shared + exclusive : shared + 2 * exclusive] = 0
    of_a[shared + 2 * exclusive :] *= 0.05
    on = torch.rand(n, len(of_a), generator=rng) < p
    size = on * (1 + 0.3 * torch.randn(n, len(of_a), generator=rng)).abs()
    return of_a, of_b, {"a": size @ of_a, "b": size @ of_b}


def best_latents(cross, of_a, of_b):
    """The latent of each feature, by its direction over both models."""
    rows = normalize(cross.W_dec / cross.scale, dim=1)
    cosine, best = (normalize(torch.cat([of_a, of_b], 1), dim=1) @ rows.T).max(1)
    return best.tolist(), cosine


def learn(objective, values, n_tokens=300_000):
    how = {"lr": 3e-3, "decay_tokens": n_tokens // 3, "normalization": "constant", "dead_after_tokens": 40_000}
    config = saewb.TrainConfig(n_tokens=n_tokens, batch_tokens=1024, **how)
    training = saewb.Training(stream(values, 1024), objective, config)
    for _ in training:
        pass
    return training.saes["sae"]


@pytest.mark.long
def test_planted_features_have_the_models_they_belong_to():
    of_a, of_b, values = planted(50_000, shared=32, exclusive=8, p=0.04)
    cross = learn(saewb.CrossCoder(64, k=2.0, k_start=16.0, k_anneal_tokens=100_000), values)
    best, cosine = best_latents(cross, of_a, of_b)
    delta = saewb.diff(cross, {point: x[:10_000] for point, x in values.items()})["delta_norm"].to_numpy()[best]
    assert cosine.min() > 0.99
    assert ((delta[:32] > 0.45) & (delta[:32] < 0.55)).all()
    assert delta[32:40].max() < 0.05
    assert delta[40:].min() > 0.95


@pytest.mark.long
def test_l1_shrinks_weak_blocks_and_latent_scaling_tells_them_apart():
    of_a, of_b, values = planted(40_000, shared=16, exclusive=6, weak=6)
    some = {point: x[:20_000] for point, x in values.items()}
    cross = learn(saewb.L1CrossCoder(48, l1=1.0), values, 400_000)
    best, cosine = best_latents(cross, of_a, of_b)
    assert cosine.min() > 0.99
    table = saewb.diff(cross, some).to_frame().loc[best].reset_index()
    only_b, weak = table.iloc[22:28], table.iloc[28:34]
    assert weak.delta_norm.min() > 0.999  # the artefact: the block of a shared feature is shrunk to nothing
    assert only_b.nu_error.abs().max() < 0.01 < 0.04 < weak.nu_error.min()
    assert only_b.r2_error_a.max() < 0.01 < 0.1 < weak.r2_error_a.min()
    batchtopk = learn(saewb.CrossCoder(48, k=2.0, k_start=12.0, k_anneal_tokens=100_000), values)
    best, _ = best_latents(batchtopk, of_a, of_b)
    delta = batchtopk.norms()[0, best] / batchtopk.norms()[1, best]
    assert delta[28:34].min() > 0.04 > 0.01 > delta[22:28].max()  # there it keeps its length
