"""Interventions on latents of transcoders: set some to other values, beside what the attribution graph predicts.

`direct=True` changes the frozen model only, where the prediction is exact. Otherwise the model itself runs, with the
difference added to what its MLPs write, and later layers respond.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._indices import index_of
from saewb.circuits.replacement import ReplacementModel, Targets
from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.models import hook_points
from saewb.models.capture import eval_mode
from saewb.models.tokenizer import single_texts, token_strings
from saewb.sae.base import SparseCoder

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False)
class LatentIntervention:
    """Effects of an intervention on latents: the result of `saewb.intervene`.

    Both are of pre-activations, and of logits before a soft cap, less their mean.
    """

    logits: Float[Tensor, " d_vocab"]
    """Logits of the next token, with the intervention."""
    clean_logits: Float[Tensor, " d_vocab"]
    """Logits of the model as it is, or with `direct` of the frozen model."""
    predicted_logits: Float[Tensor, " d_vocab"]
    """Change of each logit, less the mean change, by the attribution graph: direct effects on the logits alone."""
    latents: pd.DataFrame
    """A row per latent that is active in the clean run, in later layers than the first one changed: layer, position,
    token, latent, activation, predicted (change of its pre-activation by direct effects) and measured."""
    _tokenizer: Any = None

    def next_tokens(self, n: int = 10, *, tokens: Sequence[int] | None = None) -> pd.DataFrame:
        """The n tokens whose logit changes most.

        Args:
            n: how many.
            tokens: ids of these tokens instead, in their order.

        Returns:
            Columns token, id, probability, clean_probability, predicted and measured (changes of the logit less the
            mean change).

        Raises:
            ValueError: for an id beyond the vocabulary.
        """
        import pandas as pd

        change = self.logits - self.clean_logits
        change = change - change.mean()
        top = change.abs().argsort(descending=True, stable=True)[:n]
        if tokens is not None:
            top = torch.tensor([index_of(i, "token", len(change)) for i in tokens], dtype=torch.long)
        ids = top.tolist()
        texts = {} if self._tokenizer is None else single_texts(self._tokenizer, ids)
        return pd.DataFrame(
            {
                "token": [texts.get(i, str(i)) for i in ids],
                "id": ids,
                "probability": self.logits.softmax(-1)[top].numpy(),
                "clean_probability": self.clean_logits.softmax(-1)[top].numpy(),
                "predicted": self.predicted_logits[top].numpy(),
                "measured": change[top].numpy(),
            }
        )

    def __repr__(self) -> str:
        change = self.logits.softmax(-1) - self.clean_logits.softmax(-1)
        return (
            f"LatentIntervention({len(self.latents)} later latents; probabilities change by {change.abs().max():.3f})"
        )

    def _repr_html_(self) -> str:
        return self.next_tokens()._repr_html_()


@torch.inference_mode(False)  # the frozen pass records gradients, wherever it is called
@torch.no_grad()
def intervene(
    model: nn.Module,
    prompt: str | Tensor,
    transcoders: SparseCoder | Iterable[SparseCoder],
    changes: Sequence[tuple[int, int, int, float]],
    *,
    freeze_attention: bool = True,
    direct: bool = False,
) -> LatentIntervention:
    """Set latents of transcoders to other values, and compare what happens with what direct effects predict.

    At every layer that a latent writes to, the difference is added to the output of the MLP (or the stream, of SAEs):

        output += (value - activation) W_dec[latent]

    Predicted are direct effects alone: the change of each later pre-activation and logit in the frozen model, where it
    is A (value - activation) / activation, with A the edge of `saewb.attribution_graph`.

    Args:
        model: as for `saewb.attribution_graph`.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        transcoders: as for `saewb.attribution_graph`.
        changes: (layer, position, latent, value) tuples: the transformer block of the latent, the index of the token,
            from 0 or negative from the end, the index of the latent, and its new activation.
        freeze_attention: hold attention patterns at those of the clean run.
        direct: measure in the frozen model, with norms and MLP outputs held, too: then measured is predicted, if the
            edges are right. False lets MLPs and norms respond.

    Returns:
        A LatentIntervention: `.next_tokens()`, `.latents`, `.logits`.

    Raises:
        ValueError: for a layer without latents, a position or latent out of range, a value that is not finite, no
            change at all; as `saewb.attribution_graph`.

    References:
        Constrained and iterative patching: Ameisen et al. 2025,
        transformer-circuits.pub/2025/attribution-graphs/methods.html.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> result = saewb.intervene(model, "Paris is", saewb.tiny.transcoders(), [(1, -1, 5, 4.0)], direct=True)
        >>> bool((result.latents.predicted - result.latents.measured).abs().max() < 1e-3)
        True
    """
    tokens = prompt_ids(model, prompt)
    replacement = ReplacementModel.of(model, tokens, transcoders, 0)
    steps = _steps(replacement, changes)
    written = _written(replacement, steps)
    added = [*written, torch.zeros_like(replacement.frozen.stream)]
    frozen_read = replacement.run(added)
    if direct:
        read, logits = frozen_read, None
    else:
        read, logits = _run_model(replacement, steps, freeze_attention)
    first = min(step.layer for step in steps)
    later = (replacement.layer > first).nonzero()[:, 0]
    predicted, measured = (_pre_activations(replacement, later, reads) for reads in (frozen_read, read))
    clean_read = replacement.read
    clean = _pre_activations(replacement, later, clean_read)
    clean_logits = replacement.frozen.logits[0, -1].float().cpu()
    if logits is None:
        clean_logits = _logits(replacement, clean_read[-1])
        logits = _logits(replacement, read[-1])
    change = _logits(replacement, frozen_read[-1]) - _logits(replacement, clean_read[-1])
    return LatentIntervention(
        logits=logits,
        clean_logits=clean_logits,
        predicted_logits=change - change.mean(),
        latents=_frame(replacement, later, predicted - clean, measured - clean),
        _tokenizer=getattr(model, "tokenizer", None),
    )


@dataclass(frozen=True)
class _Step:
    """One change; `layer` is the index of a source layer."""

    layer: int
    position: int
    latent: int
    value: float


def _steps(replacement: ReplacementModel, changes: Sequence[tuple[int, int, int, float]]) -> list[_Step]:
    by_layer = {layer.layer: i for i, layer in enumerate(replacement.layers) if layer.site is not None}
    steps: dict[tuple[int, int, int], _Step] = {}
    for change in changes:
        if not isinstance(change, (tuple, list)) or len(change) != 4:
            raise ValueError(
                explain(f"got {change!r}.", want="(layer, position, latent, value)", fix="(2, -1, 57, 0.0)")
            )
        layer, position, latent, value = change
        if layer not in by_layer:
            raise ValueError(explain(f"no latents at layer {layer!r}.", want=f"one of {sorted(by_layer)}"))
        i = by_layer[int(layer)]
        position = index_of(position, "position", replacement.n_pos, from_end=True)
        latent = index_of(latent, "latent", replacement.layers[i].site.d_sae)
        if not math.isfinite(value := float(value)):
            raise ValueError(explain(f"got the value {value} for latent {latent}.", want="a finite number"))
        steps[i, position, latent] = _Step(i, position, latent, value)
    if not steps:
        raise ValueError(explain("intervene got no changes.", fix="[(layer, position, latent, value)]"))
    return list(steps.values())


def _written(replacement: ReplacementModel, steps: Sequence[_Step]) -> list[Tensor]:
    """What the changes add at each source layer, by the activations of the clean run."""
    added = [torch.zeros_like(kept) for kept in replacement.kept]
    for step in steps:
        position, latent = (torch.tensor([i], device=added[0].device) for i in (step.position, step.latent))
        site = replacement.layers[step.layer].site
        now = site.encode(replacement.inputs[step.layer])[0, step.position, step.latent].float()
        for layer in replacement.written_by(step.layer):
            direction = replacement.directions(step.layer, layer, latent, position)[0]
            added[layer][0, step.position] += ((step.value - now) * direction).to(added[layer])
    return added


def _run_model(
    replacement: ReplacementModel, steps: Sequence[_Step], freeze_attention: bool
) -> tuple[list[Tensor | None], Float[Tensor, " d_vocab"]]:
    """Run the model itself with the changes; what encoders and unembedding read, and the logits."""
    layers, model = replacement.layers, replacement.model
    read: list[Tensor | None] = [None] * (len(layers) + 1)
    raw: dict[int, Tensor] = {}
    pending = [torch.zeros_like(kept) for kept in replacement.kept]

    def reading(i: int) -> hook_points.Edit:
        site = layers[i].site

        def edit(activation: Tensor) -> None:
            raw[i] = site.read_input(activation).to(site.sae.dtype)
            read[i] = replacement.encoder_input(i, raw[i])
            acts = site.encode(raw[i])[0]
            for step in (step for step in steps if step.layer == i):
                position, latent = (torch.tensor([n], device=acts.device) for n in (step.position, step.latent))
                change = step.value - acts[step.position, step.latent].float()
                for layer in replacement.written_by(i):
                    direction = replacement.directions(i, layer, latent, position)[0]
                    pending[layer][0, step.position] += (change * direction).to(pending[layer])

        return edit

    def writing(i: int) -> hook_points.Edit:
        site = layers[i].site

        def edit(activation: Tensor) -> Tensor:
            if site is None:
                return activation
            out = site.read_target(activation)
            return site.write_output(out + pending[i].to(out), activation)

        return edit

    def end(final: Tensor) -> None:
        read[-1] = final

    edits = replacement.edits(reading, writing, lambda stream: None, end)
    if freeze_attention:
        edits |= replacement.frozen.edits(norms=False, mlps=False)
    with eval_mode(model), hook_points.editing(model, edits):
        logits = model(replacement.frozen.tokens)
    return read, logits[0, -1].float().cpu()


def _pre_activations(
    replacement: ReplacementModel, nodes: Int[Tensor, " nodes"], read: Sequence[Tensor | None]
) -> Float[Tensor, " nodes"]:
    batches: list[Targets] = replacement.latent_targets(nodes)
    if not batches:
        return torch.zeros(0)
    return torch.cat([replacement.values(batch, read) for batch in batches]).cpu()


def _logits(replacement: ReplacementModel, final: Tensor) -> Float[Tensor, " d_vocab"]:
    """Logits of the last position, before a soft cap, less their mean."""
    W_U = replacement.model.W_U.detach().float()
    logits = (final[0, -1].float() @ W_U) * replacement.logit_factor
    b_U = getattr(replacement.model, "b_U", None)
    logits = logits if b_U is None else logits + b_U.detach().float() * replacement.logit_factor
    return (logits - logits.mean()).cpu()


def _frame(replacement: ReplacementModel, nodes: Tensor, predicted: Tensor, measured: Tensor) -> pd.DataFrame:
    import pandas as pd

    ids = replacement.frozen.tokens[0].tolist()
    has_tokenizer = getattr(replacement.model, "tokenizer", None) is not None
    texts = token_strings(replacement.model, ids) if has_tokenizer else [str(i) for i in ids]
    position = replacement.position[nodes].tolist()
    return pd.DataFrame(
        {
            "layer": [replacement.layers[i].layer for i in replacement.layer[nodes].tolist()],
            "position": position,
            "token": [texts[i] for i in position],
            "latent": replacement.latent[nodes].tolist(),
            "activation": replacement.activation[nodes].tolist(),
            "predicted": predicted.tolist(),
            "measured": measured.tolist(),
        }
    )
