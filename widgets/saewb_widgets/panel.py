"""Base class of all panels: title, busy line, errors, a stable repr, and a snapshot for viewers without a kernel.

1. Callbacks of the front end and of traits run in methods decorated with `catch_errors`. It shows an exception in the
   panel, stores it in `panel.error` and raises it again: ipywidgets' `Button.click` would swallow it, and a comm
   message would hide it in a log.
2. Long work runs in the background (`start_work`), on a thread that touches no trait. The front end polls for the
   result while `busy` is set, since not every front end shows updates from threads; scripts call `wait`.
3. Displaying a panel creates two outputs: the panel, and under it `snapshot()`, which the front end hides and updates
   as the view changes. A saved notebook shows the snapshot where no kernel runs; there JupyterLab shows "model not
   found" for the first output, whatever else it contains.
4. With ipykernel 7, callbacks may run on a second thread while a cell runs: `catch_errors` holds the panel's lock.
"""

from __future__ import annotations

import functools
import html
import threading
import time
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets as t

import saewb
from saewb import errors

if TYPE_CHECKING:
    from IPython.display import HTML

PACKAGE = Path(__file__).parent
LATENT_JS = Path(saewb.__file__).parent / "features" / "page" / "latent.js"  # draws a latent, as on the HTML page


def source(*files: str | Path) -> str:
    """Concatenate files of this package: there is no build step, and a widget's ES module cannot import another one."""
    return "\n".join((PACKAGE / file).read_text(encoding="utf-8") for file in files)


