"""Features on Neuronpedia: links, embedded pages, explanations, lists; and an index in the layout its users know.

Nothing here runs unless called, nothing is sent but the request for a page, and what was fetched is kept on disk.
"""

from __future__ import annotations

import html
import json
import os
import re
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from saewb.errors import FormatError, explain
from saewb.features.feature_json import feature_row

if TYPE_CHECKING:
    from saewb.features.index import FeatureIndex

SITE = "https://www.neuronpedia.org"
_ID = re.compile(r"[\w.-]+/[\w.-]+")
_LARGEST = 32 * 2**20  # bytes of an answer
_SHOWN = "embed=true&embedexplanation=true&embedplots=true&embedtest=false"


@dataclass(frozen=True)
class NeuronpediaPage:
    """One feature's page; shown by a notebook in a frame, from the network."""

    source: str  # "model/source", e.g. "gpt2-small/6-res-jb"
    latent: int  # its number there, which is the latent's index
    site: str = SITE  # without a slash at its end
    height: int = 540  # of the frame, pixels

    @property
    def url(self) -> str:
        """Of the page."""
        return f"{self.site}/{self.source}/{self.latent}"

    def _repr_html_(self) -> str:
        frame = html.escape(f"{self.url}?{_SHOWN}", quote=True)
        link = html.escape(self.url, quote=True)
        return (
            f'<iframe src="{frame}" height="{self.height}" style="width:100%;border:1px solid #8884;border-radius:8px"'
            f' title="Neuronpedia" loading="lazy" sandbox="allow-scripts allow-same-origin allow-popups"></iframe>'
            f'<div><a href="{link}" target="_blank" rel="noopener">{link}</a></div>'
        )


def page(of: Any, latent: int, *, source: str | None = None, site: str = SITE) -> NeuronpediaPage:
    """The page of a latent, as a link and, in a notebook, embedded. Asks nobody anything by itself.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latent: its index.
        source: "model/source" on the site, instead of the one the SAE names.
        site: another one that is laid out alike.

    Returns:
        A NeuronpediaPage: `.url`, and the page itself where a notebook shows it.

    Raises:
        ValueError: if the SAE names no page and `source` is not given, or is not of that form.

    Example:
        >>> page(None, 7, source="gpt2-small/6-res-jb").url
        'https://www.neuronpedia.org/gpt2-small/6-res-jb/7'
    """
    return NeuronpediaPage(source_of(of, source), _checked(latent), site.rstrip("/"))


def source_of(of: Any, source: str | None = None) -> str:
    """The "model/source" of an SAE or index on Neuronpedia.

    Args:
        of: an SAE of the catalogue, or an index of one.
        source: "model/source", which wins.

    Returns:
        "model/source", such as "gpt2-small/6-res-jb".

    Raises:
        ValueError: if it has none, or one of another form.

    Example:
        >>> source_of(None, "gpt2-small/6-res-jb")
        'gpt2-small/6-res-jb'
    """
    from saewb.features.index import FeatureIndex

    found = source
    if found is None and of is not None:
        metadata = {} if isinstance(of, FeatureIndex) else of.cfg.metadata
        known = of.facts.neuronpedia if isinstance(of, FeatureIndex) else metadata.get("neuronpedia_id")
        found = known or metadata.get("neuronpedia")
    fix = "saewb.features.neuronpedia.page(sae, 0, source='gpt2-small/6-res-jb')"
    if found is None:
        raise ValueError(explain(f"{of!r} names no page on Neuronpedia.", want="model/source", fix=fix))
    if not _ID.fullmatch(str(found)):
        raise ValueError(explain(f"{found!r} is no source of Neuronpedia.", want="model/source", fix=fix))
    return str(found)


@dataclass(frozen=True)
class Explanation:
    """What somebody, mostly a language model, took a latent for."""

    latent: int  # its index
    text: str  # the explanation
    by: str  # the model that wrote it, "" if unknown


