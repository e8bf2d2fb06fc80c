"""Planted features by SynthSAEBench's protocol: python -m tests.benchmarks.planted [--quick] [--data FOLDER]

The objectives of saewb and the trainers of sae-lens on the same data, number of samples, batch, learning rate and L0;
a random SAE and the true dictionary beside them. The data are a generator of saewb's own with a hierarchy, or those of
`load_synthetic` (a folder, or a model of SynthSAEBench on the hub).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import saewb
from saewb.synthetic import SyntheticData, load_synthetic, random_dictionary, random_hierarchy, score, zipfian

from .measure import Report, Row, Table, arguments, has

FIGURES = {
    "mcc": "MCC {:.3f}",
    "f1": "F1 {:.3f}",
    "f1_se": "± {:.3f}",
    "explained_variance": "EV {:.3f}",
    "l0": "L0 {:.1f}",
    "dead_frac": "dead {:.1%}",
    "uniqueness": "unique {:.1%}",
    "absorption_rate": "absorbed {:.1%}",
}


def own_data(n_features: int, d: int) -> SyntheticData:
    """Trees of three levels, a quarter of the features roots; firing falls off as Zipf's law and by level."""
    n_roots = n_features // 8
    hierarchy = random_hierarchy(n_features, n_roots, branching=(2, 2), depth=2, exclusive_frac=0.5)
    probability = zipfian(n_features, highest=0.1, lowest=0.01)
    for parent, child in hierarchy.pairs:
        probability[child] = 0.4 * probability[parent]
    return SyntheticData(random_dictionary(n_features, d), probability, hierarchy=hierarchy)


def of_saewb(data: SyntheticData, d_sae: int, k: int, options) -> tuple[dict[str, saewb.SparseCoder], float]:
    """SAEs by name, trained together, and the seconds of all of them."""
    objectives = {
        "saewb_TopK": saewb.TopK(d_sae, k),
        "saewb_BatchTopK": saewb.BatchTopK(d_sae, k),
        "saewb_Matryoshka": saewb.Matryoshka(d_sae, k, widths=(d_sae // 8, d_sae // 2)),
        "saewb_JumpReLU": saewb.JumpReLU(d_sae, l0=0.3, target_l0=k),
    }
    stream = saewb.stream_draws(data, seed=1, batch_tokens=options.batch)
    how = {"batch_tokens": options.batch, "lr": options.lr, "normalization": "none", "device": options.device}
    begin = time.perf_counter()
    run = saewb.train(None, stream, objectives, n_tokens=options.samples, **how)
    run.wait()
    return dict(run.saes), time.perf_counter() - begin


class _AsTheyAre(torch.nn.Module):
    """A dictionary for activations that are drawn whole."""

    def __init__(self, data: SyntheticData) -> None:
        super().__init__()
        self.feature_vectors = data.dictionary.directions

    def forward(self, x):
        """The activations."""
        return x


class _Draws:
    """Activations where sae-lens asks its generator for features."""

    def __init__(self, data: SyntheticData) -> None:
        self.data, self.rng = data, torch.Generator().manual_seed(1)

    def sample(self, n: int):
        """Draw n activations."""
        return self.data(n, self.rng)

    __call__ = sample


def of_sae_lens(
    data: SyntheticData, d_sae: int, k: int, options
) -> tuple[dict[str, saewb.SparseCoder], dict[str, float]]:
    """SAEs by name, trained one after the other, and the seconds of each."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.matryoshka_batchtopk_sae import (
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.synthetic.training import train_toy_sae

    size = {"d_in": data.dictionary.d, "d_sae": d_sae, "k": k, "device": options.device}
    widths = [d_sae // 8, d_sae // 2, d_sae]
    peers = {
        "sae-lens_TopK": TopKTrainingSAE(TopKTrainingSAEConfig(**size)),
        "sae-lens_BatchTopK": BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**size)),
        "sae-lens_Matryoshka": MatryoshkaBatchTopKTrainingSAE(
            MatryoshkaBatchTopKTrainingSAEConfig(**size, matryoshka_widths=widths)
        ),
    }
    saes, took = {}, {}
    for name, peer in peers.items():
        begin = time.perf_counter()
        how = {"training_samples": options.samples, "batch_size": options.batch, "lr": options.lr}
        train_toy_sae(peer, _AsTheyAre(data), _Draws(data), device=options.device, **how)
        took[name] = time.perf_counter() - begin
        with tempfile.TemporaryDirectory() as folder:
            peer.save_inference_model(str(Path(folder) / "sae"))
            saes[name] = saewb.load_sae(Path(folder) / "sae")
    return saes, took


def main() -> None:
    """Train, score and print."""
    parser = arguments(__doc__)
    parser.add_argument("--data", help="what load_synthetic takes; else a generator of saewb's own")
    parser.add_argument("--samples", type=int, default=4_096_000, help="to train on")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--scored", type=int, default=100_000, help="samples to score on")
    options = parser.parse_args()
    n, d = (128, 32) if options.quick else (1024, 256)
    if options.quick:
        options.samples, options.batch, options.scored, options.lr = 65_536, 512, 4_000, 3e-3
    data = load_synthetic(options.data) if options.data else own_data(n, d)
    d_sae = data.dictionary.n_features
    k = max(1, round(len(data.sample(4096).firings) / 4096))
    saes, seconds = of_saewb(data, d_sae, k, options)
    took: dict[str, float] = {}
    if has("sae_lens"):
        peers, took = of_sae_lens(data, d_sae, k, options)
        saes |= peers
    scores = score(data, saes, options.scored, seed=123)
    rows = []
    for name, row in scores.iterrows():
        note = ", ".join(form.format(row[key]) for key, form in FIGURES.items() if key in row and row[key] == row[key])
        rows.append(Row(str(name), took.get(str(name)), note))
    rows.append(Row("saewb, all at once", seconds))
    title = f"{data.dictionary.n_features:,} planted features in {data.dictionary.d} dimensions, k = {k}, "
    title += f"{options.samples:,} samples"
    Report(options).add(Table(title, tuple(rows), "saewb, all at once"))


if __name__ == "__main__":
    main()
