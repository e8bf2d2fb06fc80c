"""Sparse steps against autograd through the objectives' own losses: same losses, figures and gradients."""

from dataclasses import replace

import pytest
import torch
from helpers.examples import examples
from helpers.objective_registry import OBJECTIVES as THE_LIST
from helpers.objective_registry import InMemory, true_features
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.kernels import precision
from saewb.kernels import topk as tiles
from saewb.kernels.pairs import by_latent, combine, dots, gather_rows, pairs_of, per_latent, rectangular
from saewb.kernels.select import Readout, above_zero, top_of_batch, top_per_token
from saewb.training.sparse_step import best_precision, clipped_step, has_sparse_step, sparse_step
from saewb.training.sparse_step import gradients as sparse_gradients
from saewb.training.sparse_step import topk as topk_steps
from saewb.training.sparse_step.adam import clips_in_fused_step

D_SAE = 48
OBJECTIVES = {
    "topk": saewb.TopK(D_SAE, k=5),
    "topk free aux_relu": saewb.TopK(D_SAE, k=3, rows="free", init_norm=0.3, aux_relu=True, k_aux=2),
    "topk no aux": saewb.TopK(D_SAE, k=1, aux=0),
    "abstopk": saewb.AbsTopK(D_SAE, k=4, rows="free", init_norm=2.0),
    "batchtopk": saewb.BatchTopK(D_SAE, k=4.6, rows="free", init_norm=0.3),
    "matryoshka": saewb.Matryoshka(D_SAE, k=6, widths=(5, 20)),
    "matryoshka by level": saewb.Matryoshka(D_SAE, k=6, widths=(20,), aux_by_level=True, aux_relu=True),
    "standard": saewb.Standard(D_SAE, l1=0.7),
    "standard p": saewb.Standard(D_SAE, l1=0.7, p=2.0),
    "jumprelu step": saewb.JumpReLU(D_SAE, l0=0.2, bandwidth=0.3),
    "jumprelu tanh": saewb.JumpReLU(D_SAE, l0=0.2, bandwidth=0.5, sparsity="tanh", to_input=True, pre_act=0.1),
    "jumprelu quadratic": saewb.JumpReLU(
        D_SAE, l0=0.2, bandwidth=0.4, sparsity="quadratic", target_l0=3, threshold="log", to_input=True, rows="free"
    ),
    "gated": saewb.Gated(D_SAE, l1=0.3),
    "gated free": saewb.Gated(D_SAE, l1=0.3, frozen=False, rows="free", init_norm=0.4),
} | {f"list: {name}": objective for name, objective in THE_LIST.items() if has_sparse_step(objective)}


def problem(objective, tokens, d_in=7, d_out=None, seed=0, shift=0.0, dead=0.2, skip=False):
    """Weights away from their start, a batch and a state with dead latents, in float64, where ties do not happen."""
    rng = torch.Generator().manual_seed(seed)
    objective = replace(objective, skip=skip)
    params = objective.init_params(d_in, d_out, seed=seed, dtype=torch.float64)
    with torch.no_grad():
        for name, p in params.named_parameters():
            p.add_(torch.randn(p.shape, generator=rng, dtype=p.dtype), alpha=0.1)
            if name in ("b_enc", "b_gate"):
                p.add_(shift)
    x = torch.randn(tokens, d_in, generator=rng, dtype=torch.float64)
    y = x if d_out is None else torch.randn(tokens, d_out, generator=rng, dtype=torch.float64)
    state = objective.initial_state().with_dead(torch.rand(objective.d_sae, generator=rng) < dead)
    exact = {name: value.double() for name, value in state.coefficients.items()}
    return objective, params, x, y, replace(state, coefficients=exact)


def reference(objective, params, x, y, state):
    """Losses and gradients by autograd; zeros where nothing reaches."""
    params.zero_grad(set_to_none=True)
    losses = objective.losses(params, x, y, state)
    losses.total.backward()
    return losses, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in params.named_parameters()}


