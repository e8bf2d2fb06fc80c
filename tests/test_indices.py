"""Index arguments and masks of any library: one conversion, used by every function that takes latents and the like."""

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import tiny_models

import saewb
from saewb._indices import index_of, index_slice, indices_of

MASK = [False, True, False, True, False]
RESID = "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    "values",
    [
        [1, 3],
        (1.0, 3.0),
        range(1, 5, 2),
        torch.tensor([1, 3]),
        np.array([1, 3], dtype=np.uint8),
        pd.Series([1, 3], index=[3, 1]),
        pd.array([1, 3], dtype="Int64"),
        [torch.tensor(1), np.int64(3)],
        {1: "a", 3: "b"}.keys(),
        MASK,
        torch.tensor(MASK),
        np.array(MASK),
        pd.Series(MASK, index=[4, 3, 2, 1, 0]),
        pd.Series(MASK, dtype="boolean"),
    ],
)
def test_the_same_indices_from_every_library(values):
    assert indices_of(values, "latents", 5).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("values", "error", "says"),
    [
        ([1, 2.5], ValueError, "2.5"),
        (torch.tensor([1.5]), ValueError, "not whole"),
        (torch.tensor([torch.inf]), ValueError, "not whole"),
        ([5], ValueError, r"no latents \[5\]"),
        ([-1], ValueError, r"no latents \[-1\]"),
        (MASK[:4], ValueError, "a mask of 4"),
        ([1, 1, 0, 1], ValueError, "bool"),
        ([True, 3], TypeError, "latents=True"),
        (True, TypeError, "latents=True"),
        (torch.tensor(True), TypeError, "latents=True"),
        ("12", TypeError, "'12'"),
        (["1"], TypeError, "'1'"),
        ({1: 2.0}, TypeError, "an index, several"),
        (None, TypeError, "None"),
        (pd.array([1, None], dtype="Int64"), (TypeError, ValueError), "whole|integer"),
        (torch.ones(1, 4, dtype=torch.long), ValueError, r"latents\[0\]"),
    ],
)
def test_what_is_no_index(values, error, says):
    with pytest.raises(error, match=says):
        indices_of(values, "latents", 5)


def test_one_index_and_slices():
    assert index_of(np.int64(-1), "position", 5, from_end=True) == 4
    assert index_slice(slice(np.int64(1), torch.tensor(4)), "positions") == slice(1, 4, None)
    for wrong in (True, "1", [1]):
        with pytest.raises(TypeError):
            index_of(wrong, "latent", 5)
    with pytest.raises(TypeError, match="slice"):
        index_slice([1, 2], "positions")


@pytest.mark.parametrize("convert", [list, torch.tensor, np.array, pd.Series])
def test_a_mask_means_what_it_selects_everywhere(convert):
    """Latents 3 and 7 of 40, positions 2 and 4 of 7."""
    model, sae, ids = tiny_models.bridge(), tiny_models.sae(RESID), tiny_models.tokens(1, 7)
    latents, positions = (convert([i in some for i in range(n)]) for n, some in ((40, (3, 7)), (7, (2, 4))))
    clean = model(ids)
    with saewb.steer(model, sae, {5: 9.0}, positions=positions):
        _, there = model.run_with_cache(ids, names_filter=RESID)
    _, before = model.run_with_cache(ids, names_filter=RESID)
    assert (there[RESID] - before[RESID])[0].norm(dim=-1).nonzero()[:, 0].tolist() == [2, 4]
    with saewb.ablate(model, sae, latents):
        got = model(ids)
    with saewb.ablate(model, sae, [3, 7]):
        assert torch.equal(model(ids), got)
    assert not torch.equal(clean, got)
    view = saewb.matrix_view(sae)
    assert torch.equal(view.block(latents, [1]), view.block([3, 7], [1]))
    effects = torch.arange(20.0)[None]
    members = convert([i > 16 for i in range(20)])
    assert saewb.enrich(effects, {"last": members}, n_permutations=9).score.tolist() == [1.0]


def test_numbers_of_numpy_are_numbers():
    model, sae = tiny_models.bridge(), tiny_models.sae(RESID)
    ids = tiny_models.tokens(1, 7)
    target = np.int64(9)
    reading = saewb.read_prompt(model, ids.numpy(), sae, target=target)
    assert reading.target == 9
    assert reading.to_frame(position=np.int64(-1), sae=np.int64(0)).position.unique().tolist() == [6]
    plain = saewb.attribute(model, ids, sae, 9).metric
    assert saewb.attribute(model, ids[0].tolist(), sae, target).metric == plain
    assert saewb.TopK(d_sae=np.int64(64), k=np.int32(4)) == saewb.TopK(d_sae=64, k=4)
