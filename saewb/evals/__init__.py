"""Evaluate SAEs: losses of the model with them, reconstruction, firing, absorption, recovered concepts, comparison."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "absorption",
        "comparison",
        "diffing",
        "evaluation",
        "linear_probe",
        "meta_sae",
        "model_losses",
        "published",
        "result",
        "scr_tpp",
        "spelling",
    ],
)
