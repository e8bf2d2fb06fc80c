"""Start a training run, or resume one: build the stream, the `Training` and the `Run`."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saewb._files import absolute, read_yaml, refuse_damage
from saewb.data.cache import ActivationCache
from saewb.data.documents import TextFiles
from saewb.data.sources import ModelSource
from saewb.data.stream import ActivationStream, stream_widths
from saewb.data.tokens import model_tokens
from saewb.distributed import SINGLE_PROCESS, ParallelContext
from saewb.errors import check_device, explain
from saewb.fingerprint import check_same, tensors_digest
from saewb.interventions.attachment import attachments
from saewb.models.active import model_digest
from saewb.models.capture import Activations, concatenate
from saewb.models.hook_points import device_at
from saewb.models.load import load_model
from saewb.models.shared_copy import shared_copy
from saewb.models.tokenizer import special_ids
from saewb.training import Training
from saewb.training.config import RunSpec, Trainee
from saewb.training.loggers import Logger
from saewb.training.memory import MemoryEstimate, run_memory
from saewb.training.run import Run
from saewb.training.run_folder import CHECKPOINT, RunFolder, is_resumable, read_spec

FEW_STEPS = 200
"""A run of fewer steps gets a note: its SAE has hardly left its random initialization."""


@torch.inference_mode(False)
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
    loggers: Sequence[Logger] = (),
    device: torch.device | str | None = None,
    positions: slice = slice(None),
    **options: Any,
) -> Run:
    """Train SAEs or transcoders in the background; returns at once.

    One forward pass of the model, up to the last layer that is needed, serves all SAEs. The run has its own hook points
    on the same weights: other cells can use the model, and SAEs they attach do not affect the run. Arguments are
    checked before it returns: hook names, sizes, options, memory (an error if weights and moments cannot fit, else a
    warning, see `run.memory`).

    In a script that torchrun or `accelerate launch` started in several processes, all train together
    (`saewb.distributed`): call it in each with the same arguments, and `run.wait()`; only the first one writes the
    folder and calls loggers.

    Args:
        model: any kind; None if `tokens` is a stream or a cache of activations.
        tokens: ids `[rows, ctx]`, texts, anything else that `saewb.stream_tokens` takes, or its result. Repeated as
            often as needed, unless they are an iterator. Or activations: an ActivationStream, an ActivationCache.
        saes: an objective, e.g. `saewb.TopK(d_sae=4096, k=32)`; a `saewb.Trainee`, with its own hooks, learning rate
            or SAE to start from; or a dictionary of either by name.
        n_tokens: tokens to train on, special tokens and other positions not counted: `n_tokens / batch_tokens` steps.
            An SAE needs thousands of steps; `run.notes` warns if there are very few.
        hook: hook point read by SAEs that name none; "blocks.0.attn.hook_z[3]" is one head.
        hook_out: hook point predicted; None or `hook` makes SAEs, another one transcoders.
        folder: new folder for history, checkpoints and SAEs; or one whose run ended before its first checkpoint, which
            is replaced. None keeps all in memory.
        held_out: tokens or texts that are not trained on, or activations by point, for evaluation.
        loggers: called with each `saewb.training.loggers.Event`.
        device: of the training; None means the model's, at the hook that the first SAE reads.
        positions: positions of each row of tokens to train on.
        options: of the training (lr, batch_tokens, warmup_tokens, normalization, eval_every_tokens, seed, ...), the run
            (checkpoint_every_tokens, checkpoint_every_s, keep_saes, log_every_steps) and the data (buffer_tokens,
            prefetch, ctx_len, pass_tokens, skip_special_tokens, ...). `saewb.training_options()` lists all of them with
            their defaults and descriptions.

    Returns:
        A Run, which a notebook displays; `run.wait()`, `run.stop()`, `run.sae`.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for an invalid value, or arguments that do not fit each other or the model.
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
    spec = RunSpec.from_options(saes, n_tokens=n_tokens, hook=hook, hook_out=hook_out, positions=positions, **options)
    _check_used(spec, folder, held_out, loggers)
    return _start(spec, model, tokens, folder=folder, held_out=held_out, loggers=loggers, device=device)


