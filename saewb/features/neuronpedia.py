"""Features on Neuronpedia: links, embedded pages, explanations, lists, graphs, and export in its JSON format.

Nothing is sent except the request for a page, list or graph, and answers are cached on disk. A redirect to another host
is not followed, so that an API key reaches only the site it is meant for.
"""

from __future__ import annotations

import html
import json
import re
import reprlib
import time
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saewb._files import atomic_write, write_text
from saewb._http import HTTPRefusal, put_bytes, request_json
from saewb._indices import indices_of
from saewb.errors import FormatError, explain
from saewb.features.index import FeatureIndex
from saewb.features.labels import Explanation, Explanations
from saewb.features.latent import Latent
from saewb.models.load import cache_folder

SITE = "https://www.neuronpedia.org"
_ID = re.compile(r"(?!\.+/)[\w.-]+/(?!\.+$)[\w.-]+")  # names of folders too: neither of them is "..", or "."
_MAX_QUICK = 150  # latents that the site's quick-list page shows; it answers "not found" to more
_MAX_BYTES = 32 * 2**20  # of an answer
_MAX_GRAPH = 100 * 2**20  # bytes of a graph that the site takes
_SLUG = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?")
_EMBED_OPTIONS = "embed=true&embedexplanation=true&embedplots=true&embedtest=false"


@dataclass(frozen=True)
class NeuronpediaPage:
    """Page of one feature, which a notebook shows in a frame, from the network."""

    source: str
    """"model/source", e.g. "gpt2-small/6-res-jb"."""
    latent: int
    """Index of the latent."""
    site: str = SITE
    """Address of the site, without a slash at its end."""
    height: int = 540
    """Height of the frame in pixels."""

    @property
    def url(self) -> str:
        """Address of the page."""
        return f"{self.site}/{self.source}/{self.latent}"

    def _repr_html_(self) -> str:
        frame = html.escape(f"{self.url}?{_EMBED_OPTIONS}", quote=True)
        link = html.escape(self.url, quote=True)
        return (
            f'<iframe src="{frame}" height="{self.height}" style="width:100%;border:1px solid #8884;border-radius:8px"'
            f' title="Neuronpedia" loading="lazy" sandbox="allow-scripts allow-same-origin allow-popups"></iframe>'
            f'<div><a href="{link}" target="_blank" rel="noopener">{link}</a></div>'
        )


def page(of: Any, latent: int, *, source: str | None = None, site: str = SITE) -> NeuronpediaPage:
    """Page of a latent on Neuronpedia, as a link and, in a notebook, embedded; sends no request itself.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latent: index of the latent.
        source: "model/source" on the site, instead of the one in the SAE's metadata.
        site: address of a site of the same structure.

    Returns:
        A NeuronpediaPage: `.url`, and the page itself where a notebook shows it.

    Raises:
        ValueError: if neither the SAE nor `source` names a page, or `source` is not of that form.

    Example:
        >>> page(None, 7, source="gpt2-small/6-res-jb").url
        'https://www.neuronpedia.org/gpt2-small/6-res-jb/7'
    """
    return NeuronpediaPage(
        source_of(of, source), _latents(of if source is None else None, [latent])[0], site.rstrip("/")
    )


def source_of(of: Any, source: str | None = None) -> str:
    """Find the "model/source" of an SAE or index on Neuronpedia.

    Args:
        of: an SAE of the catalogue, or an index of one.
        source: "model/source", which takes precedence.

    Returns:
        "model/source", such as "gpt2-small/6-res-jb".

    Raises:
        ValueError: if there is none, or it is of another form.

    Example:
        >>> source_of(None, "gpt2-small/6-res-jb")
        'gpt2-small/6-res-jb'
    """
    if source is None and isinstance(of, FeatureIndex):
        source = of.info.neuronpedia
    elif source is None and of is not None:
        source = of.cfg.metadata.get("neuronpedia_id") or of.cfg.metadata.get("neuronpedia")
    fix = "saewb.features.neuronpedia.page(sae, 0, source='gpt2-small/6-res-jb')"
    if source is None:
        raise ValueError(explain(f"{of!r} names no page on Neuronpedia.", want="model/source", fix=fix))
    if not _ID.fullmatch(str(source)):
        raise ValueError(explain(f"{source!r} is no source of Neuronpedia.", want="model/source", fix=fix))
    return str(source)


