"""`diff` in closed form, latent scaling against least squares, streams, errors."""

import numpy as np
import pytest
import torch
from sae.test_crosscoder import D_SAE, activations, crosscoder

import saewb

WIDTHS = (6, 6)


@pytest.fixture(scope="module")
def case():
    cross, x = crosscoder(widths=WIDTHS), activations(300, WIDTHS)
    with torch.no_grad():
        cross.W_dec[0, :6] = 0  # of b alone
        cross.W_dec[1, 6:] = 0  # of a alone
        cross.W_dec[2, 6:] = -cross.W_dec[2, :6]  # of both, opposite
        cross.b_enc[3] = -100  # never fires
    return cross, x, saewb.diff(cross, x, batch_tokens=70)


def test_norms_classes_and_firing(case):
    cross, x, result = case
    table, a, b = result.to_frame(), *(np.linalg.norm(w.detach(), axis=1) for w in cross.W_dec.split(6, dim=1))
    np.testing.assert_allclose(table.norm_a, a)
    np.testing.assert_allclose(table.delta_norm, 0.5 * ((b - a) / np.maximum(a, b) + 1))
    assert table["class"].tolist()[:3] == ["b only", "a only", "shared"]
    assert (table.delta_norm[:3].tolist(), table.cosine[2]) == ([1.0, 0.0, 0.5], pytest.approx(-1))
    acts = cross.encode(x).detach().numpy()
    np.testing.assert_allclose(result.density, (acts > 0).mean(0))
    np.testing.assert_array_equal(result["n_active"], (acts > 0).sum(0))
    np.testing.assert_allclose(table.mean_activation, [z[z > 0].mean() if z.any() else np.nan for z in acts.T])
    assert (len(result), result.n_tokens, result.points) == (D_SAE, 300, ("a", "b"))
    assert sum(result.counts().values()) == D_SAE - 1
    recons = cross.split(cross(x).detach())
    for point, values in x.items():
        assert result.reconstruction[point].fvu == pytest.approx(saewb.metrics.fvu(values, recons[point]).item())


def test_latent_scaling_is_least_squares(case):
    cross, x, result = case
    u, acts, W = (
        cross.normalize_input(x).detach().numpy(),
        cross.encode(x).detach().numpy(),
        cross.W_dec.detach().numpy(),
    )
    recons = acts @ W + cross.b_dec.detach().numpy()
    for i in (0, 1, 2, 7, 19):
        f, own = acts[:, i], slice(0, 6) if np.linalg.norm(W[i, :6]) >= np.linalg.norm(W[i, 6:]) else slice(6, 12)
        design = np.outer(f, W[i, own]).reshape(-1, 1)
        beta = {}
        for point, span in (("a", slice(0, 6)), ("b", slice(6, 12))):
            targets = {"error": (u - recons)[:, span] + np.outer(f, W[i, span]), "rec": recons[:, span]}
            for name, y in targets.items():
                (fit,), *_ = np.linalg.lstsq(design, y.reshape(-1), rcond=None)
                beta[name, point] = fit
                assert result[f"beta_{name}_{point}"][i] == pytest.approx(fit, rel=1e-9, abs=1e-12)
                active = y[f > 0]
                left = ((active - fit * np.outer(f, W[i, own])[f > 0]) ** 2).sum() / (active**2).sum()
                assert result[f"r2_{name}_{point}"][i] == pytest.approx(1 - left, rel=1e-9, abs=1e-12)
        of, other = ("a", "b") if own.start == 0 else ("b", "a")
        for name in ("error", "rec"):
            assert result[f"nu_{name}"][i] == pytest.approx(beta[name, other] / beta[name, of], rel=1e-9)
    assert np.isnan(result.nu_error[3])  # does not fire


def test_batches_streams_and_limits_do_not_matter(case):
    cross, x, result = case
    whole = saewb.diff(cross, saewb.Activations(x))
    streamed = saewb.diff(cross, saewb.stream_tensors(x, batch_tokens=100))
    for other in (whole, streamed):
        numbers = [name for name in result.table if name != "class"]
        np.testing.assert_allclose(other.table[numbers], result.table[numbers], rtol=1e-9, atol=1e-12)
    first = saewb.diff(cross, saewb.stream_tensors(x, batch_tokens=100, repeat=True), n_tokens=150)
    part = saewb.diff(cross, {point: values[:150] for point, values in x.items()})
    np.testing.assert_allclose(first.density, part.density)
    few = saewb.diff(cross, x, n_scaled=2)
    assert set(few.table.index[few.nu_error.notna()]) == {0, 1}  # farthest from shared
    swapped = saewb.diff(cross, x, points=("b", "a"))
    np.testing.assert_allclose(swapped.delta_norm, 1 - result.delta_norm)


def test_other_widths_have_no_cosine_and_no_scaling():
    result = saewb.diff(crosscoder(), activations(50))
    assert result.cosine.isna().all()
    assert result.nu_error.isna().all()
    assert result.delta_norm.notna().all()


def test_plot_and_text(case):
    figure = case[2].plot()
    shown = sum(len(trace.x) for trace in figure.data if trace.type == "histogram")
    assert shown == D_SAE - 1
    assert "23 of 24 latents fire on 300 tokens" in figure.layout.title.text
    assert "a only" in str(case[2])
    assert "<table" in case[2]._repr_html_()
    with pytest.raises(AttributeError, match="no 'delta'"):
        case[2].delta  # noqa: B018


def test_errors_say_what_to_type(case):
    cross, x, _ = case
    with pytest.raises(TypeError, match="diff got a SAE"):
        saewb.diff(cross.as_sae(), x)
    with pytest.raises(ValueError, match="no point 'c'"):
        saewb.diff(cross, x, points=("a", "c"))
    with pytest.raises(ValueError, match="two different ones"):
        saewb.diff(cross, x, points=("a", "a"))
    with pytest.raises(ValueError, match="no activations of 'b'"):
        saewb.diff(cross, {"a": x["a"]})
    with pytest.raises(ValueError, match="no token"):
        saewb.diff(cross, {"a": x["a"][:0], "b": x["b"][:0]})
