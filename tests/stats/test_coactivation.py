"""Latents that fire together: the definition, any split, two SAEs, the memory bound, files."""

import json
import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from helpers.peak_memory import peak_bytes
from hypothesis import given
from hypothesis import strategies as st

from saewb.errors import FormatError
from saewb.sae.sparse import SparseLatents
from saewb.stats import coactivation as module
from saewb.stats.coactivation import CoactivationStream, coactivation, needed_bytes
from saewb.stats.correlation import correlation_stats


def latents(tokens=200, d=12, seed=0, above=0.8):
    x = torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed))
    return torch.where(x.abs() > above, x, 0.0)  # signs too


def pearson(x, y=None):
    """The definition, about the means; nan where a column does not vary."""
    a, b = (t.double().numpy() - t.double().numpy().mean(0) for t in (x, x if y is None else y))
    for centered in (a, b):
        centered[:, np.ptp(centered, axis=0) == 0] = np.nan
    return (a.T @ b) / np.sqrt(np.square(a).sum(0)[:, None] * np.square(b).sum(0))


def check(found, x, y=None):
    rows, cols = range(found.shape[0]), range(found.shape[1])
    a, b = ((t != 0).double() for t in (x, x if y is None else y))
    both = (a.T @ b).numpy()
    either = (a.sum(0)[:, None] + b.sum(0)).numpy() - both
    assert found.counts(rows, cols).tolist() == both.tolist()
    shared = np.divide(both, either, out=np.full_like(both, np.nan), where=either > 0)
    assert found.jaccard(rows, cols).numpy() == pytest.approx(shared, nan_ok=True)
    assert found.phi(rows, cols).numpy() == pytest.approx(pearson(a, b), abs=1e-6, nan_ok=True)
    assert found.correlation(rows, cols).numpy() == pytest.approx(pearson(x, y), abs=1e-6, nan_ok=True)


# -- perfect, baseline, scale, by hand ---------------------------------------------------------------------------------


def test_perfect_always_together():
    x = latents(d=1).repeat(1, 3) * torch.tensor([1.0, 2.0, 5.0])
    result = coactivation([x])
    for figure in (result.phi, result.jaccard, result.correlation):
        assert figure([0, 1], [1, 2]).numpy() == pytest.approx(np.ones((2, 2)))
    assert result.stats("phi").rms == pytest.approx(1)


def test_never_together_and_independent():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(50, 1)
    result = coactivation([x])
    assert result.counts([0], [1]).item() == 0
    assert (result.phi([0], [1]).item(), result.jaccard([0], [1]).item()) == (-1, 0)
    grid = torch.tensor([[a, b] for a in (0.0, 1.0) for b in (0.0, 1.0, 1.0)])
    assert coactivation([grid]).phi([0], [1]).item() == pytest.approx(0, abs=1e-12)
    assert coactivation([grid]).correlation([0], [1]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 40.0])
def test_scale_of_a_latent_does_not_matter(scale):
    x, scales = latents(), torch.ones(12)
    scales[::2] = scale
    before, after = coactivation([x]), coactivation([x * scales])
    every = range(12)
    assert torch.equal(before.together, after.together)
    assert after.phi(every, every).equal(before.phi(every, every))
    assert after.correlation(every, every).numpy() == pytest.approx(before.correlation(every, every).numpy(), abs=1e-6)


def test_by_hand():
    """Firing 1101, 1011: together on 2 of 4, either on 4; phi = (4 * 2 - 3 * 3) / 3. Activations: see the sums."""
    x = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, -1.0], [2.0, 1.0]])
    result = coactivation([x])
    assert result.counts([0, 1], [0, 1]).tolist() == [[3, 2], [2, 3]]
    assert result.jaccard([0], [1]).item() == 0.5
    assert result.phi([0], [1]).item() == pytest.approx(-1 / 3)
    # sums 6, 2; squares 14, 6; product 4: (16 - 12) / sqrt((56 - 36) (24 - 4))
    assert result.correlation([0], [1]).item() == pytest.approx(4 / 20)


# -- the definition, in any split --------------------------------------------------------------------------------------


@st.composite
def streams(draw):
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum))
    d, seed = draw(st.integers(1, 9)), draw(st.integers(0, 9999))
    x = latents(sum(sizes), d, seed, above=draw(st.sampled_from([0.0, 0.8, 2.0])))
    x[:, draw(st.integers(0, d - 1))] = draw(st.sampled_from([0.0, 2.0]))  # never fires, or never changes
    return sizes, x


@examples(40)
@given(streams(), st.integers(0, 6), st.sampled_from([1, 7, 2**19]))
def test_any_split_gives_what_the_whole_gives(data, cut, pairs):
    """As one stream and as two that are merged, however few pairs are added at a time."""
    sizes, x = data
    before, module._PAIRS = module._PAIRS, pairs
    try:
        one, first, second = (CoactivationStream(x.shape[1]) for _ in range(3))
        for i, part in enumerate(x.split(sizes)):
            one.update(part)
            (first if i < cut else second).update(part)
        first.merge(second)
    finally:
        module._PAIRS = before
    for stream in (one, first):
        result = stream.result()
        assert result.n_tokens == len(x)
        check(result, x)