def explanations(
    of: Any,
    latents: Iterable[int],
    *,
    source: str | None = None,
    site: str = SITE,
    timeout: float = 10.0,
    cache: str | Path | None = None,
    max_age_days: float = 30.0,
) -> Explanations:
    """Get explanations of latents from the cache on disk, or else from Neuronpedia, by one request per latent.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latents: indices of the latents.
        source: "model/source", instead of the one in the SAE's metadata.
        site: address of the site.
        timeout: seconds for each request, from its start to the end of the answer.
        cache: folder; None is `neuronpedia` in saewb's cache folder (SAEWB_CACHE, else XDG_CACHE_HOME/saewb).
        max_age_days: older answers in the cache are requested again, and used only if the site cannot be reached.

    Returns:
        Explanations, by latent in their order: `method` is "neuronpedia:TYPE" of the site, `judge` the model that
        wrote it. None of a latent without any, or without a page. `index.with_labels` shows them everywhere.

    Raises:
        ConnectionError: in one line, if the site cannot be reached or refuses, and the cache has no answer. Answers
            that came before are in the cache.
        FormatError: if the answer is not in the format of the site's API.
        ValueError: as `page`.

    Example:
        >>> explanations(None, [], source="gpt2-small/6-res-jb")  # no request
        Explanations(0 of 0 latents)
    """
    indices, source = _latents(of if source is None else None, latents), source_of(of, source)
    answers = ((i, _fetch(site, source, i, timeout, cache, max_age_days)) for i in indices)
    return Explanations(record for i, answer in answers for record in _parse_explanations(i, answer))


