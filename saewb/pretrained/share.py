"""Publish SAEs on the Hugging Face Hub with a model card: architecture, training, figures, loading code."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saewb.errors import explain
from saewb.pretrained.formats.saelens.config import EXTENSIONS
from saewb.pretrained.formats.saelens.write import to_file
from saewb.pretrained.load import save_sae
from saewb.pretrained.resolve import REPO, inside
from saewb.sae.matching_pursuit import PursuitSAE
from saewb.sae.sae import SAE
from saewb.sae.temporal import TemporalSAE

AnySAE = SAE | PursuitSAE | TemporalSAE

# Keys of an SAE's metadata about its training, and their words in the model card.
_TRAINING_KEYS = {
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
_LOCAL = re.compile(r"(?:~?[/\\]|file:|[A-Za-z]:[/\\]|\.{1,2}[/\\])[^\n]*\Z")  # text that begins as a path on a machine
_ARCHITECTURES = {"SAE": "", "PursuitSAE": "matching pursuit", "TemporalSAE": "temporal"}
_CENTERED = (
    "With sae-lens, load the language model with `center_writing_weights=True`: it was trained on such activations. "
    "saewb centers them itself."
)


def push_to_hub(
    sae: AnySAE | Mapping[str, AnySAE],
    repo_id: str,
    id: str | None = None,
    *,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload SAEs to a repository of the hub in one commit; `load_sae(repo_id, id)` and sae-lens load them.

    The repository is created if it does not exist. Unless it has a model card already, it gets one: the architecture of
    the SAEs, their training as far as their metadata describes it, figures, and the code that loads them.

    Args:
        sae: one SAE, or several by folder of the repository.
        repo_id: "owner/name".
        id: folder of a single SAE; None means its hook's name.
        figures: numbers for the card, by folder and name, e.g. {"blocks.8.hook_resid_pre": {"l0": 60.2}}.
        private: whether a new repository is private.
        revision: an existing branch; None means "main".
        token: of the hub; None means that of the login.
        commit_message: None means one that names the SAEs.

    Returns:
        The address of the commit.

    Raises:
        ValueError: if `repo_id` or an id is no such name, if there is neither an id nor a hook, if the layout cannot
            express one of them (nothing is then pushed), or if `figures` names another folder.
        huggingface_hub.errors.HfHubHTTPError: if the hub refuses the upload.
    """
    if not REPO.fullmatch(repo_id):
        raise ValueError(explain(f"push_to_hub got repo_id={repo_id!r}.", want="'owner/name'"))
    saes = {folder: _without_paths(one) for folder, one in _by_folder(sae, id).items()}
    stray = sorted(set(figures or {}) - set(saes))
    if stray:
        raise ValueError(explain(f"push_to_hub got figures for {stray}.", want=f"folders of this push: {list(saes)}"))
    with tempfile.TemporaryDirectory() as upload:
        for folder, one in saes.items():
            save_sae(one, Path(upload) / folder)
        return _upload(Path(upload), saes, repo_id, figures or {}, private, revision, token, commit_message)


def _by_folder(sae: AnySAE | Mapping[str, AnySAE], id: str | None) -> dict[str, AnySAE]:
    if not isinstance(sae, Mapping):
        return {inside(id or sae.cfg.hook or ""): sae}
    if id is not None or not sae:
        raise ValueError(
            explain(f"push_to_hub got {len(sae)} SAEs by folder and id={id!r}.", want="at least one, and no id besides")
        )
    return {inside(folder): one for folder, one in sae.items()}


def _without_paths(sae: AnySAE) -> AnySAE:
    """The SAE with the last part only of each local path in its configuration, which would be published."""
    return sae.with_config(model=_last_part(sae.cfg.model), metadata=_last_part(dict(sae.cfg.metadata)))


def _last_part(value: Any) -> Any:
    """Plain values with absolute local paths cut down to their last part."""
    if isinstance(value, str) and _LOCAL.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    if isinstance(value, Mapping):
        return {key: _last_part(item) for key, item in value.items()}
    return [_last_part(item) for item in value] if isinstance(value, (list, tuple)) else value


def _upload(
    folder: Path,
    saes: Mapping[str, AnySAE],
    repo_id: str,
    figures: Mapping[str, Mapping[str, Any]],
    private: bool,
    revision: str | None,
    token: str | None,
    commit_message: str | None,
) -> str:
    from huggingface_hub import HfApi, ModelCard

    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    if not api.file_exists(repo_id, "README.md", revision=revision):
        ModelCard(model_card(saes, repo_id, figures)).save(folder / "README.md")
    first = next(iter(saes))
    message = f"{first}: {saes[first]!r}" if len(saes) == 1 else f"{len(saes)} SAEs: {', '.join(saes)}"[:200]
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message or message
    )
    return commit.commit_url


