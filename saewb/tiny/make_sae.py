"""Make the bundled SAE: TopK on the residual stream of the bundled model, evaluated on held-out text.

1. Run the model over the packed training text; keep the activations after block 2, without those of BOS positions: the
   first position of a row has five times the norm of the others and would take up much of the error.
2. Train on centered and scaled activations with `saewb.training`: `saewb.TopK`, unit decoder rows, and an auxiliary
   loss in which latents that have not fired for a while reconstruct the residual.
3. Export an SAE that takes the model's own activations. Its decoder rows have norm 1, so the activation of a latent is
   a length in the model's units, along its decoder row.
4. Evaluate on the held-out documents (`saewb.evaluate`) and store the metrics in cfg.json, metadata["held_out"].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from saewb.data.stream import stream_tensors
from saewb.data.tokens import pack
from saewb.evals.evaluation import evaluate
from saewb.models.load import load_model
from saewb.models.tokenizer import special_mask, special_token_ids
from saewb.pretrained.load import save_sae
from saewb.sae.sae import SAE
from saewb.training import TrainConfig, Training
from saewb.training.objectives import TopK

_HELD_OUT_FIGURES = (
    *("n_tokens", "n_predictions", "fvu", "l0", "dead_frac"),
    *("ce_clean", "ce_with_sae", "ce_zero_ablated", "ce_mean_ablated", "ce_recovered_zero", "ce_recovered_mean"),
)


@dataclass(frozen=True)
class SAERecipe:
    """Size of the SAE and length of its training; the defaults are those of the bundled one."""

    layer: int = 2
    """Layer whose output, blocks.{layer}.hook_resid_post, is reconstructed."""
    d_sae: int = 1024
    """Latents."""
    k: int = 16
    """Latents per token."""
    ctx_len: int = 128
    """Tokens per row, BOS included."""
    n_steps: int = 4000
    """Optimizer steps."""
    batch: int = 2048
    """Tokens per step, in a new order every epoch."""
    lr: float = 2e-3
    """Peak learning rate of Adam."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_frac: float = 0.3
    """Fraction of the steps, at the end, over which the learning rate falls linearly to 0."""
    dead_after_tokens: int = 300_000
    """Tokens without firing after which a latent takes part in the auxiliary loss."""
    k_aux: int = 64
    """Dead latents used per token."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss."""
    seed: int = 0
    """Seed of initial weights and data order."""


def make_sae(
    model_folder: Path, training: Sequence[str], held_out: Sequence[str], folder: Path, recipe: SAERecipe, source: str
) -> None:
    """Train on `training`, evaluate on `held_out`, and write in SAELens layout; `source` names the corpus."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    special = special_token_ids(tokenizer)
    rows = pack(training, tokenizer, recipe.ctx_len)
    x = activations(model, rows, recipe.layer)[~special_mask(rows, special)]
    print(f"sae: {len(x)} training activations", flush=True)
    sae = train_sae(x, recipe)
    held_out_rows = pack(held_out, tokenizer, recipe.ctx_len)
    metrics = {"n_documents": len(held_out), **held_out_metrics(model_folder, sae, held_out_rows)}
    print(f"sae: {metrics}", flush=True)
    metadata = {
        "context_size": recipe.ctx_len,
        "dataset_path": source,
        "prepend_bos": True,
        "n_training_tokens": recipe.n_steps * recipe.batch,
        "n_distinct_training_tokens": len(x),
        "latent_unit": "length in model units along a unit decoder row",
        "trained_with": "saewb.tiny.make",
        "held_out": metrics,
    }
    save_sae(sae.with_config(model="tiny", metadata=metadata), folder, overwrite=True)


@torch.no_grad()
def activations(
    model: PreTrainedModel, rows: Int[Tensor, "rows ctx_len"], layer: int
) -> Float[Tensor, "rows ctx_len d_in"]:
    """The residual stream after block `layer`: blocks.{layer}.hook_resid_post of TransformerLens."""
    # hidden_states[0] is the embedding. The last entry has the final norm applied, so `layer` must not be the last.
    return torch.cat(
        [model.model(batch, output_hidden_states=True).hidden_states[layer + 1] for batch in rows.split(64)]
    )


def train_sae(x: Float[Tensor, "tokens d_in"], recipe: SAERecipe) -> SAE:
    """Train a TopK SAE on `x`, in the model's units (steps 2 and 3 of the module)."""
    n_tokens = recipe.n_steps * recipe.batch
    config = TrainConfig(
        n_tokens=n_tokens,
        batch_tokens=recipe.batch,
        lr=recipe.lr,
        betas=(0.9, 0.99),
        warmup_tokens=min(recipe.warmup_steps, recipe.n_steps // 2) * recipe.batch,
        decay_tokens=int(recipe.decay_frac * n_tokens),
        clip=None,
        normalization="centered",
        estimate_tokens=min(len(x), n_tokens),
        dead_after_tokens=recipe.dead_after_tokens,
        seed=recipe.seed,
    )
    objective = TopK(recipe.d_sae, k=recipe.k, aux=recipe.aux_weight, k_aux=recipe.k_aux, aux_relu=True)
    hook = f"blocks.{recipe.layer}.hook_resid_post"
    stream = stream_tensors({hook: x}, batch_tokens=recipe.batch, repeat=True, shuffle_seed=recipe.seed)
    training = Training(stream, objective, config)
    for step in training:
        if step.step % 500 == 0:
            metrics = "fvu {fvu:.4f}, {dead_frac:.1%} dead".format(**step.only.numbers())
            print(f"sae step {step.step}/{recipe.n_steps} {metrics}", flush=True)
    return training.saes["sae"]


def held_out_metrics(
    model_folder: Path, sae: SAE, rows: Int[Tensor, "rows ctx_len"], hook: str | None = None
) -> dict[str, Any]:
    """Some of the figures of `saewb.evaluate` on `rows`, for the metadata of the SAE."""
    evaluation = evaluate(load_model(model_folder, torch.float32, "cpu"), sae, rows, hook=hook, batch_size=32)
    figures = {name: value for name, value in evaluation.figures().items() if name in _HELD_OUT_FIGURES}
    return {**figures, "special_tokens": "left as they are, not counted"}
