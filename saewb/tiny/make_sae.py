"""Make the bundled SAE: TopK on the residual stream of the bundled model, evaluated on held-out text.

1. Run the model over the packed training text; keep the activations after block 2, without those of BOS positions: the
   first position of a row has five times the norm of the others and would take up much of the error.
2. Train on centered and scaled activations with `saewb.training`: `saewb.TopK`, unit decoder rows, and an auxiliary
   loss in which latents that have not fired for a while model what the others left over.
3. The exported SAE takes the model's own activations, its decoder rows have norm 1, and the activation of a latent is
   therefore a length in the model's units, along its decoder row.
4. Evaluate on the held-out documents and keep the metrics in cfg.json, under metadata["held_out"].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from saewb.data.stream import stream_tensors
from saewb.data.tokens import pack
from saewb.models.tokenizer import special_mask, special_token_ids
from saewb.pretrained.load import save_sae
from saewb.sae.sae import SAE
from saewb.training import TrainConfig, Training
from saewb.training.objectives import TopK


@dataclass(frozen=True)
class SAERecipe:
    """Size of the SAE and length of its training. The defaults made the bundled one."""

    layer: int = 2
    """Reads and writes blocks.{layer}.hook_resid_post."""
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
    """Of weights and order."""


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
    metrics = {"n_documents": len(held_out), **held_out_metrics(model, sae, held_out_rows, recipe.layer, special)}
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
    model: PreTrainedModel, sae: SAE, rows: Int[Tensor, "rows ctx_len"], layer: int, special: Sequence[int]
) -> dict[str, Any]:
    """Some of the metrics of `saewb.evaluate` on `rows`, by the same definitions, in plain torch.

    Special tokens keep their activations under the SAE and both ablations, and no metric counts them: a loss is a mean
    over predictions of a token that is not special from one that is not. The mean in `ce_mean_ablated` is that of the
    counted activations.
    """
    counted = ~special_mask(rows, special)
    with torch.no_grad():
        x = activations(model, rows, layer)[counted]
        latents = sae.encode(x)
        residual = x - sae.decode(latents)
    mean = x.mean(0)
    clean = mean_loss(model, rows, counted)
    spliced = mean_loss(model, rows, counted, layer, sae)
    zero = mean_loss(model, rows, counted, layer, torch.zeros_like)
    average = mean_loss(model, rows, counted, layer, lambda out: mean.expand_as(out))
    return {
        "n_tokens": int(counted.sum()),
        "n_predictions": int(_predictions(counted).sum()),
        "special_tokens": "left as they are, not counted",
        "fvu": (residual.double().square().sum() / (x - mean).double().square().sum()).item(),
        "l0": (latents != 0).sum(1).double().mean().item(),
        "dead_frac": (latents == 0).all(0).double().mean().item(),
        "ce_clean": clean,
        "ce_with_sae": spliced,
        "ce_zero_ablated": zero,
        "ce_mean_ablated": average,
        "ce_recovered_zero": (zero - spliced) / (zero - clean),
        "ce_recovered_mean": (average - spliced) / (average - clean),
    }


@torch.no_grad()
def mean_loss(
    model: PreTrainedModel,
    rows: Int[Tensor, "rows ctx_len"],
    counted: Bool[Tensor, "rows ctx_len"],
    layer: int = 0,
    edit: Callable[[Tensor], Tensor] | None = None,
) -> float:
    """Cross-entropy in nats over predictions of a counted token from a counted one.

    With `edit`, the counted activations after block `layer` are replaced by `edit(activations)`.
    """
    total = 0.0
    for batch, mask in zip(rows.split(32), counted.split(32), strict=True):

        def hook(_: nn.Module, __: object, out: Tensor, mask: Tensor = mask) -> Tensor:
            return out if edit is None else torch.where(mask[..., None], edit(out), out)

        handle = model.model.layers[layer].register_forward_hook(hook)
        try:
            logits = model(batch).logits[:, :-1]
        finally:
            handle.remove()
        predictions = _predictions(mask)
        total += F.cross_entropy(logits[predictions], batch[:, 1:][predictions], reduction="sum").item()
    return total / int(_predictions(counted).sum())


def _predictions(counted: Bool[Tensor, "rows ctx_len"]) -> Bool[Tensor, "rows predictions"]:
    return counted[:, :-1] & counted[:, 1:]
