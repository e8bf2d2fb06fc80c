"""Evaluate SAEs: losses of the model with them, reconstruction, firing."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submodules=["diffing", "evaluation", "model_losses", "result"]
)
