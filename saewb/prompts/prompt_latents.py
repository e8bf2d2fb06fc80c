"""Active latents on each token of a prompt, and their effects on a candidate next token.

1. `read_prompt` runs the clean model once and stores the input of each SAE and the final residual stream.
2. Each SAE encodes its input, 64 MiB of latents at a time; every active latent becomes a row.
3. `PromptReading.toward` adds to the rows their direct effect on a token's logit (`saewb.circuits.direct_logit`).
4. `PromptReading.attributed` adds their effect by `saewb.attribute`, through the whole model.

`read_in_turn` also yields the next tokens, in fewer passes than `read_prompt` and `next_tokens` take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb._finite import check_finite
from saewb._indices import index_of
from saewb.circuits.attribution import attribute
from saewb.circuits.attribution_nodes import ERROR, token_id
from saewb.circuits.direct_logit import active_latents, direct_effects
from saewb.data.tokens import prompt_ids
from saewb.errors import explain, near
from saewb.interventions.site import Site, sites_of
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import capture, capturing, eval_mode
from saewb.models.tokenizer import special_ids, special_mask
from saewb.prompts.next_tokens import NextTokens, next_tokens_in_turn, prompt_strings
from saewb.sae.sparse import SparseLatents

if TYPE_CHECKING:
    import pandas as pd

    from saewb.features import FeatureIndex

Weight = Literal["activation", "logit_effect", "attribution", "of_max"]
_WEIGHTS: tuple[Weight, ...] = ("activation", "logit_effect", "attribution", "of_max")


@torch.inference_mode(False)  # the activations that it keeps are differentiated later
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
    """List the active latents on each token of a prompt, and their effects on a candidate next token.

        activation     a_i
        logit_effect   a_i W_dec[i] . u / length     direct, on the target's logit at the latent's own position
        attribution    as `saewb.attribute`          on the target's log probability after `at`, through the whole model

    u is the target's column of the unembedding as in `FeatureIndex.latent` (the final norm's weight folded in, centered
    over the vocabulary), length the RMS of the final residual stream there: with the share of the error and of b_dec,
    the effects of an SAE on the last layer sum to the target's logit less the mean of all logits. An SAE's
    normalization is taken into account; a cross-layer transcoder's latent counts with all it writes, at every layer.

    One pass of the model; a row per active latent, and 64 MiB of dense latents at a time, whatever the length. What the
    SAEs read stays on the model's device, for `toward` and `attributed`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); run in eval mode, with
            whatever steers it, or is attached at other points.
        prompt: a text, to which the tokenizer adds its special tokens; or ids, `[pos]` or `[1, pos]`.
        saes: SAEs, transcoders, cross-layer transcoders (a part for each layer); one or several, at the points their
            configurations name.
        target: candidate next token, as text or id; adds `logit_effect`.
        at: position whose next token it would be, for `attribution`.
        attribution: "gradient" or "integrated"; needs a target.
        skip_special_tokens: leave these positions out: True for the tokenizer's BOS, EOS, PAD and the like, False for
            none, or ids.

    Returns:
        A PromptReading: `.to_frame(position, by=...)`, `.activations(sae, latent)`, `.toward(word)`.

    Raises:
        ValueError: for a hook or SAE that does not fit; an SAE that is attached where one of these reads or writes; a
            prompt of no token or more than the model's context; a text that is several tokens; `attribution` without a
            target.
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
        raise ValueError(explain("attribution needs a token to attribute.", want="a target", fix=fix))
    request = _check_request(model, prompt, saes, skip_special_tokens)
    with hook_points.lock(model), eval_mode(model, *request.saes), torch.no_grad():
        request.check_unmodified()
        reading = request.read(capture(model, request.ids, request.hook_names))
    reading = reading if target is None else reading.toward(target)
    return reading if attribution is None else reading.attributed(target, at, attribution)


