"""What a pass gathers against the same written down plainly, in Python, with everything in memory."""

import math
from itertools import pairwise

import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.features.accumulate import LatentAccumulator, TokenRows
from saewb.features.config import IndexConfig
from saewb.features.latent import Context, quantile_groups
from saewb.features.neighbors import coactive
from saewb.features.ranking import modal_token
from saewb.features.top_contexts import EMPTY, TopContexts
from saewb.sae.sparse import SparseLatents

SEED, CTX, D_SAE = 3, 6, 5
MASK = 2**64 - 1


def plan(**changes):
    sizes = {"d_sae": D_SAE, "ctx_len": CTX, "n_top": 3, "n_sample": 4, "before": 2, "after": 1, "coactive_tokens": 7}
    return IndexConfig(**{**sizes, "active": D_SAE, "l0_most": D_SAE, "seed": SEED, **changes})


def draw_text(seed, rows, fires=0.5, signed=False):
    """Ids of few kinds, so that windows repeat; activations of few values, so that there are ties; token 0 special."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (rows, CTX), generator=rng)
    values = torch.randint(1, 5, (rows, CTX, D_SAE), generator=rng) / 4
    values *= torch.rand(rows, CTX, D_SAE, generator=rng) < fires
    if signed:
        values *= torch.randint(0, 2, values.shape, generator=rng) * 2 - 1
    values[..., 2] *= 100  # one latent is larger
    values[..., 4] = 0  # one never fires
    return ids, values


def seen(ids, values, first_row):
    mask = ids != 0
    return TokenRows(ids, mask, first_row), SparseLatents.from_dense(values * mask[..., None])


def gathered(plan, ids, values, cuts, first_row=0, resume=()):
    """In batches that end at `cuts`; after the batches numbered in `resume`, by another one that goes on from it."""
    accumulator = LatentAccumulator(plan)
    bounds = [0, *sorted(cuts), len(ids)]
    for n, (a, b) in enumerate(pairwise(bounds)):
        if a < b:
            accumulator.update(*seen(ids[a:b], values[a:b], first_row + a))
        if n in resume:
            again = LatentAccumulator(plan)
            again.restore(accumulator.tensors())
            accumulator = again
    return accumulator


# -- the same, plainly ------------------------------------------------------------------------------------------------


def mixed(x):
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def hashed(x):
    return min((mixed(x) >> 32) & 0x7FFFFFFF, EMPTY - 1)


def token_hash(position):
    return mixed(mixed(position) + SEED)


def window(p, ids, row, at):
    return tuple(int(ids[row, j]) if 0 <= j < CTX else -1 for j in range(at - p.before, at + p.after + 1))


def acts(p, ids, values, row, at, i):
    return [
        float(values[row, j, i]) if 0 <= j < CTX and ids[row, j] != 0 else 0.0
        for j in range(at - p.before, at + p.after + 1)
    ]


def fires(ids, values, i):
    """(row, place, value) of each firing of a latent."""
    return [
        (r, c, float(values[r, c, i]))
        for r in range(len(ids))
        for c in range(CTX)
        if ids[r, c] != 0 and values[r, c, i] != 0
    ]


def plain_top(p, ids, values, i):
    of_row = {}
    for row, at, value in fires(ids, values, i):
        if row not in of_row or abs(value) > abs(of_row[row][1]):
            of_row[row] = (at, value)
    ordered = sorted(of_row.items(), key=lambda x: (-abs(x[1][1]), x[0]))
    items, texts = [], set()
    for row, (at, value) in ordered:
        if window(p, ids, row, at) not in texts:
            texts.add(window(p, ids, row, at))
            items.append((row, at, value))
    return items[: p.n_top]


def plain_sample(p, ids, values, i):
    latent_hash = mixed(i + 1)
    keyed = sorted((hashed(token_hash(r * CTX + c) ^ latent_hash), r, c, v) for r, c, v in fires(ids, values, i))
    return [(r, c, v) for _, r, c, v in keyed[: p.n_sample]]


def check_contexts(p, shelf, ids, values, plain, first_row):
    for i in range(D_SAE):
        want = plain(p, ids, values, i)
        n = len(want)
        assert (shelf["order"][i] != EMPTY).tolist() == [True] * n + [False] * (len(shelf["order"][i]) - n)
        assert shelf["position"][i, :n].tolist() == [(first_row + r) * CTX + c for r, c, _ in want]
        assert shelf["value"][i, :n].tolist() == [v for _, _, v in want]
        assert shelf["tokens"][i, :n].tolist() == [list(window(p, ids, r, c)) for r, c, _ in want]
        assert shelf["acts"][i, :n].tolist() == [acts(p, ids, values, r, c, i) for r, c, _ in want]


def plain_histogram(values):
    if not values:
        return {}
    e = math.frexp(max(values))[1] - 6
    counts = {}
    for v in values:
        b = math.floor(v / 2.0**e)
        counts[b] = counts.get(b, 0) + 1
    return {"exponent": e, "counts": counts}


def part(tensors, name):
    return {k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")}


# -- checks -----------------------------------------------------------------------------------------------------------


@examples(40)
@given(
    st.integers(0, 10**6), st.integers(1, 14), st.sets(st.integers(1, 13)), st.sets(st.integers(0, 9)), st.booleans()
)
def test_it_is_what_brute_force_finds_for_any_batches_and_resumes(seed, rows, cuts, resume, signed):
    # hashes depend on the row's number: the brute force numbers rows from 0
    ids, values = draw_text(seed, rows, signed=signed)
    p = plan()
    result = gathered(p, ids, values, [c for c in cuts if c < rows], resume=resume).tensors()
    check_contexts(p, part(result, "top"), ids, values, plain_top, 0)
    check_contexts(p, part(result, "sample"), ids, values, plain_sample, 0)
    for i in range(D_SAE):
        fired = fires(ids, values, i)
        want = plain_histogram([abs(v) for *_, v in fired])
        counts = result["counts.counts"][i]
        assert {b: n for b, n in enumerate(counts.tolist()) if n} == want.get("counts", {})
        if fired:
            assert int(result["counts.exponent"][i]) == want["exponent"]
        assert float(result["counts.total"][i]) == pytest.approx(sum(v for *_, v in fired), abs=1e-9)
        groups = [0 if c == 0 else int(math.log2(c)) + 1 for _, c, _ in fired]
        assert result["counts.by_position"][i].tolist() == [groups.count(g) for g in range(4)]
    places = [c for r in range(rows) for c in range(CTX) if ids[r, c] != 0]
    groups = [0 if c == 0 else int(math.log2(c)) + 1 for c in places]
    assert result["counts.n_by_position"].tolist() == [groups.count(g) for g in range(4)]
    tokens = [(r, c) for r in range(rows) for c in range(CTX) if ids[r, c] != 0]
    chosen = sorted(tokens, key=lambda t: (hashed(token_hash(t[0] * CTX + t[1])), t))[: p.coactive_tokens]
    assert result["active.token_position"].tolist() == [r * CTX + c for r, c in chosen]
    for row, (r, c) in zip(result["active.token_active"].tolist(), chosen, strict=True):
        assert sorted(i for i in row if i >= 0) == values[r, c].nonzero()[:, 0].tolist()


@examples(40)
@given(st.integers(0, 10**6), st.integers(2, 14), st.data())
def test_merged_parts_are_the_whole(seed, rows, data):
    ids, values = draw_text(seed, rows)
    p, cut = plan(), data.draw(st.integers(1, rows - 1))
    whole = gathered(p, ids, values, []).tensors()
    first, second = (
        gathered(p, ids[:cut], values[:cut], []),
        gathered(p, ids[cut:], values[cut:], [], first_row=cut),
    )
    if data.draw(st.booleans()):
        first, second = second, first
    first.merge(second.tensors())
    same(first.tensors(), whole)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        if name == "counts.total":
            torch.testing.assert_close(a[name], b[name], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(a[name], b[name]), name


def test_the_strongest_active_latents_are_noted_where_there_are_too_many():
    ids, values = draw_text(1, 8, fires=1.0)
    values = values + torch.arange(D_SAE) * 0.01 * (values != 0)
    p = plan(active=2)
    result = gathered(p, ids, values, [3]).tensors()
    for position, row in zip(
        result["active.token_position"].tolist(), result["active.token_active"].tolist(), strict=True
    ):
        want = values[position // CTX, position % CTX].topk(2).indices.tolist()
        assert row == want


def test_memory_does_not_grow_with_the_text():
    """What is kept after 4 and after 40 times as much text is the same, and no more than promised."""
    sizes = []
    p = plan()
    for rows in (40, 160, 1600):
        ids, values = draw_text(0, rows)
        tensors = gathered(p, ids, values, range(0, rows, 8)).tensors()
        sizes.append(sum(t.nbytes for t in tensors.values()))
    assert sizes[0] == sizes[1] == sizes[2] <= p.nbytes


def test_candidates_that_wait_are_bounded(monkeypatch):
    import saewb.features.top_contexts as top_contexts

    monkeypatch.setattr(top_contexts, "PENDING", 50)
    p, most = plan(), 0
    accumulator = LatentAccumulator(p)
    ids, values = draw_text(0, 400)
    for row in range(400):
        accumulator.update(*seen(ids[row : row + 1], values[row : row + 1], row))
        most = max(most, *(sum(map(len, s._pending)) for s in (accumulator.top, accumulator.sample)))
    assert 0 < most < 50
    check_contexts(p, part(accumulator.tensors(), "top"), ids, values, plain_top, 0)


def test_blocks_of_latents_change_nothing(monkeypatch):
    import saewb.features.top_contexts as top_contexts

    ids, values = draw_text(5, 30)
    whole = gathered(plan(), ids, values, [7, 20]).tensors()
    monkeypatch.setattr(top_contexts, "BLOCK", 2)
    same(gathered(plan(), ids, values, [7, 20]).tensors(), whole)


def test_the_sample_is_uniform():
    """Each firing is as likely as any other to be sampled, whatever its size: a mean over many seeds."""
    ids, values = draw_text(2, 12, fires=0.9)
    everything = fires(ids, values, 1)
    drawn = []
    for seed in range(300):
        result = part(gathered(plan(seed=seed), ids, values, []).tensors(), "sample")
        drawn += result["value"][1].tolist()
    mean = sum(v for *_, v in everything) / len(everything)
    spread = math.sqrt(sum((v - mean) ** 2 for *_, v in everything) / len(everything) / len(drawn))
    assert abs(sum(drawn) / len(drawn) - mean) < 4 * spread


def test_a_shelf_that_nothing_was_put_on():
    shelf = TopContexts(2, 3, 4)
    assert (shelf.tensors()["order"] == EMPTY).all()
    assert len(shelf.candidates(torch.arange(2))) == 0


def test_coactive_by_hand():
    """4 tokens; 0 and 1 fire together on two of them, 2 alone, 3 always."""
    active = torch.tensor([[0, 1, 3], [1, 0, 3], [2, 3, -1], [3, 0, -1]], dtype=torch.int32)
    result = coactive(active, 5, 2)
    assert result["coactive.fired"].tolist() == [3, 2, 1, 4, 0]
    assert result["coactive.latent"][0].tolist() == [1, 3]
    assert result["coactive.together"][0].tolist() == [2, 3]
    phi = (4 * 2 - 3 * 2) / math.sqrt(3 * 1 * 2 * 2)
    assert result["coactive.phi"][0].tolist() == pytest.approx([phi, 0])  # what always fires correlates with nothing
    assert result["coactive.latent"][4].tolist() == [-1, -1]


@pytest.mark.parametrize("tile", [1, 8, 2**20])
def test_coactive_is_the_dense_product(tile, monkeypatch):
    monkeypatch.setattr("saewb.features.neighbors.PAIRS", tile)
    fired = torch.rand(60, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    active = torch.full((60, 9), -1, dtype=torch.int32)
    for t in range(60):
        which = fired[t].nonzero()[:, 0]
        active[t, : len(which)] = which.int()
    result = coactive(active, 9, 8)
    together, phi = (fired.T.double() @ fired.double()), torch.corrcoef(fired.T.double())
    for i in range(9):
        others = [j for j in range(9) if j != i and together[i, j] > 0]
        order = result["coactive.latent"][i, : len(others)].tolist()
        assert sorted(order) == others
        assert result["coactive.together"][i, : len(order)].tolist() == [int(together[i, j]) for j in order]
        values = result["coactive.phi"][i, : len(order)].tolist()
        assert values == pytest.approx([float(phi[i, j]) for j in order])
        assert values == sorted(values, reverse=True)


def test_quantile_groups_are_by_size_and_of_equal_size():
    contexts = tuple(Context(("a",), (1,), (float(v),), 0, v, 0) for v in (5, 1, 4, 2, 3, 6, 7))
    groups = quantile_groups(contexts, 3)
    assert [[c.value for c in g] for g in groups] == [[1, 2], [3, 4, 5], [6, 7]]
    assert quantile_groups((), 2) == ((), ())
    assert [len(g) for g in quantile_groups(contexts[:1], 3)] == [0, 1, 0]


def test_the_commonest_token_and_its_share():
    token, share = modal_token(torch.tensor([[7, 3, 7, -1], [2, 1, 2, 1], [-1, -1, -1, -1]]))
    assert token.tolist() == [7, 1, -1]
    assert share.tolist() == pytest.approx([2 / 3, 0.5, 0])
