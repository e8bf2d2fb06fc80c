"""Every public function that computes gives on a second device what it gives on the CPU, and stays on that device.

The device is made of the CPU (`helpers/second_device.py`); registering it is for a whole process, so that the cases run
in one of their own, once for all tests of this file. By hand, twenty times over: `python -m devices --repeat 20` in
`tests/`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from devices import cases
from helpers.transformer_lens_3 import has_hooked_transformer

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)

# How often the host waits for the device, by unit of work; no entry: never. An index reads from the device how many
# latents are active and which contexts enter it; an evaluation which tokens count. A pursuit asks in each of its rounds
# which tokens go on. Of the uploads of a pass over the model 6 are the model's own, 4 of a pass to the hook.
WAITS = {
    "training step, topk, dead latents looked at each time": {"nonzero": 1},
    "training step, pursuit": {"nonzero": 4},
    "log of a step": {"copy": 1, "upload": 1},
    "training step, from a model": {"upload": 5 * 18 / 16},  # 18 passes for 16 steps: rows are fewer at a text's end
    "batch of a stream": {"upload": 5},
    "index batch, topk": {"mask": 1, "nonzero": 8, "number": 2, "size": 1, "upload": 6},
    "index batch, relu": {"mask": 1, "nonzero": 8, "number": 2, "size": 1, "upload": 6},
    "generated token": {"copy": 1, "upload": 1},
    "generated token, steered": {"copy": 1, "upload": 3},
    "generated token, attached": {"copy": 1, "upload": 1},
    "forward pass, bare": {"upload": 6},
    "forward pass, attached": {"upload": 6},
    "forward pass, attached, special tokens": {"upload": 7},
    "forward pass, steered": {"upload": 8},
    "forward pass, steered at positions": {"upload": 10},
    "evaluation batch": {"mask": 1, "size": 2, "upload": 40},
}


def run_devices(*arguments):
    """Run `python -m devices` in a process of its own; a dictionary of its lines of JSON."""
    env = os.environ | {"PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "devices", *arguments]
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.fixture(scope="module")
def results():
    return run_devices("--transfers")


@pytest.mark.parametrize("name", cases.CASES)
def test_results_are_those_of_the_cpu(results, name):
    assert results[name]["problems"] == []


@pytest.mark.long
def test_a_device_without_float64_gives_the_same():
    """As an Apple GPU: sums are in float32 there, or in float64 on the CPU."""
    lines = run_devices("--no-float64", "--tolerance", "1e-4")
    assert {name: line["problems"] for name, line in lines.items() if line["problems"]} == {}


@pytest.mark.long
def test_results_are_the_same_each_time():
    lines = run_devices("--repeat", "2")
    assert {name: line["problems"] for name, line in lines.items() if line["problems"]} == {}


@pytest.mark.skipif(has_hooked_transformer(), reason="a model's own uploads are those of transformer-lens 4")
def test_the_host_waits_for_the_device_as_often_as_recorded(results):
    assert results["transfers"]["counts"] == {**{key: {} for key in results["transfers"]["counts"]}, **WAITS}


def test_every_public_name_has_a_case_or_a_reason():
    without, unknown = cases.missing()
    assert not without, f"new public names need a case in tests/devices/cases.py: {sorted(without)}"
    assert not unknown, f"no public names any more: {sorted(unknown)}"


def test_a_model_spread_over_two_devices_gives_the_same(results):
    """Everything follows the device of the hook point, also a training, which is where its first SAE reads."""
    assert results["spread"]["problems"] == []


def test_an_sae_on_another_device_is_refused_with_the_line_to_type(results):
    assert results["elsewhere"]["problems"] == []


def test_the_second_device_finds_what_a_gpu_would_refuse(results):
    """The device itself: mixing is an error, a number of the CPU is not, memory and sizes stay one."""
    assert results["device"]["problems"] == []
