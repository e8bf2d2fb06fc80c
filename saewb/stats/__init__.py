"""Statistics of directions, firing, co-firing and correlation. Nothing here needs a language model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "coactivation",
        "correlation",
        "correlation_map",
        "firing",
        "intervals",
        "sampling",
        "superposition",
    ],
)
