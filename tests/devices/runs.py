"""Everything that runs a model with SAEs, on one model and two SAEs: for models in half precision or on two devices."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from helpers import tiny_models

import saewb

EARLY, LATE = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
TEXTS = [" ".join(f"w{(7 * i + j * j) % 28}" for j in range(11)) for i in range(12)]


def saes():
    """At EARLY and LATE, on the CPU, float32."""
    return tiny_models.sae(EARLY, "topk", k=5), tiny_models.sae(LATE, seed=1)


def runs(model, a, b):
    """By name: functions of nothing, each of which gives results."""
    tokens, prompt, both = tiny_models.tokens(), "w1 w2 w3", [a, b]
    here = tokens if model is None else tokens.to(next(model.parameters()).device)
    how = {"batch_tokens": 24, "ctx_len": 12}
    training = {**how, "n_tokens": 96, "buffer_tokens": 48, "look_every_steps": 1}

    def attach():
        with saewb.attach(model, both, skip_special_tokens=True) as attached:
            logits = model(here)
            return {"logits": logits, "early": attached.latents[a], "late": attached.latents[b]}

    def attach_with_error():
        with saewb.attach(model, both, error_term=True):
            return model(here)

    def gradients():
        with saewb.attach(model, both):
            return torch.autograd.grad(model(here).float().square().sum(), [a.W_dec, b.W_dec])

    def steer():
        with saewb.steer(model, {a: {3: 2.0}, b: {4: 1.0}}, positions=slice(2, None), skip_special_tokens=True):
            return model(here)

    def attribute(method):
        options = {} if method == "gradient" else {"n_steps": 2, "n_nodes": 9}
        return saewb.attribute(model, prompt, both, "w4", method=method, **options).to_frame()

    def train():
        points = {
            "early": saewb.Trainee(saewb.TopK(20, k=3), read=EARLY),
            "late": saewb.Trainee(saewb.Gated(20), read=LATE),
        }
        run = saewb.train(model, TEXTS, points, held_out=TEXTS[:2], **training).wait()
        return {"saes": run.saes, "losses": run.history[[c for c in run.history if c.endswith(("loss", "fvu"))]]}

    def cache():
        with tempfile.TemporaryDirectory() as folder:
            stored = saewb.cache_activations(model, TEXTS, [EARLY, LATE], Path(folder) / "c", 60, ctx_len=12)
            return dict(next(stored.stream(batch_tokens=20)).values)

    def index():
        options = {"n_logits": 3, "coactive_tokens": 10, "loss_effect_tokens": 14}
        return [dict(of_one.tensors) for of_one in saewb.build_index(model, both, tokens, **options)]

    return {
        "attach": attach,
        "attach with error": attach_with_error,
        "gradients": gradients,
        "steer": steer,
        "evaluate": lambda: [saewb.evaluate(model, sae, tokens).to_frame() for sae in both],
        "index": index,
        **{f"attribute, {method}": lambda m=method: attribute(m) for method in ("gradient", "integrated", "ablation")},
        "edges": lambda: saewb.attribute_edges(model, prompt, *both, n_targets=3),
        "read_prompt": lambda: saewb.read_prompt(model, prompt, both, target="w5", attribution="gradient").to_frame(),
        "next_tokens": lambda: saewb.next_tokens(model, prompt, both).to_frame(),
        "changes": lambda: saewb.next_token_changes(model, prompt, lambda: saewb.steer(model, b, {3: 4.0})),
        "matrix": lambda: [saewb.latent_matrix(model, s, tokens, min_fires=1).block([0, 1], [2, 3]) for s in both],
        "train": train,
        "transcoder": lambda: (
            saewb.train(model, TEXTS, saewb.TopK(20, k=3), hook=EARLY, hook_out=LATE, **training).wait().sae
        ),
        "generate": lambda: list(
            saewb.generate_tokens(model, "w1 w2", lambda: saewb.attach(model, both), max_new_tokens=5)
        ),
        "stream": lambda: dict(
            next(saewb.stream_activations(model, TEXTS, [EARLY, LATE], buffer_tokens=48, **how)).values
        ),
        "cache": cache,
        "memory": lambda: (
            saewb.training_memory(model, saewb.TopK(20, k=3), hook=LATE, n_tokens=96, batch_tokens=24).weights
        ),
    }
