"""What the tests of published layouts share: weights no two dimensions of which agree, and the arithmetic in numpy."""

import numpy as np
import torch

D, F, O = 16, 40, 12  # noqa: E741  (the letters of the layouts' descriptions)
NEAR = {"atol": 1e-5, "rtol": 1e-5}


def weights(d_in=D, d_sae=F, d_out=None, seed=0, scale=0.4, **more):
    """float32 arrays by saewb's names: biases that are not zero, decoder rows of different norms; `more`: shapes."""
    rng = np.random.default_rng(seed)
    d_out = d_in if d_out is None else d_out
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": (d_sae,), "b_dec": (d_out,), **more}
    result = {name: (rng.standard_normal(shape) * scale).astype(np.float32) for name, shape in shapes.items()}
    result["W_dec"] *= np.linspace(0.5, 2, d_sae, dtype=np.float32)[:, None]
    return result


def inputs(rows=50, d_in=D, seed=9, scale=1.0):
    return (np.random.default_rng(seed).standard_normal((rows, d_in)) * scale).astype(np.float32)


def near_the_median(w, x, seed=3):
    """A threshold per latent, positive, near the median of what is positive before the gate: both sides of it occur."""
    pre = x @ w["W_enc"] + w["b_enc"]
    middle = np.nanmedian(np.where(pre > 0, pre, np.nan), axis=0)
    spread = np.random.default_rng(seed).uniform(0.8, 1.2, len(middle))
    return (np.nan_to_num(middle, nan=0.5) * spread).astype(np.float32)


def gated(pre, threshold=0.0):
    """JumpReLU, strictly above the threshold; ReLU without one."""
    return np.where((pre > threshold) & (pre > 0), pre, 0)


def wide(w):
    return {name: np.asarray(array, dtype=np.float64) for name, array in w.items()}


def assert_computes(sae, x, latents, out):
    """encode, one latent of it, decode and forward are these, within 1e-5 of the largest."""
    on = (latents != 0).mean()
    assert 0.02 < on < 0.98, on
    assert ((latents != 0).any(0) & (latents == 0).any(0)).mean() > 0.5  # most latents are on here and off there
    arguments = torch.from_numpy(x)
    scales = {"latents": np.abs(latents).max(), "out": np.abs(out).max()}
    with torch.no_grad():
        _near(sae.encode(arguments), latents, scales["latents"])
        _near(sae.encode(arguments, latents=[7, 2]), latents[:, [7, 2]], scales["latents"])
        _near(sae.decode(torch.from_numpy(latents.astype(np.float32)), arguments), out, scales["out"])
        _near(sae(arguments), out, scales["out"])


def _near(got, want, scale):
    np.testing.assert_allclose(got.numpy() / scale, want / scale, atol=1e-5, rtol=1e-5)


def tensors(w, dtype=torch.float32, **names):
    """As torch tensors, contiguous, some under other names (`theirs="ours"`), the others left out if any is named."""
    chosen = {theirs: w[ours] for theirs, ours in names.items()} if names else w
    return {name: torch.from_numpy(np.ascontiguousarray(a)).to(dtype).contiguous() for name, a in chosen.items()}


def rounded(w, dtype):
    """What is left of the arrays when stored in `dtype`."""
    return {name: torch.from_numpy(np.ascontiguousarray(a)).to(dtype).float().numpy() for name, a in w.items()}