def read_in_turn(
    model: nn.Module,
    prompt: str | Sequence[int] | Tensor,
    saes: nn.Module | Sequence[nn.Module],
    compared: nn.Module | Sequence[nn.Module] | None = None,
    *,
    n: int = 10,
    skip_special_tokens: bool | Sequence[int] = True,
) -> Iterator[tuple[PromptReading | None, NextTokens]]:
    """Yield the results of `read_prompt` and `next_tokens` from two passes instead of three, as soon as each is ready.

    Args:
        model: as for `read_prompt`; its lock is held for each pass, and not in between.
        prompt: as for `read_prompt`.
        saes: SAEs to encode with.
        compared: SAEs to attach for the second result of `next_tokens`; None for no second result.
        n: as for `next_tokens`.
        skip_special_tokens: as for `read_prompt`.

    Returns:
        An iterator: the reading and the model's own next tokens after one pass; then None and the next tokens with
        `compared` attached. The logits of the first pass are held in between.

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
    request = _check_request(model, prompt, saes, skip_special_tokens)
    steps = next_tokens_in_turn(model, request.ids, compared, n, skip_special_tokens=skip_special_tokens)
    with hook_points.lock(model), eval_mode(model, *request.saes), torch.no_grad():
        request.check_unmodified()
        with capturing(model, request.hook_names) as activations:
            clean = next(steps)
        reading = request.read(activations)
    activations.clear()
    yield reading, clean
    yield from ((None, spliced) for spliced in steps)


@dataclass(frozen=True, eq=False)
class CleanRun:
    """Activations of the clean run, from which effects on any token are computed."""

    model: nn.Module
    saes: tuple[nn.Module, ...]
    """SAEs as the caller passed them."""
    sites: tuple[Site, ...]
    """One per SAE, and per layer of a cross-layer transcoder."""
    inputs: tuple[Float[Tensor, "1 pos d_in"], ...]
    """Input of the SAE at each site, on the model's device."""
    final: Float[Tensor, "pos d_model"]
    """The residual stream before the final norm."""
    ids: Int[Tensor, "1 pos"]
    skip_special_tokens: bool | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PromptReading:
    """Active latents of a prompt, a row per position and latent: the result of `saewb.read_prompt`."""

    tokens: tuple[str, ...]
    """The prompt, token by token."""
    ids: tuple[int, ...]
    """Token ids of the prompt."""
    special: Bool[Tensor, " pos"]
    """True at positions left out."""
    saes: tuple[str, ...]
    """Name of each SAE, or layer of a cross-layer transcoder: where it reads and writes."""
    owner: tuple[int, ...]
    """Per name, index of the caller's SAE that it belongs to."""
    d_sae: tuple[int, ...]
    """Number of latents of each."""
    sae: Int[Tensor, " rows"]
    """Index into `saes`; rows are in the order of SAE, position, latent."""
    position: Int[Tensor, " rows"]
    """Index of the token, from 0."""
    latent: Int[Tensor, " rows"]
    """Index of the latent in its SAE."""
    activation: Float[Tensor, " rows"]
    """In the SAE's own units."""
    target: int | None = None
    """Id of the token that effects are on."""
    at: int | None = None
    """Position after which `attribution` predicts it."""
    logit_effect: Float[Tensor, " rows"] | None = None
    """Direct effect on its logit at the row's own position."""
    attribution: Float[Tensor, " rows"] | None = None
    """Effect on its log probability at `at`, through the whole model."""
    clean_run: CleanRun = field(repr=False, default=None)
    """Activations that `toward` and `attributed` use."""

    def __len__(self) -> int:
        return len(self.latent)

    @property
    def target_token(self) -> str | None:
        """Text of the token that effects are on."""
        return None if self.target is None else prompt_strings(self.clean_run.model, [self.target])[0]

    @torch.inference_mode(False)
    def toward(self, target: str | int) -> PromptReading:
        """Add `logit_effect` to the rows: the direct effect of each on this token's logit at its own position.

        nan for SAEs that do not write into the residual stream, and for crosscoders.

        Args:
            target: one token, as text or id.

        Raises:
            ValueError: for a text that is several tokens.
        """
        run = self.clean_run
        token = token_id(run.model, target)
        with hook_points.lock(run.model), eval_mode(*run.saes):
            effects = [
                direct_effects(run.model, site, x, self._latents(k), token, run.final)
                for k, (site, x) in enumerate(zip(run.sites, run.inputs, strict=True))
            ]
        attribution, at = (self.attribution, self.at) if self.target == token else (None, None)
        return replace(self, target=token, logit_effect=torch.cat(effects), attribution=attribution, at=at)

    def attributed(
        self, target: str | int, at: int = -1, method: Literal["gradient", "integrated"] = "gradient"
    ) -> PromptReading:
        """Add `attribution` to the rows: the effect of each on this token's log probability after position `at`.

        Args:
            target: one token, as text or id.
            at: the position whose next token it would be.
            method: as for `saewb.attribute`, whose effects these are.

        Raises:
            ValueError: for a text that is several tokens, a position outside of the prompt.
        """
        run, token, position = self.clean_run, token_id(self.clean_run.model, target), self._position(at)

        def log_probability(logits: Tensor) -> Tensor:
            return logits[0, position].float().log_softmax(-1)[token]

        options = {"method": method, "skip_special_tokens": run.skip_special_tokens}
        nodes = attribute(run.model, run.ids, run.saes, log_probability, **options)
        latents = (nodes.latent != ERROR).nonzero()[:, 0]
        key, order = self._key(nodes.sae[latents], nodes.position[latents], nodes.latent[latents]).sort()
        row_key = self._key(self.sae, self.position, self.latent)
        effect = torch.zeros(len(self), dtype=torch.float32)  # rows after `at` have none
        if len(key):
            index = torch.searchsorted(key, row_key).clamp_(max=len(key) - 1)
            effect = torch.where(key[index] == row_key, nodes.effect[latents][order][index].float(), effect)
        logit_effect = self.logit_effect if self.target == token else None
        return replace(self, target=token, at=position, attribution=effect, logit_effect=logit_effect)

    def activations(self, sae: int | str, latent: int) -> Float[Tensor, " pos"]:
        """Activations of one latent at every position of the prompt; 0 at positions left out."""
        k = self._sae_index(sae)
        latent = index_of(latent, f"latent of {self.saes[k]}", self.d_sae[k])
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
        """Table of the rows, the largest |`by`| first: sae, position, token, latent, activation, and computed effects.

        With an index also density, the fraction of its text's tokens on which the latent fires, and of_max, the
        activation divided by the largest one in that text.

        Args:
            position: rows of this token only; negative counts from the end; None for all.
            sae: rows of this SAE only, by number or name; None for all.
            by: "activation"; "logit_effect" or "attribution" after `toward` or `attributed`; "of_max" with an index.
            n: maximum number of rows.
            once: list each latent once, where it is largest.
            index: index of the SAE; or one for each SAE passed to `read_prompt`, None where there is none.
            max_density: leave out latents that fire more often than this; those without an index stay.

        Raises:
            ValueError: for an unknown position, SAE or weight; an index of another number of latents.
        """
        import numpy as np
        import pandas as pd

        weights = {name: w for name in _WEIGHTS[:3] if (w := getattr(self, name)) is not None}
        mask = torch.ones(len(self), dtype=torch.bool)
        if index is not None:
            weights["density"], weights["of_max"] = self._look_up(index)
            mask &= ~(weights["density"] > max_density)
        if position is not None:
            mask &= self.position == self._position(position)
        if sae is not None:
            mask &= self.sae == self._sae_index(sae)
        rows = mask.nonzero()[:, 0]
        size = self._weight(by, weights)[rows].abs().nan_to_num(nan=-1.0)
        rows = rows[size.argsort(descending=True, stable=True)].numpy()
        texts, names = np.array(self.tokens, dtype=object), np.array(self.saes, dtype=object)
        columns = {
            "sae": names[self.sae.numpy()[rows]],
            "position": self.position.numpy()[rows],
            "token": texts[self.position.numpy()[rows]],
            "latent": self.latent.numpy()[rows],
        }
        table = pd.DataFrame(columns | {name: w.numpy()[rows] for name, w in weights.items()})
        table = table.drop_duplicates(["sae", "latent"]) if once else table
        return table.head(len(table) if n is None else n).reset_index(drop=True)

    def __repr__(self) -> str:
        toward = "" if self.target is None else f", toward {self.target_token!r}"
        plain = int((~self.special).sum())
        return f"PromptReading({len(self)} rows on {plain} tokens: {', '.join(self.saes)}{toward})"

    def _repr_html_(self) -> str:
        return self.to_frame(n=20, once=True)._repr_html_()

    def _latents(self, k: int) -> SparseLatents:
        rows = (self.sae == k).nonzero()[:, 0]
        shape = (len(self.tokens), self.d_sae[k])
        return SparseLatents(self.position[rows], self.latent[rows], self.activation[rows], shape)

    def _key(self, sae: Tensor, position: Tensor, latent: Tensor) -> Int[Tensor, " rows"]:
        return (sae * len(self.tokens) + position) * max(self.d_sae) + latent

    def _position(self, at: int) -> int:
        return index_of(at, "position", len(self.tokens), from_end=True)

    def _sae_index(self, sae: int | str) -> int:
        if not isinstance(sae, str):
            return index_of(sae, "sae", len(self.saes))
        if sae not in self.saes:
            close, want = near(sae, self.saes), f"0 to {len(self.saes) - 1}, or a name"
            raise ValueError(explain(f"no SAE {sae!r} here.", near=close, want=want))
        return self.saes.index(sae)

    def _look_up(self, index: FeatureIndex | Sequence[FeatureIndex | None]) -> tuple[Tensor, Tensor]:
        """Density of each row's latent, and activation divided by the largest one; nan without an index."""
        n = len(self.clean_run.saes)
        indexes = list(index) if isinstance(index, (list, tuple)) else [index]
        if len(indexes) != n:
            raise ValueError(explain(f"got {len(indexes)} indexes for {n} SAEs.", want="one for each, or None"))
        density, of_max = (torch.full((len(self),), torch.nan) for _ in range(2))
        for k, owner in enumerate(self.owner):
            if (index := indexes[owner]) is None:
                continue
            index.check_sae(self.clean_run.saes[owner])
            if len(index) != self.d_sae[k]:
                what = f"{index!r} is not of {self.saes[k]}, which has {self.d_sae[k]} latents."
                raise ValueError(explain(what, fix="saewb.build_index(model, sae, texts)"))
            rows = (self.sae == k).nonzero()[:, 0]
            density[rows] = index.density[self.latent[rows]].float()
            largest = index.largest.abs()[self.latent[rows]]
            of_max[rows] = self.activation[rows].abs() / largest.where(largest > 0, torch.nan)
        return density, of_max

    def _weight(self, by: str, weights: Mapping[str, Tensor]) -> Tensor:
        if by not in _WEIGHTS:
            raise ValueError(explain(f"by={by!r}.", near=near(str(by), _WEIGHTS), want=", ".join(_WEIGHTS)))
        if by not in weights:
            fixes = {"logit_effect": 'reading.toward(" Paris")', "attribution": 'reading.attributed(" Paris")'}
            fix = fixes.get(by, f"reading.to_frame(by={by!r}, index=index)")
            raise ValueError(explain(f"this reading has no {by}.", fix=fix))
        if by == "logit_effect" and len(self) and bool(weights[by].isnan().all()):
            what = f"no direct effects on logits are known of {', '.join(self.saes)}."
            want = "an SAE or transcoder that writes into the residual stream"
            raise ValueError(explain(what, want=want, fix='reading.attributed(" Paris")'))
        return weights[by]


