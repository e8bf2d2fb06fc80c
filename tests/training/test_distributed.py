"""Two processes train what one trains: the same curves, the same weights; stops, failures and folders are shared."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import distributed_worker

import saewb
from saewb import cli
from saewb.distributed import ParallelContext
from saewb.training.objectives.topk import topk_over_batch

TESTS = Path(__file__).parents[1]
TOLERANCE = 2e-5  # of a figure: sums in another order, over 25 steps


def launched(*command, cwd, launcher=("torch.distributed.run", "--nproc-per-node", "2")):
    path = os.pathsep.join([str(Path(saewb.__file__).parents[1]), str(TESTS), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-m", *launcher, *map(str, command)]
    return subprocess.run(argv, cwd=cwd, env=env, capture_output=True, text=True, timeout=400)


def rows(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def assert_close(a, b, what):
    if isinstance(a, list):  # counts of latents, and where they are cut a rounding may move one
        assert sum(a) == sum(b), (what, a, b)
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) <= 2, (what, a, b)
        return
    assert abs(a - b) <= TOLERANCE * (abs(a) + 1e-3), (what, a, b)


def assert_same_curve(one, two):
    one, two = rows(one), rows(two)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, distributed_worker.STEPS + 1))
    for a, b in zip(one, two, strict=True):
        for key in a.keys() - {"seconds"}:
            assert_close(a[key], b[key], (a["step"], key))


def assert_same_weights(one, two, names=distributed_worker.OBJECTIVES):
    for name in names:
        a, b = saewb.load_sae(one / "saes" / name), saewb.load_sae(two / "saes" / name)
        for key, tensor in a.state_dict().items():
            torch.testing.assert_close(tensor, b.state_dict()[key], rtol=1e-4, atol=1e-5, msg=f"{name} {key}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process trains, and what two train."""
    folder = tmp_path_factory.mktemp("parallel")
    distributed_worker.train(folder / "one_plain", "plain").wait()
    distributed_worker.train(folder / "one_sparse").wait()
    distributed_worker.train(folder / "alone_first", n_steps=distributed_worker.HALF).wait()
    done = launched(TESTS / "helpers" / "distributed_worker.py", "all", folder, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("step", ["plain", "sparse"])
def test_two_processes_train_what_one_trains(folder, step):
    assert_same_curve(folder / f"one_{step}", folder / step)
    assert_same_weights(
        folder / f"one_{step}",
        folder / step,
        distributed_worker.PLAIN if step == "plain" else distributed_worker.OBJECTIVES,
    )
    assert max(row["topk/losses/aux"] for row in rows(folder / step)) > 0  # dead latents took part


def test_both_processes_hold_the_same_bits(folder):
    first, second = (torch.load(folder / f"saes_{rank}.pt") for rank in (0, 1))
    for name, tensors in first.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, second[name][key]), (name, key)


def test_activations_in_memory_are_shared_too(folder):
    figures, weights = distributed_worker.numbers(distributed_worker.from_tensors(None))
    for rank in (0, 1):
        theirs, their_weights = torch.load(folder / f"tensors_{rank}.pt")
        for a, b in zip(figures, theirs, strict=True):
            for name, numbers in a.items():
                for key, value in numbers.items():
                    assert_close(value, b[name][key], (name, key))
        for name, tensors in weights.items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(tensor, their_weights[name][key], rtol=1e-4, atol=1e-5)


def test_a_run_of_one_goes_on_with_two_and_of_two_with_one(folder):
    assert_same_curve(folder / "one_sparse", folder / "alone_first")
    distributed_worker.resumed(folder / "together_first").wait()
    assert_same_curve(folder / "one_sparse", folder / "together_first")
    assert_same_weights(folder / "one_sparse", folder / "together_first")


def test_only_the_first_process_writes(folder):
    first, second = (json.loads((folder / f"{rank}_folder.json").read_text()) for rank in (0, 1))
    assert first == [str(folder / "sparse"), True, distributed_worker.STEPS]
    assert second[0] == "None"
    assert second[2] == distributed_worker.STEPS


