"""saewb: the workbench for sparse autoencoders of language models, in the notebook.

    import saewb

    model, sae = saewb.load_model("tiny"), saewb.load_sae("tiny")
    with saewb.attach(model, sae) as attached:
        logits = model("The Eiffel Tower is in")
    saewb.evaluate(model, sae, [document.text for document in saewb.tiny.held_out_texts()])

The public names stand in `__init__.pyi` and are resolved on first use: `import saewb` takes milliseconds and loads
nothing else. Each folder below is one room; a room imports only from the lines under it, and `errors` from anywhere
(`tests/test_architecture.py` holds this):

    cli, demo, diagnostics          the command line: saewb demo, eval, train, lab, doctor
    tiny/                           the bundled model, SAE and texts, and how they were made
    evals/                          how good an SAE is: losses with it, reconstruction, absorption, recovered concepts
    prompts/                        one prompt: active latents, next tokens, chats, generation; does steering work
    probing/                        contrasts of two sets of texts, sparse probes, directions and neurons as latents
    explanations/                   latents in words: explain and score with a language model
    circuits/                       how the model got to a token: attribution, frozen model, graphs, interventions
    features/                       the feature index: contexts, histograms, logit effects, search, HTML page
    training/                       train, checkpoints, resume; objectives/ and the hand-written sparse_step/
    interventions/                  attach, steer, ablate; where an SAE reads and writes (site)
    data/                           documents -> token rows -> streams of activations, buffers, caches on disk
    synthetic/                      data whose features are known, and how many of them an SAE recovers
    models/                         load a model, hook points, forward passes, tokenizer, unembedding
    stats/                          firing, superposition, correlation, coactivation, the correlation map
    pretrained/                     find, download, read, write and share SAEs; catalogue/ and formats/
    sae/                            SAE architectures, their configurations, SparseLatents
    kernels/                        fast exact products: top-k, selection in low precision; knows no SAE
    metrics, hub, distributed       reconstruction metrics; Hugging Face Hub; torch.distributed
    _files, _display, _http         atomic files; tables; JSON requests
    _indices, _finite               index arguments and masks as integers; checks for infinities and NaN
    _config                         frozen dataclasses that check their fields
    fingerprint                     of which SAE, model, tokens and settings something on disk is
    errors                          error messages that say what to type
"""

from __future__ import annotations

from typing import Any

import lazy_loader

__version__ = "0.1.0"

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _attribute(name)
    from saewb.errors import near

    close = ", ".join(near(name, __all__))
    raise AttributeError(f"module 'saewb' has no attribute {name!r}; {f'near: {close}' if close else 'see dir(saewb)'}")
