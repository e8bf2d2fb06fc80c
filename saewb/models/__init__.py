"""Language models of TransformerLens: load, hook points, forward passes, tokenizer, unembedding."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "capture",
        "forward",
        "gguf",
        "hook_points",
        "load",
        "shared_copy",
        "tokenizer",
        "unembed",
    ],
)
