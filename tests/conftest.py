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
        *(f"saewb.training.objectives.{part}" for part in ("params", "losses", "dead", "straight_through")),
        *(f"saewb.features.{part}" for part in ("accumulate", "enrichment", "logit_effects", "top_contexts")),
    ],
    "beartype.beartype",
)

import pytest
import torch
from helpers import tiny_models

torch.set_num_threads(1)  # models this small are slower on two, and much slower on a busy machine


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
