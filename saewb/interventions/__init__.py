"""SAEs in a model's forward pass: attach, steer, ablate; the model is left as it was."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["attachment", "base", "cross_layer", "site", "splice", "steering"]
)
