"""What was read of a prompt: active latents as rows, to be weighed with a word, looked up, put in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb.errors import explain, near
from saewb.models import hook_points
from saewb.models.capture import eval_mode
from saewb.models.tokenizer import token_strings
from saewb.prompts.attribution import attribute
from saewb.prompts.attribution_nodes import ERROR, token_id
from saewb.prompts.direct_logit import Part, Rows, direct_effects

if TYPE_CHECKING:
    import pandas as pd

    from saewb.features import FeatureIndex

Weight = Literal["activation", "logit_effect", "attribution", "of_max"]
_WEIGHTS: tuple[Weight, ...] = ("activation", "logit_effect", "attribution", "of_max")


@dataclass(frozen=True, eq=False)
class Kept:
    """What the clean run left, for weighing rows with another word."""

    model: nn.Module
    saes: tuple[nn.Module, ...]  # as they were given
    parts: tuple[Part, ...]
    inputs: tuple[Float[Tensor, "1 pos d_in"], ...]  # what each part read, on the model's device
    final: Float[Tensor, "pos d_model"]  # the residual stream before the final norm
    ids: Int[Tensor, "1 pos"]
    skip: bool | tuple[int, ...]  # skip_special_tokens


@dataclass(frozen=True, eq=False)
class PromptReading:
    """The active latents of a prompt, a row per position and latent. Made by `saewb.read_prompt`, which explains it."""

    tokens: tuple[str, ...]  # the prompt, token by token
    ids: tuple[int, ...]  # of its tokens
    special: Bool[Tensor, " pos"]  # positions left out
    saes: tuple[str, ...]  # each SAE, or layer of a cross-layer transcoder, by where it reads and writes
    owner: tuple[int, ...]  # which of those given each is, or is a layer of
    d_sae: tuple[int, ...]  # how many latents each has
    sae: Int[Tensor, " rows"]  # which of them; rows are in the order of SAE, position, latent
    position: Int[Tensor, " rows"]  # of the token, from 0
    latent: Int[Tensor, " rows"]  # index in its SAE
    activation: Float[Tensor, " rows"]  # in the SAE's own units
    target: int | None = None  # id of the word that effects are on
    at: int | None = None  # the position at which it is predicted, where attribution looked
    logit_effect: Float[Tensor, " rows"] | None = None  # on its logit at the row's own position, directly
    attribution: Float[Tensor, " rows"] | None = None  # on its log probability at `at`, by every way
    kept: Kept = field(repr=False, default=None)  # what later questions need

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def target_token(self) -> str | None:
        """The text of the word that effects are on."""
        return None if self.target is None else words_of(self.kept.model, [self.target])[0]

    def toward(self, target: str | int) -> PromptReading:
        """The same rows with `logit_effect`: what each adds to this word's logit, directly, at its own position.

        nan for SAEs that do not write into the residual stream, and for crosscoders.

        Args:
            target: one token, as text or id.

        Raises:
            ValueError: for a word that is several tokens.
        """
        kept = self.kept
        token = token_id(kept.model, target)
        with hook_points.lock(kept.model), eval_mode(*kept.saes):
            found = [
                direct_effects(kept.model, part, x, self._rows(k), token, kept.final)
                for k, (part, x) in enumerate(zip(kept.parts, kept.inputs, strict=True))
            ]
        same = self.target == token
        keep = {"attribution": self.attribution, "at": self.at} if same else {"attribution": None, "at": None}
        return replace(self, target=token, logit_effect=torch.cat(found), **keep)

    def attributed(
        self, target: str | int, at: int = -1, method: Literal["gradient", "integrated"] = "gradient"
    ) -> PromptReading:
        """The same rows with `attribution`: what each does for this word's log probability after position `at`.

        Args:
            target: one token, as text or id.
            at: the position whose next token it would be.
            method: as for `saewb.attribute`, whose effects these are.

        Raises:
            ValueError: for a word that is several tokens, a position that is not there.
            TypeError: for a cross-layer transcoder.
        """
        kept, token, place = self.kept, token_id(self.kept.model, target), self._position(at)

        def log_probability(logits: Tensor) -> Tensor:
            return logits[0, place].float().log_softmax(-1)[token]

        how = {"method": method, "skip_special_tokens": kept.skip}
        found = attribute(kept.model, kept.ids, kept.saes, log_probability, **how)
        latents = (found.latent != ERROR).nonzero()[:, 0]
        key = self._key(found.sae[latents], found.position[latents], found.latent[latents])
        key, order = key.sort()
        mine = self._key(self.sae, self.position, self.latent)
        effect = torch.zeros(len(self), dtype=torch.float32)  # what comes after `at` has none
        if len(key):
            slot = torch.searchsorted(key, mine).clamp_(max=len(key) - 1)
            effect = torch.where(key[slot] == mine, found.effect[latents][order][slot].float(), effect)
        same = self.logit_effect if self.target == token else None
        return replace(self, target=token, at=place, attribution=effect, logit_effect=same)

    def activations(self, sae: int | str, latent: int) -> Float[Tensor, " pos"]:
        """What one latent does at every position of the prompt; 0 at those left out."""
        k = self._which(sae)
        if not 0 <= latent < self.d_sae[k]:
            raise ValueError(explain(f"latent {latent} of {self.saes[k]}.", want=f"0 to {self.d_sae[k] - 1}"))
        rows = ((self.sae == k) & (self.latent == latent)).nonzero()[:, 0]
        return torch.zeros(len(self.tokens)).index_put((self.position[rows],), self.activation[rows])

    def to_frame(
        self,
        position: int | None = None,
        sae: int | str | None = None,
        *,
        by: Weight = "activation",
        n: int | None = None,
        once: bool = False,
        index: FeatureIndex | Sequence[FeatureIndex | None] | None = None,
        max_density: float = 1.0,
    ) -> pd.DataFrame:
        """Rows as a table, the largest |`by`| first: sae, position, token, latent, activation, and effects if weighed.

        Given an index also density, the fraction of its text's tokens on which the latent fires, and of_max, the
        activation as a share of the largest one there.

        Args:
            position: of this token only; negative counts from the end; None: all.
            sae: of this one only, by number or name; None: all.
            by: "activation"; "logit_effect" or "attribution" after `toward` or `attributed`; "of_max" with an index.
            n: rows at most.
            once: each latent once, where it is largest.
            index: of the SAE; or one for each of those given to `read_prompt`, None where there is none.
            max_density: leave out latents that fire more often than this; those without an index stay.

        Raises:
            ValueError: for a position, SAE or weight that is not there; an index of another number of latents.
        """
        import numpy as np
        import pandas as pd

        weights = {name: w for name in _WEIGHTS[:3] if (w := getattr(self, name)) is not None}
        if (known := self._known(index)) is not None:
            weights["density"], weights["of_max"] = known
        chosen = torch.ones(len(self), dtype=torch.bool)
        if position is not None:
            chosen &= self.position == self._position(position)
        if sae is not None:
            chosen &= self.sae == self._which(sae)
        if known is not None:
            chosen &= ~(weights["density"] > max_density)
        rows = chosen.nonzero()[:, 0]
        size = self._weight(by, weights)[rows].abs().nan_to_num(nan=-1.0)
        rows = rows[size.argsort(descending=True, stable=True)].numpy()
        texts, names = np.array(self.tokens, dtype=object), np.array(self.saes, dtype=object)
        columns = {
            "sae": names[self.sae.numpy()[rows]],
            "position": self.position.numpy()[rows],
            "token": texts[self.position.numpy()[rows]],
            "latent": self.latent.numpy()[rows],
        }
        found = pd.DataFrame(columns | {name: w.numpy()[rows] for name, w in weights.items()})
        found = found.drop_duplicates(["sae", "latent"]) if once else found
        return found.head(len(found) if n is None else n).reset_index(drop=True)

    def __repr__(self) -> str:
        toward = "" if self.target is None else f", toward {self.target_token!r}"
        plain = int((~self.special).sum())
        return f"PromptReading({len(self)} rows on {plain} tokens: {', '.join(self.saes)}{toward})"

    def _repr_html_(self) -> str:
        return self.to_frame(n=20, once=True)._repr_html_()

    def _rows(self, k: int) -> Rows:
        own = (self.sae == k).nonzero()[:, 0]
        return Rows(self.position[own], self.latent[own], self.activation[own])

    def _key(self, sae: Tensor, position: Tensor, latent: Tensor) -> Int[Tensor, " rows"]:
        return (sae * len(self.tokens) + position) * max(self.d_sae) + latent

    def _position(self, at: int) -> int:
        n = len(self.tokens)
        if not -n <= at < n:
            raise ValueError(explain(f"position {at} of a prompt of {n} tokens.", want=f"0 to {n - 1}"))
        return at % n

    def _which(self, sae: int | str) -> int:
        if isinstance(sae, str) and sae in self.saes:
            return self.saes.index(sae)
        if isinstance(sae, int) and 0 <= sae < len(self.saes):
            return sae
        close = near(sae, self.saes) if isinstance(sae, str) else ()
        raise ValueError(explain(f"no SAE {sae!r} here.", near=close, want=f"0 to {len(self.saes) - 1}, or a name"))

    def _known(self, index: FeatureIndex | Sequence[FeatureIndex | None] | None) -> tuple[Tensor, Tensor] | None:
        """Of each row what an index knows of its latent: density, and the activation's share of the largest; or nan."""
        if index is None:
            return None
        n = len(self.kept.saes)
        several = list(index) if isinstance(index, (list, tuple)) else [index]
        if len(several) != n:
            raise ValueError(explain(f"got {len(several)} indexes for {n} SAEs.", want="one for each, or None"))
        density, of_max = (torch.full((len(self),), torch.nan) for _ in range(2))
        for k, owner in enumerate(self.owner):
            if (found := several[owner]) is None:
                continue
            if len(found) != self.d_sae[k]:
                what = f"{found!r} is not of {self.saes[k]}, which has {self.d_sae[k]} latents."
                raise ValueError(explain(what, fix="saewb.build_index(model, sae, texts)"))
            own = (self.sae == k).nonzero()[:, 0]
            density[own] = found.density[self.latent[own]].float()
            largest = found.largest.abs()[self.latent[own]]
            of_max[own] = self.activation[own].abs() / largest.where(largest > 0, torch.nan)
        return density, of_max

    def _weight(self, by: str, weights: Mapping[str, Tensor]) -> Tensor:
        if by not in _WEIGHTS:
            raise ValueError(explain(f"by={by!r}.", near=near(str(by), _WEIGHTS), want=", ".join(_WEIGHTS)))
        if by not in weights:
            verbs = {"logit_effect": 'reading.toward(" Paris")', "attribution": 'reading.attributed(" Paris")'}
            fix = verbs.get(by, f"reading.to_frame(by={by!r}, index=index)")
            raise ValueError(explain(f"this reading has no {by}.", fix=fix))
        if by == "logit_effect" and len(self) and bool(weights[by].isnan().all()):
            what = f"no direct effects on logits are known of {', '.join(self.saes)}."
            want = "an SAE or transcoder that writes into the residual stream"
            raise ValueError(explain(what, want=want, fix='reading.attributed(" Paris")'))
        return weights[by]


def words_of(model: nn.Module, ids: Sequence[int]) -> list[str]:
    """The text of each token of a prompt; its id where the model has no tokenizer."""
    return token_strings(model, ids) if getattr(model, "tokenizer", None) is not None else [f"<{i}>" for i in ids]