@dataclass(frozen=True, eq=False)
class _Request:
    """A validated prompt and the sites to read."""

    model: nn.Module
    ids: Int[Tensor, "1 pos"]
    special: Bool[Tensor, " pos"]
    skip_special_tokens: bool | tuple[int, ...]
    saes: tuple[nn.Module, ...]
    sites: tuple[Site, ...]
    owner: tuple[int, ...]

    @property
    def final_hook(self) -> str:
        """Name of the point with the final residual stream."""
        return f"blocks.{self.model.cfg.n_layers - 1}.hook_resid_post"

    @property
    def hook_names(self) -> list[str]:
        """Points to capture in a pass."""
        return [*(site.hook_name for site in self.sites), self.final_hook]

    def check_unmodified(self) -> None:
        """Check that no SAE is attached where these read or write."""
        check_unmodified(self.model, [point for site in self.sites for point in site.points], steered=True)

    def read(self, activations: Mapping[str, Tensor]) -> PromptReading:
        """Encode the activations of a pass at `hook_names`."""
        sites, ids = self.sites, tuple(self.ids[0].tolist())
        inputs = tuple(site.read_input(activations[site.hook_name]) for site in sites)
        for site, x in zip(sites, inputs, strict=True):
            check_finite(f"activations at {site.hook_name!r}", x[:, ~self.special])
        latents = [active_latents(site, x, ~self.special) for site, x in zip(sites, inputs, strict=True)]
        final = activations[self.final_hook][0]
        return PromptReading(
            tokens=tuple(prompt_strings(self.model, ids)),
            ids=ids,
            special=self.special.cpu(),
            saes=_unique_names(sites),
            owner=self.owner,
            d_sae=tuple(site.d_sae for site in sites),
            sae=torch.cat([torch.full((len(of_site),), k) for k, of_site in enumerate(latents)]),
            position=torch.cat([of_site.token for of_site in latents]),
            latent=torch.cat([of_site.latent for of_site in latents]),
            activation=torch.cat([of_site.act for of_site in latents]),
            clean_run=CleanRun(self.model, self.saes, sites, inputs, final, self.ids, self.skip_special_tokens),
        )


def _check_request(
    model: nn.Module, prompt: object, saes: object, skip_special_tokens: bool | Sequence[int]
) -> _Request:
    ids = prompt_ids(model, prompt)
    special = special_mask(ids, special_ids(model, skip_special_tokens))[0]
    saes = tuple(saes) if isinstance(saes, (list, tuple)) else (saes,)
    if not saes:
        raise ValueError(explain("got no SAE.", fix="saewb.read_prompt(model, prompt, sae)"))
    sites: list[Site] = []
    owner: list[int] = []
    for i, sae in enumerate(saes):
        of_sae = sites_of(model, sae, writable=False)
        sites += of_sae
        owner += [i] * len(of_sae)
    skip = skip_special_tokens if isinstance(skip_special_tokens, bool) else tuple(skip_special_tokens)
    return _Request(model, ids, special, skip, saes, tuple(sites), tuple(owner))


def _unique_names(sites: Sequence[Site]) -> tuple[str, ...]:
    """Names of the sites; a repeated one gets a number."""
    names = [site.name for site in sites]
    repeats = [names[:k].count(name) for k, name in enumerate(names)]
    return tuple(f"{name} ({n + 1})" if n else name for name, n in zip(names, repeats, strict=True))