def explanations(
    of: Any,
    latents: Iterable[int],
    *,
    source: str | None = None,
    site: str = SITE,
    timeout: float = 10.0,
    cache: str | Path | None = None,
    max_age_days: float = 30.0,
) -> dict[int, tuple[Explanation, ...]]:
    """Explanations of latents, from the cache on disk or else from Neuronpedia, one request a latent.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latents: their indices.
        source: "model/source", instead of the one the SAE names.
        site: where to ask.
        timeout: seconds for each request.
        cache: folder; None is `neuronpedia` in saewb's cache folder (SAEWB_CACHE, else XDG_CACHE_HOME/saewb).
        max_age_days: older answers are asked for again, and used still if nobody answers.

    Returns:
        By latent; empty where it has none.

    Raises:
        ConnectionError: in one line, if the site cannot be reached and the cache has no answer.
        FormatError: if the answer is not what the site's API gives.
        ValueError: as `page`.

    Example:
        >>> explanations(None, [], source="gpt2-small/6-res-jb")  # asks for none
        {}
    """
    place = source_of(of, source)
    return {i: _explained(i, _fetched(site, place, i, timeout, cache, max_age_days)) for i in map(_checked, latents)}


def quick_list(of: Any, latents: Sequence[int], name: str, *, source: str | None = None, site: str = SITE) -> str:
    """The address of a page on Neuronpedia with these latents side by side; opened in a browser, it makes the list.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latents: their indices, in the order to show.
        name: of the list.
        source: "model/source", instead of the one the SAE names.
        site: another one that is laid out alike.

    Returns:
        The address; nobody is asked anything.

    Raises:
        ValueError: as `page`; if there are no latents.

    Example:
        >>> quick_list(None, [7, 9], "two", source="gpt2-small/6-res-jb").split("?")[0]
        'https://www.neuronpedia.org/quick-list/'
    """
    model, _, layer = source_of(of, source).partition("/")
    features = [{"modelId": model, "layer": layer, "index": str(_checked(i))} for i in latents]
    if not features:
        raise ValueError(explain("quick_list got no latents.", want="at least one"))
    asked = urllib.parse.urlencode({"name": name, "features": json.dumps(features)}, quote_via=urllib.parse.quote)
    return f"{site.rstrip('/')}/quick-list/?{asked}"


def make_list(
    of: Any,
    latents: Mapping[int, str] | Sequence[int],
    name: str,
    api_key: str,
    *,
    description: str = "",
    source: str | None = None,
    site: str = SITE,
    timeout: float = 30.0,
) -> str:
    """Make a list of latents on Neuronpedia, kept under the account of the key; its address.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latents: their indices, or a description of each by index.
        name: of the list.
        api_key: of your account there; used for this request and not kept.
        description: of the list.
        source: "model/source", instead of the one the SAE names.
        site: where to ask.
        timeout: seconds.

    Returns:
        The list's address.

    Raises:
        ConnectionError: if the site cannot be reached or refuses.
        FormatError: if it answers without an address.
        ValueError: as `page`; if there are no latents.

    Example:
        >>> make_list(None, [], "none", "key", source="gpt2-small/6-res-jb")
        Traceback (most recent call last):
        ...
        ValueError: make_list got no latents.
          want: at least one
    """
    model, _, layer = source_of(of, source).partition("/")
    said = dict(latents) if isinstance(latents, Mapping) else dict.fromkeys(latents, "")
    if not said:
        raise ValueError(explain("make_list got no latents.", want="at least one"))
    features = [
        {"modelId": model, "layer": layer, "index": _checked(i), "description": text} for i, text in said.items()
    ]
    body = {"name": name, "description": description, "features": features}
    url = f"{site.rstrip('/')}/api/list/new-with-features"
    answer = _asked(url, timeout, body, {"x-api-key": api_key})
    if not isinstance(answer.get("url"), str):
        raise FormatError(explain(f"{url} answered without an address: {answer.get('message', answer)!r}."))
    return answer["url"]


