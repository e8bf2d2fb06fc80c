"""Contrasts of real texts of the bundled model: splits, baselines, duplicates, what comes of them, what is refused."""

import functools

import numpy as np
import pytest
import torch
from helpers import panel_driver

import saewb
from saewb.probing.contrast import latent_statistics
from saewb.probing.volcano import minus_log10

HOOK = "blocks.2.hook_resid_post"


@functools.cache
def sets():
    """Biology and everything else, in length much alike."""
    documents = saewb.tiny.held_out_texts()
    cut = [(d.topic.startswith("Biology"), " ".join(d.text.split()[:40])) for d in documents]
    return [text for is_biology, text in cut if is_biology][:40], [t for is_biology, t in cut if not is_biology][:60]


@functools.cache
def result(**options):
    model, sae = panel_driver.embedded()
    a, b = sets()
    return saewb.contrast(model, sae, a, [*b, b[0], b[0]], n_permutations=200, progress=False, **options)


def test_real_sets_are_told_apart():
    found = result()
    table = found.to_frame()
    assert len(table) == 1024
    assert sorted(table.latent) == list(range(1024))
    best = table.iloc[0]
    assert best.q < 0.01
    assert best.p_family < 0.05
    assert best.auc_held_out > 0.75
    assert found.baselines.residual_auc > 0.85
    assert found.baselines.direction_auc > 0.85
    assert found.n_duplicates == 2
    assert (found.is_a.sum(), (~found.is_a).sum(), found.choosing.sum()) == (40, 60, 50)
    assert ((table.auc - 0.5).abs().diff().dropna() <= 1e-11).all()
    assert (found.to_frame("a").auc > 0.5).all()
    assert (found.to_frame("b").auc < 0.5).all()
    assert found.index_filter("a", n=2) == found.to_frame("a").query("q <= 0.05").latent.tolist()[:2]
    assert found.baselines.best_token == table.best_token[0]
    assert abs(best.auc - 0.5) > abs(best.token_auc - 0.5)


def test_statistics_are_of_the_half_that_chooses():
    found = result()
    z = found.pooled.latents[found.choosing].toarray()
    is_a = found.is_a[found.choosing]
    row = found.table.iloc[found.to_frame().latent[0]]
    assert row.mean_a == pytest.approx(z[is_a][:, int(row.latent)].astype(float).mean(), rel=1e-6)
    again = latent_statistics(found.pooled.latents, found.is_a, found.choosing, 200)
    assert again.equals(found.table)


def test_baselines_by_their_definitions():
    found = result()
    fit, a = found.choosing, found.is_a
    presence = np.array([[found.baselines.best_token_id in ids.tolist()] for ids in found.texts.ids])[:, 0]
    expected = 0.5 + (presence[fit & a].mean() - presence[fit & ~a].mean()) / 2
    assert found.baselines.token_auc == pytest.approx(expected, abs=1e-6)
    rest = ~fit
    expected = 0.5 + (presence[rest & a].mean() - presence[rest & ~a].mean()) / 2
    assert found.baselines.token_auc_held_out == pytest.approx(expected, abs=1e-6)
    x = found.pooled.residual.double().numpy()
    score = x @ (x[fit & a].mean(0) - x[fit & ~a].mean(0))
    pairs = score[rest & a][:, None] - score[rest & ~a][None]
    assert found.baselines.direction_auc == pytest.approx((pairs > 0).mean(), abs=1e-9)
    n = found.texts.n_tokens()
    pairs = n[rest & a][:, None] - n[rest & ~a][None]
    assert found.baselines.length_auc == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_direction_steers_by_the_difference():
    found, (model, _) = result(), panel_driver.embedded()
    direction, fit = found.direction(), torch.from_numpy(found.choosing)
    a = torch.from_numpy(found.is_a)
    difference = found.pooled.residual[fit & a].mean(0) - found.pooled.residual[fit & ~a].mean(0)
    torch.testing.assert_close(direction.W_dec[0].data, difference)
    with torch.no_grad():
        _, clean = model.run_with_cache("The river flows south")
        with saewb.steer(model, direction, {0: 1.0}):
            _, steered = model.run_with_cache("The river flows south")
    torch.testing.assert_close(steered[HOOK] - clean[HOOK], difference.expand_as(clean[HOOK]), atol=1e-4, rtol=1e-4)


