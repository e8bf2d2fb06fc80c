"""How often the host waits for the device: per training step, index batch, generated token, ... in steady state.

Each scenario is run twice, for a few units of work and for a few more; the difference is per unit, without what is
done once.
"""

from __future__ import annotations

from collections import Counter

import torch
from devices.world import HOOK
from helpers import objective_registry
from helpers.second_device import transfers

import saewb

PASS = {"ctx_len": 13, "pass_tokens": 26}  # a pass is two rows: the 24 tokens of a batch, and two BOS


def per_unit(run, few, more):
    """Counts of one unit of work, by kind: `run(n)` does n units."""
    counts = []
    run(few)  # what is done once in a process
    for n in (few, more):
        with transfers() as counted:
            run(n)
        counts.append(counted)
    kinds = sorted(set(counts[0]) | set(counts[1]))
    differences = {kind: (counts[1][kind] - counts[0][kind]) / (more - few) for kind in kinds}
    return {kind: value for kind, value in differences.items() if value}


def training(world, objective, **options):
    """A step that is not logged."""
    config = saewb.TrainConfig(10**6, batch_tokens=60, dead_after_tokens=60, **options)
    stream = saewb.stream_tensors(world.activations, batch_tokens=60, repeat=True)
    steps = iter(saewb.Training(stream, objective, config))
    for _ in range(4):
        next(steps)

    def run(n):
        for _ in range(n):
            next(steps)

    return per_unit(run, 0, 32)


def logged(world, objective):
    """What reading the metrics of a step costs."""
    config = saewb.TrainConfig(10**6, batch_tokens=60)
    stream = saewb.stream_tensors(world.activations, batch_tokens=60, repeat=True)
    step = next(iter(saewb.Training(stream, objective, config)))
    return per_unit(lambda n: [step.only.numbers_and_density() for _ in range(n)], 0, 1)


def from_a_model(world):
    """A step of a run over a model's activations, through a shuffle buffer, with its pass over the model."""

    def run(n):
        how = {"batch_tokens": 24, "buffer_tokens": 48, **PASS, "log_every_steps": 10**6, "prefetch": 0}
        saewb.train(world.model, world.texts, saewb.Standard(30), hook=HOOK, n_tokens=24 * n, **how).wait()

    return per_unit(run, 8, 24)


def stream(world):
    batches = saewb.stream_activations(world.model, world.texts, HOOK, batch_tokens=24, **PASS, repeat=True)
    next(batches)
    return per_unit(lambda n: [next(batches) for _ in range(n)], 0, 8)


def index(world, sae):
    def run(n):
        rows = torch.cat([world.tokens] * n)
        saewb.build_index(world.model, sae, rows, batch_size=len(world.tokens), n_logits=2, n_nearest=2)

    return per_unit(run, 2, 6)


def generation(world, intervene=None):
    def run(n):
        list(saewb.generate_tokens(world.model, "w1 w2 w3", intervene, max_new_tokens=n))

    return per_unit(run, 4, 12)


def bare(world):
    """The model's own pass, without saewb."""
    tokens = world.to(world.tokens)
    return per_unit(lambda n: [world.model(tokens) for _ in range(n)], 1, 5)


def attached(world, **how):
    tokens = world.to(world.tokens)
    with saewb.attach(world.model, world.topk, **how):
        return per_unit(lambda n: [world.model(tokens) for _ in range(n)], 1, 5)


def steered(world, **how):
    tokens = world.to(world.tokens)
    with saewb.steer(world.model, world.topk, {3: 2.0}, **how):
        return per_unit(lambda n: [world.model(tokens) for _ in range(n)], 1, 5)


def evaluation(world):
    def run(n):
        saewb.evaluate(world.model, world.topk, torch.cat([world.tokens] * n), batch_size=len(world.tokens))

    return per_unit(run, 2, 6)


def scenarios(world):
    """Name and counts of every scenario."""
    for name, objective in objective_registry.OBJECTIVES.items():
        yield f"training step, {name}", lambda o=objective: training(world, o)
    yield (
        "training step, topk, dead latents looked at each time",
        lambda: training(world, objective_registry.OBJECTIVES["topk"], look_every_steps=1),
    )
    yield "training step, sparse topk", lambda: training(world, objective_registry.OBJECTIVES["topk"], step="sparse")
    yield "log of a step", lambda: logged(world, objective_registry.OBJECTIVES["topk"])
    yield "training step, from a model", lambda: from_a_model(world)
    yield "batch of a stream", lambda: stream(world)
    yield "index batch, topk", lambda: index(world, world.topk)
    yield "index batch, relu", lambda: index(world, world.sae())
    yield "generated token", lambda: generation(world)
    yield "generated token, steered", lambda: generation(world, lambda: saewb.steer(world.model, world.topk, {3: 2.0}))
    yield "generated token, attached", lambda: generation(world, lambda: saewb.attach(world.model, world.topk))
    yield "forward pass, bare", lambda: bare(world)
    yield "forward pass, attached", lambda: attached(world)
    yield "forward pass, attached, special tokens", lambda: attached(world, skip_special_tokens=True, error_term=True)
    yield "forward pass, steered", lambda: steered(world)
    yield (
        "forward pass, steered at positions",
        lambda: steered(world, positions=slice(2, None), skip_special_tokens=True),
    )
    yield "evaluation batch", lambda: evaluation(world)


def counts(world):
    return {name: dict(Counter(run())) for name, run in scenarios(world)}