def catch_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a callback: show its exceptions in the panel, store them in `panel.error`, and raise them again."""

    @functools.wraps(method)
    def run(self: Panel, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            try:
                result = method(self, *args, **kwargs)
            except Exception as error:
                self.show_error(error)
                raise
            self.show_error(None)
            return result

    return run


def on_change(*names: str) -> Callable[[Callable[[Any], None]], Any]:
    """Decorate a method that reacts to changes of these traits once the panel is `_ready`; includes `catch_errors`."""

    def decorate(method: Callable[[Any], None]) -> Any:
        @functools.wraps(method)
        def run(self: Panel, _: Any) -> None:
            if self._ready:
                method(self)

        return t.observe(*names)(catch_errors(run))

    return decorate


class InvalidValue(t.TraitError, ValueError):
    """A value that a trait does not accept; everything the front end sent with it is reverted too."""

    def _render_traceback_(self) -> list[str]:
        """One line for IPython, since the traceback would only go through traitlets."""
        return [f"ValueError: {self}"]


@contextmanager
def report_errors() -> Iterator[None]:
    """In a validator: turn a ValueError into the error after which traitlets reverts the values."""
    try:
        yield
    except ValueError as error:
        raise InvalidValue(str(error)) from None


class Panel(anywidget.AnyWidget):
    """Abstract panel: subclasses provide a summary, `code()`, and static HTML for viewers without a kernel."""

    _ready = False  # whether trait changes take effect; see `on_change`
    _owns_layout = False
    _still_style = ""  # of the snapshot

    title = t.Unicode("", help="title, one line").tag(sync=True)
    about = t.Unicode("", help="subtitle: the data shown, one line").tag(sync=True)
    error_message = t.Unicode("", help="the last error, as shown; empty if the last callback succeeded").tag(sync=True)
    notice = t.Unicode("", help="message about a finished action, e.g. where a file was saved").tag(sync=True)
    busy = t.Unicode("", help="description of the background work; empty if there is none").tag(sync=True)
    snapshot_id = t.Unicode("", help="id of the snapshot output, once displayed").tag(sync=True)

    error: Exception | None = None
    """Exception of the last callback, or None."""

    def __init__(self, **traits: Any) -> None:
        self._lock = threading.RLock()
        self._jobs: dict[str, tuple[str, Future, Callable[[Any], None]]] = {}
        self._last_snapshot = ""  # as last displayed
        self._owns_layout = isinstance(traits.get("layout", {}), dict)
        super().__init__(**traits)
        self.on_msg(self._on_message)

    def close(self) -> None:
        """Remove the panel from kernel and front end, with its layout, unless that was passed: others may use it."""
        layout = self.layout if self._owns_layout and self.comm is not None else None
        super().close()
        if layout is not None:
            layout.close()

    @abstractmethod
    def summary(self) -> str:
        """A short summary for the repr, the same on every run."""

    @abstractmethod
    def code(self) -> str:
        """Python code that reproduces the view, to paste into a cell."""

    @abstractmethod
    def static_html(self) -> str:
        """The view as HTML without scripts, for a notebook without its kernel."""

    @abstractmethod
    def on_request(self, what: str, **how: Any) -> None:
        """Handle a request of the front end, such as a pressed button."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return {**data, "text/plain": repr(self), "text/html": self.snapshot().data}, metadata

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self.snapshot_id = self.snapshot_id or uuid.uuid4().hex[:8]
        data, metadata = super()._repr_mimebundle_()
        display({**data, "text/plain": repr(self)}, metadata=metadata, raw=True)
        self._last_snapshot = self.snapshot().data
        display(
            {"text/html": _snapshot_html(self.snapshot_id, self._last_snapshot)}, raw=True, display_id=self.snapshot_id
        )

    def _renew_snapshot(self) -> None:
        """Replace the displayed snapshot by the current view."""
        from IPython.display import display

        with self._lock:
            content = self.snapshot().data
        if self.snapshot_id and content != self._last_snapshot:
            self._last_snapshot = content
            display(
                {"text/html": _snapshot_html(self.snapshot_id, content)},
                raw=True,
                display_id=self.snapshot_id,
                update=True,
            )

    def snapshot(self) -> HTML:
        """The current view as plain HTML, for a notebook that is read without its kernel."""
        from IPython.display import HTML

        head = f"<b>{html.escape(self.title)}</b><div style='opacity:.65'>{html.escape(self.about)}</div>"
        style = f"font:13px/1.5 system-ui,sans-serif{self._still_style}"
        return HTML(f"<div style='{style}'>{head}{self.static_html()}</div>")

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Accept state from the front end; on failure send back the error and the current values."""
        try:
            super().set_state(sync_data)
        except Exception as error:
            # Traitlets reverts the values, `error_message` included.
            self.show_error(error)
            self.send_state([*sync_data, "error_message"])
            raise

    def check_names(self, names: Iterable[str], more: Iterable[str] = ()) -> None:
        """Raise a TypeError for a keyword that is neither a trait nor in `more`."""
        valid = [*self.trait_names(), *more]
        if unknown := [name for name in names if name not in valid]:
            near = errors.near(unknown[0], valid)
            raise TypeError(errors.explain(f"{type(self).__name__} got {unknown[0]}=.", near=near))

    def show_error(self, error: Exception | None) -> None:
        """Show an error in the panel; None clears it."""
        self.error = error
        message = "" if error is None else str(error) or "no message"
        name = "ValueError" if isinstance(error, InvalidValue) else type(error).__name__
        self.error_message = f"{name}: {message}" if error is not None else ""

    def start_work(self, key: str, what: str, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `work` on a thread, then call `then` with its result; newer work of a key replaces older.

        Args:
            key: kind of work; only the newest of each kind counts.
            what: text shown while it runs.
            work: function to run; it must not touch a trait.
            then: function that shows the result.
        """
        future: Future = Future()
        self._jobs[key] = (what, future, then)
        self.busy = what
        threading.Thread(target=_run, args=(future, work), daemon=True, name=f"saewb {key}").start()

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Show a busy text during a callback that takes a moment."""
        self.busy = what
        try:
            yield
        finally:
            self.busy = next((what for what, _, _ in self._jobs.values()), "")

    def discard_work(self, key: str) -> None:
        """Discard the result of this work."""
        self._jobs.pop(key, None)
        self.busy = next((what for what, _, _ in self._jobs.values()), "")

    @catch_errors
    def collect(self) -> None:
        """Show the results that have arrived since the last call."""
        for key, (_, future, then) in list(self._jobs.items()):
            if future.done() and self._jobs.get(key, (None, None))[1] is future:
                self.discard_work(key)
                then(future.result())

    def wait(self, timeout: float = 600.0) -> None:
        """Block until all background work is done and shown.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: if it takes longer.
        """
        end = time.monotonic() + timeout
        while self._jobs:
            _, future, _ = next(iter(self._jobs.values()))
            future.exception(max(0.0, end - time.monotonic()))
            self.collect()

    def _on_message(self, _: Any, content: Any, buffers: Any = None) -> None:
        what = content.get("do") if isinstance(content, dict) else None
        if what == "collect":
            if any(future.done() for _, future, _ in self._jobs.values()):
                self.collect()
        elif what == "snapshot":
            self._renew_snapshot()
        elif what == "dismiss":
            self.show_error(None)
            self.notice = ""
        elif isinstance(what, str):
            self._handle(what, {k: v for k, v in content.items() if k != "do"})

    @catch_errors
    def _handle(self, what: str, how: dict[str, Any]) -> None:
        self.on_request(what, **how)


def _snapshot_html(name: str, content: str) -> str:
    """The snapshot, with a style that hides JupyterLab's "model not found" where the panel cannot be shown."""
    rule = f".jp-OutputArea-child:has(+ * .saewb-snapshot-{name}) .jp-OutputArea-output:not(:has(.saewb))"
    return f"<style>{rule} {{display: none}}</style><div class='saewb-snapshot-{name}'>{content}</div>"


def _run(future: Future, work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # raised by `future.result()`
        future.set_exception(error)


def model_line(saes: Any, model: Any) -> str:
    """Subtitle: the SAEs, and a remark if the model has hooks, which have no effect in the panel."""
    names = "; ".join(map(repr, saes))
    is_clean = saewb.models.hook_points.has_no_hooks(model)
    return names if is_clean else f"{names} — the model without what cells have put on it"


def model_code(model: Any) -> tuple[str, list[str]]:
    """The model variable for exported code, and lines that define it: a copy without hooks, if `model` has any."""
    if saewb.models.hook_points.has_no_hooks(model):
        return "model", []
    return "bare", [
        "bare = saewb.models.shared_copy.shared_copy(model)  # the same weights, without what is on the model now"
    ]
