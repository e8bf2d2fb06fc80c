"""A model in half precision with SAEs in float32, and the other way round: everything runs, and gives nearly the same.

Expected values: the same rounded weights in float32, so that only the rounding of the arithmetic differs. Results that
choose (contexts, generated tokens, strongest nodes) may choose otherwise: they have to run, and be finite.
"""

import functools
import math

import pandas as pd
import pytest
import torch
from devices.runs import EARLY, LATE, runs, saes
from helpers import tiny_models

import saewb

PAIRS = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float16),
]
ERROR = {torch.bfloat16: 0.12, torch.float16: 0.02}  # of a row of logits, relative to its length, after three blocks


@functools.cache  # nothing here changes a model
def pair(model_dtype, sae_dtype):
    """A model and SAEs in these dtypes, and the same in float32."""
    model = tiny_models.new_bridge(model_dtype)
    expected = tiny_models.new_bridge(model_dtype).to(torch.float32, print_details=False)
    a, b = (sae.to(sae_dtype) for sae in saes())
    exact = [
        type(sae).from_tensors(sae.cfg, {n: t.detach().float() for n, t in sae.tensors().items()}) for sae in (a, b)
    ]
    return runs(model, a, b), runs(expected, *exact), model, (a, b)


def off(result, expected):
    """Relative error of a tensor."""
    result, expected = result.detach().float(), expected.detach().float()
    return float((result - expected).norm() / expected.norm())


def finite(result):
    if isinstance(result, torch.Tensor):
        return not result.isinf().any()
    if isinstance(result, pd.DataFrame):
        return not result.select_dtypes("number").isin([math.inf, -math.inf]).any().any()
    if isinstance(result, torch.nn.Module):
        return all(map(finite, result.parameters()))
    if isinstance(result, dict):
        return all(map(finite, result.values()))
    return all(map(finite, result)) if isinstance(result, (list, tuple)) else True


@pytest.mark.parametrize(("model_dtype", "sae_dtype"), PAIRS, ids=str)
def test_activations_keep_the_models_dtype_and_latents_the_saes(model_dtype, sae_dtype):
    half, full, model, (a, b) = pair(model_dtype, sae_dtype)
    most = max(ERROR.get(dtype, 0) for dtype in (model_dtype, sae_dtype))
    result = half["attach"]()
    assert result["logits"].dtype == model_dtype
    assert {result["early"].dtype, result["late"].dtype} == {sae_dtype}
    for name in ("attach", "attach with error", "steer"):
        got, want = (run[name]() for run in (half, full))
        got, want = (got["logits"], want["logits"]) if name == "attach" else (got, want)
        assert got.dtype == model_dtype
        assert off(got, want) < most, name
    for got, want, sae in zip(half["gradients"](), full["gradients"](), (a, b), strict=True):
        assert got.dtype == sae.dtype
        assert off(got, want) < 5 * most
    for got, want in zip(half["evaluate"](), full["evaluate"](), strict=True):
        numbers = (
            pd.DataFrame({"got": got.iloc[0], "want": want.iloc[0]})
            .loc[["l0", "fvu", "ce_with_sae", "kl"]]
            .astype(float)
        )
        assert (numbers.got - numbers.want).abs().max() < 10 * most * numbers.want.abs().max()
    point = saewb.stream_activations(model, tiny_models.tokens(8, 8), [EARLY, LATE], batch_tokens=16)
    assert {value.dtype for value in next(point).values.values()} == {model_dtype}


@pytest.mark.parametrize(("model_dtype", "sae_dtype"), PAIRS[:3], ids=str)
@pytest.mark.parametrize(
    "name", [name for name in runs(None, None, None) if name not in ("attach", "evaluate", "steer")]
)
def test_everything_else_runs_and_is_finite(model_dtype, sae_dtype, name):
    half, *_ = pair(model_dtype, sae_dtype)
    result = half[name]()
    assert finite(result)
    if name == "index":  # nan is what was not computed, and nowhere else
        assert {n for of_one in result for n, t in of_one.items() if t.isnan().any()} == {"loss_effects"}
    if name == "train":
        assert {sae.dtype for sae in result["saes"].values()} == {torch.float32}
