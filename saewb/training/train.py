"""Starting a training run, and taking one up again: from what the user says to a stream, a Training and a Run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saewb.data.cache import ActivationCache
from saewb.data.sources import ModelSource
from saewb.data.stream import ActivationStream, model_tokens
from saewb.distributed import ALONE, Team
from saewb.errors import check_device, explain, near
from saewb.interventions.attachment import attachments
from saewb.models.capture import Activations, joined
from saewb.models.shared_copy import shared_copy
from saewb.models.tokenizer import special_ids
from saewb.training import TrainConfig, Trainee, Training
from saewb.training.loggers import Sink
from saewb.training.outlook import memory_of, model_widths
from saewb.training.run import Run
from saewb.training.run_folder import RunFolder, read_facts
from saewb.training.run_plan import (
    Reading,
    facts_of,
    finisher,
    from_told,
    place_of,
    points_of,
    sorted_out,
    trainees_of,
    with_points,
)
from saewb.training.run_record import RunOptions

FEW_STEPS = 200  # below, a run says so: its SAE has hardly left its random directions


def train(
    model: nn.Module | None,
    tokens: Any,
    saes: Any,
    *,
    n_tokens: int,
    hook: str | None = None,
    hook_out: str | None = None,
    folder: str | Path | None = None,
    held_out: Any = None,
    sinks: Sequence[Sink] = (),
    device: torch.device | str | None = None,
    positions: slice = slice(None),
    **options: Any,
) -> Run:
    """Train SAEs or transcoders in the background; returns at once.

    One forward pass of the model, up to the last layer that is needed, serves all SAEs. The run has hook points of its
    own on the same weights, so the model is free for other cells, and what they attach does not reach the run. What can
    be wrong is found before it returns: names of hooks, sizes, options, the memory (an error if weights and
    moments cannot fit, else a warning, see `run.memory`).

    In a script that torchrun or `accelerate launch` started in several processes, all train together (`saewb.distributed`):
    call it in each with the same arguments, and `run.wait()`; the first one alone writes the folder and calls sinks.

    Args:
        model: any kind; None if `tokens` is a stream or a cache of activations.
        tokens: ids `[rows, ctx]`, texts, or whatever `saewb.stream_tokens` takes, or its result. Gone through again as
            often as needed, unless they are an iterator. Or activations: an ActivationStream, an ActivationCache.
        saes: an objective, e.g. `saewb.TopK(d_sae=4096, k=32)`; a `saewb.Trainee`, with its own hooks, learning rate
            or SAE to start from; or a dictionary of either by name.
        n_tokens: to train on, after special tokens and positions are left out: `n_tokens / batch_tokens` steps. An SAE
            wants thousands; `run.notes` says if there are very few.
        hook: the point read, for SAEs that do not say; "blocks.0.attn.hook_z[3]" is one head.
        hook_out: the point predicted; None or `hook` makes SAEs, another one transcoders.
        folder: for history, checkpoints and SAEs; a new one. None keeps all in memory.
        held_out: tokens or texts that are not trained on, or activations by point, to measure on.
        sinks: called with each `saewb.training.loggers.Event`.
        device: of the training; None means the model's.
        positions: of each row of tokens, those trained on.
        options: of the training (lr, batch_tokens, warmup_tokens, normalization, eval_every_tokens, seed, ...), the run
            (checkpoint_every_tokens, keep_saes, log_every_steps) and the reading (buffer_tokens, prefetch, ctx_len,
            pass_tokens, skip_special_tokens, ...). All of them, with defaults and what they mean:
            `saewb.training_options()`.

    Returns:
        A Run: it shows itself; `run.wait()`, `run.stop()`, `run.sae`.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for what does not fit.
        FileExistsError: if the folder holds a run already.

    Example:
        >>> import saewb
        >>> model, texts = saewb.load_model("tiny"), [d.text for d in saewb.tiny.held_out_texts()]
        >>> run = train(model, texts, saewb.TopK(d_sae=256, k=8), hook="blocks.2.hook_resid_post",
        ...             n_tokens=2_048, batch_tokens=512, buffer_tokens=2_048)
        >>> run.wait()
        Run(finished, 2,048 of 2,048 tokens, blocks.2.hook_resid_post)
        >>> run.sae.cfg.d_sae, len(run.history)
        (256, 2)
    """
    reading, run_options, config = sorted_out(options, n_tokens)
    reading = replace(reading, positions=(positions.start, positions.stop, positions.step))
    trainees = trainees_of(saes, hook, hook_out)
    team = Team.joined()
    with team.agreed():
        stream, widths = _stream(model, tokens, trainees, reading, config, team)
    trainees = with_points(trainees, widths)
    facts = facts_of(config, trainees, reading, run_options, widths=widths, model=_name(model))
    run = _launch(
        model, stream, widths, trainees, config, reading, run_options, facts, folder, held_out, sinks, device, team
    )
    if config.n_steps < FEW_STEPS:
        run.notes.append(
            f"{config.n_steps} steps only: more n_tokens, or a smaller batch_tokens, give it more to learn in"
        )
    return run


def resume_run(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    tokens: Any = None,
    held_out: Any = None,
    n_tokens: int | None = None,
    sinks: Sequence[Sink] = (),
    device: torch.device | str | None = None,
) -> Run:
    """Go on with a run from its last checkpoint, bit for bit as if it had not ended.

    Weights, optimizer, schedules, coefficients, mixing buffer and the place in the tokens are in the checkpoint. The
    model and the tokens are not: pass the same. (The same bits also need the same machine, threads and versions.)

    Args:
        folder: of the run.
        model: as for `train`.
        tokens: as for `train`, equal to what was passed there; an iterator has to be at its start again.
        held_out: as for `train`.
        n_tokens: a new end; None keeps it.
        sinks: as for `train`.
        device: as for `train`.

    Returns:
        The Run, going on in the background.

    Raises:
        FileNotFoundError: if there is no run, or it never came to a checkpoint.
        RuntimeError: if the run is going on.

    Example:
        >>> resume_run("nowhere")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no run in 'nowhere'.
          want: a folder with run.json
    """
    team = Team.joined()
    with team.agreed():
        read_facts(Path(folder).expanduser())  # says if there is none, before anything is made
        kept = RunFolder(folder, writes=team.leads)
    try:
        facts, state = kept.facts(), kept.state()
        facts["config"] |= {} if n_tokens is None else {"n_tokens": n_tokens}
        config = dict(facts["config"])
        autocast = config["autocast"]
        config["autocast"] = None if autocast is None else getattr(torch, autocast.removeprefix("torch."))
        config = TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()})
        reading = Reading(**facts["reading"])
        trainees = {name: from_told(said, kept.init(name)) for name, said in facts["saes"].items()}
        stream, widths = _stream(model, tokens, trainees, reading, config, team, facts["widths"])
        options = RunOptions(**facts["options"])
        return _launch(
            model, stream, widths, trainees, config, reading, options, facts, kept, held_out, sinks, device, team, state
        )
    except BaseException:
        kept.close()
        raise


def _launch(
    model: nn.Module | None,
    stream: ActivationStream,
    widths: Mapping[str, int],
    trainees: Mapping[str, Trainee],
    config: TrainConfig,
    reading: Reading,
    options: RunOptions,
    facts: Mapping[str, Any],
    folder: RunFolder | str | Path | None,
    held_out: Any,
    sinks: Sequence[Sink],
    device: torch.device | str | None,
    team: Team,
    state: Mapping[str, Any] | None = None,
) -> Run:
    device = check_device(device) if device is not None else _device(model)
    memory = memory_of(trainees, widths, model, config, reading, device)
    if not memory.weights_fit:
        what = f"the weights alone need {memory.weights / 2**30:.1f} GiB, {memory.available / 2**30:.1f} are free"
        raise ValueError(explain(f"{what}:\n{memory}", fix="a smaller d_sae, or fewer SAEs at a time"))
    if not memory.fits:
        what = f"this training needs about {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} are free"
        warnings.warn(f"{what}:\n{memory}\n  fix:  a smaller batch_tokens, buffer_tokens or d_sae", stacklevel=3)
    measured = None if held_out is None else _held_out(model, held_out, widths, reading, config)
    rows: list[dict[str, Any]] = []
    with team.agreed():
        training = Training(stream, dict(trainees), config, held_out=measured, device=device, team=team)
        if state is None and folder is not None and team.leads:
            folder = _begun(folder, facts, trainees)
    if state is not None:
        training.restore(state["training"])
        rows = folder.resumed(facts, training.n_tokens)
    if team.size > 1:
        training.begin()
    return Run(
        training,
        stream,
        places={name: place_of(trainee) for name, trainee in trainees.items()},
        finish=finisher(_name(model)),
        folder=folder if team.leads else None,
        options=options,
        sinks=sinks if team.leads else (),
        memory=memory,
        facts=facts,
        layers=(stream.stop_layer, None if model is None else model.cfg.n_layers),
        rows=rows,
        seconds=0.0 if state is None else state["seconds"],
        team=team,
    )


def _begun(path: str | Path, facts: Mapping[str, Any], trainees: Mapping[str, Trainee]) -> RunFolder:
    folder = RunFolder(path)
    try:
        folder.begin(facts, {name: t.init for name, t in trainees.items() if t.init is not None})
    except BaseException:
        folder.close()
        raise
    return folder


# -- the stream ------------------------------------------------------------------------------------------------------


def _stream(
    model: nn.Module | None,
    tokens: Any,
    trainees: Mapping[str, Trainee],
    reading: Reading,
    config: TrainConfig,
    team: Team,
    widths: Mapping[str, int] | None = None,
) -> tuple[ActivationStream, dict[str, int]]:
    """The stream, and the width of each of its points, unless they are known: the model's by a pass of one row."""
    how = {"batch_tokens": config.batch_tokens, "seed": config.seed, "prefetch": reading.prefetch}
    how["buffer_tokens"] = reading.buffer(config)
    if isinstance(tokens, ActivationStream):
        return tokens, dict(widths) if widths is not None else _widths_of(tokens, trainees)
    if isinstance(tokens, ActivationCache):
        points = points_of(trainees) or list(tokens.points)
        return tokens.stream(**how, points=points), {name: tokens.points[name] for name in points}
    if model is None:
        what = "train got no model, and tokens that are no activations."
        raise ValueError(explain(what, want="a model; or an ActivationStream or ActivationCache for tokens"))
    if any(t.read is None for t in trainees.values()):
        layer = getattr(getattr(model, "cfg", None), "n_layers", 8) // 2
        fix = f'hook="blocks.{layer}.hook_resid_post"'
        raise ValueError(explain("train got no hook.", want="where to read", fix=fix))
    if attached := attachments(model):
        what = f"SAEs are attached: {', '.join(map(repr, attached))}."
        raise ValueError(explain(what, want="the model as it is", fix="saewb.detach_all(model)"))
    own = shared_copy(model)  # so that neither sees the other's passes
    source = _source(own, tokens, points_of(trainees), reading, repeat=True, team=team)
    how["prefetch"] = reading.prefetch if team.size == 1 else 0  # exchanges in two threads would be out of order
    return ActivationStream(source, **how), model_widths(own, source.points)