def test_a_stop_in_one_stops_all_with_a_checkpoint(folder):
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[0] == "stopped"
    assert (folder / "stopped" / "checkpoint.pt").exists()


def test_what_one_process_finds_wrong_ends_all_with_a_message(folder):
    for rank in (0, 1):
        assert "batch_tokens=47 for 2 processes" in (folder / f"error_{rank}").read_text()
        assert "fix:  batch_tokens=48" in (folder / f"error_{rank}").read_text()
        assert "holds a run already" in (folder / f"exists_{rank}").read_text()
    assert (folder / "exists_0").read_text().startswith("FileExistsError")
    assert (folder / "exists_1").read_text().startswith("RuntimeError: process 0 failed")


@pytest.mark.long
def test_a_failure_in_one_ends_all_and_says_why(tmp_path):
    done = launched(TESTS / "helpers" / "distributed_worker.py", "fail", tmp_path, cwd=tmp_path)
    assert done.returncode != 0
    (state, error), (state_1, error_1) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert state == state_1 == "failed"
    assert "not callable" in error_1
    assert "another process of this launch failed or ended" in error
    assert (tmp_path / "failed" / "checkpoint.pt").exists()
    assert (tmp_path / "1.saw").read_text() == "True"  # the other ended while the one that failed was still there


CONFIG = """
model: tiny
tokens: {embedded: true}
saes: {it: {objective: BatchTopK, d_sae: 64, k: 4, hook: blocks.1.hook_resid_post}}
n_tokens: 4096
batch_tokens: 512
buffer_tokens: 1024
log_every_steps: 1
folder: FOLDER
"""


@pytest.mark.long
def test_the_command_line_under_accelerate(tmp_path):
    pytest.importorskip("accelerate", reason="the launcher; torchrun is tested without it")
    (tmp_path / "two.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path / "two")))
    (tmp_path / "one.yaml").write_text(CONFIG.replace("FOLDER", str(tmp_path / "one")))
    assert cli.main(["train", str(tmp_path / "one.yaml")]) == 0
    launcher = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    done = launched("-m", "saewb", "train", tmp_path / "two.yaml", cwd=tmp_path, launcher=launcher)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["n_tokens"] for row in two] == list(range(512, 4097, 512))
    for a, b in zip(one, two, strict=True):
        assert_close(a["loss"], b["loss"], a["step"])
    assert done.stdout.count("saes/it") == 1  # one process speaks


def test_one_alone_exchanges_nothing():
    parallel, x = ParallelContext(), torch.arange(6.0).view(2, 3)
    assert (parallel.size, parallel.rank, parallel.is_main) == (1, 0, True)
    assert parallel.shard(7) == slice(0, 7)
    assert parallel.sum_(x) is x
    assert parallel.mean_(x) is x
    assert parallel.min_(x) is x
    assert parallel.broadcast_object("a") == "a"
    assert not parallel.any(False)
    with pytest.raises(ZeroDivisionError), parallel.raise_together():
        raise ZeroDivisionError


class Pretended:
    """One of several processes, whose scores a test knows."""

    def __init__(self, rank, everyones):
        self.rank, self.size, self.everyones = rank, len(everyones), everyones

    def topk_mask(self, scores, n):
        assert len(scores) <= n
        cut = torch.cat(self.everyones).topk(n).values.min()
        return scores >= cut


def test_what_is_kept_over_a_batch_is_kept_over_all_of_it():
    params = saewb.BatchTopK(24, k=2.5).init_params(8, dtype=torch.float64)
    pre = torch.randn(40, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    pre[:20] *= 5  # the first process has nearly all of what is kept
    norms = params.norms()
    whole, least = topk_over_batch(norms, pre, 2.5)
    scores = [(torch.relu(half) * norms).flatten() for half in pre.chunk(2)]
    parts = [topk_over_batch(norms, half, 2.5, Pretended(rank, scores)) for rank, half in enumerate(pre.chunk(2))]
    assert torch.equal(torch.cat([latents for latents, _ in parts]), whole)
    assert min(low for _, low in parts) == least
    assert (parts[0][0] != 0).sum() > 90