def _check_used(spec: RunSpec, folder: str | Path | None, held_out: Any, loggers: Sequence[Logger]) -> None:
    """Check that what options need is there, rather than at the first checkpoint, evaluation or log."""
    run = spec.run
    for name, value in (("checkpoint_every_tokens", run.checkpoint_every_tokens), ("keep_saes", run.keep_saes or None)):
        if value is not None and folder is None:
            what = f"train got {name}={value!r} and no folder to write to."
            raise ValueError(explain(what, want="a new folder", fix='train(..., folder="runs/first")'))
    if folder is not None and not str(folder):
        what = "train got folder=''."
        raise ValueError(explain(what, want="a new folder, or None to keep all in memory", fix='folder="runs/first"'))
    if spec.train.eval_every_tokens is not None and held_out is None:
        what = f"train got eval_every_tokens={spec.train.eval_every_tokens} and nothing to evaluate on."
        raise ValueError(
            explain(what, want="tokens or texts that are not trained on", fix="train(..., held_out=texts)")
        )
    for logger in loggers:
        if not callable(logger):
            what = f"train got a {type(logger).__name__} among the loggers."
            raise TypeError(explain(what, want="functions of an Event", fix="loggers=[print]"))


@torch.inference_mode(False)
def resume_run(
    folder: str | Path,
    *,
    model: nn.Module | None = None,
    tokens: Any = None,
    held_out: Any = None,
    n_tokens: int | None = None,
    loggers: Sequence[Logger] = (),
    device: torch.device | str | None = None,
) -> Run:
    """Resume a run from its last checkpoint, bit for bit as if it had not been interrupted.

    Weights, optimizer, schedules, coefficients, shuffle buffer and the position in the tokens are in the checkpoint.
    The model and the tokens are not: pass the same; they are compared by content. (Tokens of an iterator cannot be. The
    same bits also need the same machine, threads and versions.)

    Args:
        folder: of the run.
        model: as for `train`.
        tokens: as for `train`, equal to what was passed there; an iterator has to be at its start again.
        held_out: as for `train`; None evaluates no more.
        n_tokens: new total of tokens to train on; None keeps the old one.
        loggers: as for `train`.
        device: as for `train`.

    Returns:
        The Run, training in the background.

    Raises:
        FileNotFoundError: if there is no run, or it has no checkpoint.
        FormatError: if its checkpoint was written by saewb 0.1.0.
        ValueError: if the model, the tokens or the held-out tokens are others than those of the run.
        RuntimeError: if the run is still running.

    Example:
        >>> resume_run("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: no run in '...nowhere'.
          want: a folder with run.json
    """
    parallel = ParallelContext.from_environment()
    with parallel.raise_together():
        read_spec(absolute(folder))  # raises if there is none, before a lock file is made
        run_folder = RunFolder(folder, writes=parallel.is_main)
    try:
        spec, checkpoint = run_folder.read_spec(), run_folder.read_checkpoint()
        if n_tokens is not None:
            spec = replace(spec, train=replace(spec.train, n_tokens=n_tokens))
        with parallel.raise_together():
            stream = _open_stream(spec, model, tokens, parallel)
            _check_content(spec, _digests(spec, stream, model, held_out), str(run_folder.path))
            training, memory = _prepare(spec, stream, model, held_out, device, parallel)
        with refuse_damage("the checkpoint of this run", "the one that saewb wrote, and the data of that run"):
            training.restore(checkpoint["training"])
        rows = run_folder.rewind(spec, training.n_tokens)
        return Run(
            training,
            stream,
            spec,
            memory=memory,
            folder=run_folder,
            loggers=loggers,
            layers=(stream.stop_layer, None if model is None else model.cfg.n_layers),
            rows=rows,
            seconds=checkpoint["seconds"],
            parallel=parallel,
        )
    except BaseException:
        run_folder.close()
        raise


