"""TrainingPanel: live curves and control of training runs, and a form that starts one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import traitlets as t

import saewb
from saewb import errors
from saewb_widgets.html import grid
from saewb_widgets.panel import Panel, catch_errors, report_errors, source
from saewb_widgets.training import form
from saewb_widgets.training.charts import charts
from saewb_widgets.training.monitor import CHARTS, LOG_SCALE, WatchedRun, free_name, watch

_CONTROLS = {"pause": "pausing", "resume": "going on with", "stop": "stopping"}


class TrainingPanel(Panel):
    """Watch training runs, pause and stop them, and start one with a form.

    Runs of this kernel can be controlled; of a run in another process, or one that has ended, its folder is enough: no
    model is needed. Curves have at most 300 points each. While a run goes on the front end asks for news once a second;
    scripts call `refresh()`. What is shown is `saewb.run_curves` and `saewb.run_densities` of each run.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> panel = TrainingPanel(model=model, tokens=texts, objective=saewb.TopK(256, k=8), n_tokens=2_048,
        ...                       hook="blocks.2.hook_resid_post", batch_tokens=512, buffer_tokens=2_048)
        >>> panel
        TrainingPanel(form for TopK)
        >>> panel.start()
        >>> panel.wait()
        >>> panel.run.wait()
        Run(finished, 2,048 of 2,048 tokens, blocks.2.hook_resid_post)
        >>> panel.refresh()
        >>> panel
        TrainingPanel(run 1 finished)
    """

    _esm = source("shared/frame.js", "training/training.js")
    _css = source("shared/frame.css", "training/training.css")

    status = t.List(help="state of each run").tag(sync=True)
    series = t.List(help="the curves of each SAE of each run").tag(sync=True)
    hidden = t.List(t.Unicode(), help="labels of the curves that are not drawn").tag(sync=True)
    scale = t.Enum(("auto", "linear", "log"), "auto", help="scale of loss, L0 and FVU; auto: log for a wide range").tag(
        sync=True
    )
    alive = t.Bool(False, help="whether a run may still change").tag(sync=True)
    looked = t.Int(0, help="number of refreshes").tag(sync=True)
    form = t.Dict(help="the form's fields; empty if there is none").tag(sync=True)
    form_open = t.Bool(False, help="whether the form is shown").tag(sync=True)
    kind = t.Unicode("TopK", help="the objective's class").tag(sync=True)
    typed = t.Dict(help="values typed into the form, as text by key, where they differ from the default").tag(sync=True)
    problems = t.Dict(help="error messages for the form, by key").tag(sync=True)
    estimate = t.Dict(help="the memory that training would need").tag(sync=True)
    facts = t.Dict(help="constants for the front end").tag(sync=True)

    def __init__(
        self,
        runs: Any = None,
        *,
        model: Any = None,
        tokens: Any = None,
        objective: Any = None,
        held_out: Any = None,
        loggers: Sequence[Any] = (),
        device: Any = None,
        **options: Any,
    ) -> None:
        """Show runs, or with a model and tokens a form that starts one; or both.

        Args:
            runs: a Run, a run's folder, a list of either, or a dictionary by name.
            model: to train on.
            tokens: as for `saewb.train`.
            objective: what the form begins with; None means `saewb.TopK(d_sae=4096, k=32)`.
            held_out: as for `saewb.train`.
            loggers: as for `saewb.train`.
            device: as for `saewb.train`.
            options: what the form begins with: `hook`, `n_tokens`, `folder`, and any option of `saewb.train`.

        Raises:
            TypeError: for what is no run or no objective, or an unknown option.
            ValueError: for neither runs nor a model with tokens.
            FileNotFoundError: for a folder without a run.
        """
        self._watched = watch(runs)
        self._model, self._tokens = model, tokens
        self._passed = {"held_out": held_out, "loggers": tuple(loggers), "device": device}
        has_form = model is not None and tokens is not None
        if not has_form and (runs is None or options or objective is not None or model is not None):
            want = "runs to watch; or model, tokens and hook, to start one"
            raise ValueError(errors.explain("TrainingPanel got nothing to train.", want=want, fix="TrainingPanel(run)"))
        self._has_form = False
        typed, kind = {}, "TopK"
        if has_form:
            objective = saewb.TopK(d_sae=4096, k=32) if objective is None else objective
            kind = form.kind_of(objective)
            typed = form.typed_text(objective, {"n_tokens": 1_000_000, **options})
        super().__init__(kind=kind, typed=typed, form_open=has_form and not self._watched)
        self._has_form = has_form
        charts = [[figure, *words, figure in LOG_SCALE] for figure, words in CHARTS.items()]
        self.facts = {"charts": charts, "kinds": list(form.KINDS)}
        if has_form:
            self._kind_changed()
        self._look()

    # -- what there is ---------------------------------------------------------------------------------------------

    @property
    def runs(self) -> dict[str, Any]:
        """The runs shown, by name."""
        return {name: watched.run for name, watched in self._watched.items()}

    @property
    def run(self) -> Any:
        """The newest of the runs shown, or None."""
        return list(self.runs.values())[-1] if self._watched else None

    def add(self, run: Any, name: str | None = None) -> None:
        """Show one more run.

        Args:
            run: a Run, or a run's folder.
            name: None means its folder's, or a number.

        Raises:
            ValueError: if another run has that name.
        """
        watched = WatchedRun(run)
        name = free_name(watched, self._watched) if name is None else name
        if name in self._watched:
            raise ValueError(errors.explain(f"there is a run {name!r}.", want="another name"))
        self._watched[name] = watched
        self._look()

    def refresh(self) -> None:
        """Show the latest state; the front end does this once a second while a run is active."""
        self.collect()
        self._look()

    def summary(self) -> str:
        """See Panel."""
        if not self._watched:
            return f"form for {self.kind}"
        if len(self._watched) > 3:
            return f"{len(self._watched)} runs"
        return ", ".join(f"{status['name']} {status['state']}" for status in self.status)

    def code(self, run: str | None = None) -> str:
        """Python that starts a training equal to the form's, or to a run's.

        Args:
            run: a run's name; None means the form if it is open, else all runs.

        Returns:
            A cell that needs `model` and `tokens` (and `held_out`, where it is measured on) and makes `run`, or with
            several runs `runs` by name.

        Raises:
            KeyError: for a run that is not shown.
            ValueError: if something is wrong in the form.
        """
        if run is not None:
            return self._get(run).run.code
        if self._has_form and (self.form_open or not self._watched):
            objective, arguments = self._parse_form()
            return saewb.training_code(objective, held_out=self._passed["held_out"] is not None, **arguments)
        if len(self._watched) == 1:
            return self.run.code
        cells = [f"{watched.run.code}runs[{name!r}] = run\n" for name, watched in self._watched.items()]
        return "\n".join(["runs = {}", *cells])

    def static_html(self) -> str:
        """See Panel."""
        if not self._watched:
            rows = [(key, text) for key, text in self.typed.items()]
            return f"<div>not started: {self.kind}</div>" + grid(("field", "value"), rows)
        rows = [
            (s["name"], s["state"], s["before"] or f"{s['n_tokens']:,} of {s['total']:,}", s.get("error", ""))
            for s in self.status
        ]
        return grid(("run", "state", "tokens", ""), rows) + charts(self.series, self.scale)

    # -- control -----------------------------------------------------------------------------------------------------

    @catch_errors
    def start(self) -> None:
        """Start what the form says, in the background: `panel.run`, once `wait()` or the front end has collected it.

        Raises:
            ValueError: if there is no form, something is wrong in it, or one is being started.
        """
        if "start" in self._jobs:
            raise ValueError(errors.explain("a run is being started.", want="a moment's patience"))
        objective, arguments = self._parse_form()
        model, tokens, passed = self._model, self._tokens, self._passed

        def then(run: Any) -> None:
            self.form_open = False
            self.add(run)

        self.start_work("start", "starting", lambda: saewb.train(model, tokens, objective, **arguments, **passed), then)

    @catch_errors
    def control(self, run: str, what: str) -> None:
        """Pause, resume or stop a run; it rests once the step under way is done (see `wait`).

        Args:
            run: its name.
            what: "pause", "resume" or "stop".

        Raises:
            KeyError: for a run that is not shown.
            ValueError: for one that is not of this kernel, or something else to do.
        """
        watched = self._get(run)
        if what not in _CONTROLS:
            near = errors.near(what, _CONTROLS)
            raise ValueError(errors.explain(f"got {what!r}.", near=near, want=", ".join(_CONTROLS)))
        if not watched.is_local:
            raise ValueError(errors.explain(f"{run!r} is not of this kernel.", want="a run started here"))
        self.start_work(
            f"control {run}", f"{_CONTROLS[what]} {run}", getattr(watched.run, what), lambda _: self._look()
        )

    def on_request(self, what: str, **how: Any) -> None:
        """See Panel."""
        if what in _CONTROLS:
            self.control(how.get("run", ""), what)
        elif what == "start":
            self.start()
        elif what == "refresh":
            self.refresh()
        elif what == "code":
            self.notice = self.code(how.get("run"))
        else:
            raise ValueError(errors.explain(f"TrainingPanel was asked to {what!r}."))

    def _on_message(self, widget: Any, content: Any, buffers: Any = None) -> None:
        if isinstance(content, Mapping) and content.get("do") == "look":
            self._news()
        else:
            super()._on_message(widget, content, buffers)

    def _news(self) -> None:
        """Refresh without clearing an error that the user may be reading, and show its own errors."""
        with self._lock:
            try:
                self._look()
            except Exception as error:
                self.alive = False  # or it would fail once a second
                self.show_error(error)
                raise

    def _look(self) -> None:
        for watched in self._watched.values():
            watched.refresh()
        alive = any(watched.alive for watched in self._watched.values())  # before the figures, so that none is missed
        status = [watched.status(name) for name, watched in self._watched.items()]
        series = [line for name, watched in self._watched.items() for line in watched.series(name)]
        with self.hold_sync():
            self.status, self.series, self.alive = status, series, alive
            self.looked += 1
            self.title = "Training" if len(status) != 1 else f"Training: {status[0]['name']}"
            self.about = self._about()

    def _about(self) -> str:
        if not self._watched:
            return repr(self._tokens) if isinstance(self._tokens, str) else "a form; nothing runs yet"
        return ", ".join(
            f"{len(w.run.names)} SAE{'s' * (len(w.run.names) > 1)} in {name}" for name, w in self._watched.items()
        )

    def _get(self, run: str) -> WatchedRun:
        if run not in self._watched:
            names = list(self._watched)
            raise KeyError(errors.explain(f"no run {run!r} here.", near=errors.near(str(run), names), want=str(names)))
        return self._watched[run]

    # -- the form ----------------------------------------------------------------------------------------------------

    def _parse_form(self) -> tuple[Any, dict[str, Any]]:
        """The objective and the arguments of `saewb.train`; raises if something is wrong in the form."""
        if not self._has_form:
            raise ValueError(
                errors.explain("there is no form.", want="model and tokens", fix="TrainingPanel(model=model, ...)")
            )
        objective, arguments, problems = form.parse(self.kind, self.typed)
        if problems:
            lines = "; ".join(f"{key}: {text.splitlines()[0]}" for key, text in problems.items())
            raise ValueError(errors.explain(f"the form is not right: {lines}", want="what stands beside the fields"))
        return objective, arguments

    @t.validate("kind")
    @catch_errors
    def _check_kind(self, proposal: dict) -> str:
        got = proposal["value"]
        with report_errors():
            if got not in form.KINDS:
                near = errors.near(got, form.KINDS)
                raise ValueError(errors.explain(f"kind is {got!r}.", near=near, want=", ".join(form.KINDS)))
        return got

    @t.observe("kind")
    @catch_errors
    def _kind_changed(self, _: Any = None) -> None:
        if self._has_form:
            self.form = {"groups": form.groups(self.kind)}
            self._typed_changed()

    @t.observe("typed")
    @catch_errors
    def _typed_changed(self, _: Any = None) -> None:
        if not self._has_form:
            return
        objective, arguments, problems = form.parse(self.kind, self.typed)
        self.problems = problems
        if problems:
            self.discard_work("estimate")
            self.estimate = {}
            return
        model, device = self._model, self._passed["device"]
        tokens = self._tokens if hasattr(self._tokens, "points") else None
        options = {key: value for key, value in arguments.items() if key != "folder"}

        def work() -> Any:
            try:
                return saewb.training_memory(model, objective, tokens=tokens, device=device, **options)
            except Exception as error:  # shown beside the form: what is typed need not be right yet
                return error

        self.start_work("estimate", "estimating memory", work, self._estimated)

    def _estimated(self, estimate: Any) -> None:
        if isinstance(estimate, Exception):
            text = form.message(estimate)
            hooks = [key for key in ("hook", "hook_out") if repr(str(self.typed.get(key))) in text]
            self.problems = {**self.problems, **dict.fromkeys(hooks[:1], text)}
            self.estimate = {"error": text}
            return
        self.estimate = {
            "rows": [line.rsplit(None, 2)[:2] for line in str(estimate).splitlines()],
            "fits": estimate.fits,
            "weights_fit": estimate.weights_fit,
        }
