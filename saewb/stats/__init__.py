"""Statistics of directions, of correlation matrices and of which latents fire together. Nothing here needs a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "coactivation",
        "cooccurrence",
        "correlation",
        "correlation_map",
        "firing",
        "sampling",
        "superposition",
    ],
)
