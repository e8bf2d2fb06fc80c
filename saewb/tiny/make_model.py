"""Train the bundled language model on a list of texts: a tokenizer, then a 1.4M-parameter Llama.

Muon trains the matrices inside the blocks, AdamW the rest, in bfloat16 autocast. One thread, fixed seeds and a schedule
by step: on one kind of CPU, with the same versions of torch, transformers and tokenizers, the weights are reproduced
exactly. Elsewhere kernels add up in another order, and after 2,000 steps the weights differ, at about the same loss.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from saewb.data.tokens import pack

EOT = "<|endoftext|>"  # id 0, the only special token: BOS, EOS, PAD and UNK at once


@dataclass(frozen=True)
class ModelRecipe:
    """Size of the model and length of its training; the defaults are those of the bundled one."""

    vocab_size: int = 4096
    """Tokens of the vocabulary."""
    ctx_len: int = 128
    """Tokens per training row, BOS included."""
    d_model: int = 128
    """Width of the residual stream."""
    d_mlp: int = 384
    """Width of the MLPs."""
    n_layers: int = 4
    """Blocks."""
    n_heads: int = 4
    """Attention heads per block."""
    n_steps: int = 2000
    """Optimizer steps."""
    batch: int = 24
    """Rows per step."""
    lr_muon: float = 0.02
    """Peak learning rate of the matrices inside the blocks."""
    lr_adamw: float = 4e-3
    """Peak learning rate of the embedding (tied to the output) and the norms."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay_from_frac: float = 0.4
    """Fraction of the steps after which the learning rate falls linearly to 0.02 of its peak."""
    seed: int = 0
    """Seed of initial weights and data order."""


def make_tokenizer(texts: Sequence[str], recipe: ModelRecipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `recipe.vocab_size` tokens; it encodes any string, and prepends BOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=False), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        min_frequency=2,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=f"{EOT} $A", special_tokens=[(EOT, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOT, eos_token=EOT, pad_token=EOT, unk_token=EOT)


def train_model(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: ModelRecipe) -> LlamaForCausalLM:
    """Train a Llama on `texts` with cross-entropy over every prediction of a row."""
    model = _new_model(tokenizer, recipe)
    is_matrix = {name: p.ndim == 2 and ".layers." in name for name, p in model.named_parameters()}
    rest = [p for name, p in model.named_parameters() if not is_matrix[name]]
    muon = Muon([p for name, p in model.named_parameters() if is_matrix[name]], weight_decay=0.05)
    adamw = torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0)
    batches = _batches(texts, tokenizer, recipe)
    smooth = 0.0
    for step in range(recipe.n_steps):
        share = _schedule(step, recipe)
        loss = _loss(model, next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        adamw.param_groups[0]["lr"] = recipe.lr_adamw * share
        adamw.step()
        muon.step(recipe.lr_muon * share)
        model.zero_grad(set_to_none=True)
        smooth = loss.item() if step == 0 else 0.97 * smooth + 0.03 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"model step {step + 1}/{recipe.n_steps} loss {smooth:.3f} nats/token", flush=True)
    return model.eval()


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face directory: float16 weights, tokenizer.json, and configs of old and new transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    # Not by save_pretrained: transformers 5 would write a tokenizer class that 4 does not know. With add_bos_token,
    # TransformerLens uses the tokenizer as it is; without, it reloads it by name.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": EOT for role in ("bos", "eos", "pad", "unk")},
        "add_bos_token": True,
        "model_max_length": model.config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _new_model(tokenizer: PreTrainedTokenizerFast, recipe: ModelRecipe) -> LlamaForCausalLM:
    # The rotary base is left out: its default is the same in all versions of transformers, its key is not.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_heads,
        max_position_embeddings=recipe.ctx_len * 4,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        rms_norm_eps=1e-5,
    )
    with torch.random.fork_rng(devices=[]):  # transformers draws the initial weights from the global state
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # faster than the fused one, at these widths on a CPU
    return model.train()


def _schedule(step: int, recipe: ModelRecipe) -> float:
    decay = max(0.02, min(1.0, (1 - step / recipe.n_steps) / (1 - recipe.decay_from_frac)))
    return min(1.0, (step + 1) / recipe.warmup_steps) * decay


def _loss(model: LlamaForCausalLM, rows: Int[Tensor, "batch ctx_len"]) -> Float[Tensor, ""]:
    # Cross-entropy on bfloat16 logits: the 4096-wide output is most of the work, and float32 doubles it.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(rows).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden.flatten(0, 1))
    return F.cross_entropy(logits, rows[:, 1:].flatten())


def _batches(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: ModelRecipe
) -> Iterator[Int[Tensor, "batch ctx_len"]]:
    """Endless batches; every epoch shuffles the documents and packs them again."""
    rng = random.Random(recipe.seed)
    rows = torch.empty(0, recipe.ctx_len, dtype=torch.long)
    while True:
        while len(rows) < recipe.batch:
            rows = torch.cat([rows, _epoch_rows(rng.sample(texts, len(texts)), tokenizer, recipe, rng)])
        yield rows[: recipe.batch]
        rows = rows[recipe.batch :]


def _epoch_rows(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, recipe: ModelRecipe, rng: random.Random
) -> Tensor:
    """Pack half of the documents; of the other half, build rows that each begin with a document and are truncated.

    Only one packed row in a hundred begins with a document, so that after BOS, with which prompts begin too, the model
    would expect the middle of a text.
    """
    half = len(texts) // 2
    packed = pack(texts[:half], tokenizer, recipe.ctx_len)
    rows, row = [], []
    for ids in tokenizer(list(texts[half:]), verbose=False)["input_ids"]:
        row = row + ids
        if len(row) >= recipe.ctx_len:
            rows.append(row[: recipe.ctx_len])
            row = []
    joined = torch.cat([packed, torch.tensor(rows, dtype=torch.long).view(-1, recipe.ctx_len)])
    return joined[rng.sample(range(len(joined)), len(joined))]


@final
class Muon:
    """Momentum with updates orthogonalized by Newton-Schulz, batched over matrices of one shape.

        M <- 0.95 M + G;   U = orthogonal(G + 0.95 M);   W <- (1 - lr wd) W - lr sqrt(max(1, rows/cols)) U

    Batched because at these sizes torch.optim.Muon, which updates one matrix at a time, takes 40 % of a step.

    References:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ (quintic 3.4445, -4.7750, 2.0315; 5 iterations).
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for p in parameters:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the parameters with learning rate `lr`; gradients are not cleared."""
        for (rows, cols), group in self.groups.items():
            grad = torch.stack([p.grad for p in group])
            buffer = self.buffers[rows, cols].mul_(self.momentum).add_(grad)
            updates = orthogonal(grad + self.momentum * buffer)
            for p, update in zip(group, updates, strict=True):
                p.mul_(1 - lr * self.weight_decay).sub_(update, alpha=lr * max(1, rows / cols) ** 0.5)


def orthogonal(x: Float[Tensor, "n rows cols"], iterations: int = 5) -> Float[Tensor, "n rows cols"]:
    """Bring the singular values of each matrix near 1 (0.7 to 1.2), in bfloat16 arithmetic."""
    tall = x.shape[1] > x.shape[2]
    y = x.mT if tall else x
    y = (y / (y.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(iterations):
        a = y @ y.mT
        y = 3.4445 * y + (-4.7750 * a + 2.0315 * a @ a) @ y
    return (y.mT if tall else y).float()
