"""One prompt: active latents, next tokens, generation; and whether steering works: scores of latents, sweeps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "generate",
        "next_tokens",
        "prompt_latents",
        "steered_texts",
        "steering_judge",
        "steering_scores",
        "steering_sweep",
    ],
)
