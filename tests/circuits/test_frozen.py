"""Freezing: constants in every family, affine passes, direct effects that sum to the logit, and models it refuses."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny_models
from helpers.families import FAMILIES, family

import saewb
from saewb.circuits.frozen import FINAL, STREAM, quiet
from saewb.models import hook_points

IDS = tiny_models.tokens(1, 6, seed=3)


def final_norm(model, tokens, stream=None, points=()):
    """Output of the final norm, with another residual stream at the start."""
    seen, edits = {}, {FINAL: lambda x: seen.update(final=x)}
    if stream is not None:
        edits[STREAM] = lambda x: stream
    with quiet(), hook_points.editing(model, edits):
        model(tokens)
    return seen["final"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_frozen_model_is_the_model_and_affine(name):
    model = family(name)
    before = tiny_models.snapshot(model)
    clean = final_norm(model, IDS)
    with saewb.freeze(model, IDS) as frozen, torch.no_grad():
        torch.testing.assert_close(final_norm(model, IDS), clean, rtol=1e-4, atol=1e-4)
        a, b = torch.randn(2, *frozen.stream.shape) * 3
        zero = torch.zeros_like(a)
        f = lambda x: final_norm(model, IDS, x).double()  # noqa: E731
        torch.testing.assert_close(f(a + b) - f(zero), f(a) + f(b) - 2 * f(zero), rtol=1e-3, atol=1e-4)
        rows = final_norm(model, IDS.expand(3, -1))
        torch.testing.assert_close(rows, clean.expand(3, -1, -1), rtol=1e-4, atol=1e-4)
    assert 0 <= frozen.curvature < 1e-4
    assert (len(frozen.patterns), len(frozen.mlp_outputs)) == (3, 3)
    assert torch.equal(final_norm(model, IDS), clean)
    assert tiny_models.snapshot(model) == before


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_is_frozen_as_it_is_in_the_whole(name):
    model = family(name)
    with saewb.freeze(model, IDS) as frozen:
        pass
    assert frozen.is_causal
    prefix = frozen.prefix(4)
    assert prefix.tokens.shape == (1, 4)
    with torch.no_grad(), hook_points.editing(model, prefix.edits()):
        torch.testing.assert_close(final_norm(model, prefix.tokens), frozen.final[:, :4], rtol=1e-4, atol=1e-4)
    ahead = {name: pattern.flip(-1) for name, pattern in frozen.patterns.items()}
    wider = {name: torch.nn.functional.pad(pattern, (0, 1)) for name, pattern in frozen.patterns.items()}
    assert not replace(frozen, patterns=ahead).is_causal
    assert not replace(frozen, patterns=wider).is_causal


@pytest.mark.parametrize("name", FAMILIES)
def test_direct_effects_and_constants_sum_to_the_output(name):
    """Of the embeddings and every MLP; the rest is what the frozen model computes of nothing."""
    model = family(name)
    with saewb.freeze(model, IDS, mlps=False) as frozen:
        leaves = {STREAM: frozen.stream, **frozen.mlp_outputs}
        leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}

        def output(values):
            seen = {}
            edits = {name: lambda x, name=name: values[name] for name in leaves}
            with quiet(), hook_points.editing(model, {**edits, FINAL: lambda x: seen.update(final=x)}):
                model(IDS)
            return seen["final"]

        target = output(leaves)[0, -1] @ torch.arange(16.0)
        slopes = torch.autograd.grad(target, list(leaves.values()))
        effects = sum(
            float((slope * value).sum().detach()) for slope, value in zip(slopes, leaves.values(), strict=True)
        )
        constant = output({name: torch.zeros_like(value) for name, value in leaves.items()})[0, -1] @ torch.arange(16.0)
    assert effects + float(constant.detach()) == pytest.approx(float(target.detach()), rel=1e-4)


def test_parts_can_be_left_free():
    model = tiny_models.bridge()
    with saewb.freeze(model, IDS, attention=False, norms=False) as frozen:
        seen = {}
        name = next(iter(frozen.patterns))
        with hook_points.editing(model, {name: lambda x: seen.update(pattern=x)}), torch.no_grad():
            model(torch.flip(IDS, (1,)))
        assert not torch.allclose(seen["pattern"], frozen.patterns[name])
    assert "6 tokens: 3 attention patterns, 7 norm scales, 3 MLP outputs" in repr(frozen)


def test_a_pass_of_another_length_is_refused():
    model = tiny_models.bridge()
    with saewb.freeze(model, IDS), pytest.raises(ValueError, match="rows of as many tokens"):
        model(IDS[:, :4])


def test_a_model_that_only_shows_its_attention_is_refused():
    """As those of transformer-lens that compute attention elsewhere: an edit of the pattern has no effect."""
    from transformer_lens.hook_points import HookPoint

    class Shown(HookPoint):
        def __call__(self, x):
            super().__call__(x)
            return x

    model = tiny_models.new_bridge()
    model.blocks[1].attn.hook_pattern.__class__ = Shown
    with pytest.raises(ValueError, match=r"cannot be frozen.*not affine"), saewb.freeze(model, IDS):
        pass
