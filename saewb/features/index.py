"""The feature index: latents, tables, search, pages and merging."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saewb._files import absolute, refuse_damage
from saewb._indices import index_of, indices_of
from saewb.errors import explain
from saewb.features import search, storage
from saewb.features.accumulate import LatentAccumulator
from saewb.features.config import N_COACTIVE, WEIGHT_TENSORS, IndexInfo
from saewb.features.html import MAX_LATENTS, write_page
from saewb.features.labels import Explanations, check_labels, label_texts
from saewb.features.latent import Latent, read_latent
from saewb.features.neighbors import coactive, firing_matrix
from saewb.features.ranking import interpretability_score, latent_table
from saewb.features.token_texts import TokenTexts
from saewb.fingerprint import sae_digest

if TYPE_CHECKING:
    import pandas as pd

    from saewb.stats.correlation_map import MatrixView


@dataclass(frozen=True, eq=False, repr=False)
class FeatureIndex:
    """Index of every latent of an SAE on text, built by `saewb.build_index` and opened by `saewb.load_index`.

    Reading it needs neither model nor SAE. After `load_index` the `tensors` are memory-mapped: `latent` reads the rows
    of that latent only (under 5 ms at 65,536 latents).

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:20]])
        >>> index
        FeatureIndex(1024 latents on 2,649 tokens, blocks.2.hook_resid_post of tiny)
        >>> latent = index.latent(748)
        >>> latent.top[0].value == latent.max > 0, latent.logits_top[0].token
        (True, ' who')
    """

    info: IndexInfo
    """Source of the index, and the settings it was built with."""
    tensors: Mapping[str, Tensor]
    """Contexts, counts, logit effects and neighbors by name; see the modules of saewb.features."""
    token_texts: TokenTexts
    """Texts of the tokens in contexts and logit effects."""
    labels: Mapping[int, str] = field(default_factory=dict)
    """Explanations in words by latent, which tables, pages and panels show; see `with_labels`."""

    def __len__(self) -> int:
        return self.info.d_sae

    def __iter__(self) -> Iterator[Latent]:
        return map(self.latent, range(len(self)))

    def __repr__(self) -> str:
        info = self.info
        site = info.hook if info.hook_out == info.hook else f"{info.hook} => {info.hook_out}"
        stopped = "" if self.is_complete else f"; stopped after {info.n_rows} of {info.n_planned} rows"
        return f"FeatureIndex({len(self)} latents on {info.n_tokens:,} tokens, {site} of {info.model}{stopped})"

    @property
    def n_tokens(self) -> int:
        """Tokens read, without special ones."""
        return self.info.n_tokens

    @property
    def is_complete(self) -> bool:
        """Whether the pass is complete; if it was stopped, `build_index(..., folder=)` continues it."""
        return self.info.n_planned is None

    def latent(self, i: int) -> Latent:
        """Read one latent with all its contexts, statistics, logit effects and neighbors.

        Logit effects are the decoder direction times TransformerLens' folded, centered unembedding: each coordinate
        times the final norm's weight, minus the mean over d_model where the norm centers (LayerNorm), times W_U, minus
        the mean over the vocabulary. Times the activation, divided by the RMS of the final residual stream, they are
        the direct contribution to the logits, without later layers. `jacobian_top` and `jacobian_bottom` are those of
        the direction after later layers, J times it, if the index was built with a Jacobian lens.

        Raises:
            ValueError: if there is no such latent.
            FormatError: if its part of the index is damaged.
        """
        latent = index_of(i, "latent", len(self), from_end=True, of=self)
        with refuse_damage(f"latent {i} of this index", "the index as it was written"):
            return read_latent(self.info, self.tensors, self.token_texts, latent, self.labels)

    def label(self, i: int) -> str:
        """The label of a latent: its explanation, else its strongest token; "" for one that is never active.

        Raises:
            ValueError: if there is no such latent.
        """
        return self.label_texts([index_of(i, "latent", len(self), from_end=True, of=self)])[0]

    def label_texts(self, latents: Sequence[int] | Tensor) -> list[str]:
        """The label of each of these latents, as `label`.

        Args:
            latents: indices, or a mask of all.

        Raises:
            ValueError: if one does not exist.
        """
        which = indices_of(latents, "latents", len(self), repeats=True, of=self).tolist()
        return label_texts(self.labels, self.info, self.tensors, self.token_texts, which)

    def with_labels(self, labels: Explanations | Mapping[int, str]) -> FeatureIndex:
        """This index with labels: those it has, and these, which count where both label a latent.

        `save` writes them with the index; `saewb.Explanations.from_labels(index.labels).save(path)` alone.

        Args:
            labels: explanations, as from `saewb.explain`, `saewb.Explanations.load` or
                `saewb.features.neuronpedia.explanations`; or texts by latent, "" for none.

        Raises:
            TypeError: if they are neither.
            ValueError: for a latent that does not exist, or a text of more than 2,000 characters.

        Example:
            >>> import saewb
            >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
            >>> index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:20]])
            >>> index.with_labels({748: "who did it"}).label(748)
            'who did it'
        """
        new = check_labels(labels, len(self), of=self)
        removed = set() if isinstance(labels, Explanations) else set(map(int, labels)) - set(new)
        return replace(self, labels={i: x for i, x in self.labels.items() if i not in removed} | new)

    @property
    def density(self) -> Tensor:
        """Fraction of tokens on which each latent is active, `[d_sae]`."""
        return self.tensors["counts.by_position"].sum(1).double() / max(1, self.n_tokens)

    @property
    def largest(self) -> Tensor:
        """Strongest activation of each latent, with its sign, 0 if it is never active: `[d_sae]`."""
        return self.tensors["top.value"][:, 0].clone()

    def table(self) -> pd.DataFrame:
        """Table of all latents: density, n_active, max, mean, top_token, single_token_share, top_logit, ...

        `top_token` is the most frequent peak token of its contexts (top and sampled), `single_token_share` the fraction
        of them with that token; `contextual` is the score that `ranking` sorts by; `label` comes last (see `label`).
        """
        table = latent_table(self.info, self.tensors, self.token_texts)
        return table.assign(label=self.label_texts(range(len(self))))

    def ranking(self, n: int | None = None) -> list[int]:
        """Latents sorted by how likely a person can name them; those of a single token come last."""
        scores = interpretability_score(self.info, self.tensors, self.token_texts)
        order = scores.argsort(descending=True, stable=True)
        return order[:n].tolist()

    def search(self, what: str | int | re.Pattern[str], n: int | None = None) -> pd.DataFrame:
        """Find latents with this text, token id or pattern in their labels, contexts or among their logit effects.

        Args:
            what: a text, matched regardless of case; a token id; or a compiled pattern.
            n: maximum of rows.

        Returns:
            One row per latent, best first: latent, contexts (number of its contexts that match), firing (fraction of
            those in which the latent fires on the match), activation (largest on a match), logit (largest effect among
            its listed tokens that match, else nan), example, label (its own, if that matches, else ""). Those with a
            label that matches come first; a label matches a text too if it has all of its words.

        Raises:
            TypeError: for anything else.
            ValueError: for an empty text.
        """
        return search.search(self.info, self.tensors, self.token_texts, what, n, self.labels)

    def find(self, model: nn.Module, sae: nn.Module, prompt: str | Sequence[int] | Tensor) -> pd.DataFrame:
        """Table of active latents of a prompt: position, token, latent, label, activation, of_max (share of `max`).

        Raises:
            ValueError: if the index is of another SAE or model, by content; if an SAE is attached where this one reads
                or writes, or the model is steered.
        """
        self.check_sae(sae)
        table = search.find(self.info, self.tensors, model, sae, prompt)
        table.insert(3, "label", self.label_texts(table.latent))
        return table

    def check_sae(self, sae: nn.Module | Tensor) -> None:
        """Check that the index is of this SAE: by the digest of all its weights.

        An index of saewb 0.1.0 has no digest: then, as for a tensor, the number of latents counts, and the cosines of
        eight pairs of decoder directions, within 0.05.

        Args:
            sae: an SAE or transcoder, or decoder directions `[d_sae, d_out]`.

        Raises:
            ValueError: if the index is of another one.

        Example:
            >>> import saewb
            >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
            >>> index = saewb.build_index(model, sae, ["The river flows through the city."] * 20, ctx_len=16)
            >>> index.check_sae(sae)
            >>> index.check_sae(sae.double())  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: FeatureIndex(1024 latents on ... of tiny) is of another SAE (by content: SAE ..., not ...).
              want: that of the index: SAE(topk k=16, 128 -> 1024 latents, blocks.2.hook_resid_post, tiny, float32 on cpu), tiny
              fix:  index = saewb.build_index(model, sae, tokens)
        """  # noqa: E501
        rows = sae if isinstance(sae, Tensor) else sae.W_dec
        if len(rows) != len(self):
            what = f"{self!r} is not of this SAE, which has {len(rows):,} latents."
            raise ValueError(explain(what, want=self.info.sae, fix="index = saewb.build_index(model, sae, tokens)"))
        if self.info.digests is not None and not isinstance(sae, Tensor):
            self.info.check_content(repr(self), SAE=sae_digest(sae, reuse=True))
        else:
            self._check_directions(rows.detach())

    def _check_directions(self, rows: Tensor) -> None:
        for i in range(0, len(self), -(-len(self) // 8)):
            for near in self.latent(i).nearest_by_decoder[:1]:
                cosine = float(torch.cosine_similarity(rows[i].double(), rows[near.latent].double(), dim=0))
                if abs(cosine - near.cosine) > 0.05:  # they may have another precision than those of the index
                    what = f"{self!r} is of another SAE: latents {i} and {near.latent} have cosine {near.cosine:.2f} "
                    what += f"there and {cosine:.2f} here."
                    fix = "index = saewb.build_index(model, sae, tokens)"
                    raise ValueError(explain(what, want=self.info.sae, fix=fix))

    def matrix(self, min_fires: int = 10) -> MatrixView:
        """Matrix view of the correlation phi of active latents, on the sampled tokens (`coactive_tokens`).

            phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))

        On a token with more than 128 active latents, only the strongest count.

        Args:
            min_fires: latents active on fewer of these tokens have no entries.

        Raises:
            ValueError: if no tokens were sampled.
        """
        return firing_matrix(self.info, self.tensors, min_fires)

    def save(self, path: str | Path) -> Path:
        """Save the index atomically to a folder that is new or holds an index.

        Raises:
            FileExistsError: if the folder holds other files.
        """
        folder = absolute(path)
        with storage.lock_index(folder, wait_s=10.0):
            return storage.write_index(folder, self.info, dict(self.tensors), self.token_texts, self.labels)

    def save_html(
        self, path: str | Path, latents: Sequence[int] | Tensor | None = None, title: str | None = None
    ) -> Path:
        """Write one HTML file of latents, which needs neither network nor kernel.

        Args:
            path: of the file.
            latents: in the order of the page, or a mask of all; None means the first 500 of `ranking()`.
            title: of the page; None means model and hook.

        Raises:
            ValueError: for no latents, or one that does not exist.
            IsADirectoryError: if `path` is a folder.
        """
        info = self.info
        shown = (
            self.ranking(MAX_LATENTS)
            if latents is None
            else indices_of(latents, "latents", len(self), of=self).tolist()
        )
        return write_page(
            map(self.latent, shown),
            Path(path).expanduser(),
            title=title or f"Features of {info.model} at {info.hook}",
            about=f"{len(self):,} latents on {info.n_tokens:,} tokens. {info.sae}" + f". {info.lens}" * bool(info.lens),
            special=info.special,
        )

    def merge(self, other: FeatureIndex) -> FeatureIndex:
        """Merge with an index of other rows of text; the result equals an index of all rows.

        The second part must be built with `first_row`, so that no two rows of text have the same number.

        Raises:
            ValueError: if they are of different SAEs or settings, or rows of text are in both.
        """
        self.info.check_mergeable(other.info, "merge")
        tokens = None if other.info.digests is None else other.info.digests["tokens"]
        accumulator = LatentAccumulator(self.info.config)
        accumulator.restore(self.tensors)
        accumulator.merge(other.tensors)
        info = self.info.with_rows(other.info.rows, other.info.n_tokens, tokens)
        merged = self.with_accumulated(info, accumulator, self.token_texts.merge(other.token_texts))
        return replace(merged, labels={**other.labels, **self.labels})

    def with_accumulated(self, info: IndexInfo, accumulator: LatentAccumulator, texts: TokenTexts) -> FeatureIndex:
        """Replace the accumulated statistics; loss effects, which only one part has, are dropped."""
        weights = {k: t for k, t in self.tensors.items() if k.split(".")[0] in WEIGHT_TENSORS}
        accumulated = {k: t.cpu() for k, t in accumulator.tensors().items()}
        together = coactive(accumulated["active.token_active"], info.d_sae, N_COACTIVE)
        return replace(self, info=info, tensors=weights | accumulated | together, token_texts=texts)


def load_index(path: str | Path, verify: bool | None = None) -> FeatureIndex:
    """Open an index that `index.save` wrote, in milliseconds at any size: latents are read on access.

    Args:
        path: the folder.
        verify: whether to compare the hash of its tensors with that of when it was written, about 1 s per GB; None does
            if they have up to 64 MiB.

    Returns:
        A FeatureIndex.

    Raises:
        FileNotFoundError: if the folder has no index.
        FormatError: if it is damaged or from a newer saewb.

    Example:
        >>> load_index("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: no index at '...nowhere'.
          want: a folder with index.json, as index.save(folder) writes it
    """
    return FeatureIndex(*storage.read_index(absolute(path), verify))
