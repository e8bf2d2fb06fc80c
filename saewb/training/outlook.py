"""What a training will be, told before it starts: its options, the memory it needs, the cell that starts it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import nn

from saewb.data.cache import ActivationCache
from saewb.data.sources import ModelSource
from saewb.data.token_streams import stream_tokens
from saewb.errors import explain, near
from saewb.field_notes import field_choices, field_notes
from saewb.models.shared_copy import shared_copy
from saewb.training import TrainConfig, Trainee
from saewb.training.memory import MemoryEstimate, estimate_memory
from saewb.training.past_run import train_code
from saewb.training.run_plan import Reading, facts_of, points_of, sorted_out, trainees_of, with_points
from saewb.training.run_record import RunOptions

_ELSEWHERE = {"positions"}  # arguments of `saewb.train` in their own right


@dataclass(frozen=True)
class TrainOption:
    """An option of `saewb.train`, or a field of an objective."""

    name: str  # as it is passed
    default: Any  # dataclasses.MISSING if there is none
    note: str  # what it is, with its unit
    owner: type  # the dataclass that checks it
    choices: tuple[str, ...] = ()  # of text, if only these are taken

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is MISSING

    def __str__(self) -> str:
        default = "" if self.required else f" = {self.default!r}"
        choices = f" ({', '.join(map(repr, self.choices))})" if self.choices else ""
        return f"{self.name}{default}: {self.note}{choices}"

    def value(self, text: str) -> Any:
        """What was typed as a Python literal, as a value; quotes may be left out where only text is taken.

        Args:
            text: e.g. "3e-4", "None", "(0.9, 0.999)", "cosine", "torch.bfloat16".

        Returns:
            The value.

        Raises:
            ValueError: for what is no literal; whether the value is right is for `owner` to say.

        Example:
            >>> batch = next(option for option in training_options() if option.name == "batch_tokens")
            >>> batch.note, batch.value("8_192")
            ('per optimizer step', 8192)
        """
        text = text.strip()
        if text in self.choices:
            return text
        if self.name == "autocast" and text.startswith("torch."):
            found = getattr(torch, text.removeprefix("torch."), None)
            if isinstance(found, torch.dtype):
                return found
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            want = ", ".join(self.choices) or "a number, None, or another Python literal"
            close = near(text, self.choices)
            raise ValueError(explain(f"got {self.name}={text!r}.", near=close, want=want)) from None


def training_options(objective: Any = None) -> tuple[TrainOption, ...]:
    """All options of `saewb.train` with their defaults and notes, or those of an objective: what a form would ask for.

    Args:
        objective: a class, e.g. `saewb.TopK`, or one of it; None means the options of `saewb.train` itself.

    Returns:
        Each option once, in the order in which it is documented; `print(*saewb.training_options(), sep="\\n")`.

    Raises:
        TypeError: for what is no objective.

    Example:
        >>> import saewb
        >>> [(option.name, option.default) for option in training_options(saewb.TopK)][1:3]
        [('k', 32), ('aux', 0.03125)]
        >>> print(training_options(saewb.TopK)[1])
        k = 32: Active latents per token.
    """
    if objective is None:
        return tuple(option for owner in (TrainConfig, Reading, RunOptions) for option in _options(owner))
    kind = objective if isinstance(objective, type) else type(objective)
    if not hasattr(kind, "losses"):
        raise TypeError(explain(f"got {objective!r}.", want="an objective", fix="training_options(saewb.TopK)"))
    return _options(kind)


def _options(owner: type) -> tuple[TrainOption, ...]:
    notes, choices = field_notes(owner), field_choices(owner)
    return tuple(
        TrainOption(f.name, f.default, notes.get(f.name, ""), owner, choices[f.name])
        for f in sorted(fields(owner), key=lambda f: f.kw_only)
        if f.name not in _ELSEWHERE
    )


def training_memory(
    model: nn.Module | None,
    saes: Any,
    *,
    n_tokens: int,
    tokens: Any = None,
    hook: str | None = None,
    hook_out: str | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> MemoryEstimate:
    """The memory that `saewb.train` with the same arguments would need; also finds what is wrong with them.

    Formulas in `saewb.training.memory.estimate_memory`. Costs one pass of two tokens, for the widths of the points.

    Args:
        model: as for `saewb.train`.
        saes: as for `saewb.train`.
        n_tokens: as for `saewb.train`.
        tokens: only if they are an ActivationCache.
        hook: as for `saewb.train`.
        hook_out: as for `saewb.train`.
        device: as for `saewb.train`.
        options: as for `saewb.train`.

    Returns:
        A MemoryEstimate, in bytes; `print` it.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for what does not fit, or a point that is not there.

    Example:
        >>> import saewb
        >>> told = training_memory(saewb.load_model("tiny"), saewb.TopK(1024, k=16),
        ...                        hook="blocks.2.hook_resid_post", n_tokens=100_000)
        >>> told.weights
        4212736
    """
    reading, _, config = sorted_out(options, n_tokens)
    trainees = trainees_of(saes, hook, hook_out)
    if isinstance(tokens, ActivationCache):
        points = points_of(trainees) or list(tokens.points)
        widths = {name: tokens.points[name] for name in points}
    elif model is None:
        raise ValueError(explain("got no model.", want="a model, or an ActivationCache for tokens"))
    elif any(t.read is None for t in trainees.values()):
        raise ValueError(explain("got no hook.", want="where to read", fix='hook="blocks.4.hook_resid_post"'))
    else:
        widths = model_widths(shared_copy(model), points_of(trainees))
    if device is None and model is not None:
        device = next(model.parameters()).device
    return memory_of(with_points(trainees, widths), widths, model, config, reading, device)


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
    """The cell that starts a training: `saewb.train` with what differs from the defaults.

    Args:
        saes: as for `saewb.train`.
        n_tokens: as for `saewb.train`.
        hook: as for `saewb.train`.
        hook_out: as for `saewb.train`.
        folder: as for `saewb.train`.
        held_out: whether `held_out` is passed on.
        options: as for `saewb.train`.

    Returns:
        Python that needs `model` and `tokens` (and `held_out`), and makes `run`.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for what does not fit.

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
    reading, run_options, config = sorted_out(options, n_tokens)
    facts = facts_of(config, trainees_of(saes, hook, hook_out), reading, run_options)
    return train_code(facts, folder=folder, held_out=held_out)


def model_widths(own: nn.Module, points: Any) -> dict[str, int]:
    """The width of each point of a twin, by a pass of one row.

    Args:
        own: the model, with hook points of its own.
        points: their names.
    """
    first = next(ModelSource(own, stream_tokens(torch.zeros(1, 2, dtype=torch.int64)), points))
    return {name: value.shape[1] for name, value in first.values.items()}


def memory_of(
    trainees: Mapping[str, Trainee],
    widths: Mapping[str, int],
    model: nn.Module | None,
    config: TrainConfig,
    reading: Reading,
    device: torch.device | str | None,
) -> MemoryEstimate:
    """The estimate of a plan that is known to be right."""
    return estimate_memory(
        [(widths[t.read], t.objective.d_sae, widths[t.write or t.read]) for t in trainees.values()],
        widths,
        batch_tokens=config.batch_tokens,
        buffer_tokens=reading.buffer(config),
        prefetch=reading.prefetch,
        pass_tokens=0 if model is None else reading.pass_tokens,
        itemsize=4 if model is None else next(model.parameters()).element_size(),
        model=model,
        device=device or "cpu",
    )
