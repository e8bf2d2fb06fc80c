"""Absorption, SCR, TPP and core figures as SAEBench's own functions compute them, in an environment of their own.

    python tests/helpers/saebench_oracle.py record PYTHON   tests/fixtures/evals/saebench.json anew, by that Python

`probe_oracles.py make FOLDER` makes the environment, which has no saewb. Tests compare with the recorded file; with
SAEWB_PEER_ENVIRONMENTS=FOLDER they also compute it again. Inputs are drawn by numpy here, for both sides.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evals" / "saebench.json"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MAINS = ([3], [0, 7, 9], [1, 2], [5, 20, 21, 22])
NS = (2, 5, 20)
MAX_K = 4


def absorbing_numbers(n=160, d=24, d_sae=60, seed=0):
    """Sparse latents, decoder rows of different lengths, activations that they make, and a probe."""
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(d_sae, d)) * rng.uniform(0.5, 1.5, (d_sae, 1))
    acts = rng.exponential(1.0, (n, d_sae)) * (rng.random((n, d_sae)) < 0.2)
    probe = W_dec[[0, 1, 3, 5]].sum(0) + 0.5 * rng.normal(size=d)
    x = acts @ W_dec + 0.3 * rng.normal(size=(n, d))
    return {
        name: value.astype(np.float32) for name, value in locals().items() if name in ("W_dec", "acts", "probe", "x")
    }


def spelled_words(per_letter=36, d=40, d_sae=90, seed=1):
    """Activations of words of 26 letters, which to train on, and an SAE that splits and absorbs letters."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.normal(size=(d, d)))[0]
    n = 26 * per_letter
    letter = np.arange(n) % 26
    side = rng.random(n) < 0.4
    x = 7 * directions[letter] + 5 * side[:, None] * directions[26 + letter % 10] + rng.normal(size=(n, d)) * 0.9
    rows = np.concatenate([directions[:26], directions[:26], directions[:26] + directions[26 + np.arange(26) % 10]])
    rows = np.concatenate([rows, rng.normal(size=(d_sae - len(rows), d)) / d**0.5])
    rows = rows * rng.uniform(0.6, 1.4, (d_sae, 1))
    W_enc, b_enc = rows.T.copy(), np.full(d_sae, -1.5)
    W_enc[:, :26] -= 0.9 * directions[26 + np.arange(26) % 10].T  # silent where the side feature is
    W_enc[:, 26:40] *= 0.7
    train = np.arange(n) < int(0.8 * n)
    return {
        "x": x.astype(np.float32),
        "letter": letter,
        "train": train,
        "W_enc": W_enc.astype(np.float32),
        "b_enc": b_enc.astype(np.float32),
        "W_dec": rows.astype(np.float32),
        "words": [f"{LETTERS[c]}{i}" for i, c in enumerate(letter)],
    }


