"""Figures of eai-delphi on confusions and activations, as JSON on standard output; run by an interpreter that has it.

    SAEWB_DELPHI=/path/to/python pytest tests/parity/test_explanations_against_delphi.py

Its two modules are loaded by their files: importing the package needs faiss, vllm and more.
"""

import importlib.util
import json
import random
import sys
import types

CONFUSIONS = [(9, 1, 8, 2), (0, 5, 5, 0), (5, 0, 0, 5), (3, 4, 0, 6), (0, 7, 2, 5), (20, 0, 20, 0), (1, 0, 0, 1)]


def activations():
    """Windows of true and predicted activations, with a constant one among them."""
    rng = random.Random(0)
    true = [[rng.choice([0.0, 0.0, rng.random() * 7]) for _ in range(12)] for _ in range(6)] + [[0.0] * 12]
    predicted = [[float(rng.randint(0, 10)) if a else float(rng.randint(0, 3)) for a in row] for row in true]
    return true, predicted


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    (root,) = importlib.util.find_spec("delphi").submodule_search_locations
    metrics = _load("delphi_metrics", f"{root}/log/result_analysis.py")
    package = sys.modules["delphi_simulation"] = types.ModuleType("delphi_simulation")
    package.__path__ = [f"{root}/scorers/simulator/simulation"]
    scoring = importlib.import_module("delphi_simulation.scoring")
    confusions = []
    for tp, fn, tn, fp in CONFUSIONS:
        counts = {"true_positives": tp, "false_negatives": fn, "true_negatives": tn, "false_positives": fp}
        totals = {"total_examples": tp + fn + tn + fp, "total_positives": tp + fn, "total_negatives": tn + fp}
        confusions.append(metrics.compute_classification_metrics(counts | totals))
    true, predicted = activations()
    result_of = scoring.SimulationResult
    fields = {"tokens": [""] * 12, "quantile": 0}
    results = [
        result_of(true_activations=t, predicted_activations=p, correlation=0.0, **fields)
        for t, p in zip(true, predicted, strict=True)
    ]
    each = [float(scoring._calculate_correlation(t, p)) for t, p in zip(true, predicted, strict=True)]
    whole = float(scoring._aggregate_group(0, results).correlation)
    each = [value if value == value else None for value in each]
    print(json.dumps({"confusions": confusions, "each": each, "whole": whole}, indent=1))


if __name__ == "__main__":
    main()