def quick_list(of: Any, latents: Sequence[int], name: str, *, source: str | None = None, site: str = SITE) -> str:
    """Address of a page on Neuronpedia with these latents side by side; a browser that opens it creates the list.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latents: indices of the latents, in the order of the page.
        name: of the list.
        source: "model/source", instead of the one in the SAE's metadata.
        site: address of a site of the same structure.

    Returns:
        The address; no request is sent.

    Raises:
        ValueError: as `page`; if there are no latents, or more than the 150 that the page shows.

    Example:
        >>> quick_list(None, [7, 9], "two", source="gpt2-small/6-res-jb").split("?")[0]
        'https://www.neuronpedia.org/quick-list/'
    """
    model, _, layer = source_of(of, source).partition("/")
    features = [{"modelId": model, "layer": layer, "index": str(i)} for i in _latents(of, latents)]
    if not features:
        raise ValueError(explain("quick_list got no latents.", want="at least one"))
    if len(features) > _MAX_QUICK:
        fix = "saewb.features.neuronpedia.make_list(sae, latents, name, api_key)"
        what = f"quick_list got {len(features)} latents."
        raise ValueError(explain(what, want=f"{_MAX_QUICK} at most: the site shows no more at an address", fix=fix))
    query = urllib.parse.urlencode({"name": name, "features": json.dumps(features)}, quote_via=urllib.parse.quote)
    return f"{site.rstrip('/')}/quick-list/?{query}"


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
    """Create a list of latents on Neuronpedia, in the account of the key, and return its address.

    Args:
        of: an SAE of the catalogue, an index of one, or None where `source` is given.
        latents: indices of the latents, or a description of each by index.
        name: of the list.
        api_key: of your account; used for this request and not stored.
        description: of the list.
        source: "model/source", instead of the one in the SAE's metadata.
        site: address of the site.
        timeout: seconds for the request.

    Returns:
        The address of the list.

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
    is_described = isinstance(latents, Mapping)
    numbers = _latents(of, list(latents) if is_described else latents)
    descriptions = dict(zip(numbers, latents.values() if is_described else [""] * len(numbers), strict=True))
    if not descriptions:
        raise ValueError(explain("make_list got no latents.", want="at least one"))
    features = [{"modelId": model, "layer": layer, "index": i, "description": text} for i, text in descriptions.items()]
    body = {"name": name, "description": description, "features": features}
    url = f"{site.rstrip('/')}/api/list/new-with-features"
    return _address(url, _request(url, timeout, body, api_key))


def upload_graph(
    graph: Any, slug: str, api_key: str, *, scan: str | None = None, site: str = SITE, timeout: float = 120.0
) -> str:
    """Upload an attribution graph to Neuronpedia, to the account of the key, and return its address.

    Three requests: one for a signed address, one that puts the graph there (without the key), one that enters it.

    Args:
        graph: an AttributionGraph; prune it first.
        slug: name of the graph in its address: lower-case letters, digits and hyphens. One of your own that is there
            already is replaced.
        api_key: of your account; used for these requests and not stored.
        scan: name of the model there, e.g. "gemma-2-2b"; None means that of the graph.
        site: address of the site.
        timeout: seconds for each request.

    Returns:
        The address of the graph.

    Raises:
        ConnectionError: if the site, or the storage that it names, cannot be reached or refuses.
        FormatError: if it answers without an address.
        ValueError: for another kind of slug; a graph of more than 100 MB.

    Example:
        >>> upload_graph(None, "My graph", "key")
        Traceback (most recent call last):
        ...
        ValueError: got slug='My graph'.
          want: lower-case letters, digits and hyphens
          fix:  slug='my-graph'
    """
    if not _SLUG.fullmatch(slug):
        fix = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-") or "graph"
        want = "lower-case letters, digits and hyphens"
        raise ValueError(explain(f"got slug={slug!r}.", want=want, fix=f"slug={fix!r}"))
    content = graph.to_json(slug=slug, scan=scan).encode()
    if len(content) > _MAX_GRAPH:
        what = f"{graph!r} is {len(content) / 2**20:,.0f} MB of JSON."
        raise ValueError(explain(what, want=f"at most {_MAX_GRAPH // 2**20} MB", fix="graph.pruned()"))
    root = f"{site.rstrip('/')}/api/graph"
    body = {"filename": f"{slug}.json", "contentLength": len(content), "contentType": "application/json"}
    signed = _request(f"{root}/signed-put", timeout, body, api_key)
    url, request_id = signed.get("url"), signed.get("putRequestId")
    if not (isinstance(url, str) and url.startswith(("https://", "http://")) and isinstance(request_id, str)):
        words = signed.get("message", reprlib.repr(sorted(signed)))
        raise FormatError(explain(f"{root}/signed-put answered without an address to put to: {words!r}."))
    put_bytes(url, content, timeout, site="the storage of Neuronpedia")
    return _address(
        f"{root}/save-to-db", _request(f"{root}/save-to-db", timeout, {"putRequestId": request_id}, api_key)
    )


def _address(url: str, answer: Mapping[str, Any]) -> str:
    """The address in an answer."""
    address = answer.get("url")
    if not isinstance(address, str) or not address.startswith(("https://", "http://")):
        words = answer.get("message", reprlib.repr(answer))
        raise FormatError(explain(f"{url} answered without an address: {words!r}."))
    return address


def export_json(
    index: FeatureIndex, path: str | Path, latents: Sequence[int] | None = None, *, source: str | None = None
) -> Path:
    """Write features as one JSON list, in the format of Neuronpedia's API and SAEDashboard's exporter.

    Each feature has `modelId, layer, index, maxActApprox, frac_nonzero, freq_hist_data_bar_heights/_values,
    logits_hist_data_bar_heights/_values, pos_str, pos_values, neg_str, neg_values, topkCosSimIndices/Values` and
    `activations`, a list of `tokens, values, maxValue, maxValueTokenIndex, minValue, binMin, binMax, binContains`. Bins
    are those of the index: top contexts have binMin and binContains -1, by which the site's page finds them, sampled
    ones the range and fraction of their group.

    Args:
        index: index of the features.
        path: of the file.
        latents: indices of the latents; None means all.
        source: "model/source" in the file; None means that of the index, else its model and hook.

    Returns:
        The path of the file.

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
    source = source or index.info.neuronpedia
    model, layer = source_of(None, source).split("/") if source else (index.info.model, index.info.hook)
    exported = range(len(index)) if latents is None else _latents(index, latents)

    def fill(path: Path) -> None:
        with path.open("w", encoding="utf-8") as out:  # one feature at a time: the file may be larger than memory
            for n, i in enumerate(exported):
                feature = {"modelId": model, "layer": layer, **_feature_json(index.latent(i))}
                out.write(("[\n" if n == 0 else ",\n") + json.dumps(feature, ensure_ascii=False))
            out.write("[]" if not len(exported) else "\n]\n")

    target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, fill)
    return target


