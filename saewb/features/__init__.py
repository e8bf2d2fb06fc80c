"""The feature index: contexts, statistics, logit effects and neighbors of every latent of an SAE, on disk.

    index = saewb.build_index(model, sae, texts, folder="my.index")
    index.latent(748); index.table(); index.search("physicist"); index.save_html("features.html")

- Building: `build` runs the model, `accumulate` collects contexts (`top_contexts`), counts and coactivation;
  `logit_effects` and `neighbors` need only the weights, `jacobian_lens` the model's gradients on some text.
- Reading: `index` is the public face of `latent` (one latent), `ranking` (the table), `search`, `html` (the page).
- On disk: `storage`, with `config` (sizes and source) and `token_texts`.
- Further analyses: `neuronpedia`, `enrichment` of `token_sets`, `correlation`.
"""

import lazy_loader

from saewb.features.build import build_index
from saewb.features.index import FeatureIndex, load_index
from saewb.features.latent import Coactive, Context, Histogram, Latent, Logit, Neighbor, PositionDensity

__all__ = [
    "Coactive",
    "Context",
    "FeatureIndex",
    "Histogram",
    "Latent",
    "Logit",
    "Neighbor",
    "PositionDensity",
    "build_index",
    "load_index",
]

__getattr__, _, _ = lazy_loader.attach(
    __name__, submodules=["neuronpedia", "token_sets", "enrichment", "html", "correlation"]
)
