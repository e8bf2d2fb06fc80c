"""Each process of tests/test_shared_reading.py, forked from one server that has imported what they need."""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import pandas  # noqa: F401 - what the processes import anyway, once in the server
import pytest
import scipy.sparse  # noqa: F401
import torch
import transformer_lens.model_bridge  # noqa: F401
import transformers  # noqa: F401

import saewb
from helpers import tiny_models
from saewb.features import build as building

RESID = "blocks.1.hook_resid_post"


def launch(n, task, folder, timeout_s=200):
    """Run a task in n processes; their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["helpers.reading_worker"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=work, args=(rank, n, port, task, str(folder))) for rank in range(n)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))  # the server looks nowhere else
        for process in processes:
            process.start()
    end = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def work(rank, n, port, task, folder):
    """What torchrun does, and the task."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(150, file=(Path(folder) / f"hangs_{rank}").open("w"))
    try:
        TASKS[task](rank, Path(folder))
        code = 0
    except Exception:
        (Path(folder) / f"traceback_{rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    os._exit(code)  # without a farewell, as a process that fails


# -- what is read ----------------------------------------------------------------------------------------------------


def saes():
    return [tiny_models.sae(RESID, "topk", k=5), tiny_models.sae(RESID, seed=4)]


def text(rows=23):
    ids = tiny_models.tokens(rows, 9)
    ids[1, 4] = tiny_models.BOS
    ids[3] = ids[2]  # a text that is there twice: its contexts tie
    ids[7] = ids[20]
    return ids


def build(folder, of=None, ids=None, **how):
    how = {"n_top": 4, "window": (3, 2), "n_quantiles": 2, "per_quantile": 3, "batch_size": 2, **how}
    how |= {"loss_effect_tokens": 40, "folder": folder}
    return saewb.build_index(tiny_models.bridge(), saes() if of is None else of, text() if ids is None else ids, **how)


def read(folder):
    """All four, as tensors and plain values."""
    model, ids, both = tiny_models.bridge(), text(), saes()
    indexes = build(folder / "index", both)
    extended = saewb.build_index(model, both[0], text(31)[23:], batch_size=3, extend=indexes[0])
    evaluation = saewb.evaluate(model, both[1], ids, batch_size=2)
    many = {"k": both[0], "relu": both[1]}
    table = saewb.evaluate_many(model, many, ids, batch_size=2, folder=folder / "evals", at_once=1)
    cache = saewb.cache_activations(model, ids, RESID, folder / "cache", 150, shard_tokens=64, pass_tokens=20)
    result = {
        "indexes": [(i.info.to_json(), dict(i.tensors), i.token_texts) for i in (*indexes, extended)],
        "evaluation": evaluation.figures(),
        "latents": vars(evaluation.latents),
        "table": table.to_dict(),
        "cache": cache[0:150].values[RESID],
    }
    return result


def _read(rank, folder):
    torch.save(read(folder / "shared"), folder / f"read_{rank}.pt")
    with saewb.distributed.one_process():
        alone = saewb.evaluate(tiny_models.bridge(), saes()[rank % 2], text(), batch_size=2, losses=False)
    (folder / f"alone_{rank}").write_text(json.dumps([alone.n_tokens, alone.l0]))
    _refuse(rank, folder)
    _fail(rank, folder)
    _interrupt(rank, folder)


def _refuse(rank, folder):
    """Process 1 has another SAE, other text, a folder of other things."""
    model, sae = tiny_models.bridge(), tiny_models.sae(RESID, seed=rank)
    ids = text(23 - (rank == 1))
    calls = {
        "index of another SAE": lambda: build(None, sae),
        "index of another text": lambda: build(None, saes()[0], ids),
        "evaluate another SAE": lambda: saewb.evaluate(model, sae, text()),
        "evaluate another text": lambda: saewb.evaluate(model, saes()[0], ids),
        "evaluate nothing": lambda: saewb.evaluate(model, saes()[0], ids[: 0 if rank == 1 else 23]),
        "cache": lambda: saewb.cache_activations(model, ids, RESID, folder / "other", 100),
        "index in a folder of other things": lambda: build(folder, saes()[0]),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            messages[name] = f"{type(error).__name__}: {error}"
    (folder / f"refused_{rank}").write_text(json.dumps(messages))


def _fail(rank, folder):
    """Process 1 fails in its third batch of each."""
    passes, forward, compute = [], building._forward, saewb.data.sources.ModelSource._compute
    measure = saewb.evals.model_losses._measure

    def failing(original):
        def call(*args, **kwargs):
            passes.append(1)
            if rank == 1 and len(passes) == 3:
                raise ArithmeticError("the third batch")
            return original(*args, **kwargs)

        return call

    building._forward = failing(forward)
    saewb.data.sources.ModelSource._compute = failing(compute)
    saewb.evals.model_losses._measure = failing(measure)
    model, errors = tiny_models.bridge(), {}
    calls = {
        "index": lambda: build(folder / "failed"),
        "evaluate": lambda: saewb.evaluate(model, saes()[0], text(), batch_size=2),
        "cache": lambda: saewb.cache_activations(
            model, text(), RESID, folder / "half", 150, shard_tokens=32, pass_tokens=9
        ),
    }
    for name, call in calls.items():
        passes.clear()
        begin = time.monotonic()
        try:
            call()
        except Exception as error:
            errors[name] = [f"{type(error).__name__}: {error}", time.monotonic() - begin]
    building._forward, saewb.data.sources.ModelSource._compute = forward, compute
    saewb.evals.model_losses._measure = measure
    (folder / f"failed_{rank}").write_text(json.dumps(errors))


def _kill(rank, folder):
    """Process 1 is killed in its third batch, after two saves."""
    forward, passes = building._forward, []

    def killed(*args):
        passes.append(1)
        if rank == 1 and len(passes) == 3:
            (folder / "killed_at").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(*args)

    building._forward = killed
    try:
        build(folder / "killed", save_every_s=0)
    except RuntimeError as error:
        (folder / f"lost_{rank}").write_text(json.dumps([str(error), time.time()]))


def _interrupt(rank, folder):
    """Ctrl-C in process 1 only, in its second batch."""
    forward, passes = building._forward, []

    def interrupted(*args):
        passes.append(1)
        if rank == 1 and len(passes) == 2:
            signal.raise_signal(signal.SIGINT)
        return forward(*args)

    building._forward = interrupted
    index = build(folder / "interrupted", saes()[0])
    building._forward = forward
    (folder / f"interrupted_{rank}").write_text(json.dumps([index.is_complete, index.info.n_rows]))


def _resume(rank, folder):
    """What was begun by other numbers of processes."""
    del rank
    for name in ("failed", "killed"):
        build(folder / name)
    build(folder / "interrupted", saes()[0])
    how = {"shard_tokens": 32, "pass_tokens": 9}
    saewb.cache_activations(tiny_models.bridge(), text(), RESID, folder / "half", 150, **how)


TASKS = {"read": _read, "kill": _kill, "resume": _resume}
