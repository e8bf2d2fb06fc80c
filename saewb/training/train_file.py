"""`saewb train config.yaml`: a run as a file.

model: tiny                              # as for saewb.load_model
tokens: {files: [corpus.txt.gz]}         # or {embedded: true}, {cache: folder}; separator: between documents
held_out: {files: [other.txt]}           # as tokens; may be left out
saes:
  wide: {objective: TopK, d_sae: 4096, k: 32, hook: blocks.2.hook_resid_post}
  transcoder: {objective: TopK, d_sae: 4096, hook: blocks.2.mlp.hook_in, hook_out: blocks.2.hook_mlp_out}
n_tokens: 2_000_000
folder: runs/first                       # resumed if there is a run in it
lr: 3e-4                                 # and any other option of saewb.train
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import saewb
from saewb.distributed import Team
from saewb.errors import explain, near

_KNOWN = ("model", "tokens", "held_out", "saes", "n_tokens", "folder", "device", "dtype")


def train_file(path: Path) -> Any:
    """Start, or go on with, the run that a file describes.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError, TypeError: for what the file should not say, or lacks.
    """
    asked = _read(path)
    for name in ("tokens", "saes", "n_tokens", "folder"):
        if name not in asked:
            raise ValueError(explain(f"{path} has no {name!r}.", want="model, tokens, saes, n_tokens, folder"))
    folder = Path(asked["folder"]).expanduser()
    cached = "cache" in _mapping(asked["tokens"], "tokens")
    model = (
        None if cached and "model" not in asked else saewb.load_model(asked.get("model", "tiny"), asked.get("dtype"))
    )
    tokens = _documents(asked["tokens"], "tokens")
    held_out = _documents(asked["held_out"], "held_out") if "held_out" in asked else None
    if Team.joined().told((folder / "run.json").exists()):  # one answer for all processes
        return saewb.resume_run(folder, model=model, tokens=tokens, held_out=held_out, n_tokens=asked["n_tokens"])
    saes = {name: _trainee(name, said) for name, said in _mapping(asked["saes"], "saes").items()}
    rest = {k: _number(v) for k, v in asked.items() if k not in _KNOWN}
    device = asked.get("device")
    return saewb.train(
        model, tokens, saes, n_tokens=asked["n_tokens"], folder=folder, held_out=held_out, device=device, **rest
    )


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(explain(f"no file {str(path)!r}.", want="a YAML file", fix="saewb train config.yaml"))
    try:
        return dict(_mapping(yaml.safe_load(path.read_text(encoding="utf-8")), str(path)))
    except yaml.YAMLError as error:
        raise ValueError(explain(f"{path} is no YAML: {error}.", want="name: value, a line each")) from error


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(explain(f"{what} is {value!r}.", want="names with values"))
    return value


def _documents(said: Any, what: str) -> Any:
    said = _mapping(said, what)
    kinds = [kind for kind in ("files", "embedded", "cache") if kind in said]
    if len(kinds) != 1 or set(said) - {"files", "embedded", "cache", "separator"}:
        raise ValueError(explain(f"{what} has {', '.join(said)}.", want="one of files, embedded, cache; separator"))
    if kinds == ["cache"]:
        return saewb.ActivationCache(said["cache"])
    if kinds == ["files"]:
        return saewb.TextFiles(said["files"], **({"separator": said["separator"]} if "separator" in said else {}))
    held_out = {document.text for document in saewb.tiny.held_out_texts()}
    if what == "held_out":
        return sorted(held_out)
    return [document.text for document in saewb.tiny.texts() if document.text not in held_out]


def _trainee(name: str, said: Any) -> Any:
    fields = {key: _number(value) for key, value in _mapping(said, f"saes: {name}").items()}
    known = saewb.training.objectives.OBJECTIVES
    kind = fields.pop("objective", None)
    if kind not in known:
        raise ValueError(explain(f"{name} has objective {kind!r}.", near=near(str(kind), known), want=", ".join(known)))
    own = {"read": fields.pop("hook", None), "write": fields.pop("hook_out", None)}
    own |= {key: fields.pop(key) for key in ("lr", "seed") if key in fields}
    return saewb.Trainee(known[kind](**fields), **own)


def _number(value: Any) -> Any:
    """YAML reads 3e-4 as text; a list as one that can be changed."""
    if isinstance(value, list):
        return tuple(_number(item) for item in value)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