def train_file(path: Path) -> Run:
    """Start the run that a YAML file describes, or resume it if its folder has a checkpoint of the same settings.

        model: tiny                              # as for saewb.load_model
        tokens: {files: [corpus.txt.gz]}         # or {embedded: true}, {cache: folder}; separator: between documents
        held_out: {files: [other.txt]}           # as tokens; may be left out
        saes:
          wide: {objective: TopK, d_sae: 4096, k: 32, hook: blocks.2.hook_resid_post}
          transcoder: {objective: TopK, d_sae: 4096, hook: blocks.2.mlp.hook_in, hook_out: blocks.2.hook_mlp_out}
        n_tokens: 2_000_000
        folder: runs/first
        lr: 3e-4                                 # and any other option of saewb.train

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError, TypeError: for an unknown, invalid or missing entry; for settings (but n_tokens), a model or tokens
            that are not those of the run in the folder.
    """
    options = _read_yaml(path)
    for name in ("tokens", "saes", "n_tokens", "folder"):
        if name not in options:
            raise ValueError(explain(f"{path} has no {name!r}.", want="model, tokens, saes, n_tokens, folder"))
    folder = absolute(options.pop("folder"))
    device, dtype = options.pop("device", None), options.pop("dtype", None)
    has_model = "model" in options or "cache" not in options["tokens"]
    model = load_model(options.pop("model", "tiny"), dtype) if has_model else None
    tokens = _documents(options.pop("tokens"), "tokens")
    held_out = _documents(options.pop("held_out"), "held_out") if "held_out" in options else None
    saes = {name: Trainee.from_dict(sae) for name, sae in options.pop("saes").items()}
    spec = RunSpec.from_options(saes, strict=False, **options)
    if ParallelContext.from_environment().broadcast_object(is_resumable(folder)):
        if (folder / CHECKPOINT).is_file():
            _check_settings(read_spec(folder), spec, path, folder)
        how = {"held_out": held_out, "n_tokens": spec.train.n_tokens, "device": device}
        return resume_run(folder, model=model, tokens=tokens, **how)
    _check_used(spec, folder, held_out, ())
    return _start(spec, model, tokens, folder=folder, held_out=held_out, device=device)


def _check_settings(written: RunSpec, now: RunSpec, path: Path, folder: Path) -> None:
    """Check that a file of settings says what the run in its folder was started with; `n_tokens` may differ.

    Raises:
        ValueError: naming the settings that differ.
    """
    now = now.with_widths(written.widths)
    saes = [{n: sae.to_dict() for n, sae in spec.saes.items()} for spec in (written, now)]
    differs = [f"SAE {n!r} {a}, not {saes[1][n]}" for n, a in saes[0].items() if n in saes[1] and a != saes[1][n]]
    differs += [f"SAEs {list(saes[0])}, not {list(saes[1])}"] if list(saes[0]) != list(saes[1]) else []
    for part in ("train", "data", "run"):
        a, b = asdict(getattr(written, part)), asdict(getattr(now, part))
        differs += [f"{name}={a[name]!r}, not {b[name]!r}" for name in a if a[name] != b[name] and name != "n_tokens"]
    if differs:
        what = f"the run in {str(folder)!r} has other settings than {str(path)!r}: {'; '.join(differs)}."
        raise ValueError(explain(what, want="the settings it was started with", fix="folder: runs/second    # anew"))


def _digests(spec: RunSpec, stream: ActivationStream, model: nn.Module | None, held_out: Any) -> dict[str, str | None]:
    """Digests of what a run reads: the model, the tokens, and the held-out tokens if there are any."""
    model = stream.source.model if isinstance(stream.source, ModelSource) else model
    digests = {} if model is None else {"model": model_digest(model, in_training=True)}
    digests["tokens"] = stream.digest()
    if isinstance(held_out, (Mapping, Activations)):
        digests["held-out tokens"] = tensors_digest(
            dict(held_out.values if isinstance(held_out, Activations) else held_out)
        )
    elif held_out is not None and model is not None:
        rows = model_tokens(model, held_out, ctx_len=spec.data.ctx_len, column=spec.data.column)
        digests["held-out tokens"] = rows.digest()
    return digests


