"""Bundled tiny language model, an SAE on it, and texts, to try everything without a network.

The model writes English sentences and knows few facts; the SAE's metrics are under "held_out" in `sae/cfg.json`.
`python -m saewb.tiny.make` builds all of it from scratch. The texts are Wikipedia's (CC BY-SA 4.0): see ATTRIBUTION.md.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from saewb.errors import explain

if TYPE_CHECKING:
    import torch

    from saewb.sae.sae import SAE

_HERE = Path(__file__).parent
TEXT_FILE = "texts.json.gz"


@dataclass(frozen=True)
class Document:
    """The lead section of a Wikipedia article, lightly cleaned (ATTRIBUTION.md says how)."""

    title: str
    """Title of the article, which is also the attribution: https://en.wikipedia.org/wiki/<title>."""
    text: str
    """Plain text, one paragraph."""
    topic: str
    """One of 12: Wikipedia's list of vital articles it comes from, or "Uncategorized"."""
    held_out: bool
    """True: neither tokenizer, model nor SAE was trained on it."""


def texts() -> list[Document]:
    """The bundled texts: about 2,000 article leads, topics in equal shares as far as there are enough.

    Example:
        >>> sorted(texts(), key=lambda d: len(d.text))[-1].topic in {d.topic for d in texts()}
        True
    """
    return list(_texts())


def held_out_texts() -> list[Document]:
    """The texts that neither the tokenizer, the model nor the SAE was trained on, for unbiased metrics.

    Example:
        >>> len(held_out_texts()) >= 100
        True
    """
    return [document for document in _texts() if document.held_out]


def folder(what: Literal["model", "sae", "transcoders"]) -> Path:
    """The folder of the bundled model (a Hugging Face directory), SAE or transcoders (SAELens layout, one per layer).

    Args:
        what: "model", "sae" or "transcoders".

    Returns:
        A folder of the installed package; read only.

    Raises:
        ValueError: for anything else.

    Example:
        >>> folder("sae").joinpath("cfg.json").exists()
        True
    """
    if what not in ("model", "sae", "transcoders"):
        raise ValueError(explain(f"nothing called {what!r} is bundled.", want="'model', 'sae' or 'transcoders'"))
    return _HERE / what


def transcoders(device: torch.device | str = "cpu") -> list[SAE]:
    """The bundled transcoders of the four MLPs of `load_model("tiny")`, for `saewb.attribution_graph`.

    Args:
        device: of the parameters.

    Returns:
        Four SAEs, the first layer's first, float32.

    Example:
        >>> transcoders()[3]
        SAE(topk k=16, 128 -> 768 latents -> 128, blocks.3.mlp.hook_in => blocks.3.hook_mlp_out, tiny, float32 on cpu)
    """
    import torch

    from saewb.pretrained.load import load_sae

    folders = sorted(folder("transcoders").iterdir())
    return [load_sae(one, dtype=torch.float32, device=device) for one in folders if one.is_dir()]


@cache
def _texts() -> tuple[Document, ...]:
    return tuple(Document(**row) for row in json.loads(gzip.decompress((_HERE / TEXT_FILE).read_bytes())))
