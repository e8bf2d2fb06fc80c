"""The order in which latents are shown: those a person can name first."""

import pytest
import torch

import saewb
from saewb.features.ranking import token_coherence

# Read by us, each with its twelve strongest contexts: what one would call them.
NAMED = {
    21: "a direction, after 'to the'",
    548: "'second' or 'fourth', before '-largest'",
    63: "how many there are: two, three, four",
    484: "which side of a place",
    683: "a number in words: five, six, seven",
    179: "'Some' or 'Many', beginning a sentence on a kind of thing",
    134: "an individual, a living being",
    618: "which in order of size",
    807: "a person's nation, after 'was a'",
    378: "what has been done: identified, recognized",
    4: "what a person did: founded, received, won",
    2: "'there', also of 'therefore'",
    299: "how many people live there",
    346: "south of something",
}


def plainly(tokens):
    """The formula, token by token."""
    counts = [{t: row.count(t) for t in row if t >= 0} for row in tokens.tolist()]
    items = []
    for i, mine in enumerate(counts):
        vectors = {t: torch.tensor([float(c.get(t, 0)) for j, c in enumerate(counts) if j != i]) for t in mine}
        unit = {t: v / v.norm().clamp_min(1e-12) for t, v in vectors.items()}
        above = below = 0.0
        for t in mine:
            for u in mine:
                if t != u:
                    below += mine[t] * mine[u]
                    above += mine[t] * mine[u] * float(unit[t] @ unit[u])
        items.append(above / below if below else 0.0)
    return torch.tensor(items)


def test_kinship_is_its_formula():
    rng = torch.Generator().manual_seed(1)
    kinds = torch.randint(0, 12, (300, 1), generator=rng) * 5 + torch.randint(0, 5, (300, 30), generator=rng)
    stray = torch.randint(0, 60, (300, 30), generator=rng)
    how_stray = torch.rand(300, 1, generator=rng)
    tokens = stray.where(torch.rand(300, 30, generator=rng) < how_stray, kinds)
    tokens[torch.rand(tokens.shape, generator=rng) < 0.1] = -1  # fewer contexts than there is room for
    off, expected = token_coherence(tokens) - plainly(tokens), plainly(tokens)
    assert expected.std() > 0.1
    assert float(off.abs().max()) < 0.08
    assert float(off.std()) < 0.02


def test_kinship_of_the_clear_cases():
    of_a_kind = [[3, 3, 8, 8]] * 3  # each pair always together: the cosine is 1, whatever the signs
    result = token_coherence(torch.tensor([*of_a_kind, [5, 5, 5, 5], [20, 21, 22, -1], [-1, -1, -1, -1]]))
    assert result.tolist() == pytest.approx([1, 1, 1, 0, 0, 0], abs=1e-6)
    assert token_coherence(torch.full((2, 3), -1)).tolist() == [0, 0]


def test_kinship_is_the_same_each_time_and_leaves_the_global_seed():
    tokens = torch.randint(-1, 50, (200, 20), generator=torch.Generator().manual_seed(0))
    first = token_coherence(tokens)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(token_coherence(tokens), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_best_ten_of_the_embedded_sae_have_names():
    """On the texts of `saewb demo`: what it prints is what this reads."""
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    texts = [document.text for document in saewb.tiny.held_out_texts()][:300]
    best = saewb.build_index(model, sae, texts).ranking(10)
    assert set(best) <= set(NAMED)
