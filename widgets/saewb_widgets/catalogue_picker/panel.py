"""CataloguePicker: find a published SAE in the catalogue, view its details, and load it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.catalogue_picker import filter
from saewb_widgets.html import grid
from saewb_widgets.panel import Panel, catch_errors, on_change, report_errors, source

if TYPE_CHECKING:
    import pandas as pd

WINDOW = 100  # rows of the table sent at a time
_NO_FILTER = {
    **dict.fromkeys(("model", "release", "site", "query", "sort"), ""),
    **dict.fromkeys(("layer", "width", "on_neuronpedia")),
    **{"l0": (None, None), "descending": False},
}


class Cancelled(Exception):
    """Raised on the threads of a cancelled download."""


class CataloguePicker(Panel):
    """Find a published SAE by model, release, words, site, width and L0, view its details, and load it.

    The table is `panel.table`, a selection of `saewb.catalogue()`; 100 rows are sent at a time. The loaded SAE is
    `panel.sae`. Loading runs in the background (`busy`, `wait()`, `cancel()`).

    Example:
        >>> panel = CataloguePicker(model="gpt2", site="resid_pre", sort="layer", descending=True)
        >>> panel.query = "res-jb"
        >>> panel
        CataloguePicker(20 of 13,857 SAEs, none chosen)
        >>> panel.table.id[0]
        'blocks.11.hook_resid_pre'
        >>> panel.selected = ("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
        >>> panel.page["l0"], panel.page["d_sae"]
        (60.0, 24576)
        >>> exec(panel.code(), shown := {})
        >>> shown["table"].equals(panel.table)
        True
    """

    _esm = source("shared/frame.js", "catalogue_picker/catalogue_picker.js")
    _css = source("shared/frame.css", "catalogue_picker/catalogue_picker.css")

    model = t.Unicode("", help="name of the model; empty: any").tag(sync=True)
    release = t.Unicode("", help="name of the release; empty: any").tag(sync=True)
    site = t.Unicode("", help="resid_post, mlp_out, transcoder...; empty: any").tag(sync=True)
    layer = t.Int(None, allow_none=True, help="layer that the SAE reads").tag(sync=True)
    width = t.Int(None, allow_none=True, help="number of latents").tag(sync=True)
    l0 = t.Tuple(
        t.Float(allow_none=True),
        t.Float(allow_none=True),
        default_value=(None, None),
        help="range of active latents per token, from and to",
    ).tag(sync=True)
    on_neuronpedia = t.Bool(None, allow_none=True, help="with pages on Neuronpedia, without, or either (None)").tag(
        sync=True
    )
    query = t.Unicode("", help="words, each of which must occur in release, id, model, hook or repo").tag(sync=True)
    sort = t.Unicode("", help="column to sort by; empty: the catalogue's own order").tag(sync=True)
    descending = t.Bool(False, help="largest first").tag(sync=True)
    selected = t.Tuple(
        t.Unicode(), t.Unicode(), default_value=("", ""), help="release and id of the SAE on the page"
    ).tag(sync=True)
    # Written by the panel for the front end; setting them has no other effect.
    offset = t.Int(0, help="position in the table of the first row sent").tag(sync=True)
    position = t.Int(-1, help="position in the table of the selected SAE; -1 if it is not listed").tag(sync=True)
    rows = t.Dict(help="the rows sent, and the total number of rows").tag(sync=True)
    left = t.Dict(help="values that can be chosen, and the number of SAEs of each").tag(sync=True)
    page = t.Dict(help="details of the selected SAE").tag(sync=True)
    progress = t.Dict(help="of a download: release, id, bytes downloaded, bytes in total (0: not known yet)").tag(
        sync=True
    )
    loaded = t.Dict(help="release, id and repr of panel.sae").tag(sync=True)
    facts = t.Dict(help="constants for the front end").tag(sync=True)

    def __init__(self, *, device: str | None = None, **traits: Any) -> None:
        """Show the catalogue.

        Args:
            device: device to load to; None means the CPU.
            traits: e.g. `model="google/gemma-2-2b"`, `width=16384`, `l0=(20, 100)`, `sort="l0"`.

        Raises:
            TypeError: for an unknown trait.
            ValueError: for a model, release, site, column or SAE that the catalogue does not have.
        """
        self.check_names(traits)
        self.sae: Any = None  # the SAE loaded last
        self.catalogue: pd.DataFrame = saewb.catalogue()
        self.table = self.catalogue
        self._device = device
        self._cancelled = threading.Event()  # of the current download
        self._bytes: tuple[int, int] = (0, 0)  # downloaded, total
        self._list_number = 0
        super().__init__(**traits)
        self.title = "Published SAEs"
        releases, models = self.catalogue["release"].nunique(), self.catalogue["model"].nunique()
        self.about = f"{len(self.catalogue):,} SAEs of {models} models in {releases} releases"
        self.facts = {"all": len(self.catalogue), "window": WINDOW, "columns": list(filter.COLUMNS.items())}
        self._ready = True
        self._list()
        self._send_page()

    # What a user does

    def load(self, release: str | None = None, id: str | None = None) -> None:
        """Start loading an SAE, by default the selected one; after `wait()` it is `panel.sae`.

        Raises:
            ValueError: if none is selected, or the catalogue does not have it.
        """
        if release is not None:
            self.selected = (release, id or "")
        if not self.selected[0]:
            fix = "panel.load('gpt2-small-res-jb', 'blocks.8.hook_resid_pre')"
            raise ValueError(errors.explain("CataloguePicker was asked to load nothing.", want="a row chosen", fix=fix))
        self.cancel()
        (release, id), cancelled = self.selected, threading.Event()
        self._cancelled, self._bytes = cancelled, (0, 0)
        options = {} if self._device is None else {"device": self._device}

        def progress(done: int, total: int) -> None:
            if cancelled.is_set():
                raise Cancelled(f"{release}, {id}")
            self._bytes = (done, total)

        def then(sae: Any) -> None:
            self.sae = sae
            self.loaded = {"release": release, "id": id, "text": repr(sae)}
            self.notice = ""

        self.progress = {"release": release, "id": id, "done": 0, "total": 0}
        self.notice = ""
        self.start_work(
            "load", f"loading {id}", lambda: saewb.load_sae(release, id, progress=progress, **options), then
        )

    def cancel(self) -> None:
        """Cancel loading. Complete files stay in the cache, so loading again downloads only the others."""
        if self.progress:
            self._cancelled.set()
            release, id = self.progress["release"], self.progress["id"]
            self.discard_work("load")
            self.notice = f"cancelled: {release}, {id}"

    def discard_work(self, key: str) -> None:
        """See Panel."""
        super().discard_work(key)
        if key == "load":
            self.progress = {}

    def summary(self) -> str:
        """See Panel."""
        n, of = len(self.table), len(self.catalogue)
        listed = f"{of:,} SAEs" if n == of else f"{n:,} of {of:,} SAEs"
        return f"{listed}, {' '.join(self.selected) if self.selected[0] else 'none chosen'}"

    def code(self) -> str:
        """Python code that computes `table` and, once an SAE is loaded, `sae`."""
        lines = ["import saewb", "", *self._choice().code()]
        if self.loaded:
            lines.append(self._call(self.loaded["release"], self.loaded["id"]))
        elif self.selected[0]:
            lines.append(f"# {self._call(*self.selected)}")
        return "\n".join(lines) + "\n"

    def static_html(self) -> str:
        """See Panel."""
        listed = [
            (
                release,
                id,
                layer,
                "" if d_sae is None else f"{d_sae:,}",
                "" if l0 is None else f"{l0:g}",
                filter.size(size),
            )
            for release, id, _, _, layer, d_sae, l0, _, size, _ in self.rows["rows"][:12]
        ]
        shown = grid(("release", "id", "layer", "width", "L0", "size"), listed)
        return shown + (grid(("", " ".join(self.selected)), filter.page_rows(self.page)) if self.page else "")

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what == "move":
            self._move(**how)
        elif what == "load":
            self.load(**how)
        elif what == "cancel":
            self.cancel()
        elif what == "clear":
            self.clear()
        elif what == "code":
            self.notice = self.code()
        else:
            raise ValueError(errors.explain(f"CataloguePicker was asked to {what!r}."))

    def clear(self) -> None:
        """Remove all filters."""
        self._ready = False
        try:
            for name, value in _NO_FILTER.items():
                setattr(self, name, value)
        finally:
            self._ready = True
        self._list()

    def _call(self, release: str, id: str) -> str:
        where = "" if self._device is None else f", device={self._device!r}"
        return f"sae = saewb.load_sae({release!r}, {id!r}{where})"

    def _move(self, to: int | None = None, by: int = 0) -> None:
        if len(self.table):
            position = max(0, min(len(self.table) - 1, self.position + by if to is None else to))
            row = self.table.iloc[position]
            self.selected = (row["release"], row["id"])

    def _on_message(self, _: Any, content: Any, buffers: Any = None) -> None:
        super()._on_message(_, content, buffers)
        if self.progress and isinstance(content, dict) and content.get("do") == "collect":
            done, total = self._bytes
            self.progress = {**self.progress, "done": done, "total": total}

    # Validation, before anything changes

    @t.validate("model", "release", "site", "sort", "l0", "selected")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name == "selected":
                return self._check_sae(value)
            if name == "l0":
                low, high = value
                if (low is not None and low < 0) or (None not in (low, high) and low > high):
                    want = "(from, to), latents per token; None leaves an end open"
                    raise ValueError(errors.explain(f"l0 is {value}.", want=want, fix="panel.l0 = (20, 100)"))
                return value
            if name == "model" and value:
                return self._full_name(value)
            return filter.check(name, value, filter.COLUMNS if name == "sort" else self.catalogue[name].unique())

    def _check_sae(self, value: tuple[str, str]) -> tuple[str, str]:
        if value[0] or value[1]:
            saewb.pretrained.catalogue.find(*value)  # raises for an unknown SAE
        return value

    def _full_name(self, model: str) -> str:
        """Name of a model in the catalogue."""
        if (self.catalogue["model"] == model).any():
            return model
        (first, *others) = saewb.catalogue(model=model)["model"].unique()
        if others:
            raise ValueError(errors.explain(f"model {model!r} is several.", want=", ".join([first, *others])))
        return first

    # Reactions to changes

    @on_change(*_NO_FILTER)
    def _on_filter(self) -> None:
        self._list()

    @on_change("selected")
    def _on_selected(self) -> None:
        self._send_page()

    @on_change("offset")
    def _on_offset(self) -> None:
        self._send_rows()

    def _choice(self) -> filter.Choice:
        fields = (self.model, self.release, self.site, self.layer, self.width)
        return filter.Choice(*fields, self.l0, self.on_neuronpedia, self.query, self.sort, self.descending)

    def _list(self) -> None:
        choice = self._choice()
        self.table, self._list_number = choice.apply(self.catalogue), self._list_number + 1
        self.left = choice.remaining(self.catalogue)
        self.position = self._position()
        if self.offset:
            self.offset = 0  # sends the rows
        else:
            self._send_rows()

    def _send_rows(self) -> None:
        begin = max(0, min(self.offset, len(self.table) - 1))
        part = self.table.iloc[begin : begin + WINDOW].itertuples(index=False)
        sent = [filter.line(row) for row in part]
        self.rows = {"list": self._list_number, "total": len(self.table), "offset": begin, "rows": sent}

    def _position(self) -> int:
        release, id = self.selected
        rows = self.table.index[(self.table["release"] == release) & (self.table["id"] == id)]
        return int(rows[0]) if len(rows) else -1

    def _send_page(self) -> None:
        """Send the page of the selected SAE."""
        self.position = self._position()
        if not self.selected[0]:
            self.page = {}
            return
        entry = saewb.pretrained.catalogue.find(*self.selected)
        table = self.catalogue
        row = next(table[(table["release"] == entry.release) & (table["id"] == entry.id)].itertuples(index=False))
        links = (
            []
            if entry.neuronpedia is None
            else [("Neuronpedia", f"{saewb.features.neuronpedia.SITE}/{entry.neuronpedia}")]
        )
        links += [(name, address) for name, address in entry.links.items() if address.startswith("https://")]
        self.page = filter.page(row, links, entry.note)
