"""What `saewb.train` is asked for: sorted out, checked, and told as plain values for a resumed run."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from saewb.data.stream import PASS_TOKENS
from saewb.errors import explain, near
from saewb.sae.sae import SAE
from saewb.training import TrainConfig, Trainee
from saewb.training import objectives as all_objectives
from saewb.training.run_folder import sae_names
from saewb.training.run_record import RunOptions

_HEAD = re.compile(r"(.+)\[(\d+)\]")
_OPTIONS = {f.name for f in fields(RunOptions)}
_CONFIG = {f.name for f in fields(TrainConfig)}


@dataclass(frozen=True)
class Reading:
    """How activations are read."""

    buffer_tokens: int | None = None  # mixed over so many; None: 16 batches
    prefetch: int = 2  # batches ahead
    ctx_len: int = 128  # tokens of a row
    pass_tokens: int = PASS_TOKENS  # of one forward pass
    skip_special_tokens: bool | Sequence[int] = True  # leaves them out; or the ids to leave out
    positions: tuple[int | None, int | None, int | None] = (None, None, None)  # start, stop, step of those kept
    held_out_tokens: int = 16_384  # of held-out texts, at most

    def __post_init__(self) -> None:
        for name, least in (("buffer_tokens", 0), ("prefetch", 0), ("ctx_len", 1), ("pass_tokens", 1)):
            value = getattr(self, name)
            if not ((type(value) is int and value >= least) or (name == "buffer_tokens" and value is None)):
                raise ValueError(
                    explain(f"got {name}={value!r}.", want=f"a number of tokens or batches, {least} or more")
                )

    def buffer(self, config: TrainConfig) -> int:
        """Tokens of the mixing buffer, with the default filled in; never more than are trained on."""
        return min(config.n_tokens, 16 * config.batch_tokens if self.buffer_tokens is None else self.buffer_tokens)


_READING = {f.name for f in fields(Reading)}


# As other trainers call them.
_ELSEWHERE = {
    "learning_rate": "lr",
    "batch_size": "batch_tokens",
    "context_size": "ctx_len",
    "warmup_steps": "warmup_tokens",
}


def sorted_out(options: Mapping[str, Any], n_tokens: int) -> tuple[Reading, RunOptions, TrainConfig]:
    """The options of `saewb.train`, by whom they are for.

    Raises:
        TypeError: for one that nobody knows.
    """
    known = _READING - {"positions"} | _OPTIONS | _CONFIG - {"n_tokens"}
    for name in options:
        if name not in known:
            close = [_ELSEWHERE[name]] if name in _ELSEWHERE else near(name, known)
            fix = f"train(..., {close[0]}=...)" if close else 'print(*saewb.training_options(), sep="\\n")'
            raise TypeError(explain(f"train has no option {name!r}.", near=close, fix=fix))
    parts = [{k: v for k, v in options.items() if k in names} for names in (_READING, _OPTIONS, _CONFIG)]
    return Reading(**parts[0]), RunOptions(**parts[1]), TrainConfig(n_tokens=n_tokens, **parts[2])


def trainees_of(saes: Any, hook: str | None, hook_out: str | None) -> dict[str, Trainee]:
    """An objective, a Trainee, or several by name, as Trainees that read and write where they are told."""
    named = dict(saes) if isinstance(saes, Mapping) else {"sae": saes}
    if not named:
        raise ValueError(explain("train got no SAE.", want="an objective", fix="saewb.TopK(d_sae=4096, k=32)"))
    sae_names(named)
    made = {}
    for name, sae in named.items():
        trainee = sae if isinstance(sae, Trainee) else Trainee(sae)
        if isinstance(trainee.objective, type):
            kind = trainee.objective.__name__
            raise TypeError(explain(f"train got the class {kind}.", want="one of it", fix=f"saewb.{kind}(d_sae=4096)"))
        if not hasattr(trainee.objective, "losses"):
            what = f"train got a {type(trainee.objective).__name__} for {name!r}."
            raise TypeError(explain(what, want="an objective", fix="saewb.TopK(d_sae=4096, k=32)"))
        read = trainee.read or hook
        write = trainee.write or (hook_out if trainee.read is None else None)
        made[name] = replace(trainee, read=read, write=None if write == read else write)
    return made


def with_points(trainees: Mapping[str, Trainee], widths: Mapping[str, int]) -> dict[str, Trainee]:
    """Those that name no point read the only one there is."""
    only = next(iter(widths)) if len(widths) == 1 else None
    return {name: replace(t, read=t.read or only) for name, t in trainees.items()}


def points_of(trainees: Mapping[str, Trainee]) -> list[str]:
    """All points that are read or written, each once."""
    both = [point for t in trainees.values() for point in (t.read, t.write) if point is not None]
    return list(dict.fromkeys(both))


def facts_of(
    config: TrainConfig, trainees: Mapping[str, Trainee], reading: Reading, options: RunOptions, **rest: Any
) -> dict[str, Any]:
    """What is asked for, as `run.json` has it."""
    return {
        "saewb_run": 1,
        "config": {**asdict(config), "autocast": None if config.autocast is None else str(config.autocast)},
        "saes": {name: told(trainee) for name, trainee in trainees.items()},
        "reading": {**asdict(reading), "skip_special_tokens": plain_skip(reading.skip_special_tokens)},
        "options": asdict(options),
        **rest,
    }


def plain_skip(skip: bool | Sequence[int]) -> bool | list[int]:
    """`skip_special_tokens` as JSON has it."""
    return skip if isinstance(skip, bool) else [int(i) for i in skip]


def told(trainee: Trainee) -> dict[str, Any]:
    """A Trainee as plain values, without what it starts from."""
    objective = {"objective": type(trainee.objective).__name__, **asdict(trainee.objective)}
    return {**objective, "read": trainee.read, "write": trainee.write, "lr": trainee.lr, "seed": trainee.seed}


def from_told(told: Mapping[str, Any], init: Any) -> Trainee:
    """The Trainee again."""
    rest = {k: tuple(v) if isinstance(v, list) else v for k, v in told.items()}
    own = {name: rest.pop(name) for name in ("read", "write", "lr", "seed")}
    return Trainee(getattr(all_objectives, rest.pop("objective"))(**rest), **own, init=init)


def place_of(trainee: Trainee) -> str:
    """Where it reads and writes, in a few words."""
    return f"{trainee.read} => {trainee.write}" if trainee.write else str(trainee.read)


def finisher(model: str | None) -> Callable[[Any], Any]:
    """Gives an SAE that comes out of training the model's name, and its head as a field of its own."""

    def finish(sae: Any) -> Any:
        found = _HEAD.fullmatch(sae.cfg.hook or "")
        head = {"hook": found[1], "head": int(found[2])} if found and isinstance(sae, SAE) else {}
        return type(sae).from_tensors(replace(sae.cfg, model=model, **head), dict(sae.named_parameters()))

    return finish
