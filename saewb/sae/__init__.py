"""Sparse autoencoders: configurations, architectures, sparse latents."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "activation_functions",
        "base",
        "config",
        "cross_layer",
        "crosscoder",
        "matching_pursuit",
        "random_sae",
        "sae",
        "sparse",
        "temporal",
    ],
)
