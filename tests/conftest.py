"""Shapes in the signatures are checked while testing; no test reaches a hub."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

install_import_hook(
    [
        "saewb.sae",
        "saewb.arithmetic",
        "saewb.metrics",
        "saewb.tokens",
        "saewb.pursuit",
        "saewb.temporal",
        "saewb.stats",
        "saewb.enrichment",
        "saewb.objectives.weights",
        "saewb.objectives.losses",
        "saewb.objectives.dead",
        "saewb.objectives.straight_through",
        *(f"saewb.index.{part}" for part in ("counts", "firings", "gather", "loss_effects", "shelf", "weights")),
    ],
    "beartype.beartype",
)

import pytest
import small
import torch

torch.set_num_threads(1)  # models this small are slower on two, and much slower on a busy machine


@pytest.fixture(autouse=True)
def _own_randomness():
    """Tests neither depend on the global random state nor leave one behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(params=small.kinds())
def model(request):
    """The same three-layer model of random weights as each kind of model that this transformer-lens has."""
    made = small.bridge() if request.param == "bridge" else small.hooked()
    before = small.snapshot(made)
    yield made
    assert small.snapshot(made) == before, "a test left hooks on the model"
