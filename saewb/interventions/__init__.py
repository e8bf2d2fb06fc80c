"""SAEs in a model's forward pass: attach, steer, ablate; the model is left as it was."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["attachment", "base", "change", "cross_layer", "positions", "site", "splice", "steering"]
)