@examples(20)
@given(streams(), st.integers(1, 8))
def test_between_two_saes(data, d_b):
    sizes, x = data
    y = latents(len(x), d_b, seed=5, above=0.5)
    stream = CoactivationStream(x.shape[1], d_b)
    for a, b in zip(x.split(sizes), y.split(sizes), strict=True):
        stream.update(a, b)
    check(stream.result(), x, y)


def test_top_latents_are_the_same_as_dense_ones():
    x = latents(above=0)
    values, indices = x.relu().topk(4, dim=1)
    saved = torch.zeros_like(x).scatter(1, indices, values)
    result = coactivation(
        [
            SparseLatents.from_topk(values[:70], indices[:70], (70, 12)),
            SparseLatents.from_topk(values[70:], indices[70:], (130, 12)),
        ]
    )
    check(result, saved)


def test_a_token_on_which_everything_fires_among_quiet_ones():
    x = latents(300, 40, above=2.0)
    x[17] = 1.0
    check(coactivation(x.split(50)), x)


def test_nothing_fires():
    result = coactivation([torch.zeros(5, 3)])
    assert result.counts(range(3), range(3)).sum() == 0
    assert bool(result.phi(range(3), range(3)).isnan().all())
    assert result.top_pairs().empty
    with pytest.raises(ValueError, match="phi is defined for no pair"):
        result.stats()


# -- asking ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["phi", "jaccard", "correlation"])
def test_partners_and_pairs_are_the_largest_of_the_blocks(by, monkeypatch):
    result = coactivation([latents()])
    monkeypatch.setattr(module, "_PAIRS", 30)  # a few rows at a time
    block = getattr(result, by)(range(12), range(12)).fill_diagonal_(-9)
    index, value = result.partners([3, 0], k=4, by=by)
    assert torch.equal(value, block[[3, 0]].topk(4).values)
    assert torch.equal(index, block[[3, 0]].topk(4).indices)
    top = result.top_pairs(5, by=by, min_together=1)
    later = block[torch.ones(12, 12).triu(1).bool()]
    assert top[by].to_numpy() == pytest.approx(later.topk(5).values.numpy())
    for row in top.itertuples():
        assert row.together == result.counts([row.latent], [row.partner]).item()
        assert row.latent < row.partner


def test_partners_that_met_too_seldom_are_left_out():
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    index, value = coactivation([x]).partners([0, 1], k=2, min_together=2)
    assert index.tolist() == [[2, -1], [-1, -1]]
    assert value.isnan().tolist() == [[False, True], [True, True]]


def test_stats_are_those_of_the_matrix():
    x = latents()
    result, matrix = coactivation([x]), torch.from_numpy(pearson(x))
    assert (result.stats("correlation").rms, result.stats("correlation").mean) == pytest.approx(
        (correlation_stats(matrix).rms, correlation_stats(matrix).mean), abs=1e-9
    )


def test_latents_in_any_form_and_wrong_ones():
    result = coactivation([latents()])
    assert torch.equal(result.counts(torch.tensor([2]), [5]), result.counts([5], (2,)).T)
    with pytest.raises(ValueError, match=r"no latents \[12\]"):
        result.phi([0], [12])
    with pytest.raises(ValueError, match="no figure 'phy'"):
        result.partners([0], by="phy")
    with pytest.raises(ValueError, match="products=True"):
        coactivation([latents()], products=False).correlation([0], [1])


def test_says_what_it_is():
    x = latents()
    x[:, 4] = 0
    assert repr(coactivation([x])) == "Coactivation(12 latents, 200 tokens, 1 never fire)"


# -- streams -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_and_changes_nothing():
    stream, two = CoactivationStream(12), CoactivationStream(12, 3)
    stream.update(latents())
    for call, text in [
        (lambda: stream.update(torch.zeros(2, 11)), r"shape \(2, 11\)"),
        (lambda: stream.update(latents(), latents()), "two SAEs"),
        (lambda: two.update(latents()), "one SAE"),
        (
            lambda: two.update(
                torch.zeros(2, 12), SparseLatents.from_topk(torch.ones(3, 1), torch.ones(3, 1).long(), (3, 3))
            ),
            "same tokens",
        ),
        (lambda: stream.merge(two), "x 3 latents with products cannot go into one of 12 latents with"),
        (lambda: stream.merge(CoactivationStream(12, products=False)), "without products cannot go"),
        (CoactivationStream(3).result, "no tokens"),
        (lambda: coactivation([]), "no batches"),
        (lambda: CoactivationStream(0), "d_sae=0"),
    ]:
        with pytest.raises(ValueError, match=text):
            call()
    check(stream.result(), latents())
    with pytest.raises(ValueError, match="has been taken"):
        stream.update(latents())