def _feature_json(latent: Latent) -> dict[str, Any]:
    """Convert a latent to the keys of `export_json`, except model and layer."""
    page = latent.to_dict()
    activations = [_activation(c, -1.0, latent.max, -1.0) for c in page["top"]]
    for group in reversed(page["groups"]):
        values = [abs(c["acts"][c["at"]]) for c in group]
        activations += [_activation(c, min(values), max(values), 1 / len(page["groups"])) for c in reversed(group)]
    values = {"index": str(latent.index), "maxActApprox": latent.max, "frac_nonzero": latent.density}
    for name, histogram in (("freq_hist", page["histogram"]), ("logits_hist", page["logits"])):
        values[f"{name}_data_bar_heights"] = histogram["counts"] if histogram else []
        values[f"{name}_data_bar_values"] = _bin_centers(**histogram) if histogram else []
    for sign, words in (("pos", page["raised"]), ("neg", page["lowered"])):
        values[f"{sign}_str"], values[f"{sign}_values"] = [w[0] for w in words], [w[2] for w in words]
    values["topkCosSimIndices"] = [latent for latent, *_ in page["by_decoder"]]
    values["topkCosSimValues"] = [cosine for _, cosine, _ in page["by_decoder"]]
    return values | {"activations": activations}


def _bin_centers(low: float, high: float, counts: Sequence[int]) -> list[float]:
    return [low + (i + 0.5) * (high - low) / len(counts) for i in range(len(counts))]


def _activation(context: Mapping[str, Any], low: float, high: float, share: float) -> dict[str, Any]:
    acts = context["acts"]
    largest = max(range(len(acts)), key=lambda j: abs(acts[j]))
    return {
        "tokens": context["tokens"],
        "values": acts,
        "maxValue": acts[largest],
        "maxValueTokenIndex": largest,
        "minValue": min(acts),
        "binMin": low,
        "binMax": high,
        "binContains": share,
    }


def _latents(of: Any, latents: Any) -> list[int]:
    """Indices of latents, or a mask of those of the SAE or index, as a list."""
    indices = indices_of(latents, "latents", _d_sae(of)).tolist()
    if min(indices, default=0) < 0:
        raise ValueError(explain(f"got latent {min(indices)}.", want="an index, 0 or more"))
    return indices


def _d_sae(of: Any) -> int | None:
    """Number of latents of an SAE or index; None where there is neither, or an SAE of several layers."""
    d_sae = of.info.d_sae if isinstance(of, FeatureIndex) else None if of is None else of.cfg.d_sae
    return d_sae if isinstance(d_sae, int) else None


def _parse_explanations(latent: int, answer: Any) -> tuple[Explanation, ...]:
    entries = answer.get("explanations") or [] if isinstance(answer, dict) else None
    if not isinstance(entries, list) or not all(isinstance(x, dict) for x in entries):
        raise FormatError(explain(f"the answer about latent {latent} is not a feature with explanations."))
    names = ("description", "typeName", "explanationModelName")
    triples = [[str(x.get(name) or "") for name in names] for x in entries]
    return tuple(Explanation(latent, text, f"neuronpedia:{kind}".rstrip(":"), by) for text, kind, by in triples if text)


def _fetch(
    site: str, source: str, latent: int, timeout: float, cache: str | Path | None, max_age_days: float
) -> dict[str, Any]:
    # A folder per site, so that answers of different sites are not confused.
    host = re.sub(r"\W+", "-", urllib.parse.urlsplit(site).netloc)
    file = _cache_folder(cache) / host / source / f"{latent}.json"
    url = f"{site.rstrip('/')}/api/feature/{source}/{latent}"
    cached = _read_cached(file, url)
    if cached is not None and time.time() - file.stat().st_mtime < max_age_days * 86400:
        return cached
    try:
        answer = _request(url, timeout)
    except ConnectionError as error:
        if isinstance(error, HTTPRefusal) and error.code == 404 and error.words:  # in its own words: no such page
            answer = {}
        elif cached is not None:
            return cached
        else:
            raise
    _parse_explanations(latent, answer)  # an answer of another form is not cached
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"url": url, "explanations": answer.get("explanations")}))
    return answer


def _read_cached(file: Path, url: str) -> dict[str, Any] | None:
    """A cached answer of this address; None if there is none, it does not say of which it is, or it is damaged."""
    try:
        answer = json.loads(file.read_text(encoding="utf-8"))
        _parse_explanations(0, answer)
    except (OSError, ValueError, RecursionError):
        return None
    return answer if answer.get("url") == url else None


def _request(url: str, timeout: float, body: Mapping[str, Any] | None = None, api_key: str = "") -> dict[str, Any]:
    headers = {"x-api-key": api_key} if api_key else {}
    how = {"site": "Neuronpedia", "max_bytes": _MAX_BYTES, "secret": api_key}
    return request_json(url, timeout, body, headers, **how)


def _cache_folder(folder: str | Path | None) -> Path:
    return cache_folder() / "neuronpedia" if folder is None else Path(folder).expanduser()
