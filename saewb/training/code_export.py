"""Python source of a `RunSpec`: the notebook cell that starts the run."""

from __future__ import annotations

import math
import reprlib
from dataclasses import fields, replace
from typing import Any

import torch

from saewb.errors import explain
from saewb.training.config import RunSpec, Trainee


def training_code(
    saes: Any,
    *,
    n_tokens: int,
    hook: str | None = None,
    hook_out: str | None = None,
    folder: str | None = None,
    held_out: bool = False,
    **options: Any,
) -> str:
    """Python source of a call of `saewb.train`, with the arguments that differ from their defaults.

    Args:
        saes: as for `saewb.train`.
        n_tokens: as for `saewb.train`.
        hook: as for `saewb.train`.
        hook_out: as for `saewb.train`.
        folder: as for `saewb.train`.
        held_out: whether the call passes `held_out`.
        options: as for `saewb.train`.

    Returns:
        Python source that needs `model` and `tokens` (and `held_out`), and defines `run`.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for an invalid value.

    Example:
        >>> import saewb
        >>> print(training_code(saewb.TopK(512, k=16), hook="blocks.2.hook_resid_post", n_tokens=50_000))
        import saewb
        <BLANKLINE>
        run = saewb.train(
            model,
            tokens,
            saewb.TopK(d_sae=512, k=16),
            hook='blocks.2.hook_resid_post',
            n_tokens=50_000,
        )
        <BLANKLINE>
    """
    spec = RunSpec.from_options(saes, n_tokens=n_tokens, hook=hook, hook_out=hook_out, **options)
    return train_code(spec, folder=folder, held_out=held_out)


def train_code(spec: RunSpec, *, folder: str | None = None, held_out: bool = False) -> str:
    """Python source of the `saewb.train` call of a spec, without defaults; needs `model`, `tokens` (and `held_out`).

    Args:
        spec: of the run.
        folder: of the new run.
        held_out: whether the call passes `held_out`.
    """
    arguments = {} if folder is None else {"folder": folder}
    for part in (spec.train, spec.run, spec.data):
        arguments |= _changed(part)
    if "positions" in arguments:
        arguments["positions"] = slice(*arguments["positions"])
    saes = {name: _with_points(sae) for name, sae in spec.saes.items()}
    locations = {(sae.read, sae.write) for sae in saes.values() if not sae.objective.multi_point}
    shared = len(locations) == 1 and locations != {(None, None)}
    read, write = locations.pop() if shared else (None, None)
    hooks = {name: point for name, point in (("hook", read), ("hook_out", write)) if point is not None}
    saes = {name: replace(sae, read=None, write=None) if shared else sae for name, sae in saes.items()}
    arguments = {**hooks, "n_tokens": arguments.pop("n_tokens"), **arguments}
    model = f"  # {_one_line(spec.model)}" if spec.model else ""
    by_name = ", ".join(f"{name!r}: {_trainee_code(sae)}" for name, sae in saes.items())
    code = _trainee_code(saes["sae"]) if list(saes) == ["sae"] else f"{{{by_name}}}"
    lines = [f"model,{model}", "tokens,", f"{code},"]
    lines += [f"{name}={_literal(value)}," for name, value in arguments.items()]
    lines += ["held_out=held_out,"] if held_out else []
    return "import saewb\n\nrun = saewb.train(\n" + "".join(f"    {line}\n" for line in lines) + ")\n"


def _with_points(sae: Trainee) -> Trainee:
    """The same trainee; the points of an objective over several of them are a field of the objective."""
    return replace(sae, objective=replace(sae.objective, points=sae.reads)) if sae.objective.multi_point else sae


def _trainee_code(sae: Trainee) -> str:
    objective = sae.objective
    options = ", ".join(f"{name}={_plain_literal(value)}" for name, value in _changed(objective).items())
    code = f"saewb.{type(objective).__name__}({options})"
    fields = [
        f"{name}={_plain_literal(value)}"
        for name in (("lr", "seed") if objective.multi_point else ("read", "write", "lr", "seed"))
        if (value := getattr(sae, name)) is not None
    ]
    return f"saewb.Trainee({', '.join([code, *fields])})" if fields else code


def _changed(config: Any) -> dict[str, Any]:
    """Fields that differ from their defaults, in signature order."""
    ordered = sorted(fields(config), key=lambda f: f.kw_only)
    return {f.name: value for f in ordered if (value := getattr(config, f.name)) != f.default}


def _literal(value: Any) -> str:
    return f"{value:_}" if type(value) is int and value >= 10_000 else _plain_literal(value)


def _plain_literal(value: Any) -> str:
    """Source of a value, which a run's folder may have from a stranger: of plain types only, and nothing is called."""
    if isinstance(value, torch.dtype):
        return repr(str(value).removeprefix("torch."))  # which saewb.train takes too, and needs no import
    if isinstance(value, slice):
        return f"slice({', '.join(map(_plain_literal, (value.start, value.stop, value.step)))})"
    if isinstance(value, (list, tuple)):
        items = ", ".join(map(_plain_literal, value)) + "," * (isinstance(value, tuple) and len(value) == 1)
        return f"[{items}]" if isinstance(value, list) else f"({items})"
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return repr(value)
    what = f"there is no source for a {type(value).__name__}, {reprlib.repr(value)}."
    raise ValueError(explain(what, want="numbers, texts, lists of them"))


def _one_line(text: str) -> str:
    """A text that cannot end the comment it stands in."""
    return "".join(c if c.isprintable() else " " for c in text)
