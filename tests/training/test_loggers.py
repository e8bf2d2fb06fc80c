"""Loggers with the real libraries, offline: what they wrote, read back with what the libraries read it with."""

import json
import struct

import pytest
from helpers import tiny_models
from training import test_run

import saewb

STEPS = 24


@pytest.fixture(scope="module")
def run_and_folder(tmp_path_factory):
    """A run of two SAEs that told both, where they are installed."""
    folder = tmp_path_factory.mktemp("loggers")
    loggers = []
    try:
        import tensorboard  # noqa: F401

        loggers.append(saewb.training.loggers.TensorBoard(folder / "board"))
    except ImportError:
        pass
    try:
        import wandb

        quiet = wandb.Settings(silent=True, console="off")
        how = {"mode": "offline", "dir": str(folder), "settings": quiet, "log_weights": True}
        loggers.append(saewb.training.loggers.Wandb(project="sparse", name="first", **how))
    except ImportError:
        pass
    how = {"held_out": tiny_models.tokens(9, 7, seed=2), "eval_every_tokens": 400, "loggers": loggers}
    saes = {"a": saewb.TopK(d_sae=24, k=4), "b": saewb.Standard(d_sae=24, l1=0.3)}
    run = test_run.train(folder / "run", saes, checkpoint_every_tokens=480, **how).wait()
    return run, folder


def test_tensorboard_reads_the_history(run_and_folder):
    pytest.importorskip("tensorboard", reason="pip install tensorboard: reads back what the logger wrote")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, folder = run_and_folder
    board = EventAccumulator(str(folder / "board"))
    board.Reload()
    history = run.history
    figures = set(history.columns) - {"step", "n_tokens"}
    assert set(board.Tags()["scalars"]) == figures
    for name in figures:
        column = history[["n_tokens", name]].dropna()
        events = board.Scalars(name)
        assert [e.step for e in events] == column["n_tokens"].tolist(), name
        assert [e.value for e in events] == pytest.approx(column[name].tolist(), rel=1e-6), name
    assert not [note for note in run.notes if "failed at step" in note]


def records(path):
    """The records of an offline run: wandb's own messages, out of LevelDB's log format (blocks of 32 KiB)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""  # 7: header of the file, ":W&B", 2 bytes of magic, version
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_wandb_keeps_sae_lens_keys_config_and_weights(run_and_folder):
    pytest.importorskip("wandb", reason="pip install wandb: reads back what the logger wrote")
    run, folder = run_and_folder
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    result = list(records(path))
    rows = [record.history for record in result if record.WhichOneof("record_type") == "history"]
    logged = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row.item} for row in rows]
    assert [row["_step"] for row in logged] == list(range(1, STEPS + 1))
    for row, mine in zip(logged, run.history.to_dict("records"), strict=True):
        assert row["details/n_training_samples"] == mine["n_tokens"]
        for name in "ab":
            assert row[f"{name}/losses/mse_loss"] == pytest.approx(mine[f"{name}/losses/mse"])
            assert row[f"{name}/losses/overall_loss"] == pytest.approx(mine[f"{name}/loss"])
            assert row[f"{name}/metrics/explained_variance"] == pytest.approx(1 - mine[f"{name}/fvu"])
            assert row[f"{name}/metrics/l0"] == pytest.approx(mine[f"{name}/l0"])
        assert row["b/details/l1_coefficient"] == pytest.approx(mine["b/coefficients/l1"])
    assert logged[-1]["a/held_out/fvu"] == pytest.approx(run.history["a/held_out/fvu"].iloc[-1])
    (opened,) = [record.run for record in result if record.WhichOneof("record_type") == "run"][:1]
    assert (opened.project, opened.display_name) == ("sparse", "first")
    config = {item.key: json.loads(item.value_json) for item in opened.config.update}
    assert config["train"]["batch_tokens"] == 40
    assert config["saes"]["b"]["objective"] == "Standard"
    (left,) = [record.exit.exit_code for record in result if record.WhichOneof("record_type") == "exit"]
    assert left == 0
    assert not [note for note in run.notes if "failed at step" in note]


def test_wandb_is_given_the_weights_where_asked(run_and_folder):
    pytest.importorskip("wandb", reason="pip install wandb: reads back what the logger wrote")
    _, folder = run_and_folder
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    artifacts = [record for record in records(path) if "artifact" in str(record.WhichOneof("record_type") or record)]
    text = "".join(map(str, artifacts))
    assert text.count("sae_weights.safetensors") >= 2
    assert '"a"' in text
    assert '"b"' in text
