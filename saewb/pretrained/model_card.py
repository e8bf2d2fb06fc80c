"""The card of a repository of SAEs: what they are, how they were trained, how good they are, how to load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# What of an SAE's metadata says how it was made, and the words for it.
_TRAINING = {
    "training_architecture": "trained as",
    "dataset_path": "data set",
    "context_size": "context length (tokens)",
    "training_tokens": "training tokens",
    "n_training_tokens": "training tokens",
    "trained_with": "trained with",
    "prepend_bos": "BOS in front of each context",
    "seqpos_slice": "positions",
    "exclude_special_tokens": "special tokens left out",
    "training_architecture_details": "settings",
    "source": "made from",
}
_ARCHITECTURES = {"SAE": "", "PursuitSAE": "matching pursuit", "TemporalSAE": "temporal"}


def model_card(saes: Mapping[str, Any], repo_id: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The README.md of a repository, as Markdown. Nothing is in it that the SAEs or `figures` do not say.

    Args:
        saes: by folder.
        repo_id: "owner/name".
        figures: for each folder, numbers by name.
    """
    models = sorted({sae.cfg.model for sae in saes.values() if sae.cfg.model})
    head = ["---", "library_name: saewb", "tags: [sparse-autoencoder, saewb, saelens]"]
    head += [f"base_model: {models[0]}"] if len(models) == 1 and "/" in models[0] else []
    text = [*head, "---", f"# {repo_id.split('/')[1]}", ""]
    text += [
        f"Sparse autoencoders of {' and '.join(models) or 'a language model'}, one per folder, SAELens layout.",
        "",
    ]
    return "\n".join([*text, *_table(saes), *_trained(saes), *_figures(saes, figures), *_loading(saes, repo_id), ""])


def _table(saes: Mapping[str, Any]) -> list[str]:
    rows = ["| folder | reads | writes | activation | d_in | latents | dtype |", "|--|--|--|--|--|--|--|"]
    for folder, sae in saes.items():
        cfg = sae.cfg
        activation = _ARCHITECTURES.get(type(sae).__name__) or cfg.activation
        activation += f" k={cfg.k}" if getattr(cfg, "k", None) is not None else ""
        scaling = getattr(cfg, "normalization", "none")
        activation += "" if scaling == "none" else f", {scaling}"
        dtype = str(sae.dtype).removeprefix("torch.")
        cells = (folder, cfg.hook or "", cfg.hook_out or cfg.hook or "", activation, cfg.d_in, cfg.d_sae, dtype)
        rows.append("| " + " | ".join(map(_cell, cells)) + " |")
    return [*rows, ""]


def _trained(saes: Mapping[str, Any]) -> list[str]:
    found: dict[str, dict[str, str]] = {}
    for folder, sae in saes.items():
        for key, words in _TRAINING.items():
            value = sae.cfg.metadata.get(key)
            if value not in (None, {}, []):
                found.setdefault(words, {})[folder] = _plain(key, value)
    lines = ["## How they were trained", ""]
    if not found:
        return [*lines, "Their files do not say.", ""]
    for words, values in found.items():
        different = sorted(set(values.values()))
        if len(different) == 1 and len(values) == len(saes):
            lines.append(f"- {words}: {different[0]}")
        else:
            lines += [f"- {words}, {folder}: {value}" for folder, value in values.items()]
    return [*lines, ""]


def _plain(key: str, value: Any) -> str:
    if key == "source" and isinstance(value, Mapping):
        return f"{value.get('repo')}/{value.get('path')} at {value.get('commit') or value.get('revision')}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {json.dumps(v, default=str)}" for name, v in value.items() if v is not None)
    return str(value)


def _figures(saes: Mapping[str, Any], figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    known = {folder: {**_own_figures(sae.cfg.metadata), **figures.get(folder, {})} for folder, sae in saes.items()}
    names = list(dict.fromkeys(name for row in known.values() for name in row))
    if not names:
        return []
    rows = ["## Figures", "", "| folder | " + " | ".join(names) + " |", "|--" * (len(names) + 1) + "|"]
    for folder, row in known.items():
        rows.append("| " + " | ".join([_cell(folder), *(_cell(_number(row.get(name))) for name in names)]) + " |")
    return [*rows, ""]


def _own_figures(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What the SAE itself says of how good it is: metadata's "held_out", or the l0 that sae-lens notes."""
    held_out = metadata.get("held_out", {name: metadata[name] for name in ("l0",) if name in metadata})
    return dict(held_out) if isinstance(held_out, Mapping) else {}


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _loading(saes: Mapping[str, Any], repo_id: str) -> list[str]:
    folder, sae = next(iter(saes.items()))
    lines = ["## Loading", "", "```python", "import saewb"]
    lines += [f"sae = saewb.load_sae({repo_id!r}, {folder!r})   # {sae!r}", "```", ""]
    if getattr(sae.cfg, "is_transcoder", False) and getattr(sae.cfg, "k", None) is not None:
        return [*lines, "sae-lens has no top-k transcoders and cannot load it."]
    note = "" if getattr(sae.cfg, "normalization", "none") != "centered" else _CENTERED
    return [
        *lines,
        "or with sae-lens:",
        "",
        "```python",
        "from sae_lens import SAE",
        f"sae = SAE.from_pretrained(release={repo_id!r}, sae_id={folder!r})",
        "```",
        *([note] if note else []),
    ]


_CENTERED = (
    "With sae-lens, load the language model with `center_writing_weights=True`: it was trained on such activations. "
    "saewb centers them itself."
)
