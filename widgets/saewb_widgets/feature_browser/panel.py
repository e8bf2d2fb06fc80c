"""FeatureBrowser: a table of all latents of a feature index, and the page of the selected one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.feature_browser import bookmarks, table_filter
from saewb_widgets.html import latent_html, latent_rows
from saewb_widgets.panel import LATENT_JS, Panel, catch_errors, on_change, report_errors, source
from saewb_widgets.serialize import densities, latent_page, latent_row, tried

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 48  # rows of the table sent at a time
_AT_ONCE = 4096  # latents up to which tables and searches do not need a thread
_LABEL = 2000  # characters of a note that are the latent's label, at most
_CACHED_ROWS = 4096  # rows of the table cached, 300 bytes each


class FeatureBrowser(Panel):
    """Browse a feature index: search, sort and filter its latents, and view the page of one.

    The table holds all latents, whatever their number: Python sorts and filters, and 48 rows are sent at a time. Above
    4,096 latents the ranking and searches run in the background; `busy` says so, `wait()` waits for them.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = saewb.build_index(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:20]])
        >>> panel = FeatureBrowser(index)
        >>> panel.query, panel.selected = "physicist", 748
        >>> panel
        FeatureBrowser(latent 748, 7 of 1024 latents, blocks.2.hook_resid_post of tiny)
        >>> exec(panel.code(), shown := {"index": index})
        >>> shown["latent"].index, shown["latents"] == panel.latents
        (748, True)
    """

    _esm = source("shared/frame.js", LATENT_JS, "shared/latent_page.js", "feature_browser/feature_browser.js")
    _css = source("shared/frame.css", "feature_browser/feature_browser.css")

    selected = t.Int(0, help="the latent on the page").tag(sync=True)
    query = t.Unicode("", help="a text, /a pattern/, id:TOKEN, or a latent's number").tag(sync=True)
    sort = t.Unicode(table_filter.BEST, help="'best', 'latent' or a column of index.table()").tag(sync=True)
    descending = t.Bool(True, help="largest first; 'best' does not ask").tag(sync=True)
    show_only = t.Unicode("all", help="all, firing, silent, pinned or noted").tag(sync=True)
    density = t.Tuple(t.Float(), t.Float(), default_value=(0.0, 1.0), help="fractions of tokens, from and to").tag(
        sync=True
    )
    prompt = t.Unicode("", help="a text to run the model on; needs model and sae").tag(sync=True)
    pins = t.List(t.Int(), help="latents, in the order they were pinned; see pin()").tag(sync=True)
    notes = t.Dict(key_trait=t.Int(), value_trait=t.Unicode(), help="a reader's words on latents; see note()").tag(
        sync=True,
        to_json=lambda notes, _: {str(i): text for i, text in notes.items()},
        from_json=lambda notes, _: {int(i): text for i, text in notes.items()},
    )
    # Written by the panel for the front end; setting them has no other effect.
    offset = t.Int(0, help="place in the table of the first row sent").tag(sync=True)
    position = t.Int(0, help="place in the table of the selected latent; -1 if it is not listed").tag(sync=True)
    rows = t.Dict(help="the rows sent, and how many there are").tag(sync=True)
    page = t.Dict(help="everything about the selected latent").tag(sync=True)
    densities = t.Dict(help="how many latents fire how often").tag(sync=True)
    tried = t.Dict(help="the prompt's tokens and what fires on them").tag(sync=True)
    facts = t.Dict(help="constants for the front end: sort orders, options").tag(sync=True)

    def __init__(
        self,
        index: saewb.FeatureIndex | str | Path,
        model: Any = None,
        sae: Any = None,
        *,
        notes_file: str | Path | None = None,
        **traits: Any,
    ) -> None:
        """Show an index.

        Args:
            index: a FeatureIndex, or the folder of one (then `code()` opens it by itself).
            model: with `sae`, to try texts of one's own.
            sae: the one the index is of.
            notes_file: where pins and notes are kept; read now, written at each change. None keeps them in the panel.
            traits: e.g. `selected=748`, `query="Paris"`, `sort="density"`.

        Raises:
            TypeError: if `index` is something else, or a trait unknown.
            ValueError: for a latent, an order or a filter that does not exist; if only one of model and sae is given;
                if the index is of another SAE.
            FileNotFoundError: if there is no index in the folder.
        """
        self.check_names(traits)
        if (model is None) != (sae is None):
            fix = "FeatureBrowser(index, model, sae)"
            raise ValueError(errors.explain("FeatureBrowser got one of model and sae.", want="both", fix=fix))
        self._folder = Path(index).expanduser() if isinstance(index, str | Path) else None
        self.index = saewb.load_index(self._folder) if self._folder is not None else index
        if not isinstance(self.index, saewb.FeatureIndex):
            what = f"FeatureBrowser got a {type(index).__name__}."
            raise TypeError(errors.explain(what, want="a FeatureIndex or its folder", fix="saewb.load_index(folder)"))
        if sae is not None:
            self.index.check_sae(sae)
        self.model, self.sae = model, sae
        self._given, self._noted = dict(self.index.labels), set[int]()  # labels without the notes; latents with a note
        self._notes_file = None if notes_file is None else Path(notes_file).expanduser()
        self._table: pd.DataFrame | None = None
        self._hits: tuple[str, pd.DataFrame] | None = None  # of the last search, and its query
        self._latents: Sequence[int] = range(len(self.index))
        self._list_number = 0  # tells the front end rows of one list from those of another
        special = frozenset(self.index.info.special)
        self._rows = functools.lru_cache(_CACHED_ROWS)(lambda i: latent_row(self.index.latent(i), special))
        self._chosen = "selected" in traits
        super().__init__(**traits)
        self._open()

    def _open(self) -> None:
        index, f = self.index, self.index.info
        self.title = f"Features of {f.model} at {f.hook}" + ("" if f.hook == f.hook_out else f" => {f.hook_out}")
        self.about = f"{len(index):,} latents on {f.n_tokens:,} tokens. {f.sae}"
        first = index.latent(0)
        sorts = {k: v for k, v in table_filter.SORTS.items() if k != "top_logit_effect" or first.logits_top}
        self.facts = {
            "latents": len(index),
            "sorts": list(sorts.items()),
            "can_try": self.model is not None,
            "notes_file": "" if self._notes_file is None else self._notes_file.name,
            "window": WINDOW,
        }
        if self._notes_file is not None:
            pins, notes = bookmarks.read(self._notes_file)
            self.pins, self.notes = self._check_latents(pins), {i: notes[i] for i in self._check_latents(notes)}
        self._label(self.notes)
        self._ready = True
        self._send_page()
        self._list()
        if self.prompt:
            self._run_prompt()

    # What a user does

    @property
    def latents(self) -> list[int]:
        """The latents of the table, in its order."""
        return list(self._latents)

    def pin(self, latent: int) -> None:
        """Pin a latent; `show_only = "pinned"` lists the pinned ones."""
        (i,) = self._check_latents([latent])
        self.pins = [*(p for p in self.pins if p != i), i]

    def unpin(self, latent: int) -> None:
        """Undo `pin`."""
        self.pins = [p for p in self.pins if p != latent]

    def note(self, latent: int, text: str) -> None:
        """Write a note about a latent, which is its label in `index` too; an empty text deletes it."""
        (i,) = self._check_latents([latent])
        others = {k: v for k, v in self.notes.items() if k != i}
        self.notes = {**others, i: text} if text else others

    def save_html(self, path: str | Path, latents: Iterable[int] | None = None) -> Path:
        """Write a page to share, that needs neither kernel nor network; see `FeatureIndex.save_html`.

        Args:
            path: of the file.
            latents: those on it; None: the pinned ones if these are shown, else the first 500 of the table.
        """
        chosen = self._latents[:500] if latents is None else latents
        return self.index.save_html(path, [int(i) for i in chosen], self.title)

    def summary(self) -> str:
        """See Panel."""
        f, n = self.index.info, len(self.index)
        listed = f"{n} latents" if len(self._latents) == n else f"{len(self._latents)} of {n} latents"
        return f"latent {self.selected}, {listed}, {f.hook} of {f.model}"

    def code(self) -> str:
        """Python code that computes `latents` (the table in its order) and `latent` (the page) from `index`."""
        lines = ["import saewb", ""]
        if self._folder is not None:
            lines.append(f"index = saewb.load_index({str(self._folder)!r})")
        else:
            lines.append("# index: the FeatureIndex that the panel was made with")
        if self.notes:
            lines.append(f"index = index.with_labels({dict(self.notes)!r})")
        lines += [*self._filter().code(), f"latent = index.latent({self.selected})"]
        return "\n".join(lines) + "\n"

    def static_html(self) -> str:
        """See Panel."""
        return latent_rows(self.rows.get("rows", [])[:12]) + latent_html(self.page)

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "move":
            self._move(**how)
        elif what == "save":
            self.notice = f"saved {self.save_html(**how)}"
        elif what == "code":
            self.notice = self.code()
        elif what == "pin":
            latent = how.get("latent", self.selected)
            (self.unpin if latent in self.pins else self.pin)(latent)
        elif what == "note":
            self.note(**how)
        else:
            raise ValueError(errors.explain(f"FeatureBrowser was asked to {what!r}."))

    def _move(self, to: int | None = None, by: int = 0) -> None:
        if not self._latents:
            return
        position = self.position + by if to is None else to
        self._chosen = True
        self.selected = int(self._latents[max(0, min(len(self._latents) - 1, position))])

    def _check_latents(self, latents: Iterable[int]) -> list[int]:
        return [self.index.latent(int(i)).index for i in latents]

    # Values are checked before anything changes

    @t.validate("selected", "sort", "show_only", "density", "query")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name == "selected":
                n = len(self.index)
                return value % n if -n <= value < n else self.index.latent(value).index  # which raises
            return table_filter.check_trait(name, value, dict(self.facts.get("sorts") or table_filter.SORTS))

    # Reactions to changes

    @on_change("query", "sort", "descending", "show_only", "density")
    def _on_filter(self) -> None:
        self._list()

    @on_change("selected")
    def _on_selected(self) -> None:
        self._chosen = True
        self._send_page()

    @on_change("offset")
    def _on_offset(self) -> None:
        self._send_rows()

    @on_change("prompt")
    def _on_prompt(self) -> None:
        self._run_prompt()

    @on_change("pins", "notes")
    def _on_marks(self) -> None:
        if self._notes_file is not None:
            bookmarks.write(self._notes_file, self.pins, self.notes)
        if self._label(self.notes):
            self._send_page()
            self._send_rows()
        if self.show_only in ("pinned", "noted"):
            self._list()

    def _label(self, notes: Mapping[int, str]) -> bool:
        """Make notes the labels of `index`, and those that were deleted none; whether that changes any."""
        gone = {i: self._given.get(i, "") for i in self._noted if i not in notes}
        labeled = self.index.with_labels({**gone, **{i: text[:_LABEL] for i, text in notes.items()}})
        self._noted = set(notes)
        if dict(labeled.labels) == dict(self.index.labels):
            return False
        self.index, self._hits = labeled, None
        self._rows.cache_clear()
        return True

    def _filter(self) -> table_filter.TableFilter:
        marked = {"pinned": self.pins, "noted": self.notes}.get(self.show_only, ())
        fields = (self.query, self.sort, self.descending, self.show_only, self.density)
        return table_filter.TableFilter(*fields, tuple(sorted(marked)))

    def _list(self) -> None:
        """Filter and sort the table, now or, where that takes long, once ranking and search are done."""
        filter_ = self._filter()
        if self._table is None:
            if len(self.index) > _AT_ONCE:
                if not self.rows:
                    self._set_latents(range(len(self.index)))  # by number, until it is known which are best
                if "table" not in self._jobs:
                    task = f"ranking {len(self.index):,} latents"
                    self.start_work(
                        "table", task, self.index.table, lambda table: (self._set_table(table), self._list())
                    )
                return
            self._set_table(self.index.table())
        if filter_.query and (self._hits is None or self._hits[0] != filter_.query):
            search, what = self.index.search, filter_.search_argument()
            if len(self.index) > _AT_ONCE:
                task = f"searching {len(self.index):,} latents for {filter_.query}"
                self.start_work("search", task, lambda: search(what), lambda hits: self._set_hits(filter_.query, hits))
                return
            self._hits = (filter_.query, search(what))
        if not filter_.query:
            self.discard_work("search")
        self._set_latents(filter_.apply(self._table, self._hits[1] if filter_.query else None))

    def _set_table(self, table: pd.DataFrame) -> None:
        self._table = table
        self.densities = densities(table.density)

    def _set_hits(self, query: str, hits: pd.DataFrame) -> None:
        self._hits = (query, hits)
        self._list()

    def _set_latents(self, latents: Sequence[int]) -> None:
        self._latents, self._list_number = latents, self._list_number + 1
        if not self._chosen and len(latents) and self.selected != latents[0]:
            self.selected = int(latents[0])
            self._chosen = False
        self.position = self._position()
        if self.offset:
            self.offset = 0  # sends the rows
        else:
            self._send_rows()

    def _position(self) -> int:
        if isinstance(self._latents, range):
            return self.selected
        return next((position for position, i in enumerate(self._latents) if i == self.selected), -1)

    def _send_rows(self) -> None:
        begin = max(0, min(self.offset, len(self._latents) - 1))
        part = [self._rows(int(i)) for i in self._latents[begin : begin + WINDOW]]
        self.rows = {"list": self._list_number, "total": len(self._latents), "offset": begin, "rows": part}

    def _send_page(self) -> None:
        """Send the page of the selected latent."""
        url = None
        if self.index.info.neuronpedia:
            url = saewb.features.neuronpedia.page(self.index, self.selected).url
        special = frozenset(self.index.info.special)
        self.page = latent_page(self.index.latent(self.selected), special, url)
        self.position = self._position()

    def _run_prompt(self) -> None:
        """Run the model on the prompt."""
        if not self.prompt:
            self.tried = {}
            return
        if self.model is None:
            fix = "FeatureBrowser(index, model, sae)"
            raise ValueError(errors.explain("a prompt needs the model and the SAE.", fix=fix))
        with self.working("running the model"):
            ids = saewb.data.tokens.prompt_ids(self.model, self.prompt)[0].tolist()
            active = self.index.find(self.model, self.sae, ids)
            marks = [position for position, i in enumerate(ids) if i in self.index.info.special]
            self.tried = tried(saewb.token_strings(self.model, ids), marks, active)
