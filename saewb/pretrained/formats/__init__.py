"""Layouts of published SAEs, one module each: `detect` finds the layout of a folder or file, `read` reads it.

A layout is a subclass of `Layout`; add a new one to `LAYOUTS`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from saewb.errors import FormatError, explain, near
from saewb.pretrained.formats import crosscoder, saelens
from saewb.pretrained.formats._layout import Layout, Provenance
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats.attention_hook_z import AttentionHookZ
from saewb.pretrained.formats.circuit_tracer import CircuitTracerCrossLayer, CircuitTracerTranscoder
from saewb.pretrained.formats.crosscoder import (
    CrossCoderLayout,
    DictionaryLearningCrossCoder,
    DictionaryLearningCrossCoderCheckpoint,
    ReplicationCrossCoder,
)
from saewb.pretrained.formats.dictionary_learning import DictionaryLearning
from saewb.pretrained.formats.gemma_scope import GemmaScope
from saewb.pretrained.formats.gemma_scope_2 import GemmaScope2, GemmaScope2CrossLayer
from saewb.pretrained.formats.linear_pt import DeepSeekR1, Goodfire
from saewb.pretrained.formats.llama_scope import LlamaScope, LlamaScopeR1
from saewb.pretrained.formats.openai import OpenAI
from saewb.pretrained.formats.qwen_scope import QwenScope
from saewb.pretrained.formats.saelens import SAELens
from saewb.pretrained.formats.sparsify import Sparsify
from saewb.pretrained.formats.temporal import Temporal
from saewb.sae.crosscoder import CrossCoderSAE

__all__ = [
    "LAYOUTS",
    "Layout",
    "Provenance",
    "TensorFile",
    "absence",
    "detect",
    "files_of",
    "is_readable",
    "patterns",
    "read",
    "write",
]

# Libraries whose files saewb does not read, by names of their tensors.
_UNREADABLE = {"lm_saes 2 (llamascopium)": {"W_E", "b_E", "W_D", "b_D"}}

# In order of precedence: `detect` returns the first that matches.
LAYOUTS: list[Layout] = [
    SAELens(),
    CrossCoderLayout(),
    DictionaryLearningCrossCoder(),
    DictionaryLearningCrossCoderCheckpoint(),
    ReplicationCrossCoder(),
    Sparsify(),
    DictionaryLearning(),
    GemmaScope2CrossLayer(),
    CircuitTracerCrossLayer(),
    CircuitTracerTranscoder(),
    QwenScope(),
    OpenAI(),
    DeepSeekR1(),
    GemmaScope(),
    GemmaScope2(),
    LlamaScope(),
    LlamaScopeR1(),
    Temporal(),
    AttentionHookZ(),
    Goodfire(),
]


def detect(path: Path) -> Layout:
    """Find the layout of a folder or file.

    Args:
        path: an existing folder or file.

    Returns:
        The first of `LAYOUTS` whose `detect` is true.

    Raises:
        FormatError: if there is none; the message lists the files and the known layouts.
    """
    path = Path(path)
    if (layout := _first_match(path)) is not None:
        return layout
    raise FormatError(_unknown_layout(path))


def _unknown_layout(path: Path) -> str:
    """Message about a folder or file of no known layout: an SAE inside, or the tensors there are, or all layouts."""
    what, inner = f"the file {path}", []
    names: list[str] = []
    if path.is_dir():
        names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
        inner = [name.rstrip("/") for name in names if is_readable(path / name)]
        more = f" and {len(names) - 12} more" if len(names) > 12 else ""
        what = f"{path} has {', '.join(names[:12]) or 'no files'}{more}"
    if inner:
        want = f"one of its {len(inner)} SAEs: {', '.join(inner[:6])}" + (", ..." if len(inner) > 6 else "")
        fix = f"saewb.load_sae({str(path)!r}, {inner[0]!r})"
        return explain(f"no layout that saewb knows: {what}.", want=want, fix=fix)
    file = next(filter(None, map(_open, [path, *(path / name for name in names)])), None)
    if file is None:
        want = "; ".join(layout.description for layout in LAYOUTS)
        return explain(f"no layout that saewb knows: {what}.", want=want)
    sizes = [f"{name} {list(file.shape(name))}" for name in file.names]
    tensors = ", ".join(sizes[:8]) + (f" and {len(sizes) - 8} more" if len(sizes) > 8 else "")
    library = next((name for name, marks in _UNREADABLE.items() if marks <= set(file.names)), None)
    is_of = f", which is of {library}" if library else ""
    return explain(
        f"no layout that saewb knows: {what}{is_of}. {file.path.name} holds {tensors}.",
        want="a published layout, or an SAE made of these tensors",
        fix="saewb.SAE.from_tensors(saewb.SAEConfig(d_in=..., d_sae=...), {'W_enc': ..., 'b_enc': ..., 'W_dec': ..., "
        "'b_dec': ...})",
    )


def _open(path: Path) -> TensorFile | None:
    """A file with tensors; None for any other."""
    try:
        file = TensorFile(path)
    except (FormatError, OSError):
        return None
    return file if file.names else None


def is_readable(path: Path) -> bool:
    """Whether any layout recognizes this folder or file."""
    return _first_match(path) is not None


def _first_match(path: Path) -> Layout | None:
    return next((layout for layout in LAYOUTS if layout.detect(path)), None)


def patterns(path: str, format: str | None = None) -> list[str]:
    """Patterns of a repository's files that hold an SAE.

    Args:
        path: folder or file in the repository.
        format: name of its layout in the catalogue's `format` column; None means any layout.
    """
    layouts = (layout for layout in LAYOUTS if format is None or format in layout.aliases)
    return [pattern for layout in layouts for pattern in layout.patterns(path)]


def read(
    path: Path,
    provenance: Provenance | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Read the SAE in a folder or file of any layout.

    Args:
        path: an existing folder or file.
        provenance: information beyond the files.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Returns:
        One of saewb's SAE classes.

    Raises:
        FormatError: if it is of no known layout, or does not fit its layout.
    """
    return detect(path).read(path, provenance, dtype=dtype, device=device)