def _source(
    model: nn.Module, tokens: Any, points: Iterable[str], reading: Reading, *, repeat: bool, team: Team = ALONE
) -> ModelSource:
    rows = model_tokens(model, tokens, ctx_len=reading.ctx_len, pass_tokens=reading.pass_tokens, repeat=repeat)
    skipped = special_ids(model, reading.skip_special_tokens)
    return ModelSource(model, rows, points, positions=slice(*reading.positions), skipped=skipped, team=team)


def _widths_of(stream: ActivationStream, trainees: Mapping[str, Trainee]) -> dict[str, int]:
    """Looks at the first tokens, which are not waited for longer than it takes to compute some."""
    first = stream.peek()
    if first is None and (first := next(stream, None)) is not None:
        stream.put_back()
    if first is None:
        raise ValueError(explain("the stream is empty.", want="one batch or more"))
    for point in points_of(trainees):
        if point not in first.values:
            known = list(first.values)
            raise ValueError(explain(f"the stream has no point {point!r}.", near=near(point, known), want=str(known)))
    return {name: value.shape[1] for name, value in first.values.items()}


def _held_out(
    model: nn.Module | None, held_out: Any, widths: Mapping[str, int], reading: Reading, config: TrainConfig
) -> dict[str, Tensor]:
    if isinstance(held_out, (Mapping, Activations)):
        return dict(held_out.values if isinstance(held_out, Activations) else held_out)
    if model is None:
        want = "activations by point, {name: [tokens, d]}"
        raise ValueError(explain("held_out cannot be read without a model.", want=want))
    parts: list[Activations] = []
    for chunk in _source(model, held_out, widths, reading, repeat=False):
        parts.append(chunk)
        if sum(map(len, parts)) >= reading.held_out_tokens:
            break
    if not parts:
        raise ValueError(explain("held_out gives no token.", want=f"a row of {reading.ctx_len} tokens or more"))
    return dict(joined(parts).rows(slice(0, reading.held_out_tokens)).values)


# -- around it -------------------------------------------------------------------------------------------------------


def _device(model: nn.Module | None) -> torch.device | None:
    return None if model is None else next(model.parameters()).device


def _name(model: nn.Module | None) -> str | None:
    return None if model is None else model.cfg.model_name
