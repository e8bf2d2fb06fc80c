"""Whatever is attached, nested, run, hooked, reset and detached, in whatever order: a model of what must come out.

The machine keeps, beside the real model, a plain list of what was put on it, and computes each output by applying that
list in order. Longer by hand: `SAEWB_EXAMPLES=20000 pytest tests/test_attach_machine.py`.
"""

import functools
import os

import pytest
import torch
from helpers import tiny_models
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from saewb.interventions.attachment import attach, attachments
from saewb.models import hook_points

PLACES = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"]
ALIAS = {"blocks.0.hook_resid_post": "blocks.0.hook_out", "blocks.1.hook_mlp_out": "blocks.1.mlp.hook_out"}
TOKENS = tiny_models.tokens(1, 4)


class Entry:
    """One thing on a point, in the order it was put there: an attachment's SAE, or a hook of the user's."""

    def __init__(self, place, *, sae=None, owner=None, scale=None, permanent=False, inner=None):
        self.place, self.sae, self.owner = place, sae, owner
        self.scale, self.permanent, self.inner = scale, permanent, inner


class Boom(Exception):
    pass


def boom(activation, hook):
    raise Boom


class AttachMachine(RuleBasedStateMachine):
    kind = "bridge"

    @initialize()
    def start(self):
        self.model, self.twin = models(self.kind)
        self.before = tiny_models.snapshot(self.model)
        self.live = []  # attachments, oldest first
        self.entries = []
        self._known = None  # the last expected output, and of what
        with torch.no_grad():
            self.clean = self.model(TOKENS)

    # -- what may happen -----------------------------------------------------------------------------------------------

    @rule(data=st.data())
    def attach_some(self, data):
        places = data.draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3, unique=True))
        error_term = data.draw(st.booleans())
        saes, names = [], []
        for place in places:
            activation = data.draw(st.sampled_from(["relu", "topk"]))
            saes.append(
                tiny_models.sae(
                    place, activation, k=4 if activation == "topk" else None, seed=data.draw(st.integers(0, 3))
                )
            )
            canonical = data.draw(st.booleans()) and self.kind == "bridge"
            names.append(ALIAS.get(place, place) if canonical else place)
        attachment = attach(self.model, saes, hook=names, error_term=error_term)
        self.live.append(attachment)
        for place, sae in zip(places, saes, strict=True):
            self.entries.append(Entry(place, sae=sae, owner=(attachment, error_term)))

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def detach_any(self, data):
        self._gone(self.live.pop(data.draw(st.integers(0, len(self.live) - 1))))

    def _gone(self, attachment):
        attachment.detach()
        self.entries = [e for e in self.entries if e.owner is None or e.owner[0] is not attachment]
        self.entries = [e for e in self.entries if e.inner is None or e.inner.is_attached]

    @rule(place=st.sampled_from(PLACES), scale=st.sampled_from([0.5, 2.0]), permanent=st.booleans())
    def add_a_hook(self, place, scale, permanent):
        self.model.add_hook(place, lambda a, hook: a * scale, is_permanent=permanent)
        self.entries.append(Entry(place, scale=scale, permanent=permanent))

    @precondition(lambda self: self.live)
    @rule(data=st.data(), scale=st.sampled_from([0.0, 3.0]))
    def add_a_hook_inside(self, data, scale):
        place = data.draw(st.sampled_from([e.place for e in self.entries if e.sae is not None]))
        self.model.add_hook(f"{place}.hook_sae_acts_post", lambda a, hook: a * scale)
        self.entries.append(Entry(place, scale=scale, inner=self._top(place).owner[0]))

    @rule()
    def reset_hooks(self):
        self.model.reset_hooks()
        self.entries = [e for e in self.entries if e.sae is not None or e.permanent]

    @rule()
    def reset_hooks_and_permanent_ones(self):
        self.model.reset_hooks(including_permanent=True)
        # What is attached comes back at the start of the next pass: in the order of the attachments.
        self.entries = [e for e in self.entries if e.sae is not None]

    @rule()
    def run_with_cache(self):
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(TOKENS)
        torch.testing.assert_close(logits, self.expected(), atol=1e-4, rtol=1e-4)
        for place in PLACES:
            assert (f"{place}.hook_sae_acts_post" in cache) == (self._top(place) is not None)

    @rule(place=st.sampled_from(PLACES), scale=st.sampled_from([0.5, -1.0]))
    def run_with_hooks(self, place, scale):
        with torch.no_grad():
            got = self.model.run_with_hooks(TOKENS, fwd_hooks=[(place, lambda a, hook: a * scale)])
        extra = Entry(place, scale=scale)
        torch.testing.assert_close(got, self.expected([extra]), atol=1e-4, rtol=1e-4)

    @rule(place=st.sampled_from(PLACES), inside=st.booleans(), attached=st.booleans())
    def an_exception_in_the_middle(self, place, inside, attached):
        try:
            if attached:
                with attach(self.model, tiny_models.sae(place)):
                    where = f"{place}.hook_sae_recons" if inside else place
                    self.model.run_with_hooks(TOKENS, fwd_hooks=[(where, boom)])
            else:
                self.model.run_with_hooks(TOKENS, fwd_hooks=[(place, boom)])
        except Boom:
            return
        raise AssertionError("the hook did not run")

    @rule()
    def run_with_gradients(self):
        got = self.model(TOKENS)
        torch.testing.assert_close(got.detach(), self.expected(), atol=1e-4, rtol=1e-4)

    # -- what must hold ------------------------------------------------------------------------------------------------

    @invariant()
    def output_is_as_expected(self):
        if not hasattr(self, "model"):
            return
        with torch.no_grad():
            got = self.model(TOKENS)
        if not self.entries:
            assert torch.equal(got, self.clean)
            assert tiny_models.snapshot(self.model) == self.before
        torch.testing.assert_close(got, self.expected(), atol=1e-4, rtol=1e-4)
        assert attachments(self.model) == self.live

    def expected(self, extra=()):
        """The logits, by one plain torch function per point on a twin that nobody ever attached anything to."""
        entries = [*self.entries, *extra]
        if self._known is not None and self._known[0] == entries:
            return self._known[1]

        def at(place):
            def edit(activation):
                flat = activation.flatten(2) if activation.ndim == 4 else activation
                top = self._top(place)
                for entry in entries:
                    if entry.place != place or entry.inner is not None:
                        continue
                    flat = (
                        flat * entry.scale
                        if entry.sae is None
                        else self._spliced(flat, entry)
                        if entry is top
                        else flat
                    )
                return flat.reshape(activation.shape)

            return edit

        with torch.no_grad(), hook_points.editing(self.twin, {place: at(place) for place in PLACES}):
            self._known = entries, self.twin(TOKENS)
        return self._known[1]

    def _spliced(self, flat, entry):
        latents = entry.sae.encode(flat)
        for other in self.entries:
            if other.inner is entry.owner[0] and other.place == entry.place:
                latents = latents * other.scale
        out = entry.sae.decode(latents, flat)
        return out + (flat - entry.sae(flat)) if entry.owner[1] else out

    def _top(self, place):
        result = [e for e in self.entries if e.sae is not None and e.place == place]
        return max(result, key=lambda e: self.live.index(e.owner[0])) if result else None

    def teardown(self):
        if not hasattr(self, "model"):
            return
        self.model.reset_hooks(including_permanent=True)
        while self.live:
            self._gone(self.live.pop())
        assert tiny_models.snapshot(self.model) == self.before
        with torch.no_grad():
            assert torch.equal(self.model(TOKENS), self.clean)


@functools.cache
def models(kind):
    """Two of a kind with the same weights: one to attach to, and one that nobody ever attaches anything to."""
    make = tiny_models.new_bridge if kind == "bridge" else tiny_models.new_hooked
    return make(layers=2), make(layers=2)


@pytest.mark.timeout(0)
@pytest.mark.parametrize("examples", [50, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", tiny_models.kinds())
def test_any_order_of_everything(kind, examples):
    from hypothesis.stateful import run_state_machine_as_test

    more = int(os.environ.get("SAEWB_EXAMPLES", "0"))
    run_state_machine_as_test(
        type("Machine", (AttachMachine,), {"kind": kind}),
        settings=settings(
            max_examples=more or examples,
            stateful_step_count=8,
            deadline=None,
            derandomize=not more,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
