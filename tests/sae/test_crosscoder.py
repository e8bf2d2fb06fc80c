"""CrossCoderSAE against the formulas in numpy, and against one SAE over the points side by side."""

import numpy as np
import pytest
import torch
from helpers import tiny_models

import saewb

WIDTHS, D_SAE = (5, 7), 24


def crosscoder(activation="jumprelu", dtype=torch.float64, seed=0, points=("a", "b"), widths=WIDTHS):
    cfg = saewb.CrossCoderConfig(points, widths, D_SAE, activation)
    rng = torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(s, generator=rng, dtype=torch.float64) * 0.4 for n, s in cfg.tensor_shapes().items()}
    for name in {"scale", "threshold"} & tensors.keys():
        tensors[name] = tensors[name].abs() + 0.1
    return saewb.CrossCoderSAE.from_tensors(cfg, {n: t.to(dtype) for n, t in tensors.items()})


def activations(n=9, widths=WIDTHS, seed=1, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed)
    values = (torch.randn(n, d, generator=rng, dtype=torch.float64) * 1.5 + 0.3 for d in widths)
    return {point: x.to(dtype) for point, x in zip("ab", values, strict=False)}


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_is_the_formula(activation):
    cross, x = crosscoder(activation), activations()
    w = {name: p.detach().numpy() for name, p in cross.named_parameters()}
    u = np.concatenate([x["a"].numpy(), x["b"].numpy()], 1)
    u = (u - w["mean"]) * w["scale"]
    z = np.maximum(u @ w["W_enc"] + w["b_enc"], 0)
    z = np.where(z > w["threshold"], z, 0) if activation == "jumprelu" else z
    y = (z @ w["W_dec"] + w["b_dec"]) / w["scale"] + w["mean"]
    np.testing.assert_allclose(cross.encode(x).detach(), z, rtol=1e-12)
    np.testing.assert_allclose(cross.decode(cross.encode(x)).detach(), y, rtol=1e-12)
    np.testing.assert_allclose(
        cross.norms().detach(), [np.linalg.norm(w["W_dec"][:, s], axis=1) for s in (slice(5), slice(5, 12))]
    )
    both = torch.cat([x["a"], x["b"]], 1)
    one = cross.as_sae()
    torch.testing.assert_close(one.encode(both), cross.encode(both))
    torch.testing.assert_close(one(both), cross(x))
    torch.testing.assert_close(cross.encode_sparse(x).dense(), cross.encode(x).detach())
    torch.testing.assert_close(cross.decode(cross.encode_sparse(x)), cross(x))
    assert torch.equal(cross.encode(x, latents=[3, 1]), cross.encode(x)[:, [3, 1]])
    parts = cross.split(both)
    assert all(torch.equal(parts[point], x[point]) for point in "ab")


def test_gradients_pass_and_taps_see_what_there_is():
    cross, x = crosscoder("relu"), activations()
    x["a"].requires_grad_()
    seen = []
    cross.decode(
        cross.encode(x, tap=lambda name, v: seen.append(name) or v), tap=lambda name, v: seen.append(name) or v
    ).sum().backward()
    assert seen == ["acts_pre", "acts_post", "recons"]
    assert x["a"].grad.abs().sum() > 0


def test_scale_of_a_published_file():
    cross = crosscoder(dtype=torch.float32).with_scale({"b": 0.5, "a": 2.0})
    assert cross.scale.tolist() == [2.0] * 5 + [0.5] * 7
    with pytest.raises(ValueError, match="a positive factor for each of a, b"):
        cross.with_scale({"a": 1.0})


def test_wrong_input_says_what_to_type():
    cross, x = crosscoder(dtype=torch.float32), activations(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"no activations of 'b'.\n  want: a, b"):
        cross.encode({"a": x["a"]})
    with pytest.raises(ValueError, match=r"'b' of shape \(9, 5\).\n  want: \[..., 7\]"):
        cross.encode({"a": x["a"], "b": x["a"]})
    with pytest.raises(ValueError, match="got x of shape"):
        cross.encode(x["a"])
    with pytest.raises(ValueError, match="got points=\\('a', 'a'\\)"):
        saewb.CrossCoderConfig(("a", "a"), (2, 2), 3)
    with pytest.raises(ValueError, match="got widths=\\(2,\\)"):
        saewb.CrossCoderConfig(("a", "b"), (2,), 3)


def test_attaching_and_the_like_are_refused():
    model, cross = tiny_models.bridge(), crosscoder(dtype=torch.float32)
    for call in (
        saewb.attach,
        lambda m, s: saewb.evaluate(m, s, tiny_models.tokens()),
        lambda m, s: saewb.build_index(m, s, tiny_models.tokens()),
    ):
        with pytest.raises(TypeError, match="reads a and b at once"):
            call(model, cross)