def test_maxima_are_the_texts_of_largest_value():
    found, (model, _) = result(), panel_driver.embedded()
    latent = found.index_filter("a")[0]
    texts = found.maxima(model, latent, n=3)
    assert [t.value for t in texts] == sorted(found.pooled.latents[:, [latent]].toarray()[:, 0].tolist())[::-1][:3]
    for one in texts:
        given = sets()[0 if one.side == "a" else 1][one.index]
        assert one.text.endswith(given)
        assert max(one.activations) == pytest.approx(one.value, rel=1e-4)
        assert one.activations[0] == 0  # BOS does not count
    assert all(t.side == "b" for t in found.maxima(model, latent, side="b"))
    with pytest.raises(ValueError, match="has no latent 5000"):
        found.maxima(model, 5000)


def test_small_sets_are_not_split_and_say_so():
    model, sae = panel_driver.embedded()
    a, b = sets()
    found = saewb.contrast(model, sae, a[:12], b[:20], n_permutations=20, progress=False)
    assert not found.has_held_out
    assert "none: AUCs are of the texts that chose" in str(found)
    assert found.to_frame().auc_held_out.isna().all()
    assert np.isnan(found.baselines.residual_auc)
    whole = saewb.contrast(model, sae, a, b, held_out=0, n_permutations=20, progress=False)
    assert whole.choosing.all()


def test_several_saes_in_one_pass():
    model, sae = panel_driver.embedded()
    a, b = sets()
    neurons = saewb.neurons(model, "blocks.1.mlp.hook_post")
    both = saewb.contrast(model, [sae, neurons], a, b, n_permutations=200, progress=False)
    assert both[0].table.equals(result().table)
    assert len(both[1].table) == 384
    assert np.isfinite(both[1].table.auc).all()


def test_shown_as_text_html_and_figure():
    found = result()
    assert repr(found).startswith("Contrast(40 + 60 texts, ")
    assert "residual_auc" in str(found)
    assert "duplicates" in found._repr_html_()
    figure, table = found.plot(), found.to_frame()
    drawn = {int(i): (x, y) for t in figure.data for i, x, y in zip(t.customdata[:, 0], t.x, t.y, strict=True)}
    tested = table[table.q.notna()].set_index("latent")
    assert set(drawn) == set(tested.index)
    for latent in list(drawn)[:20]:
        assert drawn[latent] == pytest.approx((tested.log_odds[latent], -np.log10(tested.q[latent])))
    assert {t.name: len(t.x) for t in figure.data}["q > 0.05"] == (tested.q > 0.05).sum()
    assert minus_log10(np.array([1.0])).tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b": [*sets()[1], sets()[0][3]]}, r"b\[60\] is the same text as a\[3\]"),
        ({"a": ["A cat."] * 5}, "a has one text"),
        ({"held_out": 1.5}, "held_out=1.5"),
        ({"n_permutations": 0}, "n_permutations=0"),
        ({"pool": "median"}, "pool='median'"),
        ({"hook": "blocks.2.hook_resid_pst"}, "resid_post"),
    ],
)
def test_refused(options, message):
    model, sae = panel_driver.embedded()
    a, b = options.pop("a", sets()[0]), options.pop("b", sets()[1])
    with pytest.raises(ValueError, match=message):
        saewb.contrast(model, sae, a, b, progress=False, **options)
    with pytest.raises(ValueError, match="side='c'"):
        result().to_frame("c")
