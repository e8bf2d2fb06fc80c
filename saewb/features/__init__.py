"""The feature index: what every latent of an SAE does, on text and by its weights, kept on disk.

    index = saewb.build_index(model, sae, texts, folder="my.index")
    index.latent(748); index.table(); index.search("physicist"); index.save_html("features.html")

- `build` runs the pass, `firings` the SAE, `gather` keeps what an index is made of: `shelf` the best contexts of each
  latent, `counts` what adds up. `weights`, `nearest` and `loss_effects` need no stream;
  `together` says which latents fire on the same tokens.
- `feature_index` shows it, by `latent` (a page), `overview` (the table), `searching`; `words` and `store` keep it.
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