def _check_content(spec: RunSpec, now: dict[str, str | None], folder: str) -> None:
    """Check that a run goes on with the model and the tokens it was started with, where those are known.

    Raises:
        ValueError: naming what differs.
    """
    parts = [part for part in now if part in spec.digests]
    fix = "saewb.train(..., folder='runs/second')    # anew"
    what = f"the run in {folder!r}"
    check_same(what, spec.digests, now, parts=parts, fix=fix, want="the model and the tokens that it was started with")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(explain(f"no file {str(path)!r}.", want="a YAML file", fix="saewb train config.yaml"))
    content = read_yaml(path)
    for name, value in [(str(path), content), *((content or {}).items() if isinstance(content, dict) else ())]:
        if name in (str(path), "tokens", "held_out", "saes") and not isinstance(value, dict):
            raise ValueError(explain(f"{name} is {reprlib.repr(value)}.", want="names with values"))
    for name in content:
        if not isinstance(name, str):
            raise ValueError(explain(f"{path} has a name {reprlib.repr(name)}.", want="text"))
    for name, sae in content.get("saes", {}).items():
        if not isinstance(sae, dict) or not all(isinstance(key, str) for key in sae):
            what = f"saes has {name}: {reprlib.repr(sae)}."
            raise ValueError(explain(what, want="objective, d_sae, hook, ... with values"))
    return content


def _documents(options: Mapping[str, Any], name: str) -> Any:
    """Open the texts, files or cache that a YAML file names."""
    kinds = [kind for kind in ("files", "embedded", "cache") if kind in options]
    if len(kinds) != 1 or set(options) - {"files", "embedded", "cache", "separator"}:
        raise ValueError(explain(f"{name} has {', '.join(options)}.", want="one of files, embedded, cache; separator"))
    if kinds == ["cache"]:
        return ActivationCache(options["cache"])
    if kinds == ["files"]:
        return TextFiles(options["files"], **({"separator": options["separator"]} if "separator" in options else {}))
    tiny = import_module("saewb.tiny")  # by name, since `tiny` imports this module to train the bundled SAE
    held_out = {document.text for document in tiny.held_out_texts()}
    if name == "held_out":
        return sorted(held_out)
    return [document.text for document in tiny.texts() if document.text not in held_out]


def _start(
    spec: RunSpec,
    model: nn.Module | None,
    tokens: Any,
    *,
    folder: str | Path | None,
    held_out: Any,
    device: torch.device | str | None,
    loggers: Sequence[Logger] = (),
) -> Run:
    parallel = ParallelContext.from_environment()
    with parallel.raise_together():
        stream = _open_stream(spec, model, tokens, parallel)
        widths = stream_widths(stream)
        spec = replace(spec.with_widths(widths), model=None if model is None else model.cfg.model_name)
        if folder is not None and parallel.is_main:
            spec = replace(spec, digests=_digests(spec, stream, model, held_out))
        training, memory = _prepare(spec, stream, model, held_out, device, parallel)
        run_folder = RunFolder.create(folder, spec) if folder is not None and parallel.is_main else None
    run = Run(
        training,
        stream,
        spec,
        memory=memory,
        folder=run_folder,
        loggers=loggers,
        layers=(stream.stop_layer, None if model is None else model.cfg.n_layers),
        parallel=parallel,
    )
    if spec.train.n_steps < FEW_STEPS:
        few = f"{spec.train.n_steps} steps only: more n_tokens, or a smaller batch_tokens, give it more to learn in"
        run.notes.append(few)
    return run


