"""A latent as plain JSON values; TokenRows."""

import json
from dataclasses import fields

import torch
from helpers import tiny_models

from saewb.features import Latent, build_index
from saewb.features.accumulate import TokenRows


def test_a_latent_as_plain_values():
    index = build_index(tiny_models.bridge(), tiny_models.sae("blocks.1.hook_resid_post"), tiny_models.tokens(6, 8))
    latent = max(index, key=lambda x: x.n_active)
    values = latent.to_dict()
    assert json.loads(json.dumps(values)) == values
    assert len(values) == len(fields(Latent)) + 1  # and the scale
    assert values["top"][0]["tokens"] == list(latent.top[0].tokens)
    assert values["top"][0]["acts"] == list(latent.top[0].acts)
    strongest = latent.quantiles[-1][-1]
    assert (values["groups"][0][0]["row"], values["groups"][0][0]["position"]) == (strongest.row, strongest.position)
    assert values["scale"] >= abs(latent.max)
    assert values["raised"][0] == [latent.logits_top[0].token, latent.logits_top[0].id, latent.logits_top[0].effect]
    assert sum(values["histogram"]["counts"]) == latent.n_active
    assert latent.to_dict(digits=2)["max"] == float(f"{latent.max:.2g}")
    assert latent.to_dict(digits=2)["top"][0]["acts"] == [float(f"{a:.2g}") for a in latent.top[0].acts]


def test_rows_keep_their_numbers():
    rows = TokenRows(torch.arange(12).view(4, 3), torch.ones(4, 3, dtype=torch.bool), first_row=5)
    part = rows[1:3]
    assert (part.first_row, part.end, len(part), rows.end) == (6, 8, 2, 9)
    assert part.row(7).tolist() == rows.row(7).tolist() == [6, 7, 8]
    window, inside = part.window(torch.tensor([0, 4]), 1, 1)
    assert window.tolist() == [[0, 0, 1], [3, 4, 5]]
    assert inside.tolist() == [[False, True, True], [True, True, True]]
