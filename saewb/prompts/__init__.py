"""One prompt: active latents, next tokens, generation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "generate",
        "next_tokens",
        "prompt_latents",
    ],
)
