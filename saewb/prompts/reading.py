"""Reading a prompt: which latents are active on each of its tokens, and what they do for a word that may come next.

1. `read_prompt` runs the clean model once and keeps what each SAE reads and the final residual stream.
2. Each SAE encodes that, 64 MiB of latents at a time; what is not 0 becomes a row.
3. `PromptReading.toward` weighs the rows with a word: what each adds to its logit directly (`saewb.direct_effects`).
4. `PromptReading.attributed` weighs them with `saewb.attribute`: what each does for the word by every way.

`read_in_turn` gives the same and what comes next, of fewer passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saewb.data.tokens import prompt_ids
from saewb.errors import explain
from saewb.interventions.site import places
from saewb.interventions.splice import flat
from saewb.models import hook_points
from saewb.models.capture import capture, capturing, eval_mode
from saewb.models.tokenizer import special_ids, special_mask
from saewb.prompts.direct_logit import Part, active_rows
from saewb.prompts.next_tokens import NextTokens, in_turn
from saewb.prompts.prompt_latents import Kept, PromptReading, words_of
from saewb.sae.cross_layer import CrossLayerTranscoder


def read_prompt(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor,
    saes: nn.Module | Sequence[nn.Module],
    *,
    target: str | int | None = None,
    at: int = -1,
    attribution: Literal["gradient", "integrated"] | None = None,
    skip_special_tokens: bool | Sequence[int] = True,
) -> PromptReading:
    """Which latents are active on each token of a prompt, in the clean model; and what they do for a word.

        activation     a_i
        logit_effect   a_i W_dec[i] . u / length     on the word's logit at the latent's own position, directly
        attribution    of `saewb.attribute`          on the word's log probability after `at`, by every way

    u is the word's column of the unembedding as in `FeatureIndex.latent` (the final norm's weight folded in, centered
    over words), length the RMS of the final residual stream there: with the error's and b_dec's share, the effects of
    an SAE on the last layer sum to the word's logit less the mean of all logits. A scaling of the SAE is taken into
    account; a cross-layer transcoder's latent counts with all it writes, at every layer.

    One pass of the model; a row for each active latent, and 64 MiB of dense latents at a time, whatever the length.
    What the SAEs read stays on the model's device, for `toward` and `attributed`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode, with
            whatever is attached to it.
        prompt: a text, to which the tokenizer adds its special tokens; or ids, `[pos]` or `[1, pos]`.
        saes: SAEs, transcoders, cross-layer transcoders (a part for each layer); one or several, at the points their
            configurations name.
        target: a token that may come next, as text or id; gives `logit_effect`.
        at: the position after which it would come, for `attribution`.
        attribution: "gradient" or "integrated"; needs a target.
        skip_special_tokens: leave these positions out: True for the tokenizer's BOS, EOS, PAD and the like, False for
            none, or ids.

    Returns:
        A PromptReading: `.to_frame(position, by=...)`, `.activations(sae, latent)`, `.toward(word)`.

    Raises:
        ValueError: for a hook or SAE that does not fit; a prompt of no token or more than the model's context; a word
            that is several tokens; `attribution` without a target.
        TypeError: for something that is no SAE; for `attribution` through a cross-layer transcoder.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> reading = saewb.read_prompt(model, "Paris is the capital of", sae, target=" France")
        >>> reading.tokens[-2:], len(reading), reading.target_token
        ((' capital', ' of'), 112, ' France')
        >>> reading.to_frame(position=-1, by="logit_effect", n=3).columns.tolist()
        ['sae', 'position', 'token', 'latent', 'activation', 'logit_effect']
    """
    if attribution is not None and target is None:
        fix = 'saewb.read_prompt(model, prompt, sae, target=" Paris", attribution="gradient")'
        raise ValueError(explain("attribution needs a word to attribute.", want="a target", fix=fix))
    asked = _asked(model, prompt, saes, skip_special_tokens)
    with hook_points.lock(model), eval_mode(model, *asked.saes), torch.no_grad():
        made = asked.reading(capture(model, asked.ids, asked.points))
    made = made if target is None else made.toward(target)
    return made if attribution is None else made.attributed(target, at, attribution)


def read_in_turn(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor,
    saes: nn.Module | Sequence[nn.Module],
    compared: nn.Module | Sequence[nn.Module] | None = None,
    *,
    n: int = 10,
    skip_special_tokens: bool | Sequence[int] = True,
) -> Iterator[tuple[PromptReading | None, NextTokens]]:
    """What `read_prompt` and `next_tokens` give, of two passes together instead of three, each as soon as it is there.

    Args:
        model: as for `read_prompt`; its lock is held for each pass, and not in between.
        prompt: as for `read_prompt`.
        saes: to read with.
        compared: those to put in place for the next words; None: none.
        n: words of each, as for `next_tokens`.
        skip_special_tokens: as for `read_prompt`.

    Returns:
        An iterator: the reading and the model's own next words after one pass; then None and the next words with
        `compared` in place. The logits of the first pass are held in between.

    Raises:
        ValueError, TypeError: as `read_prompt` and `next_tokens`.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> steps = saewb.read_in_turn(model, "Paris is the capital of", sae, sae)
        >>> reading, alone = next(steps)
        >>> _, compared = next(steps)
        >>> len(reading), alone.kl is None, compared.kl is None
        (112, True, False)
    """
    asked = _asked(model, prompt, saes, skip_special_tokens)
    words = in_turn(model, asked.ids, compared, n, skip_special_tokens=skip_special_tokens)
    with hook_points.lock(model), eval_mode(model, *asked.saes), torch.no_grad():
        with capturing(model, asked.points) as seen:
            alone = next(words)
        reading = asked.reading(seen)
    seen.clear()
    yield reading, alone
    yield from ((None, found) for found in words)


@dataclass(frozen=True, eq=False)
class _Asked:
    """A prompt to be read, checked."""

    model: nn.Module
    ids: Tensor  # [1, pos]
    special: Tensor  # [pos], positions left out
    skip: bool | tuple[int, ...]  # skip_special_tokens
    saes: tuple[nn.Module, ...]
    parts: tuple[Part, ...]

    @property
    def last(self) -> str:
        """Where the final residual stream is."""
        return f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"

    @property
    def points(self) -> list[str]:
        """What is needed of a pass."""
        return [*(part.read for part in self.parts), self.last]

    def reading(self, seen: Mapping[str, Tensor]) -> PromptReading:
        """The latents, of what a pass gave at `points`."""
        parts, ids = self.parts, tuple(self.ids[0].tolist())
        inputs = tuple(_read(part, seen[part.read]) for part in parts)
        rows = [active_rows(part, x, ~self.special) for part, x in zip(parts, inputs, strict=True)]
        return PromptReading(
            tokens=tuple(words_of(self.model, ids)),
            ids=ids,
            special=self.special.cpu(),
            saes=_names(parts),
            owner=tuple(part.owner for part in parts),
            d_sae=tuple(part.d_sae for part in parts),
            sae=torch.cat([torch.full((len(r.latent),), k) for k, r in enumerate(rows)]),
            position=torch.cat([r.position for r in rows]),
            latent=torch.cat([r.latent for r in rows]),
            activation=torch.cat([r.activation for r in rows]),
            kept=Kept(self.model, self.saes, parts, inputs, seen[self.last][0], self.ids, self.skip),
        )


def _asked(model: nn.Module, prompt: object, saes: object, skip_special_tokens: bool | Sequence[int]) -> _Asked:
    ids = prompt_ids(model, prompt)
    special = special_mask(ids, special_ids(model, skip_special_tokens))[0]
    several = tuple(saes) if isinstance(saes, (list, tuple)) else (saes,)
    skip = skip_special_tokens if isinstance(skip_special_tokens, bool) else tuple(skip_special_tokens)
    return _Asked(model, ids, special, skip, several, _parts(model, several))


def _parts(model: nn.Module, saes: Sequence[nn.Module]) -> tuple[Part, ...]:
    if not saes:
        raise ValueError(explain("got no SAE.", fix="saewb.read_prompt(model, prompt, sae)"))
    made: list[Part] = []
    for owner, sae in enumerate(saes):
        if not (isinstance(sae, nn.Module) and hasattr(sae, "encode") and hasattr(sae, "cfg")):
            raise TypeError(explain(f"got {type(sae).__name__} as an SAE.", fix="sae = saewb.load_sae(...)"))
        if isinstance(sae, CrossLayerTranscoder):
            pairs = zip(sae.cfg.hooks, sae.cfg.hooks_out, strict=True)
            made += [_part(model, sae, owner, layer, read, write) for layer, (read, write) in enumerate(pairs)]
        else:
            made.append(_part(model, sae, owner, None, *places(sae, None, None)))
    return tuple(made)


def _part(model: nn.Module, sae: nn.Module, owner: int, layer: int | None, read: str, write: str) -> Part:
    for name in (read, write):
        hook_points.resolve(model, name)  # says if there is none
    return Part(sae, owner, layer, read if read == write else f"{read} => {write}", read, write)


def _read(part: Part, activation: Tensor) -> Tensor:
    """What the part reads, heads side by side; the layers of a cross-layer transcoder read what is there."""
    if part.layer is not None:
        return activation
    return flat(part.sae, activation, part.sae.cfg.d_in, part.read)


def _names(parts: Sequence[Part]) -> tuple[str, ...]:
    """Names of the parts; where several have the same, with a number."""
    names = [part.name for part in parts]
    seen = [names[:k].count(name) for k, name in enumerate(names)]
    return tuple(f"{name} ({before + 1})" if before else name for name, before in zip(names, seen, strict=True))
