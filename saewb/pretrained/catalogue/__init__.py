"""Catalogue of published SAEs: 13,857 SAEs of 170 releases, as in sae-lens 6.54.12, with corrections.

The data is releases.jsonl, one release per line; where it differs from sae-lens, the `note` of that line explains why.
It is read on first use, and a look-up of one release parses its line only.

- `find(release, id)` is one SAE; `releases()` are the names; `ids(release)` those of one.
- `catalogue(...)` is the filtered table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from saewb.errors import explain, near
from saewb.pretrained.catalogue._expand import expand
from saewb.pretrained.catalogue.search import catalogue

__all__ = ["PublishedSAE", "at", "catalogue", "find", "ids", "lines", "releases"]


@dataclass(frozen=True)
class PublishedSAE:
    """Entry of one published SAE: all that is known without its files."""

    release: str
    """Name of its release."""
    id: str
    """Name of the SAE in the release."""
    repo: str
    """Repository on the hub, "owner/name"."""
    path: str
    """Folder or file in the repository."""
    format: str
    """Layout of the files, by the name of its reader in sae-lens; "sae_lens" for its own."""
    model: str
    """Language model, by its name on the hub."""
    hook: str
    """Hook point the SAE reads."""
    layer: int
    """Layer of that hook point."""
    d_in: int
    """Width of its input."""
    dtype: str
    """dtype of the published weights, e.g. "float32"."""
    hook_out: str | None = None
    """Hook point the SAE writes; None means `hook`."""
    d_sae: int | None = None
    """Number of latents, where it is known."""
    l0: float | None = None
    """Mean number of active latents per token."""
    l0_is: str = "measured"
    """Whether `l0` is "measured", or the "target" of training."""
    architecture: str | None = None
    """One of "relu", "jumprelu", "topk", "gated", "temporal"."""
    neuronpedia: str | None = None
    """Id on Neuronpedia, "model/source"; latents have pages neuronpedia.org/model/source/<latent>."""
    norm_factor: float | None = None
    """Factor that multiplied its training inputs."""
    variance_explained: float | None = None
    """Fraction of variance explained, as its authors report it."""
    bytes: int | None = None
    """Size of the weights, estimated from shapes and dtype."""
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Corrections of the configuration in its files, by the keys of SAELens' cfg.json."""
    links: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Web addresses of model, paper and so on."""
    note: str = ""
    """Differences from sae-lens, and other remarks."""


def lines() -> Iterator[str]:
    """Lines of the data file, one release each, as JSON that begins with its name."""
    return iter((files("saewb.pretrained.catalogue") / "releases.jsonl").read_text(encoding="utf-8").splitlines())


def releases() -> list[str]:
    """The names of all releases, sorted.

    Example:
        >>> len(releases()), releases()[0]
        (170, 'deepseek-r1-distill-llama-8b-qresearch')
    """
    return [_name(line) for line in lines()]


def ids(release: str) -> list[str]:
    """The ids of a release, in the order of publication.

    Raises:
        ValueError: if there is no such release; with similar names.

    Example:
        >>> ids("gpt2-small-res-jb")[:2]
        ['blocks.0.hook_resid_pre', 'blocks.1.hook_resid_pre']
    """
    return expand(_spec(release))["id"]


def find(release: str, id: str | None) -> PublishedSAE:
    """Find a published SAE by release and id.

    Raises:
        ValueError: if there is no such release, or no such id in it; with similar names and the corrected call.

    Example:
        >>> entry = find("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
        >>> entry.repo, entry.l0, entry.neuronpedia, entry.bytes
        ('jbloom/GPT2-Small-SAEs-Reformatted', 60.0, 'gpt2-small/8-res-jb', 151096320)
    """
    spec = _spec(release)
    published = _published(spec, "id", id)
    if published is None:
        known = expand(spec)["id"]
        close = near(id, known) if id else []
        what = f"the release {release!r} has no SAE {id!r}." if id else f"got the release {release!r} and no id."
        some = f"one of its {len(known)} ids, e.g. {', '.join(known[:6])}"
        fix = f"saewb.load_sae({release!r}, {(close or known)[0]!r})"
        raise ValueError(explain(what, near=close, want="" if close else some, fix=fix))
    return published


def at(repo: str, path: str) -> PublishedSAE | None:
    """Find the SAE at a path on the hub: the first entry of the catalogue with that path, or None.

    Example:
        >>> at("jbloom/GPT2-Small-SAEs-Reformatted", "blocks.8.hook_resid_pre").release
        'gpt2-small-res-jb'
    """
    specs = (json.loads(line) for line in lines() if f'"repo":"{repo}"' in line)
    return next((published for spec in specs if (published := _published(spec, "path", path)) is not None), None)


_DEFAULTS = {"format": "sae_lens", "dtype": "float32"}
_SHARED = (
    *("release", "repo", "format", "model", "d_in", "dtype", "l0_is"),
    *("architecture", "overrides", "links", "note"),
)


def _published(spec: Mapping[str, Any], column: str, value: str | None) -> PublishedSAE | None:
    """The first SAE of a release with this value in a column; None if there is none."""
    columns = expand(spec)
    if value not in columns[column]:
        return None
    row = columns[column].index(value)
    shared = {name: spec[name] for name in _SHARED if name in spec}
    return PublishedSAE(**_DEFAULTS | shared, **{name: values[row] for name, values in columns.items()})


def _name(line: str) -> str:
    return line.split('"', 4)[3]


def _spec(release: str) -> dict[str, Any]:
    for line in lines():
        if _name(line) == release:
            return json.loads(line)
    what = f"no release named {release!r} in the catalogue ({len(releases())} releases)."
    fix = "saewb.catalogue()  # lists all; saewb.catalogue(model=...) those of one model"
    raise ValueError(explain(what, near=near(release, releases()), fix=fix))
