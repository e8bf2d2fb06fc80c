"""Figures of scores against eai-delphi 0.1.3: recorded; anew where SAEWB_DELPHI names an interpreter with it."""

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers import delphi_figures

from saewb.explanations.figures import classification_figures, correlation_figures

RECORDED = Path(__file__).parents[1] / "fixtures" / "delphi_figures.json"


def theirs():
    return json.loads(RECORDED.read_text())


def test_the_record_is_what_it_gives():
    if not (interpreter := os.environ.get("SAEWB_DELPHI")):
        pytest.skip("SAEWB_DELPHI names no interpreter with eai-delphi")
    done = subprocess.run([interpreter, delphi_figures.__file__], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == theirs()


@pytest.mark.parametrize(("n", "confusion"), list(enumerate(delphi_figures.CONFUSIONS)))
def test_figures_of_a_confusion(n, confusion):
    ours, metrics = classification_figures(*confusion), theirs()["confusions"][n]
    names = {"balanced_accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "f1_score"}
    for name, other in names.items():
        assert ours[name] == pytest.approx(metrics[other], abs=1e-12)
    assert ours["low"] <= ours["value"] <= ours["high"]


def test_correlations_of_a_simulation():
    true, predicted = delphi_figures.activations()
    recorded, ours = theirs(), correlation_figures(true, predicted, seed=0)
    assert ours["value"] == pytest.approx(recorded["whole"], abs=1e-12)
    each = [correlation_figures([t], [p], seed=0)["value"] for t, p in zip(true, predicted, strict=True)]
    np.testing.assert_allclose(each, [math.nan if value is None else value for value in recorded["each"]], atol=1e-12)
    assert ours["per_window"] == pytest.approx(np.nanmean(each))
    assert ours["low"] < ours["value"] < ours["high"]