def test_counts_cannot_overflow():
    stream = CoactivationStream(3)
    stream.n_tokens = 2**31 - 1
    with pytest.raises(ValueError, match="too many to count"):
        stream.update(torch.ones(1, 3))


def test_sums_of_products_are_float64():
    """A million times 0.1: float32 would be off in the fourth digit."""
    stream = CoactivationStream(2)
    x = torch.full((100_000, 2), 0.1)
    for _ in range(10):
        stream.update(x)
    assert stream.result().products.item() == pytest.approx(1e6 * float(np.float32(0.1)) ** 2, rel=1e-9)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_16k_latents_fit_into_2_gb_and_more_is_refused_beforehand():
    assert needed_bytes(16_384) <= module.MAX_BYTES == 2 * 10**9
    with pytest.raises(ValueError, match=r"65,536 latents take 25,\d{3},\d{3},\d{3} bytes") as error:
        CoactivationStream(65_536)
    assert "products=False" in str(error.value)


def test_memory_is_what_was_said():
    """3,000 latents, quiet tokens, one on which all fire, and a batch that is dense all over."""
    before = """
from saewb.stats.coactivation import CoactivationStream, needed_bytes
rng = torch.Generator().manual_seed(0)
x = torch.rand(512, 3000, generator=rng)
x[x < .99] = 0
x[100] = 1
dense = torch.rand(2, 3000, generator=rng)
small = CoactivationStream(20)
small.update(torch.rand(50, 20, generator=rng))
small.result().top_pairs(1)
"""
    code = """
stream = CoactivationStream(3000, max_bytes=needed_bytes(3000))
stream.update(x)
stream.update(dense)
stream.result().top_pairs(3)
"""
    took = peak_bytes(before, code)
    assert took < needed_bytes(3000) < 2 * took  # and not said out of all proportion


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("products", [False, True])
def test_a_file_gives_back_what_was_saved(tmp_path, two, products):
    stream = CoactivationStream(12, 5 if two else None, products=products)
    stream.update(latents(), *([latents(d=5)] if two else []))
    result = stream.result()
    again = type(result).load(result.save(tmp_path / "together.safetensors"))
    assert (again.n_tokens, again.shape, repr(again)) == (result.n_tokens, result.shape, repr(result))
    assert torch.equal(again.together, result.together)
    assert (again.products is None) == (not products)
    rows, cols = range(12), range(result.shape[1])
    assert again.phi(rows, cols).nan_to_num().equal(result.phi(rows, cols).nan_to_num())
    assert [path.name for path in tmp_path.iterdir()] == ["together.safetensors"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    import safetensors.torch

    path = coactivation([latents()]).save(tmp_path / "a")
    before = path.read_bytes()

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        coactivation([latents(seed=1)]).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    result = coactivation([latents()])
    path, other = result.save(tmp_path / "a"), tmp_path / "b"
    parts, about = load_file(path), {"n_tokens": 200, "latents": [12, 12], "two": False}

    def written(tensors, format="saewb coactivation 1", about=about):
        save_file(tensors, other, metadata={"format": format, "json": json.dumps(about)})
        return other

    with pytest.raises(FormatError, match="is not a coactivation file"):
        result.load(written(parts, format="pt"))
    with pytest.raises(FormatError, match="do not fit 13 latents"):
        result.load(written(parts, about=about | {"latents": [13, 13]}))
    with pytest.raises(FormatError, match="do not fit"):
        result.load(written({k: v for k, v in parts.items() if k != "a.fired"}))
    with pytest.raises(FormatError, match="do not fit"):
        result.load(written(parts | {"together": parts["together"][:-1]}))
    other.write_bytes(b"nothing of the kind")
    with pytest.raises(FormatError, match="not a safetensors file"):
        result.load(other)
    with pytest.raises(FileNotFoundError):
        result.load(tmp_path / "c")


def test_on_real_activations_of_the_embedded_sae():
    import saewb
    from saewb.models.capture import capture

    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    ids = saewb.pack([d.text for d in saewb.tiny.held_out_texts()[:40]], model.tokenizer, 64)
    with torch.no_grad():
        x = capture(model, ids, [sae.cfg.hook])[sae.cfg.hook].flatten(0, 1)
        result, dense = coactivation(sae.encode_topk(part) for part in x.split(300)), sae.encode(x)
    some = dense.count_nonzero(0).topk(40).indices
    assert result.counts(some, some).equal((dense[:, some] != 0).double().T.mm((dense[:, some] != 0).double()).long())
    assert result.correlation(some, some).numpy() == pytest.approx(pearson(dense[:, some]), abs=1e-6)
    assert math.isclose(result.a.fired.sum() / result.n_tokens, (dense != 0).sum(1).double().mean(), rel_tol=1e-9)