def texts_of_classes(sizes, d=20, length=12, seed=2):
    """Tokens of texts `[texts, length, d]`, zero where masked, with a direction per class; and the class of each."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(sizes)), sizes)
    means = rng.normal(size=(len(sizes), d)) * 1.2
    x = means[y][:, None] * (rng.random((len(y), length, 1)) < 0.4) + rng.normal(size=(len(y), length, d)) + 0.2
    x[np.arange(length) >= rng.integers(6, length + 1, len(y))[:, None]] = 0
    x[:, 0] = 0  # a special token
    return x.astype(np.float32), y


def small_sae(d=20, d_sae=48, seed=3):
    """Weights of a ReLU SAE whose latents fire on zeros too."""
    rng = np.random.default_rng(seed)
    W_dec = rng.normal(size=(d_sae, d))
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True) / rng.uniform(0.7, 1.3, (d_sae, 1))
    weights = {
        "W_enc": W_dec.T,
        "b_enc": rng.normal(size=d_sae) * 0.3,
        "W_dec": W_dec,
        "b_dec": rng.normal(size=d) * 0.1,
    }
    return {name: value.astype(np.float32).copy() for name, value in weights.items()}


QUADRANT = {(1, 1): 41, (0, 0): 41, (1, 0): 20, (0, 1): 20}
"""Texts by label and spurious label, in the order of the tables."""


def quadrants(seed):
    """Tokens of texts of four kinds, and 2 label + spurious of each, mixed."""
    kinds = np.repeat([2 * a + b for a, b in QUADRANT], list(QUADRANT.values()))
    kinds = np.random.default_rng(seed).permutation(kinds)
    rng = np.random.default_rng(seed + 1)
    shared = np.random.default_rng(99).normal(size=(2, 20))
    sign = np.stack([kinds // 2, kinds % 2], 1) * 2 - 1
    x = (sign @ (shared * [[0.35], [0.6]]))[:, None] + rng.normal(size=(len(kinds), 12, 20)) + 0.2
    x[:, 0] = 0
    x[np.arange(12) >= rng.integers(6, 13, len(kinds))[:, None]] = 0
    return x.astype(np.float32), kinds


def recorded():
    """Results of SAEBench as they are recorded."""
    return json.loads(FIXTURE.read_text())


def compute(python):
    """Results of SAEBench, computed now by an interpreter that has it."""
    environment = {**os.environ, "JAXTYPING_DISABLE": "1"}  # its annotations of shapes contradict each other
    done = subprocess.run([python, __file__, "compute"], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


# -- run in SAEBench's environment -------------------------------------------------------------------------------------


class _Stub:
    """What SAEBench asks of an SAE."""

    def __init__(self, W_enc, b_enc, W_dec, b_dec=None):
        import types

        import torch

        self.W_enc, self.b_enc = torch.from_numpy(W_enc), torch.from_numpy(b_enc)
        self.W_dec = torch.from_numpy(W_dec)
        self.b_dec = torch.zeros(W_dec.shape[1]) if b_dec is None else torch.from_numpy(b_dec)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.cfg = types.SimpleNamespace(d_sae=len(W_dec))

    def encode(self, x):
        return (x @ self.W_enc + self.b_enc).relu()

    def decode(self, acts):
        return acts @ self.W_dec + self.b_dec


class _Model:
    """A model whose activation is that of the word in the last line of a prompt."""

    tokenizer = "none is asked"

    def __init__(self, words, x):
        self.at, self.x = {word: i for i, word in enumerate(words)}, x

    def to_tokens(self, _text):
        return [[0] * 7]

    def run_with_cache(self, texts, names_filter):
        rows = [self.at[text.split("\n")[-1].split(" ")[0].rstrip(":")] for text in texts]
        return None, {names_filter[0]: self.x[rows][:, None].repeat(1, 7, 1)}


def _calculator(model, words):
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    from sae_bench.evals.absorption.prompting import first_letter_formatter

    return FeatureAbsorptionCalculator(
        model=model,
        icl_word_list=words,
        max_icl_examples=3,
        base_template="{word} has the first letter:",
        answer_formatter=first_letter_formatter(),
        word_token_pos=-6,
    )


def _random_numbers():
    import torch

    numbers = {name: torch.from_numpy(value) for name, value in absorbing_numbers().items()}
    words = [f"w{i}" for i in range(len(numbers["x"]))]
    sae = _Stub(np.zeros((24, 60), np.float32), np.zeros(60, np.float32), absorbing_numbers()["W_dec"])
    results = []
    for main in MAINS:
        calculator, position = _calculator(_Model(words, numbers["x"]), words), 0

        def encode(x):
            nonlocal position
            position += len(x)
            return numbers["acts"][position - len(x) : position]

        sae.encode = encode
        found = calculator.calculate_absorption(sae, words, numbers["probe"], main, 0, show_progress=False)
        results.append(
            {
                "fraction": [float(one.absorption_fraction) for one in found.word_results],
                "full": [bool(one.is_full_absorption) for one in found.word_results],
                "projection": [one.probe_projection for one in found.word_results],
            }
        )
    return results


def _spelling():
    import torch
    from sae_bench.evals.absorption import feature_absorption, k_sparse_probing, main
    from sae_bench.evals.absorption.probing import train_multi_probe

    of = spelled_words()
    sae, x, train = _Stub(of["W_enc"], of["b_enc"], of["W_dec"]), torch.from_numpy(of["x"]), of["train"]
    labels = [(word, int(letter)) for word, letter in zip(of["words"], of["letter"], strict=True)]
    sides = [[pair for pair, here in zip(labels, mask, strict=True) if here] for mask in (train, ~train)]
    y = torch.nn.functional.one_hot(torch.tensor([letter for _, letter in sides[0]]), 26)
    device = torch.device("cpu")
    torch.manual_seed(42)
    options = {"num_epochs": 50, "lr": 1e-2, "weight_decay": 1e-4, "show_progress": False, "device": device}
    probe = train_multi_probe(x[train], y, num_probes=26, batch_size=64, **options)
    torch.manual_seed(42)
    ks = list(range(1, MAX_K + 1))
    k_probes = k_sparse_probing.train_k_sparse_probes(sae, sides[0], x[train], ks=ks)
    raw = k_sparse_probing.eval_probe_and_sae_k_sparse_raw_scores(sae, probe, k_probes, sides[1], x[~train])
    metadata = k_sparse_probing.sae_k_sparse_metadata(sae, probe, k_probes, "stub", 0)
    metrics = k_sparse_probing.build_metrics_df(raw, metadata, MAX_K)
    k_sparse_probing.add_feature_splits_to_metrics_df(metrics, max_k_value=MAX_K)
    likely = {}
    for letter in LETTERS:
        right = raw[(raw["answer_letter"] == letter) & (raw[f"score_probe_{letter}"] > 0)]["token"].tolist()
        (split,) = metrics[metrics["letter"] == letter]["split_feats"]
        likely[letter] = feature_absorption.StatsAndLikelyFalseNegativeResults(len(right), 0, split, right)
    words = [word for word, _ in labels]
    calculator = _calculator(_Model(words, x), words)
    table = feature_absorption.calculate_projection_and_cos_sims(calculator, sae, probe, 0, likely)
    total = main._aggregate_results_df(table).set_index("letter")
    result = {}
    for row in metrics.to_dict("records"):
        letter = row["letter"]
        result[letter] = {
            "f1_probe": row["f1_probe"],
            "f1": [row[f"f1_sparse_sae_{k}"] for k in ks],
            "split": [int(i) for i in row["split_feats"]],
            "fraction": float(total["mean_absorption_fraction"][letter]) if letter in total.index else None,
            "full": float(total["full_absorption_rate"][letter]) if letter in total.index else None,
            "n": int(total["num_probe_true_positives"][letter]) if letter in total.index else 0,
        }
    return result


def _arguments():
    return {
        "use_sklearn": False,
        "batch_size": 16,
        "epochs": 20,
        "lr": 1e-3,
        "early_stopping_patience": 20,
        "l1_penalty": 1e-3,
    }


def _ablations(train, test, chosen, scr):
    import torch
    from sae_bench.evals.scr_and_tpp import main
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.sae_bench_utils.activation_collection import create_meaned_model_activations

    sae = _Stub(**small_sae())
    torch.manual_seed(42)
    means = [create_meaned_model_activations(side) for side in (train, test)]
    probes, _ = probe_training.train_probe_on_activations(*means, perform_scr=scr, **_arguments())
    torch.set_grad_enabled(False)
    clean = main.get_probe_test_accuracy(probes, chosen, means[1], 500, scr)
    effects = main.get_all_node_effects_for_one_sae(sae, probes, chosen, scr, train, 25)
    ablated = main.perform_feature_ablations(probes, sae, 25, test, effects, list(NS), chosen, 500, scr)
    torch.set_grad_enabled(True)
    weights = {name: probe.net.weight[0].tolist() for name, probe in probes.items()}
    return {
        "clean": clean,
        "ablated": ablated,
        "effects": {name: value.tolist() for name, value in effects.items()},
        "weights": weights,
        "scores": main.get_scr_plotting_dict(ablated, clean)
        if scr
        else main.create_tpp_plotting_dict(ablated, clean)[0],
    }


def _tpp():
    import torch

    sides = [texts_of_classes(sizes, seed=seed) for sizes, seed in (((60, 60, 60), 2), ((30, 30, 30), 2))]
    sides = [{str(c): torch.from_numpy(x[y == c]) for c in range(3)} for x, y in sides]
    return _ablations(*sides, ["0", "1", "2"], scr=False)


def _scr():
    import pandas as pd
    import torch
    from sae_bench.evals.scr_and_tpp.dataset_creation import get_spurious_corr_data
    from sae_bench.sae_bench_utils.dataset_info import PAIRED_CLASS_KEYS, dataset_metadata

    name, sides = "LabHC/bias_in_bios", []
    of = dataset_metadata[name]
    for seed in (10, 20):
        x, kinds = quadrants(seed)
        columns = {of["text_column_name"]: [str(i) for i in range(len(x))]}
        for key, values, positive in (
            ("column1", ("professor", "nurse"), kinds // 2),
            ("column2", ("male", "female"), kinds % 2),
        ):
            codes = [of[f"{key}_mapping"][value] for value in values]
            columns[of[f"{key}_name"]] = np.where(positive == 1, *codes)
        sets = get_spurious_corr_data(pd.DataFrame(columns), ("professor", "nurse"), ("male", "female"), name, 20, 42)
        sides.append({key: torch.from_numpy(x[[int(i) for i in texts]]) for key, texts in sets.items()})
    return _ablations(*sides, list(PAIRED_CLASS_KEYS), scr=True)


def _core():
    import torch
    from sae_bench.evals.core.main import calculate_max_cosine_sim, calculate_misc_metrics
    from sae_bench.evals.meta_structure.main import _decoder_variance_metrics

    weights = small_sae()
    density = np.random.default_rng(7).random(48) ** 6
    figures = {
        "max_encoder_cosine_sim": calculate_max_cosine_sim(torch.from_numpy(weights["W_enc"])).tolist(),
        "max_decoder_cosine_sim": calculate_max_cosine_sim(torch.from_numpy(weights["W_dec"].T)).tolist(),
        "feature_density": density.tolist(),
    }

    class Half(torch.nn.Module):
        def forward(self, x):
            return 0.5 * x + 0.01

    explained, _ = _decoder_variance_metrics(Half(), torch.from_numpy(weights["W_dec"]), 16)
    return {"misc": calculate_misc_metrics(figures), "per latent": figures, "meta": explained}


def _main(command, python=None):
    if command == "compute":
        import contextlib
        import io

        with contextlib.redirect_stdout(io.StringIO()):
            parts = {"random": _random_numbers, "spelling": _spelling, "tpp": _tpp, "scr": _scr, "core": _core}
            results = {name: part() for name, part in parts.items()}
        print(json.dumps(results))
    elif command == "record":
        FIXTURE.parent.mkdir(parents=True, exist_ok=True)
        FIXTURE.write_text(json.dumps(compute(python), indent=1) + "\n")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    _main(*sys.argv[1:3])
