"""Reading a prompt: which latents are active on each of its tokens, and what they do for a word that may come next.

1. `read_prompt` runs the clean model once and keeps what each SAE reads and the final residual stream.
2. Each SAE encodes that, 64 MiB of latents at a time; what is not 0 becomes a row.
3. `toward` weighs the rows with a word: what each adds to its logit directly (`saewb.direct_effects`).
4. `attributed` weighs them with `saewb.attribute`: what each does for the word by every way through the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb import hooks
from saewb.activations import capture, eval_mode
from saewb.attribution import attribute
from saewb.cross_layer import CrossLayerTranscoder
from saewb.direct_effects import Part, Rows, active_rows, direct_effects
from saewb.errors import explain, near
from saewb.nodes import ERROR, token_id
from saewb.placing import places
from saewb.spans import token_strings
from saewb.splice import flat
from saewb.tokens import prompt_ids, special_ids, special_mask

if TYPE_CHECKING:
    import pandas as pd

Weight = Literal["activation", "logit_effect", "attribution"]
_WEIGHTS: tuple[Weight, ...] = ("activation", "logit_effect", "attribution")


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
    ids: tuple[int, ...]
    special: Bool[Tensor, " pos"]  # positions left out
    saes: tuple[str, ...]  # each SAE, or layer of a cross-layer transcoder, by where it reads and writes
    d_sae: tuple[int, ...]  # how many latents each has
    sae: Int[Tensor, " rows"]  # which of them; rows are in the order of SAE, position, latent
    position: Int[Tensor, " rows"]
    latent: Int[Tensor, " rows"]
    activation: Float[Tensor, " rows"]
    target: int | None = None  # id of the word that effects are on
    at: int | None = None  # the position at which it is predicted, where attribution looked
    logit_effect: Float[Tensor, " rows"] | None = None  # on its logit at the row's own position, directly
    attribution: Float[Tensor, " rows"] | None = None  # on its log probability at `at`, by every way
    kept: Kept = field(repr=False, default=None)

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def target_token(self) -> str | None:
        """The text of the word that effects are on."""
        return None if self.target is None else _words(self.kept.model, [self.target])[0]

    def toward(self, target: str | int) -> PromptReading:
        """The same rows with `logit_effect`: what each adds to this word's logit, directly, at its own position.

        Args:
            target: one token, as text or id.
        Raises:
            ValueError: for a word that is several tokens; if none of the SAEs writes into the residual stream.
        """
        kept = self.kept
        token = token_id(kept.model, target)
        with hooks.lock(kept.model), eval_mode(*kept.saes):
            found = [
                direct_effects(kept.model, part, x, self._rows(k), token, kept.final)
                for k, (part, x) in enumerate(zip(kept.parts, kept.inputs, strict=True))
            ]
        effect = torch.cat(found)
        if len(effect) and bool(effect.isnan().all()):
            what = f"no direct effects on logits are known of {', '.join(self.saes)}."
            want = "an SAE that writes into the residual stream"
            raise ValueError(explain(what, want=want, fix='reading.attributed(word, method="gradient")'))
        same = self.target == token
        keep = {"attribution": self.attribution, "at": self.at} if same else {"attribution": None, "at": None}
        return replace(self, target=token, logit_effect=effect, **keep)

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
    ) -> pd.DataFrame:
        """Rows as a table, the largest |`by`| first: sae, position, token, latent, activation, and effects if weighed.

        Args:
            position: of this token only; negative counts from the end; None: all.
            sae: of this one only, by number or name; None: all.
            by: "activation"; "logit_effect" or "attribution" after `toward` or `attributed`.
            n: rows at most.
            once: each latent once, where it is largest.
        Raises:
            ValueError: for a position, SAE or weight that is not there.
        """
        import numpy as np
        import pandas as pd

        weight = self._weight(by)
        chosen = torch.ones(len(self), dtype=torch.bool)
        if position is not None:
            chosen &= self.position == self._position(position)
        if sae is not None:
            chosen &= self.sae == self._which(sae)
        rows = chosen.nonzero()[:, 0]
        size = weight[rows].abs().nan_to_num(nan=-1.0)
        rows = rows[size.argsort(descending=True, stable=True)].numpy()
        texts, names = np.array(self.tokens, dtype=object), np.array(self.saes, dtype=object)
        columns = {
            "sae": names[self.sae.numpy()[rows]],
            "position": self.position.numpy()[rows],
            "token": texts[self.position.numpy()[rows]],
            "latent": self.latent.numpy()[rows],
        }
        columns |= {name: w.numpy()[rows] for name in _WEIGHTS if (w := getattr(self, name)) is not None}
        found = pd.DataFrame(columns)
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

    def _weight(self, by: str) -> Tensor:
        if by not in _WEIGHTS:
            raise ValueError(explain(f"by={by!r}.", near=near(str(by), _WEIGHTS), want=", ".join(_WEIGHTS)))
        if (found := getattr(self, by)) is None:
            verb = "toward" if by == "logit_effect" else "attributed"
            raise ValueError(explain(f"this reading has no {by}.", fix=f'reading.{verb}(" Paris")'))
        return found


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

    u is the word's column of the unembedding as in `FeatureIndex.latent` (the final norm's weight folded in, centred
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
    ids = prompt_ids(model, prompt)
    special = special_mask(ids, special_ids(model, skip_special_tokens))[0]
    several = tuple(saes) if isinstance(saes, (list, tuple)) else (saes,)
    skip = skip_special_tokens if isinstance(skip_special_tokens, bool) else tuple(skip_special_tokens)
    parts = _parts(model, several)
    with hooks.lock(model), eval_mode(model, *several):
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        with torch.no_grad():
            seen = capture(model, ids, [*(part.read for part in parts), last])
            inputs = tuple(
                flat(p.sae, seen[p.read], p.sae.cfg.d_in, p.read) if p.layer is None else seen[p.read] for p in parts
            )
        rows = [active_rows(part, x, ~special) for part, x in zip(parts, inputs, strict=True)]
    which = torch.cat([torch.full((len(r.latent),), k) for k, r in enumerate(rows)])
    made = PromptReading(
        tokens=tuple(_words(model, ids[0].tolist())),
        ids=tuple(ids[0].tolist()),
        special=special.cpu(),
        saes=_names(parts),
        d_sae=tuple(part.d_sae for part in parts),
        sae=which,
        position=torch.cat([r.position for r in rows]),
        latent=torch.cat([r.latent for r in rows]),
        activation=torch.cat([r.activation for r in rows]),
        kept=Kept(model, several, parts, inputs, seen[last][0], ids, skip),
    )
    made = made if target is None else made.toward(target)
    return made if attribution is None else made.attributed(target, at, attribution)


def _parts(model: nn.Module, saes: Sequence[nn.Module]) -> tuple[Part, ...]:
    if not saes:
        raise ValueError(explain("got no SAE.", fix="saewb.read_prompt(model, prompt, sae)"))
    made: list[Part] = []
    for sae in saes:
        if not (isinstance(sae, nn.Module) and hasattr(sae, "encode") and hasattr(sae, "cfg")):
            raise TypeError(explain(f"got {type(sae).__name__} as an SAE.", fix="sae = saewb.load_sae(...)"))
        if isinstance(sae, CrossLayerTranscoder):
            pairs = zip(sae.cfg.hooks, sae.cfg.hooks_out, strict=True)
            made += [_part(model, sae, layer, read, write) for layer, (read, write) in enumerate(pairs)]
        else:
            made.append(_part(model, sae, None, *places(sae, None, None)))
    return tuple(made)


def _part(model: nn.Module, sae: nn.Module, layer: int | None, read: str, write: str) -> Part:
    for name in (read, write):
        hooks.resolve(model, name)  # says if there is none
    return Part(sae, layer, read if read == write else f"{read} => {write}", read, write)


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


def _words(model: nn.Module, ids: Sequence[int]) -> list[str]:
    return token_strings(model, ids) if getattr(model, "tokenizer", None) is not None else [f"<{i}>" for i in ids]