def model_card(saes: Mapping[str, AnySAE], repo_id: str, figures: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the model card of a repository as Markdown, from the SAEs' configurations and `figures` only.

    Args:
        saes: SAEs by folder.
        repo_id: "owner/name".
        figures: numbers by folder and name.
    """
    from huggingface_hub import ModelCardData

    saes = {folder: _without_paths(sae) for folder, sae in saes.items()}
    models = sorted({sae.cfg.model for sae in saes.values() if sae.cfg.model})
    data = ModelCardData(
        library_name="saewb",
        tags=["sparse-autoencoder", "saewb", "saelens"],
        base_model=models[0] if len(models) == 1 and REPO.fullmatch(models[0]) else None,
    )
    of = _one_line(" and ".join(models)) or "a language model"
    head = ["---", data.to_yaml(), "---", f"# {repo_id.split('/')[1]}", ""]
    head += [f"Sparse autoencoders of {of}, one per folder, SAELens layout.", ""]
    parts = (
        _architecture_table(saes),
        _training_list(saes),
        _figure_table(saes, figures),
        _loading_code(saes, repo_id),
    )
    return "\n".join([*head, *(line for part in parts for line in part), ""])


def _one_line(text: str) -> str:
    """A text that ends neither its line nor a block of code."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("```", "` ` `")


def _markdown_table(titles: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [[_one_line(str(cell)).replace("|", "\\|") for cell in row] for row in (titles, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|--" * len(titles) + "|", *lines[1:], ""]


def _architecture_table(saes: Mapping[str, AnySAE]) -> list[str]:
    rows: list[list[Any]] = []
    for folder, sae in saes.items():
        cfg = sae.cfg
        activation = _ARCHITECTURES.get(type(sae).__name__) or cfg.activation
        activation += f" k={cfg.k}" if getattr(cfg, "k", None) is not None else ""
        activation += "" if cfg.normalization == "none" else f", {cfg.normalization}"
        dtype = str(sae.dtype).removeprefix("torch.")
        rows.append([folder, cfg.hook or "", cfg.hook_out or cfg.hook or "", activation, cfg.d_in, cfg.d_sae, dtype])
    return _markdown_table(["folder", "reads", "writes", "activation", "d_in", "latents", "dtype"], rows)


def _training_list(saes: Mapping[str, AnySAE]) -> list[str]:
    by_key: dict[str, dict[str, str]] = {}
    for folder, sae in saes.items():
        for key, words in _TRAINING_KEYS.items():
            value = sae.cfg.metadata.get(key)
            if value not in (None, {}, []):
                by_key.setdefault(words, {})[folder] = _one_line(_format_value(key, value))
    lines = [] if by_key else ["Their files do not say."]
    for words, values in by_key.items():
        if len(set(values.values())) == 1 and len(values) == len(saes):
            lines.append(f"- {words}: {next(iter(values.values()))}")
        else:
            lines += [f"- {words}, {folder}: {value}" for folder, value in values.items()]
    return ["## How they were trained", "", *lines, ""]


def _format_value(key: str, value: Any) -> str:
    if key == "source" and isinstance(value, Mapping):
        return f"{value.get('repo')}/{value.get('path')} at {value.get('commit') or value.get('revision')}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {json.dumps(v, default=str)}" for name, v in value.items() if v is not None)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure_table(saes: Mapping[str, AnySAE], figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Table of `figures` and of metrics in the metadata: "held_out" of saewb, or "l0" of sae-lens."""
    numbers = {}
    for folder, sae in saes.items():
        metadata = sae.cfg.metadata
        held_out = metadata.get("held_out", {"l0": metadata["l0"]} if "l0" in metadata else {})
        numbers[folder] = {**(held_out if isinstance(held_out, Mapping) else {}), **figures.get(folder, {})}
    names = list(dict.fromkeys(name for row in numbers.values() for name in row))
    if not names:
        return []
    rows = [
        [folder, *("" if row.get(name) is None else _format_value(name, row[name]) for name in names)]
        for folder, row in numbers.items()
    ]
    return ["## Figures", "", *_markdown_table(["folder", *names], rows)]


def _loading_code(saes: Mapping[str, AnySAE], repo_id: str) -> list[str]:
    folder, sae = next(iter(saes.items()))
    lines = ["## Loading", "", "```python", "import saewb"]
    lines += [f"sae = saewb.load_sae({repo_id!r}, {folder!r})   # {_one_line(repr(sae))}", "```", ""]
    if isinstance(sae, SAE) and to_file(sae)[0] in EXTENSIONS:
        return [*lines, f"sae-lens has no {to_file(sae)[0]!r} and cannot load it."]
    lines += ["or with sae-lens:", "", "```python", "from sae_lens import SAE"]
    lines += [f"sae = SAE.from_pretrained(release={repo_id!r}, sae_id={folder!r})", "```"]
    return [*lines, *([_CENTERED] if sae.cfg.normalization == "centered" else [])]
