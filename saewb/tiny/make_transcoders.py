"""Make the bundled transcoders: one per layer, from what the MLP of the bundled model reads to what it writes.

`saewb.train` on all leads but the held-out ones, four TopK transcoders at a time; evaluated on the held-out ones, and
stored in float16 with the figures in cfg.json, metadata["held_out"].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from saewb.data.tokens import pack
from saewb.models.load import load_model
from saewb.pretrained.load import save_sae
from saewb.sae.sae import SAE
from saewb.tiny.make_sae import held_out_metrics
from saewb.training.config import Trainee
from saewb.training.objectives import TopK
from saewb.training.train import train


@dataclass(frozen=True)
class TranscoderRecipe:
    """Size of the transcoders and length of their training; the defaults are those of the bundled ones."""

    layers: int = 4
    """Layers of the model."""
    d_sae: int = 768
    """Latents of each."""
    k: int = 16
    """Latents per token."""
    ctx_len: int = 128
    """Tokens per row, BOS included."""
    n_tokens: int = 3_000_000
    """Tokens to train on, in a new order every epoch."""
    batch: int = 2048
    """Tokens per step."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    seed: int = 0
    """Seed of initial weights and data order."""


def make_transcoders(
    model_folder: Path,
    training: Sequence[str],
    held_out: Sequence[str],
    folder: Path,
    recipe: TranscoderRecipe,
    source: str,
) -> None:
    """Train on `training`, evaluate on `held_out`, and write `folder/blocks.L.mlp`; `source` names the corpus."""
    model = load_model(model_folder, torch.float32, "cpu")
    points = {i: (f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(recipe.layers)}
    objective = TopK(recipe.d_sae, k=recipe.k, aux_relu=True)
    trainees = {f"blocks.{i}.mlp": Trainee(objective, read=read, write=write) for i, (read, write) in points.items()}
    run = train(
        model,
        pack(training, model.tokenizer, recipe.ctx_len),
        trainees,
        n_tokens=recipe.n_tokens,
        batch_tokens=recipe.batch,
        lr=recipe.lr,
        decay_tokens=int(0.3 * recipe.n_tokens),
        seed=recipe.seed,
    ).wait()
    rows = pack(held_out, model.tokenizer, recipe.ctx_len)
    for name, sae in run.saes.items():
        sae = SAE.from_tensors(sae.cfg, {key: value.half() for key, value in sae.tensors().items()})
        metrics = held_out_metrics(model_folder, sae.float(), rows)
        print(f"{name}: {metrics}", flush=True)
        metadata = {
            "context_size": recipe.ctx_len,
            "dataset_path": source,
            "prepend_bos": True,
            "n_training_tokens": recipe.n_tokens,
            "trained_with": "saewb.tiny.make",
            "held_out": {"n_documents": len(held_out), **metrics},
        }
        save_sae(sae.half().with_config(model="tiny", metadata=metadata), folder / name, overwrite=True)
