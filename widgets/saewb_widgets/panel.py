"""The frame that all panels share: title, what it is busy with, errors, a stable repr, a view without a kernel.

1. Whatever the front end or a trait starts runs in a method marked `guarded`. An exception there is shown in the panel,
   kept in `panel.error` and raised again: ipywidgets' `Button.click` would swallow it, a comm message hide it in a log.
2. What takes long runs in `started` work, on a thread that touches no trait. The front end asks for its end while
   `busy` says something (updates from threads are not shown everywhere); scripts call `wait`.
3. Displayed, it makes two outputs: itself, and under it `snapshot()`, which its front end hides and has renewed as the
   view changes. It is what a saved notebook shows where no kernel runs: there JupyterLab has "model not found" for the
   first, whatever else it holds.
4. With ipykernel 7 callbacks may run beside a cell, on a second thread: `guarded` holds the panel's lock.
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

from saewb import errors

if TYPE_CHECKING:
    from IPython.display import HTML

PACKAGE = Path(__file__).parent


def source(*names: str) -> str:
    """Files of this package, one after another: no build step, and an ES module of a widget cannot import another one."""
    return "\n".join((PACKAGE / name).read_text(encoding="utf-8") for name in names)


def guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    """A callback whose exceptions are shown in its panel, kept in `panel.error`, and raised again."""

    @functools.wraps(method)
    def run(self: Panel, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            try:
                result = method(self, *args, **kwargs)
            except Exception as error:
                self.show(error)
                raise
            self.show(None)
            return result

    return run


def follows(*names: str) -> Callable[[Callable[[Any], None]], Any]:
    """What follows from a change of these traits, once the panel is `_ready`: observed, and guarded."""

    def made(method: Callable[[Any], None]) -> Any:
        @functools.wraps(method)
        def run(self: Panel, _: Any) -> None:
            if self._ready:
                method(self)

        return t.observe(*names)(guarded(run))

    return made


class Refused(t.TraitError, ValueError):
    """A value that a trait does not take: what came with it from the front end is taken back too."""

    def _render_traceback_(self) -> list[str]:
        """For IPython: what is wrong is the value, and the way to it leads through traitlets only."""
        return [f"ValueError: {self}"]


@contextmanager
def refused() -> Iterator[None]:
    """For validators: their ValueErrors as traitlets wants them, so that it takes the values back."""
    try:
        yield
    except ValueError as error:
        raise Refused(str(error)) from None


class Panel(anywidget.AnyWidget):
    """A panel, abstract: one line that says what it shows, `code()`, and a view for places without a kernel."""

    _ready = False  # whether what follows from its traits is to be shown; see `follows`

    title = t.Unicode("", help="what is shown, one line").tag(sync=True)
    about = t.Unicode("", help="what it is of, one line under the title").tag(sync=True)
    complaint = t.Unicode("", help="the last error, as shown; empty if the last callback went well").tag(sync=True)
    notice = t.Unicode("", help="what was done, e.g. where a file was saved").tag(sync=True)
    busy = t.Unicode("", help="what is being computed; empty if nothing is").tag(sync=True)
    still = t.Unicode("", help="names the output that stands in for it without a kernel, once displayed").tag(sync=True)

    error: Exception | None = None  # of the last callback

    def __init__(self, **traits: Any) -> None:
        self._lock = threading.RLock()
        self._jobs: dict[str, tuple[str, Future, Callable[[Any], None]]] = {}
        self._stood_in = ""  # the still as last sent
        super().__init__(**traits)
        self.on_msg(self._on_message)

    @abstractmethod
    def summary(self) -> str:
        """What it shows, for the repr: short, the same on every run."""

    @abstractmethod
    def code(self) -> str:
        """Python that gives what is shown, to paste in a cell."""

    @abstractmethod
    def static_html(self) -> str:
        """What is shown, as HTML without scripts: for a saved notebook, where no kernel runs."""

    @abstractmethod
    def asked(self, what: str, **how: Any) -> None:
        """The front end pressed a button."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary()})"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict, dict]:
        data, metadata = super()._repr_mimebundle_(**kwargs)
        return {**data, "text/plain": repr(self), "text/html": self.snapshot().data}, metadata

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self.still = self.still or uuid.uuid4().hex[:8]
        data, metadata = super()._repr_mimebundle_()
        display({**data, "text/plain": repr(self)}, metadata=metadata, raw=True)
        self._stood_in = self.snapshot().data
        display({"text/html": _standing_in(self.still, self._stood_in)}, raw=True, display_id=self.still)

    def _renew(self) -> None:
        """Have the still show what the panel does."""
        from IPython.display import display

        with self._lock:
            said = self.snapshot().data
        if self.still and said != self._stood_in:
            self._stood_in = said
            display({"text/html": _standing_in(self.still, said)}, raw=True, display_id=self.still, update=True)

    def snapshot(self) -> HTML:
        """What is shown now, as plain HTML: for a notebook that will be read without its kernel."""
        from IPython.display import HTML

        head = f"<b>{html.escape(self.title)}</b><div style='opacity:.65'>{html.escape(self.about)}</div>"
        return HTML(f"<div style='font:13px/1.5 system-ui,sans-serif'>{head}{self.static_html()}</div>")

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take what the front end set; where that fails, say so there and what holds instead."""
        try:
            super().set_state(sync_data)
        except Exception as error:
            # Traitlets holds back, or takes back, what was changed on the way, `complaint` with it.
            self.show(error)
            self.send_state([*sync_data, "complaint"])
            raise

    def check_names(self, given: Iterable[str], more: Iterable[str] = ()) -> None:
        """Raise a TypeError for a keyword that is none of its traits, nor of `more`."""
        known = [*self.trait_names(), *more]
        if unknown := [name for name in given if name not in known]:
            near = errors.near(unknown[0], known)
            raise TypeError(errors.explain(f"{type(self).__name__} got {unknown[0]}=.", near=near))

    def show(self, error: Exception | None) -> None:
        """Show an error in the panel, or with None take it away."""
        self.error = error
        said = "" if error is None else str(error) or "no message"
        name = "ValueError" if isinstance(error, Refused) else type(error).__name__
        self.complaint = f"{name}: {said}" if error is not None else ""

    def started(self, key: str, what: str, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Run `work` on a thread, and `then` with its result once asked for it; newer work of the same key wins.

        Args:
            key: which kind of work it is.
            what: shown while it runs.
            work: touches no trait.
            then: shows the result.
        """
        future: Future = Future()
        self._jobs[key] = (what, future, then)
        self.busy = what
        threading.Thread(target=_run, args=(future, work), daemon=True, name=f"saewb {key}").start()

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Say what it is busy with, in a callback that takes a moment."""
        self.busy = what
        try:
            yield
        finally:
            self.busy = next((what for what, _, _ in self._jobs.values()), "")

    def dropped(self, key: str) -> None:
        """The result of this work is no longer wanted."""
        self._jobs.pop(key, None)
        self.busy = next((what for what, _, _ in self._jobs.values()), "")

    @guarded
    def collect(self) -> None:
        """Show what has been computed since."""
        for key, (_, future, then) in list(self._jobs.items()):
            if future.done() and self._jobs.get(key, (None, None))[1] is future:
                self.dropped(key)
                then(future.result())

    def wait(self, timeout: float = 600.0) -> None:
        """Block until everything that was asked for is shown.

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
        elif what == "still":
            self._renew()
        elif what == "dismiss":
            self.show(None)
            self.notice = ""
        elif isinstance(what, str):
            self._ask(what, {k: v for k, v in content.items() if k != "do"})

    @guarded
    def _ask(self, what: str, how: dict[str, Any]) -> None:
        self.asked(what, **how)


def _standing_in(name: str, said: str) -> str:
    """With a rule that hides the panel's own output where no panel came of it: JupyterLab's "model not found"."""
    rule = (
        f".jp-OutputArea-child:has(+ * .saewb-still-{name}) .jp-OutputArea-output:not(:has(.saewb)) {{display: none}}"
    )
    return f"<style>{rule}</style><div class='saewb-still-{name}'>{said}</div>"


def _run(future: Future, work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # it is raised where the result is asked for
        future.set_exception(error)
