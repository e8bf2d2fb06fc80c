"""The frozen model: attention patterns, norm scales and MLP outputs held at their values on one prompt.

With these constant, the rest of a transformer is affine in its residual stream: each logit is a sum of contributions,
one per vector that was added to the stream, and a constant. Direct effects, attribution graphs and direct interventions
are computed on it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.metrics import float64
from saewb.models import hook_points
from saewb.models.capture import eval_mode

STREAM = "blocks.0.hook_resid_pre"
"""Where the residual stream begins: token and position embeddings."""
FINAL = "unembed.hook_in"
"""Output of the final norm, which the unembedding reads."""

_OF_PATTERNS = (".q_norm.hook_scale", ".k_norm.hook_scale")
"""Norms that nothing but the attention pattern depends on."""


def mlp_point(layer: int) -> str:
    """Where the MLP of a block adds to the residual stream, after a norm of its output if there is one."""
    return f"blocks.{layer}.hook_mlp_out"


@dataclass(frozen=True, eq=False)
class FrozenModel:
    """Attention patterns, norm scales and MLP outputs of one prompt, by hook point: the result of `saewb.freeze`."""

    model: nn.Module
    """The model they are of."""
    tokens: Int[Tensor, "1 pos"]
    """The prompt; a frozen pass takes rows of as many tokens."""
    patterns: Mapping[str, Tensor]
    """Attention patterns, `[1, head, query, key]`, by hook point."""
    scales: Mapping[str, Tensor]
    """What each norm divides by, `[1, pos, 1]`, by hook point."""
    mlp_outputs: Mapping[str, Float[Tensor, "1 pos d_model"]]
    """What each MLP adds to the residual stream, by hook point."""
    stream: Float[Tensor, "1 pos d_model"]
    """Residual stream at the start."""
    final: Float[Tensor, "1 pos d_final"]
    """Output of the final norm."""
    logits: Float[Tensor, "1 pos d_vocab"]
    """Logits of the model as it is."""
    curvature: float
    """Second difference of the frozen model, relative to its first: 0 but for rounding."""

    def edits(self, *, attention: bool = True, norms: bool = True, mlps: bool = True) -> dict[str, hook_points.Edit]:
        """Edits by hook point that put these values into a pass, for `saewb.models.hook_points.editing`.

        Args:
            attention: attention patterns.
            norms: norm scales.
            mlps: MLP outputs.
        """
        chosen = [*[self.patterns] * attention, *[self.scales] * norms, *[self.mlp_outputs] * mlps]
        return {name: self._put(name, value) for values in chosen for name, value in values.items()}

    @cached_property
    def is_causal(self) -> bool:
        """Whether no token's attention is on a later one, so that a prefix does not depend on what comes after."""
        n_pos = self.tokens.shape[1]
        return all(
            pattern.shape[-2:] == (n_pos, n_pos) and not bool(pattern.triu(1).any())
            for pattern in self.patterns.values()
        )

    def prefix(self, n_pos: int) -> FrozenModel:
        """The same of the first tokens alone; only if `is_causal`."""

        def cut(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value[:, :n_pos] for name, value in values.items()}

        return replace(
            self,
            tokens=self.tokens[:, :n_pos],
            patterns={name: pattern[..., :n_pos, :n_pos] for name, pattern in self.patterns.items()},
            scales=cut(self.scales),
            mlp_outputs=cut(self.mlp_outputs),
            stream=self.stream[:, :n_pos],
            final=self.final[:, :n_pos],
            logits=self.logits[:, :n_pos],
        )

    def _put(self, name: str, value: Tensor) -> hook_points.Edit:
        def edit(activation: Tensor) -> Tensor:
            if activation.shape[1:] != value.shape[1:]:
                what = f"{name!r} has shape {tuple(activation.shape)}, frozen on a prompt of {self.tokens.shape[1]}."
                raise ValueError(explain(what, want="rows of as many tokens", fix="model(frozen.tokens)"))
            return value.expand(activation.shape)

        return edit

    def __repr__(self) -> str:
        counts = f"{len(self.patterns)} attention patterns, {len(self.scales)} norm scales"
        return f"FrozenModel({self.tokens.shape[1]} tokens: {counts}, {len(self.mlp_outputs)} MLP outputs)"