def assert_same(objective, params, x, y, state, how="full", rtol=1e-9, atol=1e-11):
    want, gradients = reference(objective, params, x, y, state)
    params.zero_grad(set_to_none=True)
    got = sparse_step(objective, params, x, y, state, how, max_density=1.0)
    assert got is not None
    assert set(got.terms) == set(want.terms)
    assert set(got.extra) == set(want.extra)
    close = {"rtol": rtol, "atol": atol, "check_dtype": False}
    for name, value in want.terms.items():
        torch.testing.assert_close(got.terms[name], value.detach(), **close, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in want.extra.items():
        torch.testing.assert_close(got.extra[name], value.detach(), **close)
    torch.testing.assert_close(got.total, want.total.detach(), **close)
    torch.testing.assert_close(got.fvu, want.fvu, **close, equal_nan=True)
    assert torch.equal(got.fired, want.fired)
    assert float(got.l0) == pytest.approx(float(want.l0))
    for name, p in params.named_parameters():
        assert p.grad.shape == p.shape
        assert p.grad.stride() == p.stride()  # what a fused optimizer reads
        torch.testing.assert_close(p.grad, gradients[name], **close, msg=lambda m, n=name: f"d {n}: {m}")


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", ["autoencoder", "transcoder", "skip transcoder", "skip autoencoder"])
def test_equals_autograd(name, kind):
    d_out = 5 if "transcoder" in kind else None
    assert_same(*problem(OBJECTIVES[name], tokens=33, d_out=d_out, skip="skip" in kind))


@pytest.mark.parametrize("name", OBJECTIVES)
@given(
    tokens=st.integers(1, 40),
    d_in=st.integers(1, 9),
    seed=st.integers(0, 99),
    shift=st.sampled_from([-50.0, -1.0, 0.0, 1.0]),  # -50: every pre-activation negative
    dead=st.sampled_from([0.0, 0.3, 1.0]),
)
@examples(10)
def test_equals_autograd_on_any_shape(name, tokens, d_in, seed, shift, dead):
    assert_same(*problem(OBJECTIVES[name], tokens, d_in, seed=seed, shift=shift, dead=dead))


MANY_DEAD = {
    "topk": saewb.TopK(D_SAE, k=3, aux=0.7),
    "of k_aux": saewb.TopK(D_SAE, k=3, aux=0.7, k_aux=1, aux_relu=True),
    "abstopk": saewb.AbsTopK(D_SAE, k=3, aux=0.7, rows="free", init_norm=0.4),
    "batchtopk": saewb.BatchTopK(D_SAE, k=2.5, aux=0.7, rows="free", init_norm=0.4),
    "matryoshka": saewb.Matryoshka(D_SAE, k=2.5, aux=0.7, widths=(D_SAE // 3, D_SAE // 2)),
    "levels": saewb.Matryoshka(D_SAE, k=2.5, aux=0.7, widths=(D_SAE // 3, D_SAE // 2), aux_by_level=True),
}


@pytest.mark.parametrize("d_out", [None, 5])
@pytest.mark.parametrize("name", MANY_DEAD)
def test_many_dead_latents_are_selected_first(name, d_out, monkeypatch):
    """The loss of dead latents over pairs equals autograd, in any tiles, and has the same bits each time."""
    monkeypatch.setattr(sparse_gradients, "_MANY", 1)
    calls, sparse = [], sparse_gradients.add_auxk_gradients
    monkeypatch.setattr(topk_steps, "add_auxk_gradients", lambda *a, **k: calls.append(1) or sparse(*a, **k))
    for tile_sizes in ((2**22, 2**23), (7, 40)):
        monkeypatch.setattr(sparse_gradients, "_PAIRS_AT_ONCE", tile_sizes[0])
        monkeypatch.setattr(sparse_gradients, "_PRE_ACTS_AT_ONCE", tile_sizes[1])
        objective, params, x, y, state = problem(MANY_DEAD[name], 33, d_out=d_out, dead=0.9)
        since = state.dead.clone()
        since[state.dead_rows[::4]] = False  # fired again since the look
        for of in (state, replace(state, dead=since)):
            assert_same(objective, params, x, y, of, rtol=1e-10, atol=1e-12)
            first = {n: p.grad.clone() for n, p in params.named_parameters()}
            sparse_step(objective, params, x, y, of, "full", max_density=1.0)
            assert all(torch.equal(p.grad, first[n]) for n, p in params.named_parameters())
    assert len(calls) == 8 * (3 if name == "levels" else 1)


@pytest.mark.parametrize("name", ["topk", "abstopk", "batchtopk", "matryoshka"])
def test_every_latent_kept(name):
    assert_same(*problem(replace(OBJECTIVES[name], k=D_SAE), tokens=9))


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka", "standard", "jumprelu step", "gated"])
def test_nothing_on(name):
    objective, params, x, y, state = problem(OBJECTIVES[name], tokens=6, shift=-50.0)
    losses = sparse_step(objective, params, x, y, state, max_density=1.0)
    assert float(losses.l0) == 0
    assert not losses.fired.any()


def test_ties_cost_nothing_but_the_choice():
    """Equal rows: which of them is kept is free, the losses are not."""
    objective, params, x, y, state = problem(saewb.TopK(D_SAE, k=5, aux=0), tokens=12)
    with torch.no_grad():
        params.W_dec[1::2] = params.W_dec[::2]
        params.W_enc[:, 1::2] = params.W_enc[:, ::2]
        params.b_enc[1::2] = params.b_enc[::2]
    want, _ = reference(objective, params, x, y, state)
    got = sparse_step(objective, params, x, y, state, max_density=1.0)
    torch.testing.assert_close(got.total, want.total.detach())
    assert int(got.fired.sum()) == int(want.fired.sum())


def test_float32_to_a_ten_thousandth():
    for name in ("topk", "abstopk", "batchtopk", "matryoshka", "gated"):
        objective, params, x, y, state = problem(OBJECTIVES[name], tokens=64)
        assert_same(objective, params.float(), x.float(), y.float(), state, rtol=1e-4, atol=1e-5)


def wide(objective, seed=0):
    """A problem with a few directions in the data, a large mean and an outlying coordinate, as in language models."""
    rng = torch.Generator().manual_seed(seed)
    params = objective.init_params(64, seed=seed)
    which = torch.randint(256, (200, 6), generator=rng)
    features = torch.nn.functional.normalize(torch.randn(256, 64, generator=rng), dim=1)
    x = features[which].sum(1) * 3 + 0.02 * torch.randn(200, 64, generator=rng) + 0.3
    x[:, 5] *= 30
    params.b_dec.data.copy_(x.mean(0))
    for name in ("b_enc", "b_gate"):
        if name in params._parameters:
            params.get_parameter(name).data.copy_(-(params.center(x) @ params.W_enc).kthvalue(190, dim=0).values - 0.01)
    return params, x


LOW = {
    "topk": saewb.TopK(1024, k=16),
    "abstopk": saewb.AbsTopK(1024, k=16),
    "batchtopk": saewb.BatchTopK(1024, k=16, rows="free", init_norm=0.3),
    "matryoshka": saewb.Matryoshka(1024, k=16, widths=(100, 400)),
    "standard": saewb.Standard(1024, l1=0.5),
    "jumprelu": saewb.JumpReLU(1024, l0=0.1),
    "gated": saewb.Gated(1024, l1=0.5),
}


@pytest.mark.parametrize("how", list(precision.MARGIN))
@pytest.mark.parametrize("name", LOW)
def test_low_precision_selects_the_same_latents(name, how):
    """And values and gradients do not know of it. (Slow, but right, on hardware without such products.)"""
    params, x = wide(LOW[name])
    state = LOW[name].initial_state().with_dead(torch.arange(1024) % 30 == 0)
    assert_same(LOW[name], params, x, x, state, how, rtol=1e-4, atol=1e-4 * float(x.std()))


@pytest.mark.parametrize("how", list(precision.MARGIN))
def test_training_goes_the_same_way(how):
    """FVU after 40 steps: within 1 % of full precision's, and lower than at the start."""
    ends = {}
    for precision_ in ("full", how):
        objective = LOW["topk"]
        params, x = wide(objective)
        optimizer = torch.optim.Adam(params.parameters(), lr=1e-2)
        fvus = []
        for _ in range(40):
            losses = sparse_step(objective, params, x, x, objective.initial_state(), precision_)
            fvus.append(float(losses.fvu))
            clipped_step(optimizer, params.parameters(), 1.0)
        assert fvus[-1] < 0.7 * fvus[0]
        ends[precision_] = fvus[-1]
    assert ends[how] == pytest.approx(ends["full"], rel=0.01)


def test_too_coarse_a_margin_is_noticed():
    """Scores that bf16 cannot tell apart: the tokens are selected again, in full."""
    rng = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.ones(512, 16) + 1e-3 * torch.randn(512, 16, generator=rng), dim=1)
    x = torch.rand(20, 16, generator=rng) + 1
    got = top_per_token(x, Readout(W, torch.zeros(512), precision="bf16"), 4)
    want = (x @ W.T).topk(4, dim=1).values
    torch.testing.assert_close(got.pre.view(20, 4).sort(descending=True).values, want, rtol=1e-6, atol=0)


def test_dense_batches_are_left_to_autograd():
    """ReLU from zero biases has half of all latents on: nothing is written, and nothing large is made."""
    objective = saewb.Standard(1024)
    params, x = objective.init_params(16), torch.randn(300, 16)
    assert sparse_step(objective, params, x, x, objective.initial_state()) is None
    assert all(p.grad is None for p in params.parameters())
    few = saewb.TopK(64, k=32)
    assert sparse_step(few, few.init_params(16), x, x, few.initial_state()) is None


def test_objectives_without_a_sparse_step():
    x = torch.randn(8, 16)
    for objective in (saewb.MatchingPursuit(32), saewb.JumpReLU(32, pre_act=1.0, pre_act_on="all")):
        params = objective.init_params(16)
        assert not has_sparse_step(objective)
        assert sparse_step(objective, params, x, x, objective.initial_state()) is None
    half, x = saewb.TopK(32, k=2), x.bfloat16()
    assert sparse_step(half, half.init_params(16, dtype=torch.bfloat16), x, x, half.initial_state()) is None


def test_gradients_replace_those_before():
    objective, params, x, y, state = problem(OBJECTIVES["topk"], tokens=9)
    first = [
        sparse_step(objective, params, x, y, state, max_density=1.0) and p.grad.clone() for p in params.parameters()
    ]
    sparse_step(objective, params, x, y, state, max_density=1.0)
    for before, p in zip(first, params.parameters(), strict=True):
        assert torch.equal(before, p.grad)


def test_losses_of_large_batches_keep_their_digits():
    """float32 sums over millions of elements."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 512, generator=rng)
    objective = saewb.TopK(64, k=1, aux=0)
    params = objective.init_params(512)
    got = sparse_step(objective, params, x, x, objective.initial_state())
    want = float(
        objective.losses(params.double(), x.double(), x.double(), objective.initial_state()).terms["mse"].detach()
    )
    assert float(got.terms["mse"]) == pytest.approx(want, rel=1e-6)


# in training


def trained(objective, steps=30, **config):
    """(FVU of each step, the training) on a small stream."""
    values = true_features(40, 16, 1000, p=0.1)[1]
    settings = saewb.TrainConfig(n_tokens=100 * steps, batch_tokens=100, lr=3e-3, dead_after_tokens=500, **config)
    training = saewb.Training(InMemory({"p": values.float()}, 100), objective, settings)
    return [float(step.only.fvu) for step in training], training


@pytest.mark.parametrize(
    "objective",
    [
        saewb.TopK(96, k=4),
        saewb.AbsTopK(96, k=4, rows="free", init_norm=0.3),
        saewb.BatchTopK(96, k=4.0),
        saewb.Matryoshka(96, k=4.0, widths=(10, 30)),
        saewb.Standard(96, l1=0.1),
        saewb.JumpReLU(96, l0=0.01),
        saewb.Gated(96, l1=0.1),
    ],
    ids=lambda o: type(o).__name__,
)
def test_training_is_the_same_by_either_step(objective):
    plain, sparse, auto = (trained(objective, step=step)[0] for step in ("plain", "sparse", "auto"))
    assert sparse == pytest.approx(plain, rel=1e-2)
    assert auto == pytest.approx(plain, rel=1e-2)
    assert plain[-1] < plain[0]


def test_sparse_training_resumes_bit_for_bit():
    objective = saewb.BatchTopK(96, k=4.0)
    values = true_features(40, 16, 1000, p=0.1)[1].float()
    config = saewb.TrainConfig(n_tokens=2000, batch_tokens=100, step="sparse", dead_after_tokens=300)
    through = saewb.Training(InMemory({"p": values}, 100), objective, config)
    steps = iter(through)
    for _ in range(9):
        next(steps)
    saved = through.state()
    rest = [float(step.only.loss) for step in steps]
    again = saewb.Training(InMemory({"p": values}, 100), objective, config)
    again.restore(saved)
    assert [float(step.only.loss) for step in again] == rest
    ends = [t.state()["learners"]["sae"] for t in (through, again)]
    for name, tensor in ends[0]["params"].items():
        assert torch.equal(tensor, ends[1]["params"][name])
        for moment, value in ends[0]["optimizer"][name].items():
            assert torch.equal(value, ends[1]["optimizer"][name][moment])


def test_auto_goes_from_dense_to_sparse(monkeypatch):
    """ReLU from zero biases: by autograd while dense, by hand once few are on."""
    taken = []

    def watched(*given):
        result = sparse_step(*given)
        taken.append(result is not None)
        return result

    monkeypatch.setattr("saewb.training.trainer.sparse_step", watched)
    trained(saewb.Standard(96, l1=5.0), steps=200)
    assert not taken[0]
    assert taken[-1]
    taken.clear()
    trained(saewb.TopK(96, k=4), steps=3)
    assert taken == [True] * 3
    trained(saewb.TopK(96, k=4), steps=3, step="plain")
    assert len(taken) == 3


def test_sparse_where_there_is_none_is_refused():
    with pytest.raises(ValueError, match=r"MatchingPursuit has no sparse step[\s\S]*step='auto'"):
        trained(saewb.MatchingPursuit(96), step="sparse")
    with pytest.raises(ValueError, match=r"step='sparse' with autocast=torch.bfloat16"):
        trained(saewb.TopK(96, k=4), step="sparse", autocast=torch.bfloat16)


# the pieces


@given(
    rows=st.integers(1, 5),
    d_sae=st.integers(1, 200),
    k=st.integers(1, 12),
    signed=st.booleans(),
    slabs=st.sampled_from([2, 3, 4, 16]),
    seed=st.integers(0, 99),
    shift=st.sampled_from([-40, -25, 0, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@examples(50)
def test_largest_is_topk(rows, d_sae, k, signed, slabs, seed, shift, dtype):
    """Whatever the share of negative numbers, which bf16's bits rank the other way."""
    tile = torch.randint(-30, 30, (rows, d_sae), generator=torch.Generator().manual_seed(seed)) + shift  # with ties
    tile, k = tile.to(dtype), min(k, d_sae)
    values, columns = tiles.largest(tile, k, signed=signed, slabs=slabs)
    assert torch.equal(tile.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())
    key = torch.abs if signed else torch.clone
    assert torch.equal(key(values).sort(descending=True).values, key(tile).topk(k, dim=1).values)


@given(
    rows=st.integers(1, 5),
    d_sae=st.integers(1, 70),
    threshold=st.integers(-31, 31),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@examples(50)
def test_above_is_nonzero(rows, d_sae, threshold, seed, dtype):
    threshold, rng = float(threshold), torch.Generator().manual_seed(seed)
    tile = torch.randint(-30, 30, (rows, d_sae), generator=rng).to(dtype)
    want = {(r, c): float(tile[r, c]) for r, c in (tile > threshold).nonzero().tolist()}
    row, column, value = tiles.above(tile, threshold, limit=rows * d_sae)
    assert dict(zip(zip(row.tolist(), column.tolist(), strict=True), value.tolist(), strict=True)) == want
    assert row.tolist() == sorted(row.tolist())
    if want:
        assert tiles.above(tile, threshold, limit=len(want) - 1) is None


@given(tokens=st.integers(1, 90), n=st.integers(1, 300), seed=st.integers(0, 99), how=st.sampled_from(["full", "bf16"]))
@examples(25)
def test_top_of_batch_is_topk_of_the_flattened_batch(tokens, n, seed, how):
    rng = torch.Generator().manual_seed(seed)
    x, W, norms = (
        torch.randn(tokens, 8, generator=rng),
        torch.randn(40, 8, generator=rng),
        torch.rand(40, generator=rng),
    )
    got = top_of_batch(x, Readout(W, torch.zeros(40), norms, how), n, limit=tokens * 40)
    want = ((x @ W.T) * norms).clamp(min=0).flatten().topk(min(n, tokens * 40)).values
    scores = (got.pre * norms[got.latents]).sort(descending=True).values
    torch.testing.assert_close(scores, want[want > 0], rtol=1e-5, atol=1e-6)
    assert torch.equal(got.tokens, got.tokens.sort().values)


def test_above_zero_lists_every_positive_one():
    rng = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(30, 8, generator=rng), torch.randn(40, 8, generator=rng), torch.randn(40, generator=rng) - 3
    want = (x @ W.T + b).clamp(min=0)
    for how in precision.MARGIN | {"full": 0}:
        got = above_zero(x, Readout(W, b, precision=how), limit=1200)
        dense = torch.zeros(30, 40).index_put_((got.tokens, got.latents), got.pre)
        torch.testing.assert_close(dense, want, rtol=1e-5, atol=1e-6)


def random_pairs(tokens, d_sae, share, seed=0):
    on = torch.rand(tokens, d_sae, generator=torch.Generator().manual_seed(seed)) < share
    token, latent = on.nonzero().unbind(1)
    return pairs_of(token, latent, torch.zeros(len(token)), tokens), on


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_pair_products_are_the_dense_ones(share):
    """With the private operation and without it."""
    pairs, on = random_pairs(11, 13, share)
    values = torch.randn(len(pairs))
    dense = torch.zeros(11, 13)
    dense[on] = values
    rows, left = torch.randn(13, 6), torch.randn(11, 6)
    torch.testing.assert_close(combine(pairs, values, rows), dense @ rows)
    torch.testing.assert_close(gather_rows(by_latent(pairs, 13), values, left), dense.T @ left)
    torch.testing.assert_close(per_latent(pairs, values, 13), dense.sum(0))
    want = (left @ rows.T)[on]
    torch.testing.assert_close(dots(pairs, left, rows), want)
    torch.testing.assert_close(dots(pairs, left, rows, private=False), want)


def test_rectangular_pairs():
    pairs = rectangular(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert pairs.tokens.tolist() == [0, 0, 1, 1]
    assert pairs.starts.tolist() == [0, 2]
    saved = pairs.where(torch.tensor([False, False, True, False]))
    assert (saved.tokens.tolist(), saved.latents.tolist(), saved.starts.tolist()) == ([1], [0], [0, 0])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("clip", [0.5, 1e3, None])
def test_clipped_step_is_clip_then_step(kind, fused, clip):
    """Pins the hook by which fused optimizers divide gradients."""
    ends = []
    for ours in (True, False):
        rng = torch.Generator().manual_seed(0)
        weights = [torch.nn.Parameter(torch.randn(s, generator=rng)) for s in ((5, 4), (4,))]
        optimizer = kind(weights, lr=0.1, fused=fused)
        assert clips_in_fused_step(optimizer) == (fused and kind is not torch.optim.SGD)
        for _ in range(3):
            for w in weights:
                w.grad = torch.randn(w.shape, generator=rng)
            length = torch.stack([w.grad.norm() for w in weights]).norm()
            if ours:
                torch.testing.assert_close(clipped_step(optimizer, weights, clip), length)
            else:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(weights, clip)
                optimizer.step()
        assert not hasattr(optimizer, "grad_scale")
        ends.append([w.detach().clone() for w in weights])
    torch.testing.assert_close(*ends)


def test_gathered_rows_in_memory_that_is_there():
    pairs, on = random_pairs(50, 2500, 0.01)
    values, rows, out = torch.randn(len(pairs)), torch.randn(50, 6), torch.full((2500, 6), torch.nan)
    dense = torch.zeros(50, 2500)
    dense[on] = values
    assert gather_rows(by_latent(pairs, 2500), values, rows, out) is out
    torch.testing.assert_close(out, dense.T @ rows)


@pytest.mark.parametrize("how", ["full", *precision.MARGIN])
@pytest.mark.parametrize("scaled", [True, False])
def test_products_are_as_exact_as_they_say(how, scaled):
    """Pins oneDNN's float32 and quantized products, which are private to torch."""
    rng = torch.Generator().manual_seed(0)
    W, b, x = (torch.randn(s, generator=rng) for s in ((2100, 32), (2100,), (300, 32)))
    norms = torch.rand(2100, generator=rng) + 0.5 if scaled else None
    want = (x @ W.T + b) * (1 if norms is None else norms)
    scratch = torch.empty_like(W)
    multiply = precision.low_precision_matmul(W, b, norms, x, how, scratch)
    size = precision.tile_rows(2100, x.device)
    got = torch.cat([multiply(rows).float() for rows in (x[:size], x[size:])] if size < 300 else [multiply(x).float()])
    off = (got - want).abs().max() / want.std()
    assert off < {"full": 1e-5, "bf16": 0.05, "int8": 0.15}[how]
    if how == "full":
        plain = precision._product(W.double(), b.double(), x.double())(x.double())
        torch.testing.assert_close(plain, (x.double() @ W.double().T + b.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("copied", [2**20, 1000, 7])
def test_products_written_where_they_are_wanted(dtype, copied, monkeypatch):
    monkeypatch.setattr(precision, "_COPIED", copied)
    rng = torch.Generator().manual_seed(0)
    W, x = (torch.randn(n, 32, generator=rng, dtype=dtype) for n in (210, 60))
    whole = torch.full((80, 210), torch.nan, dtype=dtype)
    assert precision.multiply_into(whole[:30], x[::2], W).data_ptr() == whole.data_ptr()
    torch.testing.assert_close(whole[:30].double(), x[::2].double() @ W.double().T, atol=1e-5, rtol=1e-5)
    assert whole[30:].isnan().all()


def test_best_precision_is_what_the_processor_says(monkeypatch):
    cpu, text = torch.device("cpu"), set()
    for name in ("_is_vnni_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in text, raising=False)
    assert best_precision(cpu) == "full"
    text.add("_is_amx_tile_supported")
    assert best_precision(cpu) == precision.next_higher_precision("int8", cpu) == "bf16"
    text.add("_is_vnni_supported")
    assert best_precision(cpu) == ("int8" if precision.has_int8() else "bf16")
    assert precision.next_higher_precision("bf16", cpu) == best_precision(torch.device("meta")) == "full"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: there the sparse step is not the default")
@pytest.mark.parametrize("name", ["topk", "batchtopk", "standard", "jumprelu step", "gated"])
def test_equals_autograd_on_cuda(name):
    objective, params, x, y, state = problem(OBJECTIVES[name], tokens=33)
    moved = {n: value.cuda() for n, value in state.coefficients.items()}
    threshold = None if state.threshold is None else state.threshold.cuda()
    on_gpu = replace(
        state, coefficients=moved, dead=state.dead.cuda(), dead_rows=state.dead_rows.cuda(), threshold=threshold
    )
    assert_same(objective, params.cuda(), x.cuda(), y.cuda(), on_gpu)