def _prepare(
    spec: RunSpec,
    stream: ActivationStream,
    model: nn.Module | None,
    held_out: Any,
    device: torch.device | str | None,
    parallel: ParallelContext,
) -> tuple[Training, MemoryEstimate]:
    """Check the memory, read the held-out activations, and create the training."""
    if device is not None:
        device = check_device(device)
    elif model is not None:
        reads = next(iter(spec.saes.values())).reads
        device = device_at(model, reads[0]) if reads else next(model.parameters()).device
    memory = run_memory(spec, model, device)
    if not memory.weights_fit:
        what = f"the weights alone need {memory.weights / 2**30:.1f} GiB, {memory.available / 2**30:.1f} are free"
        raise ValueError(explain(f"{what}:\n{memory}", fix="a smaller d_sae, or fewer SAEs at a time"))
    if not memory.fits:
        what = f"this training needs about {memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} are free"
        warnings.warn(f"{what}:\n{memory}\n  fix:  a smaller batch_tokens, buffer_tokens or d_sae", stacklevel=4)
    activations = None if held_out is None else _held_out_activations(spec, model, held_out)
    return Training(stream, spec.saes, spec.train, held_out=activations, device=device, parallel=parallel), memory


# -- the stream ------------------------------------------------------------------------------------------------------


def _open_stream(spec: RunSpec, model: nn.Module | None, tokens: Any, parallel: ParallelContext) -> ActivationStream:
    options = {"batch_tokens": spec.train.batch_tokens, "seed": spec.train.seed, "prefetch": spec.data.prefetch}
    options["buffer_tokens"] = spec.buffer_tokens
    if isinstance(tokens, ActivationStream):
        if tokens.batch_tokens != spec.train.batch_tokens:
            what = f"the stream's batches have {tokens.batch_tokens} tokens, those of this training "
            what += f"batch_tokens={spec.train.batch_tokens}."
            fix = f"saewb.train(..., batch_tokens={tokens.batch_tokens})"
            raise ValueError(explain(what, want="the same, which the stream decides", fix=fix))
        return tokens
    if isinstance(tokens, ActivationCache):
        return tokens.stream(**options, points=spec.points or None)
    if model is None:
        what = "train got no model, and tokens that are no activations."
        raise ValueError(explain(what, want="a model; or an ActivationStream or ActivationCache for tokens"))
    if any(sae.read is None for sae in spec.saes.values()):
        layer = getattr(getattr(model, "cfg", None), "n_layers", 8) // 2
        fix = f'hook="blocks.{layer}.hook_resid_post"'
        raise ValueError(explain("train got no hook.", want="where to read", fix=fix))
    if attached := attachments(model):
        what = f"SAEs are attached: {', '.join(map(repr, attached))}."
        raise ValueError(explain(what, want="the model as it is", fix="saewb.detach_all(model)"))
    model = shared_copy(model)  # its own hook points, so that hooks elsewhere do not affect the run
    source = _model_source(spec, model, tokens, spec.points, repeat=True, parallel=parallel)
    options["prefetch"] *= parallel.size == 1  # collectives from two threads would run out of order
    return ActivationStream(source, **options)


def _model_source(
    spec: RunSpec,
    model: nn.Module,
    tokens: Any,
    points: Iterable[str],
    *,
    repeat: bool,
    parallel: ParallelContext = SINGLE_PROCESS,
) -> ModelSource:
    data = spec.data
    sizes = {"ctx_len": data.ctx_len, "pass_tokens": data.pass_tokens}
    rows = model_tokens(model, tokens, repeat=repeat, column=data.column, **sizes)
    skipped = special_ids(model, data.skip_special_tokens)
    return ModelSource(model, rows, points, positions=slice(*data.positions), skipped=skipped, parallel=parallel)


def _held_out_activations(spec: RunSpec, model: nn.Module | None, held_out: Any) -> dict[str, Tensor]:
    if isinstance(held_out, (Mapping, Activations)):
        return dict(held_out.values if isinstance(held_out, Activations) else held_out)
    if model is None:
        want = "activations by point, {name: [tokens, d]}"
        raise ValueError(explain("held_out cannot be read without a model.", want=want))
    chunks: list[Activations] = []
    for chunk in _model_source(spec, model, held_out, spec.widths, repeat=False):
        chunks.append(chunk)
        if sum(map(len, chunks)) >= spec.data.held_out_tokens:
            break
    if not chunks:
        raise ValueError(explain("held_out gives no token.", want=f"a row of {spec.data.ctx_len} tokens or more"))
    return dict(concatenate(chunks).rows(slice(0, spec.data.held_out_tokens)).values)
