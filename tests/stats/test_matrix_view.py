"""A matrix looked at in part is the matrix: every form of it against the dense one, and that one against numpy."""

import doctest
import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.sae.sparse import SparseLatents
from saewb.stats import _entries, _ordering, _overview
from saewb.stats import correlation_map as matrix_view
from saewb.stats._entries import Sparse
from saewb.stats.coactivation import coactivation
from saewb.stats.correlation import LowRankCorrelation, correlation_stats, random_low_rank_correlation
from saewb.synthetic import best_ordering, random_dictionary


def firings(n_tokens=400, d_sae=23, seed=0):
    """Activations, most of them 0; latent 3 never fires, 5 always does, 7 once, 8 always the same."""
    rng = torch.Generator().manual_seed(seed)
    acts = torch.rand(n_tokens, d_sae, generator=rng) + 0.1
    shared = torch.rand(n_tokens, 1, generator=rng)
    acts *= ((torch.rand(n_tokens, d_sae, generator=rng) < 0.1) | (shared < torch.linspace(0, 0.2, d_sae))).float()
    acts[:, 3], acts[:, 7] = 0, 0
    acts[9, 7], acts[:, 5], acts[:, 8] = 2.0, acts[:, 5] + 1, 0.5
    return acts


def fired(acts, what, least=1):
    return saewb.MatrixView(Sparse.of(SparseLatents.from_dense(acts), what, least))


def views(n=37):
    """By name: a view, and the same matrix in full, in float64, nan where it is not defined."""
    low = random_low_rank_correlation(n, 4, scale=0.25, seed=1)
    rows = torch.randn(n, 6, generator=torch.Generator().manual_seed(2))
    rows[4] = 0
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosine = unit @ unit.T
    cosine[4], cosine[:, 4] = torch.nan, torch.nan
    holes = low.dense().double()
    holes[2, 5] = holes[5, 2] = torch.nan
    acts = firings(d_sae=n)
    counts = coactivation([acts])
    every = range(n)
    with np.errstate(all="ignore"):
        correlation, phi = (torch.tensor(np.corrcoef(x.double().numpy().T)) for x in (acts, acts != 0))
    return {
        "low rank": (saewb.matrix_view(low), low.dense().double()),
        "cosine": (saewb.matrix_view(rows, by="cosine"), cosine),
        "dense": (saewb.matrix_view(holes.float()), holes),
        "counts": (saewb.matrix_view(counts, by="jaccard"), counts.jaccard(every, every)),
        "correlation": (fired(acts, "correlation"), correlation),
        "phi": (fired(acts, "phi"), phi),
    }


VIEWS = views()
named = pytest.mark.parametrize("name", VIEWS)