@contextmanager
def freeze(
    model: nn.Module, prompt: str | Tensor, *, attention: bool = True, norms: bool = True, mlps: bool = True
) -> Iterator[FrozenModel]:
    """Hold attention patterns, norm scales and MLP outputs at their values on a prompt, inside of the `with` block.

    What is left is affine in the residual stream, and so in every vector that is added to it:

        logits = W_U [ sum_s M_s v_s + c ]        v_s added to the stream at some layer and position, M_s its Jacobian

    before a soft cap, where the model has one. So the gradient of a logit at any point of the stream, times the vector
    there, is that vector's direct effect, exactly. The constants carry no gradient. Every pass inside the block, of
    one or several rows of as many tokens as the prompt, is frozen; the model's lock is held.

    That freezing works is tried on every call: the frozen model must reproduce the logits, and its second difference
    f(x + d) + f(x - d) - 2 f(x) must vanish, for a random d half as long as the embeddings x. There are models whose
    attention is computed elsewhere and only shown at its hook point: on these it does not.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode.
        prompt: a text, or token ids, `[pos]` or `[1, pos]`.
        attention: hold attention patterns.
        norms: hold norm scales.
        mlps: hold MLP outputs.

    Returns:
        A context manager; `as` gives the FrozenModel: `.tokens`, `.patterns`, `.scales`, `.mlp_outputs`.

    Raises:
        ValueError: if the model cannot be frozen; in the block, for a pass over another number of tokens.

    References:
        The local replacement model: Ameisen et al. 2025,
        transformer-circuits.pub/2025/attribution-graphs/methods.html.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> with saewb.freeze(model, "Paris is the capital of") as frozen:
        ...     stream = frozen.stream.clone().requires_grad_()
        ...     logits = model.run_with_hooks(frozen.tokens, fwd_hooks=[("blocks.0.hook_in", lambda x, hook: stream)])
        ...     (slope,) = torch.autograd.grad(logits[0, -1, 310], stream)
        >>> (slope * stream)[0].sum(-1).shape    # direct effect of each token's embedding on one logit
        torch.Size([8])
    """
    frozen = record_frozen(model, prompt_ids(model, prompt))
    with eval_mode(model), hook_points.editing(model, frozen.edits(attention=attention, norms=norms, mlps=mlps)):
        yield frozen


@torch.no_grad()
def record_frozen(model: nn.Module, tokens: Int[Tensor, "1 pos"]) -> FrozenModel:
    """Record what is frozen in a clean pass, and check that the frozen model is the model, and affine.

    Raises:
        ValueError: if it is not.
    """
    recorded: dict[str, Tensor] = {}

    def record(name: str) -> hook_points.Edit:
        return lambda activation: recorded.update({name: activation.detach().clone()})

    patterns, scales = _points_ending(model, ".hook_pattern"), _points_ending(model, ".hook_scale")
    scales = {name for name in scales if not name.endswith(_OF_PATTERNS)}
    mlps = {hook_points.resolve(model, mlp_point(layer)).name for layer in range(model.cfg.n_layers)}
    with hook_points.lock(model), eval_mode(model):
        points = (*patterns, *scales, *mlps, STREAM, FINAL)
        with hook_points.editing(model, {name: record(name) for name in points}):
            logits = model(tokens)
        frozen = FrozenModel(
            model=model,
            tokens=tokens,
            patterns={name: recorded[name] for name in recorded if name in patterns},
            scales={name: recorded[name] for name in recorded if name in scales},
            mlp_outputs={name: recorded[name] for name in recorded if name in mlps},
            stream=recorded[STREAM],
            final=recorded[FINAL],
            logits=logits.detach(),
            curvature=math.nan,
        )
        return replace(frozen, curvature=_curvature(frozen))


def _points_ending(model: nn.Module, ending: str) -> set[str]:
    return {hook_points.resolve(model, name).name for name in hook_points.point_names(model) if name.endswith(ending)}


def _curvature(frozen: FrozenModel) -> float:
    """Relative second difference of the frozen model; raises if it is not affine, or not the model."""
    model, stream = frozen.model, frozen.stream
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(stream.shape, generator=rng).to(stream)
    step = 0.5 * noise * stream.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    outputs: dict[str, Tensor] = {}
    edits = {
        **frozen.edits(),
        STREAM: lambda activation: torch.cat([stream, stream + step, stream - step]),
        FINAL: lambda activation: outputs.update(final=float64(activation)),
    }
    with quiet(), hook_points.editing(model, edits):
        model(frozen.tokens.expand(3, -1))
    same, plus, minus = outputs["final"]
    second, first = (plus + minus - 2 * same).norm(), (plus - minus).norm()
    final = float64(frozen.final)
    curvature, drift = float(second / first), float((same - final[0]).norm() / final.norm())
    limit = 3 * torch.finfo(stream.dtype).eps ** 0.5
    if not max(curvature, drift) <= limit:
        name = getattr(model.cfg, "model_name", type(model).__name__)
        what = f"{name} cannot be frozen: with attention patterns, norm scales and MLP outputs held, its output "
        what += f"changes by {drift:.1g} and is not affine (relative second difference {curvature:.1g})."
        want = f"at most {limit:.1g} of each; on this model the hook points of attention or norms take no edits"
        raise ValueError(explain(what, want=want, fix="saewb.attribute(model, prompt, saes, metric)    # local"))
    return curvature


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning of a TransformerBridge that an edited norm is computed anew, to rounding the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*edited hook_scale/hook_normalized.*")
        yield
