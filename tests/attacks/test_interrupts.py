"""Ctrl-C at every moment of attach, steer, and whatever runs the model: it is clean again, and its lock is free."""

import os

import pytest
import torch
from helpers import interrupts, tiny_models

import saewb
from saewb.models import hook_points

AT = "blocks.1.hook_resid_post"
PARTS = ("interventions", "models")
SECONDS = float(os.environ.get("SAEWB_ATTACK_SECONDS", 60))


@pytest.fixture(scope="module")
def models():
    """A model, an SAE and a transcoder of its points, and what the model computes by itself."""
    model, ids = tiny_models.new_bridge(), tiny_models.tokens()
    sae = tiny_models.sae(AT, "topk", k=4)
    transcoder = tiny_models.sae("blocks.0.mlp.hook_in", hook_out="blocks.0.hook_mlp_out")
    work = {
        "attach": lambda: attach(model, sae, transcoder, ids),
        "steer": lambda: steer(model, sae, transcoder, ids),
        "capture": lambda: saewb.models.capture.capture(model, ids, [AT]),
        "evaluate": lambda: saewb.evaluate(model, sae, ids),
        "read_prompt": lambda: saewb.read_prompt(model, ids[:1], sae),
    }
    for call in work.values():
        call()
    with torch.no_grad():
        return model, ids, work, tiny_models.snapshot(model), _hooks(model), model(ids)


def attach(model, sae, transcoder, ids):
    with saewb.attach(model, [sae, transcoder], error_term=True), saewb.attach(model, sae), torch.no_grad():
        model(ids)


def steer(model, sae, transcoder, ids):
    with saewb.steer(model, {sae: {3: 8.0}, transcoder: {1: 2.0}}, how="clamp"), torch.no_grad():
        model(ids)


def _hooks(model):
    modules = [*model.modules(), *model.original_model.modules()]
    return [(list(module._forward_hooks), list(module._forward_pre_hooks)) for module in modules]


def _check_clean(models, where):
    model, ids, _, before, hooks, logits = models
    torch.set_grad_enabled(True)  # torch's own no_grad may have been interrupted
    saewb.detach_all(model)
    assert saewb.attachments(model) == [], where
    assert _hooks(model) == hooks, where
    assert tiny_models.snapshot(model) == before, where
    assert not any(module.training for module in model.modules()), where
    with torch.no_grad():
        assert torch.equal(model(ids), logits), where
    assert interrupts.other_thread_can_take(hook_points.lock(model)), where


def _attack(models, name, stride, opcodes=False, start=0):
    call, n = models[2][name], start
    while interrupts.interrupted_at(n, call, PARTS, opcodes):
        _check_clean(models, f"{name}, event {n}")
        n += stride
    assert n > start
    return -(-(n - start) // stride)


@pytest.mark.parametrize("name", ["attach", "steer", "capture"])
def test_an_interrupt_leaves_the_model_clean(models, name):
    _attack(models, name, stride=23, start=7)


@pytest.mark.attack
@pytest.mark.parametrize("name", ["attach", "steer", "capture", "evaluate", "read_prompt"])
def test_an_interrupt_at_every_line_leaves_the_model_clean(models, name):
    print(name, _attack(models, name, stride=1), "interrupts")


@pytest.mark.attack
@pytest.mark.parametrize("name", ["attach", "steer", "capture"])
def test_an_interrupt_at_every_bytecode_leaves_the_model_clean(models, name):
    print(name, _attack(models, name, stride=1, opcodes=True), "interrupts")


@pytest.mark.attack
@pytest.mark.parametrize("name", ["attach", "steer", "capture", "evaluate", "read_prompt"])
def test_signals_at_random_moments_leave_the_model_clean(models, name):
    n = 0
    for was_interrupted in interrupts.signals(models[2][name], SECONDS, longest=0.03):
        n += was_interrupted
        _check_clean(models, f"{name}, signal {n}")
    print(name, n, "interrupts")
    assert n
