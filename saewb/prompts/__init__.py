"""One prompt: active latents, next tokens, attribution."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "attribution",
        "attribution_nodes",
        "direct_logit",
        "generate",
        "next_tokens",
        "prompt_latents",
    ],
)
