"""Shapes in the signatures are checked while testing; no test reaches a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook(
    [
        *(f"saewb.sae.{part}" for part in ("sae", "activation_functions", "matching_pursuit", "temporal", "sparse")),
        "saewb.metrics",
        "saewb.kernels.topk",
        "saewb.models.unembed",
        "saewb.data.tokens",
        "saewb.stats",
        *(f"saewb.training.objectives.{part}" for part in ("params", "losses", "jumprelu")),
        *(f"saewb.features.{part}" for part in ("accumulate", "enrichment", "logit_effects", "top_contexts")),
    ],
    "beartype.beartype",
)

import pytest
import torch
from helpers import tiny_models
from hypothesis import HealthCheck, settings

# These register a second device for the whole process, where autograd then fails after a fork; the cases of
# tests/devices run in a process of their own.
collect_ignore = ["helpers/second_device.py", *(f"devices/{name}.py" for name in ("mixed", "self_check", "transfers"))]
collect_ignore += ["parity/circuit_tracer_peer.py"]  # runs in circuit-tracer's environment

LONG_NOTEBOOKS = ("08_compare_saes_and_transcoders.ipynb",)  # a minute or more

torch.set_num_threads(1)  # models this small are slower on two, and much slower on a busy machine


_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("quick", max_examples=10, **_SHARED)
settings.register_profile("long", max_examples=300, **_SHARED)


def _is_long(config):
    return "long" in config.option.markexpr.replace("not long", "")


def pytest_configure(config):
    """Hypothesis tests draw at most 10 examples by default, and with `-m long` all that they ask for."""
    settings.load_profile("long" if _is_long(config) else "quick")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Long are some notebooks; and, with `-m long`, all hypothesis tests, which then run again at full size."""
    for item in items:
        is_hypothesis_test = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
        if item.path.name in LONG_NOTEBOOKS or (is_hypothesis_test and _is_long(config)):
            item.add_marker("long")


@pytest.fixture(autouse=True)
def _own_randomness():
    """Tests neither depend on the global random state nor leave one behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=tiny_models.kinds())
def model(request):
    """The same three-layer model of random weights as each kind of model that this transformer-lens has."""
    result = tiny_models.bridge() if request.param == "bridge" else tiny_models.hooked()
    before = tiny_models.snapshot(result)
    yield result
    assert tiny_models.snapshot(result) == before, "a test left hooks on the model"