def reduced(full, rows, cols, step, cells):
    """By loops over cells, in numpy."""
    part = full.numpy()[np.ix_(rows, cols)].copy()
    part[np.array(rows)[:, None] == np.array(cols)] = np.nan
    result = np.full((-(-len(rows) // step), -(-len(cols) // step)), np.nan)
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            x = part[i * step : (i + 1) * step, j * step : (j + 1) * step]
            x = x[~np.isnan(x)]
            if len(x):
                result[i, j] = x.mean() if cells == "mean" else x[np.abs(x).argmax()]
    return torch.tensor(result)


def close(got, want, atol=2e-5):
    torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=0, equal_nan=True)


@named
def test_blocks_are_those_of_the_matrix(name):
    view, full = VIEWS[name]
    n = len(full)
    close(view.block(range(n), range(n)), full)
    rows, cols = [9, 3, 9, 0], [4, 9]
    close(view.block(rows, cols), full[rows][:, cols])
    assert view.block([], [1]).shape == (0, 1)
    for wrong in ([-1], [n]):
        with pytest.raises(ValueError, match=rf"no features \[{wrong[0]}\] in MatrixView\([\s\S]*want: 0 to {n - 1}"):
            view.block(wrong, [0])


@named
@pytest.mark.parametrize("cells", ["mean", "strongest"])
@examples(15)
@given(data=st.data())
def test_cells_are_means_and_strongest_entries(name, cells, data):
    view, full = VIEWS[name]
    some = st.lists(st.integers(0, len(full) - 1), min_size=1, unique=True)
    rows, cols, step = data.draw(some), data.draw(some), data.draw(st.sampled_from([2, 3, 4, 64]))
    want = reduced(full, rows, cols, step, cells)
    got = view.pooled(rows, cols, step, cells)
    if cells == "strongest":  # of two that differ by rounding, either
        got, want = got.abs(), want.abs()
    close(got, want)


def test_means_of_latents_that_always_fire_far_from_0():
    """Their activations differ by a hundredth of their size: products must not lose that."""
    acts = firings(d_sae=12)
    acts[:, 5] += 100
    acts[:, 6] = 50 + acts[:, 1]
    acts = acts[:, [i for i in range(12) if i not in (3, 7, 8)]]  # which fire never, once, always alike
    full = torch.tensor(np.corrcoef(acts.double().numpy().T))
    view = fired(acts, "correlation")
    for rows, cols in (([4], [4, 7]), ([5], [5, 1]), (range(9), range(9))):
        got = view.pooled(rows, cols, 64, "mean")
        close(got, reduced(full, list(rows), list(cols), 64, "mean"), atol=1e-5)


@named
def test_a_scan_finds_what_brute_force_does(name, monkeypatch):
    view, full = VIEWS[name]
    n = len(full)
    monkeypatch.setattr(_overview, "MAX_CELLS", 10)  # blocks of 4, though it is small
    monkeypatch.setattr(_overview, "BAND_ENTRIES", 100)  # in many bands
    order = torch.randperm(n, generator=torch.Generator().manual_seed(3))
    seen = view.overview(order, n_pairs=12)
    assert seen.step == 4
    assert seen.stats is None
    shares = list(seen.scan())
    assert shares == sorted(shares)
    assert shares[-1] == seen.done_frac == 1
    assert 0 < shares[0] < 0.5
    pairs = [(abs(full[i, j].item()), i, j) for i in range(n) for j in range(i) if not full[i, j].isnan()]
    strongest = sorted(pairs, reverse=True)[:12]
    assert [abs(pair.value) for pair in seen.pairs] == pytest.approx([v for v, _, _ in strongest], abs=2e-5)
    assert len({frozenset((pair.row, pair.col)) for pair in seen.pairs}) == 12
    for pair in seen.pairs:
        assert pair.value == pytest.approx(full[pair.row, pair.col].item(), abs=2e-5)
    off = full[~torch.eye(n, dtype=torch.bool)]
    off = off[~off.isnan()]
    assert seen.stats.rms == pytest.approx(off.square().mean().sqrt().item(), abs=1e-6)
    assert seen.stats.mean == pytest.approx(off.mean().item(), abs=1e-6)
    assert view.stats().rms == pytest.approx(seen.stats.rms, abs=1e-6)
    ordered = order.tolist()
    for step, pixels in ((4, 10), (8, 5), (16, 3)):  # what was kept
        got = seen.view((0, n, 0, n), pixels)
        assert (got.step, got.cells, got.is_final) == (step, "strongest", True)
        close(got.values.abs(), reduced(full, ordered, ordered, step, "strongest").abs())
    assert list(seen.scan()) == []  # it has been


@named
@pytest.mark.parametrize("scanned", [False, True])
def test_views_say_what_they_show(name, scanned, monkeypatch):
    """Whatever is shown at once is exactly what it says to be, and the refined view is what was asked for."""
    view, full = VIEWS[name]
    monkeypatch.setattr(_overview, "MAX_CELLS", 10)
    monkeypatch.setattr(_overview, "INTERACTIVE_COST", 3000.0)  # nearly everything takes long
    order = torch.randperm(len(full), generator=torch.Generator().manual_seed(4))
    seen = view.overview(order)
    if scanned:
        assert list(seen.scan())[-1] == 1
    kinds = set()
    for window in ((0, 37, 0, 37), (3, 21, 9, 37), (5, 9, 30, 37), (8, 9, 8, 9), (0, 37, 2, 5)):
        for pixels in (4, 8, 64):
            for cells in ("strongest", "mean"):
                got, fine = seen.view(window, pixels, cells), seen.refined(window, pixels, cells)
                for v in (got, fine):
                    r0, r1, c0, c1 = v.window
                    assert (min(r0, window[0]), max(r1, window[1])) == (r0, r1)
                    assert (min(c0, window[2]), max(c1, window[3])) == (c0, c1)
                    rows, cols = order[r0:r1].tolist(), order[c0:c1].tolist()
                    if v.cells == "exact":
                        close(v.values, full[rows][:, cols])
                    elif not v.values.isnan().all():
                        want = reduced(full, rows, cols, v.step, v.cells)
                        close(
                            v.values.abs() if v.cells == "strongest" else v.values,
                            want.abs() if v.cells == "strongest" else want,
                        )
                assert fine.is_final
                assert max(fine.values.shape) <= pixels + 1
                assert fine.cells in (cells, "exact")
                if got.is_final:
                    assert (got.step, got.cells, got.window) == (fine.step, fine.cells, fine.window)
                kinds.add((got.cells, got.is_final))
    assert ("exact", True) in kinds
    if scanned:
        assert ("strongest", True) in kinds
    else:
        assert ("mean", False) in kinds or ("strongest", False) in kinds


def test_symmetric_halves_are_not_made_twice(monkeypatch):
    items = []
    real = _entries.Factors.block
    monkeypatch.setattr(_overview, "BAND_ENTRIES", 64 * 8)
    monkeypatch.setattr(_entries.Factors, "block", lambda s, r, c: (items.append(len(r) * len(c)), real(s, r, c))[1])
    low = saewb.matrix_view(random_low_rank_correlation(64, 3))
    list(low.overview().scan())
    assert sum(items) == 64 * 65 / 2 + 8 * 28  # and the other triangle of each band's own square


def test_memory_is_bounded_whatever_the_size():
    """65,536 x 65,536 entries would be 17 GB. What is made for a view and for a band of the scan is what it says."""
    low = saewb.matrix_view(random_low_rank_correlation(65_536, 8))
    seen, most, real = low.overview(), [], _entries.Factors.block
    assert seen.step == 16
    _entries.Factors.block = lambda s, r, c: (most.append(len(r) * len(c)), real(s, r, c))[1]
    try:
        whole = seen.view((0, 65_536, 0, 65_536), 384)
        assert (whole.cells, whole.step, whole.is_final, most) == ("mean", 256, False, [])
        near = seen.view((1000, 1400, 60_000, 60_300), 384)
        assert (near.step, near.cells) == (2, "strongest")
        assert most == [400 * 300]
        next(seen.scan())
        assert max(most) == _overview.BAND_ENTRIES
    finally:
        _entries.Factors.block = real


# -- orders ----------------------------------------------------------------------------------------------------------


@named
def test_an_order_has_each_feature_once(name):
    view, _ = VIEWS[name]
    for by in view.orders:
        assert sorted(view.order(by).tolist()) == list(range(37))
    with pytest.raises(ValueError, match=r"has no order 'clsters'.\n  near: clusters"):
        view.order("clsters")


def grouped(n, groups, seed=0, noise=0.4):
    """Directions in groups that point the same way, mixed up; and whose group each is of."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.randint(0, groups, (n,), generator=rng)
    centers = torch.nn.functional.normalize(torch.randn(groups, 48, generator=rng), dim=1)
    return centers[label] + noise * torch.randn(n, 48, generator=rng) / 48**0.5, label


@pytest.mark.parametrize(("n", "groups"), [(300, 6), (3000, 20)])
def test_clusters_stand_together(n, groups):
    """Also with more features than are ordered exactly."""
    rows, label = grouped(n, groups)
    view = saewb.matrix_view(rows, by="cosine")
    order = view.order("clusters")
    changes = int((label[order].diff() != 0).sum())
    assert changes <= 1.2 * groups
    assert torch.equal(order, view.order("clusters"))
    shuffled = int((label.diff() != 0).sum())
    assert shuffled > 10 * changes


def test_all_alike_and_undefined_features_have_an_order_too():
    rows = torch.ones(2500, 3)
    rows[[5, 77]] = 0
    order = saewb.matrix_view(rows, by="cosine").order("clusters").tolist()
    assert sorted(order) == list(range(2500))
    assert set(order[-2:]) == {5, 77}


def test_eigenvectors_are_those_of_the_matrix():
    for name in ("low rank", "counts", "correlation", "phi", "dense"):
        view, full = VIEWS[name]
        x = torch.randn(37, 3, generator=torch.Generator().manual_seed(0))
        got = view.entries.matmul(x)
        want = full.nan_to_num(0)
        if name == "low rank":  # its diagonal is not of the factors
            want = (view.entries.a @ view.entries.a.T).double()
        close(got, want @ x.double(), atol=1e-4)


def test_density_orders_by_density():
    acts = firings()
    view = saewb.matrix_view(coactivation([acts]))
    share = (acts != 0).double().mean(0)
    assert share[view.order("density")].tolist() == sorted(share.tolist(), reverse=True)
    inputs = saewb.matrix_view(torch.eye(3), density=torch.tensor([0.1, 0.3, 0.2]))
    assert inputs.order("density").tolist() == [1, 2, 0]
    assert "density" not in saewb.matrix_view(torch.eye(3)).orders
    with pytest.raises(ValueError, match="2 values for 3 features"):
        saewb.matrix_view(torch.eye(3), density=torch.ones(2))


# -- two sets --------------------------------------------------------------------------------------------------------


def test_learnt_against_true():
    dictionary = random_dictionary(12, 8)
    perm = torch.tensor([5, 3, 11, 0, 1, 2, 4, 6, 7, 8, 9, 10])
    learnt = 3 * dictionary.directions[perm] + 0.01
    view = saewb.matrix_view(learnt, dictionary)
    assert (view.shape, view.same, view.orders) == ((12, 12), False, ("matched", "index"))
    order = view.order("matched")
    assert torch.equal(order, best_ordering(learnt, dictionary.directions))
    want = torch.nn.functional.normalize(learnt, dim=1) @ dictionary.directions.T
    close(view.block(range(12), range(12)), want)
    seen = view.overview(order, n_pairs=5)
    list(seen.scan())
    assert seen.rows.tolist() == order.tolist()
    assert seen.cols.tolist() == list(range(12))
    assert [p.value for p in seen.pairs] == pytest.approx(want.flatten().sort(descending=True).values[:5].tolist())
    best = view.partners(3, 2)
    assert best[0].col == want[3].abs().argmax()
    assert view.partners(3, 1, axis=1)[0].row == want[:, 3].abs().argmax()
    with pytest.raises(ValueError, match="no order 'clusters'"):
        view.order("clusters")
    with pytest.raises(ValueError, match="8 and of 5 dimensions"):
        saewb.matrix_view(learnt, torch.ones(2, 5))
    fewer = saewb.matrix_view(learnt[:7], dictionary)
    assert fewer.pooled(range(7), range(12), 4, "mean").shape == (2, 3)
    close(fewer.pooled([1, 0], range(12), 12, "mean"), want[[0, 1]].mean().view(1, 1))


# -- figures ---------------------------------------------------------------------------------------------------------


def test_partners_and_pairs():
    acts = firings()
    view, full = fired(acts, "phi"), VIEWS["phi"][1]
    counts = coactivation([acts])
    view = saewb.matrix_view(counts)
    result = view.pair(10, 20)
    assert (result.fires_row, result.fires_col) == tuple((acts != 0).sum(0)[[10, 20]].tolist())
    assert result.together == int(((acts[:, 10] != 0) & (acts[:, 20] != 0)).sum())
    assert result.n_tokens == 400
    other = fired(acts, "phi").pair(10, 20)
    assert (other.together, other.n_tokens, other.fires_row) == (result.together, 400, result.fires_row)
    assert other.value == pytest.approx(result.value, abs=1e-6)
    assert fired(acts, "phi").pair(10, 10).together == result.fires_row
    low, full = VIEWS["low rank"]
    want = full[6].clone()
    want[6] = 0
    assert [p.col for p in low.partners(6, 4)] == want.abs().argsort(descending=True)[:4].tolist()
    assert low.pair(1, 2).together is None
    assert len(low.partners(6, 100)) == 36
    cosine, _ = VIEWS["cosine"]
    assert cosine.partners(4) == []
    assert math.isnan(cosine.pair(4, 5).value)


def test_low_rank_statistics_need_no_entries(monkeypatch):
    low = random_low_rank_correlation(500, 7)
    view = saewb.matrix_view(low)
    monkeypatch.setattr(_entries.Factors, "block", None)
    assert view.stats().rms == pytest.approx(correlation_stats(low).rms, rel=1e-5)
    assert view.stats().mean == pytest.approx(correlation_stats(low).mean, abs=1e-8)


def test_latents_that_fire_rarely_are_undefined():
    acts = firings()
    view = fired(acts, "phi", least=10)
    known = ~view.block(range(23), range(23)).diagonal().isnan()
    fires = (acts != 0).sum(0)
    assert torch.equal(known, (fires >= 10) & (fires < 400))


# -- small, wrong, and large -----------------------------------------------------------------------------------------


def test_one_feature_and_none():
    for view in (saewb.matrix_view(torch.ones(1, 1)), saewb.matrix_view(LowRankCorrelation.of(torch.ones(1, 1)))):
        assert view.block([0], [0]).tolist() == [[1.0]]
        seen = view.overview()
        assert list(seen.scan())[-1] == 1
        assert (seen.stats, seen.pairs, view.stats()) == (None, [], None)
        assert seen.view((0, 1, 0, 1), 100).values.tolist() == [[1.0]]
        assert view.order("clusters").tolist() == [0]
        assert view.pooled([0], [0], 2).isnan().all()
    with pytest.raises(ValueError, match="at least 1"):
        saewb.matrix_view(torch.zeros(0, 0))


def test_nothing_defined():
    view = saewb.matrix_view(torch.full((9, 9), torch.nan))
    seen = view.overview()
    assert list(seen.scan())[-1] == 1
    assert (seen.stats, seen.pairs) == (None, [])
    assert seen.view((0, 9, 0, 9), 3).values.isnan().all()
    assert sorted(view.order("clusters").tolist()) == list(range(9))


@pytest.mark.parametrize(
    ("of", "how", "error", "says"),
    [
        (torch.ones(3, 4), {}, ValueError, r"shape \(3, 4\)[\s\S]*fix:  matrix_view\(directions, by='cosine'\)"),
        (torch.ones(3), {}, ValueError, r"shape \(3,\)"),
        (torch.tensor([[1.0, 0.2], [0.5, 1.0]]), {}, ValueError, r"not symmetric[\s\S]*\(m \+ m.T\) / 2"),
        ("a path", {}, TypeError, "got a str"),
        (torch.eye(2), {"by": "phi"}, ValueError, "a matrix has no 'phi'"),
        (torch.ones(3), {"by": "cosine"}, ValueError, r"directions have shape \(3,\)"),
        (torch.eye(2), {"other": "x"}, TypeError, "got a str"),
    ],
)
def test_what_is_no_matrix_is_said(of, how, error, says):
    with pytest.raises(error, match=says):
        saewb.matrix_view(of, **how)


def test_wrong_cells_and_orders():
    view = saewb.matrix_view(torch.eye(4))
    with pytest.raises(ValueError, match="strongest or mean"):
        view.pooled([0], [1], 2, "max")
    with pytest.raises(ValueError, match="no permutation"):
        view.overview(torch.tensor([0, 0, 1, 2]))


@pytest.mark.parametrize("module", [matrix_view, _entries, _ordering, _overview])
def test_examples_run(module):
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize("name", ["low rank", "dense", "counts", "phi"])
def test_picked_features_are_where_they_are_put(name):
    view, full = VIEWS[name]
    at = [5, 2, -1, 5, 36, 0, 9]
    picked = view.picked(torch.tensor(at))
    want = torch.tensor([[full[a, b] if min(a, b) >= 0 else math.nan for b in at] for a in at])
    for i, a in enumerate(at):
        for j, b in enumerate(at):
            if a == b >= 0:
                want[i, j] = math.nan if full[a, a].isnan() else 1  # the same feature, wherever it stands
    close(picked.block(range(7), range(7)), want)
    close(picked.block([3, 1], [0, 6]), want[[3, 1]][:, [0, 6]])
    for cells in ("strongest", "mean"):
        close(picked.pooled(range(7), range(7), 2, cells), reduced(want, [*range(7)], [*range(7)], 2, cells))
    assert sorted(picked.order("clusters").tolist()) == [*range(7)]
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(1))
    off = want.nan_to_num(0)
    if name in ("counts", "phi"):  # entries of a feature with itself are 1 there
        close(picked.entries.matmul(x), off.float() @ x, atol=1e-4)
    fires = view.entries.firing_counts()
    if fires is not None:
        assert picked.entries.firing_counts().tolist() == [int(fires[a]) if a >= 0 else 0 for a in at]
        assert picked.pair(0, 1).together == view.pair(5, 2).together
        assert picked.pair(0, 2).together is None
        assert view.density is None or picked.density[2] == 0


def test_what_cannot_be_picked():
    view = VIEWS["low rank"][0]
    for features, says in (([37], "no features"), ([-2], "or -1 for none"), ([], "or -1 for none")):
        with pytest.raises(ValueError, match=says):
            view.picked(features)
    with pytest.raises(ValueError, match="two sets"):
        saewb.matrix_view(torch.eye(3), torch.eye(3)).picked([0])


def test_how_far_two_views_differ():
    a, b = torch.tensor([[1.0, 0.5], [0.5, math.nan]]), torch.tensor([[1.0, 0.1], [math.nan, 0.0]])
    one, two = (_overview.View(x, (0, 2, 0, 2), 1, "exact", True) for x in (a, b))
    assert one.differs(two) == pytest.approx(math.sqrt(0.16 / 2))
    assert math.isnan(one.differs(_overview.View(a * math.nan, (0, 2, 0, 2), 1, "exact", True)))
    assert _overview.View(a * math.nan, (0, 2, 0, 2), 1, "exact", True).scale == 1
    size = torch.rand(100, 100)
    size[3] = math.nan
    scale = _overview.View(size, (0, 100, 0, 100), 1, "exact", True).scale
    assert (size > scale).sum() <= 0.006 * 9900
    assert scale == pytest.approx(size.nanquantile(0.995).item(), abs=0.02)
