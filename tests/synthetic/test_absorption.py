"""Planted absorption: 0 for the true dictionary, 1 for the absorbing one, linear in between; its controls; `score`."""

import numpy as np
import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.sae.sae import SAE, SAEConfig
from saewb.synthetic import Hierarchy, Node, SyntheticData, absorption, constant, matched_sae, random_dictionary, score

N, PARENTS, CHILDREN = 24, 4, 5


def tree_data(noise=0.0):
    """Orthogonal features 0..3 with five children each; all magnitudes 1."""
    children = [tuple(Node(PARENTS + CHILDREN * p + i) for i in range(CHILDREN)) for p in range(PARENTS)]
    hierarchy = Hierarchy([Node(p, children[p]) for p in range(PARENTS)])
    probability = torch.tensor([0.5] * PARENTS + [0.1] * (N - PARENTS))
    return SyntheticData(random_dictionary(N, N), probability, hierarchy=hierarchy, noise=noise)


def true_sae(data):
    sae = matched_sae(SAE(SAEConfig(N, N)), data.dictionary)
    with torch.no_grad():
        sae.b_enc.fill_(-1e-3)  # rounding fires nothing
    return sae


@torch.no_grad()
def absorbing_sae(data, strength=1.0, children=range(PARENTS, N)):
    """Child rows d_c + t d_p, and the parent's encoder reads d_p - t d_c: it reconstructs as the true dictionary."""
    sae = true_sae(data)
    d = data.dictionary.directions
    for parent, child in data.hierarchy.pairs:
        if child in children:
            sae.W_dec[child] = d[child] + strength * d[parent]
            sae.W_enc[:, parent] -= strength * d[child]
    return sae


def test_the_true_dictionary_absorbs_nothing_and_the_absorbing_one_everything():
    data = tree_data()
    none, whole = (absorption(data, sae, 4000) for sae in (true_sae(data), absorbing_sae(data)))
    for result, expected in ((none, 0), (whole, 1)):
        of = result.to_frame()[lambda table: table.sae == "sae"]
        assert (of.n > 50).all()
        assert (of.rate == expected).all()
        np.testing.assert_allclose(of.fraction, expected, atol=2e-3)
        assert (of.off_alone == 0).all()  # alone, the parent's latent works
        assert of.rate.between(of.low, of.high).all()
        assert (of.high > of.low).all()
    assert "rate" in str(whole)
    assert "<table>" in whole._repr_html_()
    assert repr(whole).endswith("rate 1, 4,000 samples)")


@given(st.sets(st.integers(PARENTS, N - 1)), st.floats(0.15, 0.95))
@examples(6)
def test_the_rate_is_linear_in_the_pairs_and_the_fraction_in_the_strength(children, strength):
    data = tree_data()
    share = len(children) / (N - PARENTS)
    some = absorption(data, absorbing_sae(data, children=children), 800).summary().loc["sae"]
    assert some.rate == pytest.approx(share, abs=1e-9)
    assert some.fraction == pytest.approx(share, abs=5e-3)
    single = [child for child in sorted(children) if child % CHILDREN == PARENTS % CHILDREN]  # one each
    partly = absorption(data, absorbing_sae(data, strength, single), 800).to_frame()
    of = partly[partly.sae == "sae"].set_index("child")
    assert (of.rate == 0).all()
    np.testing.assert_allclose(of.fraction[single], strength, atol=5e-3)


def test_the_rate_is_linear_in_the_share_of_samples():
    """A parent that is silent under a child only where a third feature fires as well."""
    data = tree_data()
    sae = absorbing_sae(data, children=[PARENTS])
    d = data.dictionary.directions
    with torch.no_grad():
        sae.W_enc[:, 0] += d[PARENTS] - d[PARENTS + 1]  # silent under child 5, and so is the row of child 4
        sae.W_enc[:, PARENTS] = d[PARENTS]
    of = absorption(data, sae, 20_000).to_frame().set_index(["sae", "child"]).loc["sae"]
    share = of.n[PARENTS + 1] / (20_000 * 0.5)  # of the parent's samples, independent of its other children
    row = of.loc[PARENTS]
    assert row.low - 0.02 < share < row.high + 0.02
    assert 0 < row.rate < 1


@torch.no_grad()
def test_permuting_or_scaling_latents_changes_nothing():
    data, rng = tree_data(), torch.Generator().manual_seed(3)
    sae = absorbing_sae(data, 1.0, range(PARENTS, N, 2))
    order = torch.randperm(N, generator=rng)
    permuted = SAE.from_tensors(
        sae.cfg,
        {"W_enc": sae.W_enc[:, order], "b_enc": sae.b_enc[order], "W_dec": sae.W_dec[order], "b_dec": sae.b_dec},
    )
    scaled = SAE.from_tensors(sae.cfg, sae.tensors() | {"W_enc": sae.W_enc * 4, "W_dec": sae.W_dec / 4})
    plain = absorption(data, sae, 800).summary().loc["sae"]
    for other in (permuted, scaled):
        summary = absorption(data, other, 800).summary().loc["sae"]
        assert (summary.rate, summary.n) == (plain.rate, plain.n)
        assert summary.fraction == pytest.approx(plain.fraction, abs=1e-3)


def test_the_control_is_a_random_sae_and_silence_alone_is_said():
    data = tree_data()
    result = absorption(data, true_sae(data), 4000)
    random = result.summary().loc["random"]
    table = result.to_frame()
    assert (table[table.sae == "random"].parent_cosine < 0.9).all()
    assert random.off_alone > 0.2  # its "parent latents" are silent without any child: that is no absorption
    sae = true_sae(data)
    with torch.no_grad():
        sae.W_enc[:, :PARENTS] = 0  # dead parents
    dead = absorption(data, sae, 2000).summary().loc["sae"]
    assert (dead.off_alone, dead.rate) == (1, 0)


def test_what_is_refused():
    plain = SyntheticData(random_dictionary(8, 8), constant(8, 0.1))
    with pytest.raises(ValueError, match="no parents and children"):
        absorption(plain, SAE(SAEConfig(8, 8)))
    data = tree_data()
    with pytest.raises(ValueError, match="writes 8 dimensions"):
        absorption(data, SAE(SAEConfig(8, 8)))
    with pytest.raises(ValueError, match="n_samples=0"):
        absorption(data, true_sae(data), 0)
    with pytest.raises(ValueError, match="named \\['random'\\]"):
        score(data, {"random": true_sae(data)})


def test_the_table_of_scores():
    data = tree_data()
    table = score(data, {"true": true_sae(data), "absorbing": absorbing_sae(data)}, 4000)
    assert table.index.tolist() == ["true", "absorbing", "random", "true dictionary"]
    assert table.mcc["true"] == pytest.approx(1, abs=1e-5)
    assert table.f1["true"] == 1
    assert table.f1_se["true"] == 0
    assert table.absorption_rate.loc[["true", "absorbing"]].tolist() == [0, 1]
    assert table.mcc["random"] < 0.6 < table.mcc["absorbing"] < 0.95
    assert table.explained_variance["true"] > 0.999 > table.explained_variance["absorbing"]  # under two children
    assert table.explained_variance["random"] < table.explained_variance["true dictionary"]
    assert (table.n_latents == N).all()
    assert (table.n_samples == 4000).all()
    assert (table.f1_se[["absorbing", "random"]] > 0).all()
    assert table.f1["true dictionary"] == 1
    single = score(data, true_sae(data), 500)
    assert single.index[0].startswith("0: SAE(relu")