def files_of(sae: Any) -> tuple[str, ...]:
    """Names of the files that `write` writes for this SAE."""
    return crosscoder.FILES if isinstance(sae, CrossCoderSAE) else saelens.FILES


def write(sae: Any, folder: Path, *, overwrite: bool = False) -> Path:
    """Write an SAE atomically: a crosscoder in saewb's own layout, any other in the SAELens layout.

    Args:
        sae: any of saewb's classes except CrossLayerTranscoder.
        folder: new or empty; its parent exists.
        overwrite: replace an SAE in the folder. A folder with any other files is never replaced.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError, ValueError, TypeError: as `saelens.write` and `crosscoder.write`.
    """
    layout = crosscoder if isinstance(sae, CrossCoderSAE) else saelens
    return layout.write(sae, folder, overwrite=overwrite)


def absence(repo: str, path: str, names: Iterable[str]) -> str:
    """Error text for a folder of a repository without an SAE; lists folders that have one.

    Args:
        repo: "owner/name".
        path: requested folder; "" for the root.
        names: names of all files of the repository.
    """
    marks = {mark for layout in LAYOUTS for mark in layout.marks}
    folders = sorted({str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name in marks} - {"."})
    neighbors = near(path, folders) or folders[:3]
    where = f"in folder {path!r}" if path else "at its top"
    return explain(
        f"the hub repository {repo} has no SAE {where} ({len(folders)} folders with one).",
        near=neighbors,
        want="" if neighbors else "; ".join(layout.description for layout in LAYOUTS),
        fix=f"saewb.load_sae({repo!r}, {neighbors[0]!r})" if neighbors else "",
    )
