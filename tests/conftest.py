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
from hypothesis import settings

LONG_NOTEBOOKS = ("08_compare_saes_and_transcoders.ipynb",)  # a minute or more
QUICK_EXAMPLES = 10  # of a hypothesis test, unless the long ones are run

torch.set_num_threads(1)  # models this small are slower on two, and much slower on a busy machine


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Hypothesis tests draw a few examples by default, and with `-m long` all that they ask for."""
    is_long = "long" in config.option.markexpr.replace("not long", "")
    for item in items:
        if item.path.name in LONG_NOTEBOOKS:
            item.add_marker("long")
        test = getattr(item, "obj", None)
        if not getattr(test, "is_hypothesis_test", False):
            continue
        if is_long:
            item.add_marker("long")
        else:
            full = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(full, max_examples=min(full.max_examples, QUICK_EXAMPLES))


@pytest.fixture(autouse=True)
def _own_randomness():
    """Tests neither depend on the global random state nor leave one behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=tiny_models.kinds())
def model(request):
    """The same three-layer model of random weights as each kind of model that this transformer-lens has."""
    made = tiny_models.bridge() if request.param == "bridge" else tiny_models.hooked()
    before = tiny_models.snapshot(made)
    yield made
    assert tiny_models.snapshot(made) == before, "a test left hooks on the model"
