"""Token rows and streams of activations to train and evaluate on."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "cache",
        "chats",
        "documents",
        "packing",
        "shuffle_buffer",
        "sources",
        "stream",
        "tokens",
    ],
)
