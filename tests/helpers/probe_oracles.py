"""Sparse probes as sae-probes and SAEBench compute them, each in an environment of its own.

    python tests/helpers/probe_oracles.py make FOLDER        the environments, from the package index, in FOLDER
    python tests/helpers/probe_oracles.py record FOLDER      tests/fixtures/probing/*.json anew, by these environments

`record` runs this file with the environments' interpreters, which have no saewb. Tests compare with the recorded files;
with SAEWB_PEER_ENVIRONMENTS=FOLDER they also compute them again.
"""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures" / "probing"
PACKAGES = {"sae-probes": ["sae-probes==0.4.2"], "sae-bench": ["sae-bench==0.6.0", "numpy<2"]}
SIZES = (10, 60, 300)
"""Training texts: each has another kind of validation."""
KS = (1, 2, 4, 8)


def pooled_values(n, seed, d=40):
    """Sparse, positive values of n texts, float32, and labels: some columns tell them apart."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 2)[rng.permutation(n)]
    rate = np.where(np.arange(d) < 6, 0.35 + 0.3 * y[:, None] * (np.arange(d) % 2 * 2 - 1), 0.3)
    z = rng.exponential(1.0, (n, d)) * (rng.random((n, d)) < rate) * np.linspace(0.5, 1.5, d)
    return z.astype(np.float32), y


def classes_of_values(n_classes=3, n=(80, 40), d=30, seed=0):
    """For SAEBench: values of each class, of training and test texts, float32."""
    rng, sides = np.random.default_rng(seed), []
    for size in n:
        means = np.where(np.arange(d) % n_classes == np.arange(n_classes)[:, None], 0.9, 0.5)
        sides.append({str(c): rng.exponential(means[c], (size, d)).astype(np.float32) for c in range(n_classes)})
    return sides


def interpreter(name):
    """Python of a peer's environment; None where it is not there."""
    folder = os.environ.get("SAEWB_PEER_ENVIRONMENTS")
    path = Path(folder or "") / name / "bin" / "python"
    return str(path) if folder and path.exists() else None


def compute(name, python):
    """Results of a peer, computed now in its environment."""
    environment = {**os.environ, "JAXTYPING_DISABLE": "1"}  # SAEBench's annotations of shapes contradict each other
    command = [python, __file__, "compute", name]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def recorded(name):
    """Results of a peer as they are recorded."""
    return json.loads((FIXTURES / f"{name}.json").read_text())


# -- run in a peer's environment ---------------------------------------------------------------------------------------


def _sae_probes():
    import torch
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
    from sae_probes.utils_data import get_train_test_indices
    from sae_probes.utils_training import find_best_reg

    results = {}
    for n in SIZES:
        (x, y), (x_test, y_test) = pooled_values(n, seed=n), pooled_values(200, seed=n + 1)
        x, y, x_test, y_test = (torch.from_numpy(a) for a in (x, y, x_test, y_test))
        indices = get_sorted_indices(x, y, mean_act_normalization)
        for penalty in ("l1", "l2"):
            for k in KS:
                best = find_best_reg(
                    X_train=x[:, indices[:k]],
                    y_train=y,
                    X_test=x_test[:, indices[:k]],
                    y_test=y_test,
                    penalty=penalty,
                    seed=42,
                )
                metrics = {key: float(value) for key, value in vars(best.metrics).items()}
                results[f"{n} {penalty} {k}"] = metrics | {
                    "indices": indices[:k].tolist(),
                    "C": float(best.classifier.C),
                }
    _, y = pooled_values(300, seed=1)
    split = get_train_test_indices(y, 120, 90, 0.4, 42)
    return {"probes": results, "split": [part.tolist() for part in split]}


def _sae_bench():
    import contextlib
    import io

    import torch
    from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

    train, test = ({c: torch.from_numpy(x) for c, x in side.items()} for side in classes_of_values())
    results = {}
    with contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(42)
        options = {"use_sklearn": False, "batch_size": 250, "epochs": 100, "lr": 1e-2}
        results["residual"] = train_probe_on_activations(train, test, select_top_k=None, **options)[1]
        for k in (1, 2, 5):
            results[str(k)] = train_probe_on_activations(train, test, select_top_k=k)[1]
    return results


def _scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score, roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    x, y = pooled_values(120, seed=7)
    x, results = x[:, :12].astype(np.float64), {}
    for C in (0.1, 1.0, 10.0):
        for penalty, options in {
            "l2": {"solver": "newton-cholesky", "tol": 1e-12},
            "l1": {"penalty": "l1", "solver": "saga", "tol": 1e-14, "random_state": 0},
        }.items():
            fit = LogisticRegression(C=C, max_iter=200_000, **options).fit(x, y)
            scores = fit.decision_function(x)
            results[f"{penalty} {C}"] = {
                "weight": fit.coef_[0].tolist(),
                "bias": float(fit.intercept_[0]),
                "auc": float(roc_auc_score(y, scores)),
                "f1": float(f1_score(y, fit.predict(x), average="weighted")),
            }
    folds = StratifiedKFold(6, shuffle=True, random_state=42).split(x, y)
    ties = np.round(x[:, 3])
    return {
        "fits": results,
        "folds": [test.tolist() for _, test in folds],
        "auc of ties": float(roc_auc_score(y, ties)),
    }


PEERS = {"sae-probes": _sae_probes, "sae-bench": _sae_bench, "scikit-learn": _scikit_learn}
ENVIRONMENTS = {"sae-probes": "sae-probes", "sae-bench": "sae-bench", "scikit-learn": "sae-probes"}
"""Environment of each peer."""


def _main(command, target):
    if command == "compute":
        print(json.dumps(PEERS[target]()))
    elif command == "make":
        for name, packages in PACKAGES.items():
            venv.create(Path(target) / name, with_pip=True)
            pip = [str(Path(target) / name / "bin" / "python"), "-m", "pip", "install", *packages]
            subprocess.run(pip, check=True)
    elif command == "record":
        FIXTURES.mkdir(parents=True, exist_ok=True)
        for name, environment in ENVIRONMENTS.items():
            results = compute(name, str(Path(target) / environment / "bin" / "python"))
            (FIXTURES / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    _main(*sys.argv[1:3])
