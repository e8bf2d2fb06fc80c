"""CataloguePicker: find a published SAE, see what is known of it, and load it."""

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
_NOTHING = {  # asked of the catalogue
    **dict.fromkeys(("model", "release", "site", "query", "sort"), ""),
    **dict.fromkeys(("layer", "width", "on_neuronpedia")),
    **{"l0": (None, None), "descending": False},
}


class Cancelled(Exception):
    """Raised on the threads of a download that nobody wants any more."""


class CataloguePicker(Panel):
    """Find a published SAE by model, release, words, place, width and L0, look at what is known of it, and load it.

    The table is `panel.table`, of `saewb.catalogue()`; 100 rows of it are sent at a time. What was loaded is
    `panel.sae`. Loading runs beside the notebook (`busy`, `wait()`, `cancel()`).

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

    model = t.Unicode("", help="a model's name; empty: of any").tag(sync=True)
    release = t.Unicode("", help="a release's name; empty: any").tag(sync=True)
    site = t.Unicode("", help="resid_post, mlp_out, transcoder...; empty: any").tag(sync=True)
    layer = t.Int(None, allow_none=True, help="of the point that is read").tag(sync=True)
    width = t.Int(None, allow_none=True, help="number of latents").tag(sync=True)
    l0 = t.Tuple(
        t.Float(allow_none=True),
        t.Float(allow_none=True),
        default_value=(None, None),
        help="active latents per token, from and to",
    ).tag(sync=True)
    on_neuronpedia = t.Bool(None, allow_none=True, help="with its pages, without, or either (None)").tag(sync=True)
    query = t.Unicode("", help="words, each somewhere in release, id, model, hook or repo").tag(sync=True)
    sort = t.Unicode("", help="a column; empty: the catalogue's own order").tag(sync=True)
    descending = t.Bool(False, help="largest first").tag(sync=True)
    selected = t.Tuple(t.Unicode(), t.Unicode(), default_value=("", ""), help="release and id on the page").tag(
        sync=True
    )
    # What the front end draws; made here, so setting them has no effect on anything else.
    offset = t.Int(0, help="place in the table of the first row sent").tag(sync=True)
    position = t.Int(-1, help="place in the table of the selected one; -1 if it is not listed").tag(sync=True)
    rows = t.Dict(help="the rows sent, and how many there are").tag(sync=True)
    left = t.Dict(help="what else could be chosen, and how many SAEs have it").tag(sync=True)
    page = t.Dict(help="all that is known of the selected one").tag(sync=True)
    progress = t.Dict(help="of a download: release, id, bytes that came, bytes in all (0: not known yet)").tag(
        sync=True
    )
    loaded = t.Dict(help="what panel.sae is: release, id, text").tag(sync=True)
    facts = t.Dict(help="what stays").tag(sync=True)

    def __init__(self, *, device: str | None = None, **traits: Any) -> None:
        """Show the catalogue.

        Args:
            device: where to load to; None means the CPU.
            traits: e.g. `model="google/gemma-2-2b"`, `width=16384`, `l0=(20, 100)`, `sort="l0"`.

        Raises:
            TypeError: for an unknown trait.
            ValueError: for a model, release, site, column or SAE that the catalogue does not have.
        """
        self.check_names(traits)
        self.sae: Any = None  # what was loaded last
        self.catalogue: pd.DataFrame = saewb.catalogue()
        self.table = self.catalogue
        self._device = device
        self._given_up = threading.Event()  # of the download that runs
        self._came: tuple[int, int] = (0, 0)
        self._list_number = 0
        super().__init__(**traits)
        self.title = "Published SAEs"
        releases, models = self.catalogue["release"].nunique(), self.catalogue["model"].nunique()
        self.about = f"{len(self.catalogue):,} SAEs of {models} models in {releases} releases"
        self.facts = {"all": len(self.catalogue), "window": WINDOW, "columns": list(filter.COLUMNS.items())}
        self._ready = True
        self._list()
        self._turn()

    # What a reader does

    def load(self, release: str | None = None, id: str | None = None) -> None:
        """Begin to load an SAE, the selected one without arguments; `wait()` for it, then it is `panel.sae`.

        Raises:
            ValueError: if none is selected, or the catalogue has none of these names.
        """
        if release is not None:
            self.selected = (release, id or "")
        if not self.selected[0]:
            fix = "panel.load('gpt2-small-res-jb', 'blocks.8.hook_resid_pre')"
            raise ValueError(errors.explain("CataloguePicker was asked to load nothing.", want="a row chosen", fix=fix))
        self.cancel()
        (release, id), given_up = self.selected, threading.Event()
        self._given_up, self._came = given_up, (0, 0)
        how = {} if self._device is None else {"device": self._device}

        def came(done: int, total: int) -> None:
            if given_up.is_set():
                raise Cancelled(f"{release}, {id}")
            self._came = (done, total)

        def then(sae: Any) -> None:
            self.sae = sae
            self.loaded = {"release": release, "id": id, "text": repr(sae)}
            self.notice = ""

        self.progress = {"release": release, "id": id, "done": 0, "total": 0}
        self.notice = ""
        self.start_work("load", f"loading {id}", lambda: saewb.load_sae(release, id, progress=came, **how), then)

    def cancel(self) -> None:
        """Stop loading. Files that came whole are kept, so loading it again fetches the others only."""
        if self.progress:
            self._given_up.set()
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
        """Python that makes `table`, and once one is loaded, `sae`."""
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
        return shown + (grid(("", " ".join(self.selected)), filter.told(self.page)) if self.page else "")

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
        """Ask nothing of the catalogue any more."""
        self._ready = False
        try:
            for name, value in _NOTHING.items():
                setattr(self, name, value)
        finally:
            self._ready = True
        self._list()

    def _call(self, release: str, id: str) -> str:
        where = "" if self._device is None else f", device={self._device!r}"
        return f"sae = saewb.load_sae({release!r}, {id!r}{where})"

    def _move(self, to: int | None = None, by: int = 0) -> None:
        if len(self.table):
            place = max(0, min(len(self.table) - 1, self.position + by if to is None else to))
            row = self.table.iloc[place]
            self.selected = (row["release"], row["id"])

    def _on_message(self, _: Any, content: Any, buffers: Any = None) -> None:
        super()._on_message(_, content, buffers)
        if self.progress and isinstance(content, dict) and content.get("do") == "collect":
            done, total = self._came
            self.progress = {**self.progress, "done": done, "total": total}

    # What is asked for is checked before anything changes

    @t.validate("model", "release", "site", "sort", "l0", "selected")
    @catch_errors
    def _check(self, proposal: dict) -> Any:
        name, got = proposal["trait"].name, proposal["value"]
        with report_errors():
            if name == "selected":
                return self._existing(got)
            if name == "l0":
                low, high = got
                if (low is not None and low < 0) or (None not in (low, high) and low > high):
                    want = "(from, to), latents per token; None leaves an end open"
                    raise ValueError(errors.explain(f"l0 is {got}.", want=want, fix="panel.l0 = (20, 100)"))
                return got
            if name == "model" and got:
                return self._full(got)
            return filter.checked(name, got, filter.COLUMNS if name == "sort" else self.catalogue[name].unique())

    def _existing(self, got: tuple[str, str]) -> tuple[str, str]:
        if got[0] or got[1]:
            saewb.pretrained.catalogue.find(*got)  # which says what is wrong with it
        return got

    def _full(self, model: str) -> str:
        """The catalogue's name of a model."""
        if (self.catalogue["model"] == model).any():
            return model
        (first, *others) = saewb.catalogue(model=model)["model"].unique()
        if others:
            raise ValueError(errors.explain(f"model {model!r} is several.", want=", ".join([first, *others])))
        return first

    # What follows from it

    @on_change(*_NOTHING)
    def _asked_anew(self) -> None:
        self._list()

    @on_change("selected")
    def _selected_anew(self) -> None:
        self._turn()

    @on_change("offset")
    def _scrolled(self) -> None:
        self._send_rows()

    def _choice(self) -> filter.Choice:
        places = (self.model, self.release, self.site, self.layer, self.width)
        return filter.Choice(*places, self.l0, self.on_neuronpedia, self.query, self.sort, self.descending)

    def _list(self) -> None:
        choice = self._choice()
        self.table, self._list_number = choice.found(self.catalogue), self._list_number + 1
        self.left = choice.left(self.catalogue)
        self.position = self._place()
        if self.offset:
            self.offset = 0  # sends the rows
        else:
            self._send_rows()

    def _send_rows(self) -> None:
        begin = max(0, min(self.offset, len(self.table) - 1))
        part = self.table.iloc[begin : begin + WINDOW].itertuples(index=False)
        sent = [filter.line(row) for row in part]
        self.rows = {"list": self._list_number, "total": len(self.table), "offset": begin, "rows": sent}

    def _place(self) -> int:
        release, id = self.selected
        found = self.table.index[(self.table["release"] == release) & (self.table["id"] == id)]
        return int(found[0]) if len(found) else -1

    def _turn(self) -> None:
        """Turn to the page of the selected one."""
        self.position = self._place()
        if not self.selected[0]:
            self.page = {}
            return
        entry = saewb.pretrained.catalogue.find(*self.selected)
        every = self.catalogue
        row = next(every[(every["release"] == entry.release) & (every["id"] == entry.id)].itertuples(index=False))
        links = (
            []
            if entry.neuronpedia is None
            else [("Neuronpedia", f"{saewb.features.neuronpedia.SITE}/{entry.neuronpedia}")]
        )
        links += [(name, address) for name, address in entry.links.items() if address.startswith("https://")]
        self.page = filter.about(row, links, entry.note)
