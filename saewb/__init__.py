"""saewb: the workbench for sparse autoencoders of language models, in the notebook.

    import saewb

    model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
    with saewb.attach(model, sae) as attached:
        logits = model("The Eiffel Tower is in")
    saewb.evaluate(model, sae, [document.text for document in saewb.embedded.held_out_texts()])

The public names are resolved on first use, so that `import saewb` takes milliseconds and does nothing else.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {  # public name: the module that has it
    "FormatError": "errors",
    "doctor": "checkup",
    "SAE": "sae",
    "SAEConfig": "sae",
    "TopLatents": "sae",
    "CrossLayerConfig": "cross_layer",
    "CrossLayerTranscoder": "cross_layer",
    "PursuitConfig": "pursuit",
    "PursuitSAE": "pursuit",
    "TemporalConfig": "temporal",
    "TemporalSAE": "temporal",
    "Attachment": "attachment",
    "attach": "attachment",
    "attachments": "attachment",
    "detach_all": "attachment",
    "Steering": "interventions",
    "steer": "interventions",
    "ablate": "interventions",
    "NewToken": "generation",
    "generate_tokens": "generation",
    "next_token_changes": "generation",
    "Attribution": "attribution",
    "attribute": "attribution",
    "attribute_edges": "attribution",
    "PromptReading": "prompt_reading",
    "read_prompt": "reading",
    "read_in_turn": "reading",
    "NextTokens": "predictions",
    "next_tokens": "predictions",
    "Evaluation": "evals",
    "LatentFigures": "evaluation",
    "evaluate": "evals",
    "evaluate_many": "evals",
    "load_model": "models",
    "token_strings": "models",
    "load_sae": "loading",
    "save_sae": "loading",
    "push_to_hub": "sharing",
    "pack": "tokens",
    "superposition": "stats.superposition",
    "correlation_stats": "stats.correlation",
    "random_correlation": "stats.correlation",
    "random_low_rank_correlation": "stats.correlation",
    "LowRankCorrelation": "stats.correlation",
    "CorrelatedNormals": "stats.sampling",
    "coactivation": "stats.coactivation",
    "CoactivationStream": "stats.coactivation",
    "Coactivation": "stats.coactivation",
    "MatrixView": "stats.matrix_view",
    "matrix_view": "stats.matrix_view",
    "latent_matrix": "latent_pairs",
    "enrich": "enrichment",
    "token_sets": "token_kinds",
    "token_texts": "token_kinds",
    "tokens_where": "token_kinds",
    "TextFiles": "documents",
    "stream_tokens": "token_streams",
    "Activations": "activations",
    "ActivationStream": "streams",
    "stream_activations": "streams",
    "stream_tensors": "streams",
    "stream_iterable": "streams",
    "stream_draws": "streams",
    "ActivationCache": "activation_cache",
    "cache_activations": "activation_cache",
    "Standard": "objectives",
    "Gated": "objectives",
    "TopK": "objectives",
    "AbsTopK": "objectives",
    "BatchTopK": "objectives",
    "Matryoshka": "objectives",
    "JumpReLU": "objectives",
    "MatchingPursuit": "objectives",
    "train": "launch",
    "resume_run": "launch",
    "Run": "runs",
    "PastRun": "past_run",
    "read_run": "past_run",
    "run_curves": "past_run",
    "run_densities": "past_run",
    "TrainOption": "outlook",
    "training_options": "outlook",
    "training_memory": "outlook",
    "training_code": "outlook",
    "TrainConfig": "training",
    "Trainee": "training",
    "Training": "training",
    "TrainStep": "training",
    "catalogue": "releases",
    "load_config": "loading",
    "FeatureIndex": "index",
    "build_index": "index",
    "load_index": "index",
}
_MODULES = (
    "embedded",
    "errors",
    "evals",
    "hooks",
    "metrics",
    "models",
    "neuronpedia",
    "objectives",
    "releases",
    "sae",
    "sinks",
    "synthetic",
    "tokens",
    "training",
)

__all__ = [*_HOME, *_MODULES]  # no public name may also be a module's: importing the module would hide it


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from saewb.field_notes import described

        return described(getattr(importlib.import_module(f"saewb.{_HOME[name]}"), name))
    if name in _MODULES:
        return importlib.import_module(f"saewb.{name}")
    from saewb.errors import near

    close = ", ".join(near(name, __all__))
    raise AttributeError(f"module 'saewb' has no attribute {name!r}; {f'near: {close}' if close else 'see dir(saewb)'}")


def __dir__() -> list[str]:
    return sorted(__all__)
