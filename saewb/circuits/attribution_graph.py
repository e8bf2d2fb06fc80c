"""Attribution graph of one prompt: which latents, errors and tokens made the model say this."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Union

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb._indices import index_of
from saewb.circuits.attribution_nodes import token_id
from saewb.circuits.graph import AttributionGraph, completed, node_ids
from saewb.circuits.influence import CHUNK, influence, row_totals
from saewb.circuits.replacement import ReplacementModel, Targets
from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.models.tokenizer import token_strings
from saewb.sae.base import SparseCoder

if TYPE_CHECKING:
    import pandas as pd

GraphTarget = Union[str, int, tuple[str, float, Tensor]]
_IN_MEMORY = 2**30
"""Bytes of a matrix from which on it is on disk."""


@dataclass(frozen=True, eq=False)
class _Logits:
    """Targets at the unembedding."""

    token: list[int]
    label: list[str]
    weight: Float[Tensor, " targets"]
    direction: Float[Tensor, "targets d"]
    bias: Float[Tensor, " targets"]


@torch.inference_mode(False)  # gradients are needed, wherever it is called
def attribution_graph(
    model: nn.Module,
    prompt: str | Tensor,
    transcoders: SparseCoder | Iterable[SparseCoder],
    *,
    targets: Sequence[GraphTarget] | Int[Tensor, " targets"] | None = None,
    max_targets: int = 10,
    target_mass: float = 0.95,
    max_latents: int = 7500,
    batch_size: int = 256,
    rank_every: int = 4,
    zero_first: bool | int = True,
    progress: bool = True,
) -> AttributionGraph:
    """Trace the next token of a prompt back through latents, errors and tokens.

    In the frozen model (`saewb.freeze`), with each MLP output as the sum of its transcoder's latents, bias and error,
    every target is a sum over sources:

        z_t = sum_s A[t, s] + c_t          A[t, s] = vector(s) . d z_t / d(residual stream where s is written)

    Sources are active latents (activation times decoder direction), errors (one per layer and position) and tokens
    (their embedding). Targets are the same latents (z_t: the pre-activation) and logits (z_t: the logit, before a soft
    cap, less the mean logit). c_t comes from biases alone. Skip transcoders keep the gradient of their skip. An MLP
    without a transcoder is all error. This is exact: `nodes` has value, constant and left_out, and each row of `edges`
    sums to value - constant - left_out.

    SAEs of the residual stream, at some layers or all, make graphs too: the latents and errors of each describe the
    whole stream at its layer, so edges lead from each SAE to the next. Attention patterns and norms are frozen as
    before, but the MLPs between are linearized at the prompt: effects are gradients, as of `saewb.attribute_edges`,
    exact to first order only, and `constant` is what remains (`is_exact` is False).

    Time: a backward pass through the frozen model per target, over the layers below it and the positions before it.
    Memory: a row of 4 bytes per active latent, for each of `max_latents`; over 1 GB they are in a temporary file. An
    interrupt (Ctrl-C) ends the search: the graph has the latents whose rows are done.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x), weights as published (not
            folded or centered, if the transcoders were trained on such); run in eval mode.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        transcoders: transcoders of MLPs, at most one per layer; one cross-layer transcoder; or SAEs of the stream.
        targets: tokens (texts or ids); or (label, weight, direction) triples, directions `[d]` at what the unembedding
            reads; None means the most probable next tokens.
        max_targets: how many of these, at most.
        target_mass: how many of these: the fewest that have this probability together.
        max_latents: how many latents become nodes; of more active ones those with the largest influence on the targets.
        batch_size: targets per backward pass, at most; fewer where that takes less memory or time.
        rank_every: after how many times `batch_size` targets the influence of the latents that wait is computed anew.
        zero_first: positions at the start without latents and errors, whose activations are not like others; True means
            1 (of Gemma 3 instruction models 4, the beginning of their template), False 0.
        progress: show a progress bar.

    Returns:
        An AttributionGraph: `.nodes`, `.edges`, `.pruned()`, `.replacement_score`, `.to_json(path)`.

    Raises:
        ValueError: if the model cannot be frozen; for transcoders or SAEs that do not fit the model or one another; for
            a target that is no token.
        TypeError: for SAEs without a pre-activation, a prompt or target of another kind.

    References:
        Ameisen et al. 2025, transformer-circuits.pub/2025/attribution-graphs/methods.html; Dunefsky et al. 2024,
        arXiv:2406.11944; github.com/decoderesearch/circuit-tracer. SAEs: Marks et al. 2024, arXiv:2403.19647.

    Example:
        >>> import saewb
        >>> model, transcoders = saewb.load_model("tiny", device="cpu"), saewb.tiny.transcoders()
        >>> graph = saewb.attribution_graph(model, "Paris is the capital", transcoders, progress=False)
        >>> small = graph.pruned()
        >>> small.nodes.kind.iloc[-1], len(small) < len(graph), 0 < graph.completeness < 1
        ('target', True, True)
    """
    counts = {"max_targets": max_targets, "batch_size": batch_size, "rank_every": rank_every}
    for name, value in {**counts, "max_latents": max_latents}.items():
        if index_of(value, name) < (name in counts):
            want = "1 or more" if name in counts else "0 or more"
            raise ValueError(explain(f"attribution_graph got {name}={value!r}.", want=want))
    if not 0 < target_mass <= 1:
        what = f"attribution_graph got target_mass={target_mass!r}."
        raise ValueError(explain(what, want="a probability, e.g. 0.95"))
    tokens = prompt_ids(model, prompt)
    n_zero = _n_zero(model, zero_first, tokens.shape[1])
    replacement = ReplacementModel.of(model, tokens, transcoders, n_zero)
    logits = _logit_targets(replacement, targets, max_targets, target_mass)
    rows = _Rows(replacement, logits, min(max_latents, replacement.n_active))
    interrupted = rows.fill(batch_size, rank_every, progress)
    text = prompt if isinstance(prompt, str) else "".join(_token_texts(model, tokens[0].tolist()))
    return _graph(replacement, logits, rows, text, interrupted)


def _n_zero(model: nn.Module, zero_first: bool | int, n_pos: int) -> int:
    name = str(getattr(model.cfg, "model_name", "")).lower()
    of_template = 4 if "gemma-3" in name and name.endswith("-it") else 1
    n = of_template * zero_first if isinstance(zero_first, bool) else index_of(zero_first, "zero_first")
    if not 0 <= n <= n_pos:
        raise ValueError(explain(f"got zero_first={zero_first!r} for {n_pos} tokens.", want=f"0 to {n_pos}"))
    return n


def _logit_targets(
    replacement: ReplacementModel, targets: Sequence[GraphTarget] | Tensor | None, max_targets: int, mass: float
) -> _Logits:
    model = replacement.model
    probabilities = replacement.frozen.logits[0, -1].float().softmax(-1)
    if targets is None:
        top, tokens = probabilities.topk(min(max_targets, len(probabilities)))
        tokens = tokens[: int(torch.searchsorted(top.cumsum(0), mass)) + 1]
        return _token_targets(replacement, tokens, probabilities)
    targets = targets.tolist() if isinstance(targets, Tensor) else targets
    targets = [targets] if isinstance(targets, (str, int)) else list(targets)
    if not targets:
        raise ValueError(explain("attribution_graph got no targets.", fix='targets=[" Paris"]'))
    if all(isinstance(target, (str, int)) for target in targets):
        ids = list(dict.fromkeys(token_id(model, target) for target in targets))
        return _token_targets(replacement, torch.tensor(ids, device=probabilities.device), probabilities)
    d = replacement.frozen.final.shape[-1]
    for target in targets:
        fits = isinstance(target, (tuple, list)) and len(target) == 3 and isinstance(target[0], str)
        if not (fits and isinstance(target[2], Tensor) and target[2].shape == (d,)):
            want = f"tokens, or (label, weight, direction [{d}]) triples"
            raise TypeError(explain(f"got {target!r} as a target.", want=want))
    direction = torch.stack([target[2].detach().float() for target in targets]).to(probabilities.device)
    first = len(probabilities)  # ids of directions are beyond the vocabulary
    return _Logits(
        list(range(first, first + len(targets))),
        [target[0] for target in targets],
        torch.tensor([float(target[1]) for target in targets]),
        direction,
        torch.zeros(len(targets)),
    )


def _token_targets(replacement: ReplacementModel, tokens: Tensor, probabilities: Tensor) -> _Logits:
    direction, bias = replacement.logit_directions(tokens)
    ids = tokens.tolist()
    labels = [_token_texts(replacement.model, [token])[0] for token in ids]
    return _Logits(ids, labels, probabilities[tokens].cpu(), direction, bias.cpu())


def _token_texts(model: nn.Module, ids: Sequence[int]) -> list[str]:
    has_tokenizer = getattr(model, "tokenizer", None) is not None
    return token_strings(model, ids) if has_tokenizer else [str(i) for i in ids]


class _Rows:
    """Rows of the edge matrix as they come: of the logits first, then of latents, over all sources."""

    def __init__(self, replacement: ReplacementModel, logits: _Logits, max_latents: int) -> None:
        self.replacement, self.logits, self.max_latents = replacement, logits, max_latents
        n_logits = len(logits.token)
        self.edges = empty_matrix(n_logits + max_latents, replacement.n_sources + n_logits)
        self.node = torch.full((n_logits + max_latents,), -1)
        self.totals = torch.zeros(n_logits + max_latents, dtype=torch.float64)
        depth = torch.arange(len(replacement.layers)).repeat_interleave(replacement.n_pos) + 1
        last = len(replacement.layers) + 1
        parts = [replacement.layer.cpu() + 1, depth, torch.zeros(replacement.n_pos), torch.full((n_logits,), last)]
        self.order = torch.cat(parts).long()
        self.weights = torch.zeros(len(self.order), dtype=torch.float64)
        self.weights[replacement.n_sources :] = logits.weight.cpu().double()
        self.n = 0

    def fill(self, batch_size: int, rank_every: int, progress: bool) -> bool:
        """Compute all rows; returns whether an interrupt ended it early."""
        from tqdm.auto import tqdm

        replacement, device = self.replacement, self.replacement.latent.device
        last = torch.full((len(self.logits.token),), replacement.n_pos - 1, device=device)
        first = replacement.n_sources
        n_layers = len(replacement.layers)
        for index in torch.arange(len(last)).split(replacement.batch_size(batch_size, n_layers, replacement.n_pos)):
            batch = Targets(n_layers, last[index], self.logits.direction[index.to(device)])
            self._add(replacement.rows([batch]), index + first)
        waiting = torch.ones(replacement.n_active, dtype=torch.bool)
        ranks = self.max_latents < replacement.n_active
        bar = tqdm(total=self.max_latents, desc="attribution", unit="latent", leave=False, disable=not progress)
        with bar:
            try:
                while (left := len(self.node) - self.n) > 0:
                    if ranks:
                        best = self._influence()[: replacement.n_active].argsort(descending=True, stable=True)
                        queue = best[waiting[best]][: min(left, rank_every * batch_size)]
                    else:
                        queue = waiting.nonzero()[:, 0]
                    for nodes in replacement.batches(queue, batch_size):
                        targets = replacement.latent_targets(nodes.to(device))
                        self._add(replacement.rows(targets), nodes)
                        waiting[nodes] = False
                        bar.update(len(nodes))
            except KeyboardInterrupt:
                return True
        return False

    def _influence(self) -> Float[Tensor, " nodes"]:
        """Influence of each source by the rows that are known."""
        done = slice(self.n)
        return influence(self.edges[done], self.node[done], self.order, self.weights, self.totals[done])

    def _add(self, rows: Float[Tensor, "rows sources"], nodes: Int[Tensor, " rows"]) -> None:
        end = self.n + len(rows)
        self.edges[self.n : end, : rows.shape[1]] = rows
        self.totals[self.n : end] = row_totals(rows)
        self.node[self.n : end] = nodes
        self.n = end  # last: an interrupt leaves whole rows


def empty_matrix(n_rows: int, n_columns: int) -> Float[Tensor, "rows columns"]:
    """Zeros, in a temporary file if they take more than 1 GB."""
    if 4 * n_rows * n_columns <= _IN_MEMORY:
        return torch.zeros(n_rows, n_columns)
    with tempfile.TemporaryFile(prefix="saewb-graph-") as file:  # the map keeps it open, and it goes with the map
        file.truncate(4 * n_rows * n_columns)
        return torch.from_numpy(np.memmap(file, dtype=np.float32, mode="r+", shape=(n_rows, n_columns)))


def _graph(
    replacement: ReplacementModel, logits: _Logits, rows: _Rows, prompt: str, interrupted: bool
) -> AttributionGraph:
    """Choose columns, and put rows into the order of nodes."""
    n_logits, n_active = len(logits.token), replacement.n_active
    node, row = rows.node[: rows.n].sort()
    chosen = node[node < n_active]
    columns = torch.cat([chosen, torch.arange(n_active, replacement.n_sources + n_logits)])
    at = torch.searchsorted(columns, node)
    frame = _nodes(replacement, logits, chosen)
    value = torch.full((len(columns),), torch.nan, dtype=torch.float64)
    constant, left_out = value.clone(), value.clone()
    value[at], constant[at] = _values(replacement, logits, chosen)
    replacement.release()  # before the second matrix
    edges = empty_matrix(len(columns), len(columns))
    everything, kept = torch.zeros(2, len(node), dtype=torch.float64)
    for some in torch.arange(len(node)).split(max(1, CHUNK // rows.edges.shape[1])):
        whole = rows.edges[row[some]]
        part = whole[:, columns]
        everything[some], kept[some] = whole.sum(1, dtype=torch.float64), part.sum(1, dtype=torch.float64)
        edges[at[some]] = part
    if not replacement.is_exact:
        constant[at] = value[at] - everything
    left_out[at] = everything - kept
    frame = frame.assign(value=value.numpy(), constant=constant.numpy(), left_out=left_out.numpy())
    graph = AttributionGraph(
        nodes=frame,
        edges=edges,
        tokens=tuple(_token_texts(replacement.model, replacement.frozen.tokens[0].tolist())),
        prompt=prompt,
        model=str(getattr(replacement.model.cfg, "model_name", "")),
        saes=tuple(layer.site.name for layer in replacement.layers if layer.site is not None),
        is_exact=replacement.is_exact,
        n_active=n_active,
        replacement_score=0.0,
        completeness=0.0,
        interrupted=interrupted,
    )
    return completed(graph)


def _values(replacement: ReplacementModel, logits: _Logits, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Value and constant of each target, latents first."""
    chosen = chosen.to(replacement.latent.device)
    batches, bias = replacement.latent_targets(chosen), replacement.latent_biases(chosen).cpu()
    last = torch.full((len(logits.token),), replacement.n_pos - 1, device=chosen.device)
    batches.append(Targets(len(replacement.layers), last, logits.direction))
    bias = torch.cat([bias, logits.bias.cpu()]).double()
    value = torch.cat([replacement.values(batch, replacement.read) for batch in batches]).cpu().double() + bias
    if not replacement.is_exact:
        return value, value
    constant = (
        torch.cat([replacement.values(batch, replacement.without_sources) for batch in batches]).cpu().double() + bias
    )
    return value, constant


