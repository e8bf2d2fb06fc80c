"""The index: what was gathered, as pages, tables and searches."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from saewb.errors import explain
from saewb.features import overview, search, storage
from saewb.features.accumulate import Gathering
from saewb.features.config import IndexFacts
from saewb.features.latent import Latent, page
from saewb.features.matrix import firing_matrix
from saewb.features.ranking import readable
from saewb.features.together import N_COACTIVE, coactive
from saewb.features.token_texts import Words

if TYPE_CHECKING:
    import pandas as pd

    from saewb.stats.correlation_map import MatrixView


@dataclass(frozen=True, eq=False, repr=False)
class FeatureIndex:
    """What every latent of an SAE does, on text: made by `saewb.build_index`, opened by `saewb.load_index`.

    Needs neither model nor SAE to be looked at. `tensors` are, after `load_index`, mapped from the disk: a page reads
    its own rows only (under 5 ms at 65,536 latents).

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

    facts: IndexFacts  # what it is about
    tensors: Mapping[str, Tensor]  # what was gathered, by name; see the modules of saewb.features
    words: Words  # the strings of the tokenizer that it needs

    def __len__(self) -> int:
        return self.facts.d_sae

    def __iter__(self) -> Iterator[Latent]:
        return map(self.latent, range(len(self)))

    def __repr__(self) -> str:
        facts = self.facts
        where = facts.hook if facts.hook_out == facts.hook else f"{facts.hook} => {facts.hook_out}"
        partly = "" if self.is_complete else f"; stopped after {facts.n_rows} of {facts.n_planned} rows"
        return f"FeatureIndex({len(self)} latents on {facts.n_tokens:,} tokens, {where} of {facts.model}{partly})"

    @property
    def n_tokens(self) -> int:
        """Tokens seen, special ones left out."""
        return self.facts.n_tokens

    @property
    def is_complete(self) -> bool:
        """False if the pass was stopped before its end; `build_index(..., folder=)` goes on from there."""
        return self.facts.n_planned is None

    def latent(self, i: int) -> Latent:
        """Everything about one latent.

        Logit effects are the latent's decoder row through TransformerLens' folded, centered unembedding: each coordinate
        times the final norm's weight, minus the mean over d_model where the norm centers (LayerNorm), times W_U, minus
        the mean over words. Multiply with the activation and divide by the length of the final residual stream (its
        RMS) for what it adds to the logits directly, past later layers.

        Raises:
            ValueError: if there is no such latent.
        """
        if not -len(self) <= int(i) < len(self):
            raise ValueError(explain(f"latent {i} of {self!r}.", want=f"0 to {len(self) - 1}", fix="index.latent(0)"))
        f = self.facts
        return page(self.tensors, self.words, int(i) % len(self), f.n_tokens, f.before, f.ctx_len, f.n_quantiles)

    @property
    def density(self) -> Tensor:
        """The fraction of tokens on which each latent fires, `[d_sae]`."""
        return self.tensors["counts.by_position"].sum(1).double() / max(1, self.n_tokens)

    @property
    def largest(self) -> Tensor:
        """The strongest activation of each latent, with its sign, 0 if it never fires: `[d_sae]`."""
        return self.tensors["top.value"][:, 0].clone()

    def table(self) -> pd.DataFrame:
        """All latents, one a row: density, n_active, max, mean, top_token, single_token_share, top_logit, ...

        `top_token` is the token most of its contexts are about, `single_token_share` the share of them (of the
        strongest and the sampled); `contextual` is the score that `ranking` sorts by.
        """
        return overview.table(self.facts, self.tensors, self.words)

    def ranking(self, n: int | None = None) -> list[int]:
        """Latents a person can probably name, first those of which a context says more than a single token does."""
        order = readable(self.facts, self.tensors, self.words).argsort(descending=True, stable=True)
        return order[:n].tolist()

    def search(self, what: str | int | re.Pattern[str], n: int | None = None) -> pd.DataFrame:
        """Latents with this text, token id or pattern in the contexts they fire on, or among their words.

        Args:
            what: a text, found regardless of case where a context has it; a token id; or a compiled pattern.
            n: rows at most.

        Returns:
            One row per latent, best first: latent, contexts (how many of its contexts have it), firing (the share of
            them in which the latent fires on it), activation (its largest on it), logit (its largest effect among the
            words listed that match, else nan), example.

        Raises:
            TypeError: for anything else.
            ValueError: for an empty text.
        """
        return search.search(self.facts, self.tensors, self.words, what, n)

    def find(self, model: nn.Module, sae: nn.Module, prompt: str | Sequence[int] | Tensor) -> pd.DataFrame:
        """Which latents fire where in a text: token, position, latent, activation, of_max (share of its largest)."""
        return search.find(self.facts, self.tensors, model, sae, prompt)

    def matrix(self, min_fires: int = 10) -> MatrixView:
        """Which latents fire together, as a matrix of phi to look at, from the tokens sampled (`coactive_tokens`).

            phi = (N n_ij - n_i n_j) / sqrt(n_i (N - n_i) n_j (N - n_j))

        Of a token on which more than 128 latents fire, the strongest are known.

        Args:
            min_fires: latents that fire on fewer of these tokens have no entries.

        Raises:
            ValueError: if no tokens were sampled.
        """
        return firing_matrix(self.facts, self.tensors, min_fires)

    def save(self, path: str | Path) -> Path:
        """Write it to a folder, new or of an index: whole or not at all.

        Raises:
            FileExistsError: if the folder holds other things.
        """
        return storage.write(Path(path).expanduser(), self.facts, dict(self.tensors), self.words)

    def save_html(self, path: str | Path, latents: Sequence[int] | None = None, title: str | None = None) -> Path:
        """Write one page that shows these latents to anyone with a browser: no network, no kernel.

        Args:
            path: of the file.
            latents: in the order to show them; None: the 500 first of `ranking()`.
            title: of the page; None says what the index is about.
        """
        from saewb.features.html import write_page

        return write_page(self, Path(path).expanduser(), latents, title)

    def merge(self, other: FeatureIndex) -> FeatureIndex:
        """One index of the text of both: the very same as of all of it at once.

        Needs `first_row` given when the second part was built, so that no two rows of text have the same number.

        Raises:
            ValueError: if they are of different SAEs or settings, or rows of text are in both.
        """
        self.facts.check_same(other.facts, "merge")
        gathering = Gathering(self.facts.plan)
        gathering.restore(self.tensors)
        gathering.merge(other.tensors)
        facts = self.facts.with_rows(other.facts.rows, other.facts.n_tokens)
        return self.with_gathered(facts, gathering, self.words.merged(other.words))

    def extend(self, model: nn.Module, sae: nn.Module, tokens: Tensor | Sequence[str], **how: Any) -> FeatureIndex:
        """An index of this one's text and more, as if built of both at once; this one stays as it is.

        Args:
            model: the one it was built with.
            sae: likewise.
            tokens: ids in rows of the same length, or texts.
            how: `batch_size`, `progress` as for `build_index`.

        Raises:
            ValueError: if the SAE or the length of rows is another.
        """
        from saewb.features.build import extend_index

        return extend_index(self, model, sae, tokens, **how)

    def with_gathered(self, facts: IndexFacts, gathering: Gathering, words: Words) -> FeatureIndex:
        """The same weights' figures with what was gathered since; what one part alone can know is dropped."""
        kept = {k: t for k, t in self.tensors.items() if k.split(".")[0] in ("logits", "nearest", "decoder_norm")}
        gathered = {k: t.cpu() for k, t in gathering.tensors().items()}
        together = coactive(gathered["active.token_active"], facts.d_sae, N_COACTIVE)
        return replace(self, facts=facts, tensors=kept | gathered | together, words=words)


def load_index(path: str | Path) -> FeatureIndex:
    """Open what `index.save` wrote: in milliseconds, whatever its size, since pages are read when asked for.

    Args:
        path: the folder.

    Returns:
        A FeatureIndex.

    Raises:
        FileNotFoundError: if there is no index in it.
        FormatError: if it is damaged or of a newer saewb.

    Example:
        >>> load_index("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no index at 'nowhere'.
          want: a folder with index.json, as index.save(folder) writes it
    """
    return FeatureIndex(*storage.read(Path(path).expanduser()))