def export_json(
    index: FeatureIndex, path: str | Path, latents: Sequence[int] | None = None, *, source: str | None = None
) -> Path:
    """Write features in the JSON that Neuronpedia's API gives and SAEDashboard's exporter writes: one file, a list.

    Of each feature: `modelId, layer, index, maxActApprox, frac_nonzero, freq_hist_data_bar_heights/_values,
    logits_hist_data_bar_heights/_values, pos_str, pos_values, neg_str, neg_values, topkCosSimIndices/Values` and
    `activations`, a list of `tokens, values, maxValue, maxValueTokenIndex, binMin, binMax, binContains`. Bins are those
    of the index: the strongest contexts have binContains -1; sampled ones the span and share of their group.

    Args:
        index: whose features.
        path: of the file.
        latents: which; None means all.
        source: "model/source" to say in it; None: what the index names, else its model and hook.

    Returns:
        The full path.

    Raises:
        ValueError: if there is no such latent.

    Example:
        >>> import saewb, tempfile
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> index = saewb.build_index(model, sae, ["The river flows through the city."] * 20, ctx_len=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export_json(index, f"{folder}/features.json", [748])
        ...     [feature["index"] for feature in json.loads(path.read_text())]
        ['748']
    """
    target = Path(path).expanduser()
    named = source or index.facts.neuronpedia
    model, layer = source_of(None, named).split("/") if named else (index.facts.model, index.facts.hook)
    chosen = range(len(index)) if latents is None else latents
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with fresh.open("w", encoding="utf-8") as out:  # a feature at a time: the file may be larger than memory
            for n, i in enumerate(chosen):
                feature = {"modelId": model, "layer": layer, **feature_row(index.latent(i))}
                out.write(("[\n" if n == 0 else ",\n") + json.dumps(feature, ensure_ascii=False))
            out.write("[]" if not len(chosen) else "\n]\n")
        os.replace(fresh, target)
    finally:
        fresh.unlink(missing_ok=True)
    return target


def _checked(latent: int) -> int:
    if int(latent) != latent or latent < 0:
        raise ValueError(explain(f"got latent {latent!r}.", want="an index, 0 or more"))
    return int(latent)


def _explained(latent: int, said: Any) -> tuple[Explanation, ...]:
    listed = said.get("explanations") or [] if isinstance(said, dict) else None
    if not isinstance(listed, list) or not all(isinstance(x, dict) for x in listed):
        raise FormatError(explain(f"the answer about latent {latent} is not a feature with explanations."))
    found = [(x.get("description"), x.get("explanationModelName")) for x in listed]
    return tuple(Explanation(latent, str(text), str(by or "")) for text, by in found if text)


def _fetched(
    site: str, place: str, latent: int, timeout: float, cache: str | Path | None, max_age_days: float
) -> dict[str, Any]:
    # A file for each site, so that a stand-in's answers are not taken for the real one's.
    host = re.sub(r"\W+", "-", urllib.parse.urlsplit(site).netloc)
    kept = _cache(cache) / host / place / f"{latent}.json"
    if kept.is_file() and time.time() - kept.stat().st_mtime < max_age_days * 86400:
        return json.loads(kept.read_text(encoding="utf-8"))
    try:
        said = _asked(f"{site.rstrip('/')}/api/feature/{place}/{latent}", timeout)
    except ConnectionError:
        if kept.is_file():
            return json.loads(kept.read_text(encoding="utf-8"))
        raise
    kept.parent.mkdir(parents=True, exist_ok=True)
    fresh = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}")
    fresh.write_text(json.dumps({"explanations": said.get("explanations")}), encoding="utf-8")
    os.replace(fresh, kept)
    return said


def _asked(
    url: str, timeout: float, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    said = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "saewb", **headers}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=said)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            read = answer.read(_LARGEST + 1)
    except (urllib.error.HTTPError, urllib.error.URLError, TimeoutError, OSError) as error:
        why = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", error)
        raise ConnectionError(f"Neuronpedia did not answer ({why}): {url}") from error
    try:
        said = json.loads(read) if len(read) <= _LARGEST else None
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise FormatError(explain(f"{url} answered something that is no feature.", want="a JSON object"))
    return said


def _cache(folder: str | Path | None) -> Path:
    if folder is not None:
        return Path(folder).expanduser()
    if own := os.environ.get("SAEWB_CACHE"):
        return Path(own).expanduser() / "neuronpedia"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saewb" / "neuronpedia"