def _nodes(replacement: ReplacementModel, logits: _Logits, chosen: Tensor) -> pd.DataFrame:
    import pandas as pd

    n_pos, n_logits = replacement.n_pos, len(logits.token)
    depths = [layer.layer for layer in replacement.layers]
    texts = _token_texts(replacement.model, replacement.frozen.tokens[0].tolist())
    chosen = chosen.to(replacement.latent.device)
    position = [
        *replacement.position[chosen].tolist(),
        *list(range(n_pos)) * (len(depths) + 1),
        *[n_pos - 1] * n_logits,
    ]
    n_errors, missing = len(depths) * n_pos, pd.NA
    layer = [depths[i] for i in replacement.layer[chosen].tolist()] + [i for i in depths for _ in range(n_pos)]
    token_ids = replacement.frozen.tokens[0].tolist()
    latent = [*replacement.latent[chosen].tolist(), *[missing] * n_errors, *token_ids, *logits.token]
    activation = [
        *replacement.activation[chosen].tolist(),
        *replacement.errors.norm(dim=-1).flatten().tolist(),
        *[float("nan")] * (n_pos + n_logits),
    ]
    kind = ["latent"] * len(chosen) + ["error"] * n_errors + ["token"] * n_pos + ["target"] * n_logits
    n_sources = len(kind) - n_logits
    frame = pd.DataFrame(
        {
            "id": "",
            "kind": kind,
            "layer": pd.array([*layer, *[missing] * (n_pos + n_logits)], dtype="Int64"),
            "position": position,
            "token": [texts[p] for p in position[:n_sources]] + logits.label,
            "latent": pd.array(latent, dtype="Int64"),
            "activation": activation,
            "probability": [float("nan")] * n_sources + logits.weight.tolist(),
            "value": float("nan"),
            "constant": float("nan"),
            "left_out": float("nan"),
            "influence": 0.0,
            "cumulative": 0.0,
            "label": "",
        }
    )
    return frame.assign(id=node_ids(frame, int(replacement.model.cfg.n_layers)))
