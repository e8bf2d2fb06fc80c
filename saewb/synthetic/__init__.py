"""Synthetic activations with known features: directions, firing, magnitudes, correlation and hierarchy.

data = SyntheticData(random_dictionary(1024, 256), zipfian(1024))
sample = data.sample(4096, torch.Generator().manual_seed(0))      # .activations [samples, d], .firings (SparseLatents)
recovery(sae, data, n_samples=100_000)                            # how well an SAE recovers the features
score(data, {"mine": sae})                                        # the same of several, beside a random and a true one
absorption(data, sae)                                             # whether children swallow their parents
"""

from __future__ import annotations

from saewb.synthetic.absorption import HierarchyAbsorption, absorption
from saewb.synthetic.data import Sample, SyntheticData, load_synthetic
from saewb.synthetic.dictionary import FeatureDictionary, matched_sae, orthogonalized, random_dictionary
from saewb.synthetic.firing_patterns import Magnitudes, constant, linear, random, zipfian
from saewb.synthetic.hierarchy import Hierarchy, Node, random_hierarchy
from saewb.synthetic.recovery import (
    Recovery,
    RecoveryStream,
    best_matches,
    best_ordering,
    mean_correlation_coefficient,
    ordered_cosines,
    recovery,
    uniqueness,
)
from saewb.synthetic.score import score

__all__ = [
    "FeatureDictionary",
    "Hierarchy",
    "HierarchyAbsorption",
    "Magnitudes",
    "Node",
    "Recovery",
    "RecoveryStream",
    "Sample",
    "SyntheticData",
    "absorption",
    "best_matches",
    "best_ordering",
    "constant",
    "linear",
    "load_synthetic",
    "matched_sae",
    "mean_correlation_coefficient",
    "ordered_cosines",
    "orthogonalized",
    "random",
    "random_dictionary",
    "random_hierarchy",
    "recovery",
    "score",
    "uniqueness",
    "zipfian",
]
