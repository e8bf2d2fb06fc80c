"""The catalogue as a filtered table; a name that matches nothing is an error that lists similar ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from saewb.errors import explain, near
from saewb.pretrained.catalogue._expand import WIDTHS, expand, width

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = (
    *("release", "id", "model", "site", "layer", "d_sae", "l0", "l0_is", "architecture", "neuronpedia", "repo", "path"),
    *("format", "hook", "hook_out", "d_in", "bytes", "dtype", "norm_factor", "variance_explained", "label"),
)
_WHOLE = ("layer", "d_sae", "d_in", "bytes")
_REAL = ("l0", "norm_factor", "variance_explained")
_DEFAULTS = {"format": "sae_lens", "dtype": "float32", "l0_is": "measured"}


def catalogue(
    model: str | None = None,
    *,
    release: str | None = None,
    site: str | None = None,
    layer: int | Iterable[int] | None = None,
    width: str | int | None = None,
    l0: float | tuple[float, float] | None = None,
    architecture: str | None = None,
    neuronpedia: str | bool | None = None,
    nearest_l0: float | None = None,
) -> pd.DataFrame:
    """Table of the published SAEs that match, one per row: all 13,857 without arguments.

    `l0` is measured by the authors, or the target of training, see `l0_is`. `bytes` is estimated from shapes and dtype.
    Neither was checked against the files. A missing value is not published.

    Args:
        model: its name on the hub, the last part of it, or the name that TransformerLens has for it.
        release: a release's name.
        site: "resid_pre", "resid_mid", "resid_post", "attn_out", "z", "mlp_out", "embed" or "transcoder".
        layer: a number, or several.
        width: number of latents, as a number or a label such as "16k" (2**14).
        l0: exactly this, or (least, most), both included.
        architecture: "relu", "jumprelu", "topk", "gated" or "temporal".
        neuronpedia: True for those with pages on Neuronpedia, False for those without, or one such id or address.
        nearest_l0: keep only the SAE of nearest l0 among those that differ in nothing else.

    Returns:
        A DataFrame with columns release, id, model, site, layer, d_sae, l0, ...; `load_sae(row.release, row.id)`.

    Raises:
        ValueError: for a name that is nowhere in the catalogue; with similar names. Names that exist, but not together,
            give an empty table.
        TypeError: for a layer that is not a number.

    Example:
        >>> saes = catalogue(model="gemma-2-2b", site="resid_post", layer=20, width="16k", nearest_l0=70)
        >>> saes[["release", "id", "path"]].iloc[-1].tolist()
        ['gemma-scope-2b-pt-res-canonical', 'layer_20/width_16k/canonical', 'layer_20/width_16k/average_l0_71']
    """
    table = _table()
    if model is not None:
        table = table[_model_mask(table, model)]
    for name, value in (("release", release), ("site", _site(site)), ("architecture", architecture)):
        if value is not None:
            table = table[_checked_column(table, name, value) == value]
    if layer is not None:
        table = table[table["layer"].isin(_layers(layer))]
    if width is not None:
        table = table[(table["d_sae"] == _latents(width)).fillna(False).astype(bool)]
    if l0 is not None:
        least, most = (l0, l0) if isinstance(l0, (int, float)) else l0
        table = table[table["l0"].between(least, most)]
    if neuronpedia is not None:
        table = table[_neuronpedia_mask(table, neuronpedia)]
    if nearest_l0 is not None:
        table = _nearest(table, nearest_l0)
    return table.reset_index(drop=True)


def _table() -> pd.DataFrame:
    import pandas as pd

    text = (files("saewb.pretrained.catalogue") / "releases.jsonl").read_text(encoding="utf-8")
    specs = [json.loads(line) for line in text.splitlines()]
    rows = [expand(spec) for spec in specs]
    counts = [len(one["id"]) for one in rows]
    columns: dict[str, pd.Series] = {}
    for name in _COLUMNS:
        if name == "site":
            columns[name] = _series(name, [site for one in rows for site in _sites(one["hook"], one["hook_out"])])
        elif name in rows[0]:
            columns[name] = _series(name, list(itertools.chain.from_iterable(one[name] for one in rows)))
        else:  # one value per release
            shared = _series(name, [spec.get(name, _DEFAULTS.get(name)) for spec in specs])
            columns[name] = shared.repeat(counts).reset_index(drop=True)
    columns["l0_is"] = columns["l0_is"].where(columns["l0"].notna())
    return pd.DataFrame(columns)


def _series(name: str, values: list[Any]) -> pd.Series:
    import pandas as pd

    return pd.Series(values, dtype="Int64" if name in _WHOLE else "float64" if name in _REAL else None)


def _sites(hooks: Sequence[str], outs: Sequence[str | None]) -> list[str]:
    last = {hook: hook.rpartition(".")[2].removeprefix("hook_") for hook in set(hooks)}
    return ["transcoder" if out else last[hook] for hook, out in zip(hooks, outs, strict=True)]


def _site(site: str | None) -> str | None:
    return None if site is None else site.rpartition(".")[2].removeprefix("hook_")


def _unknown(name: str, value: object, values: Iterable[str]) -> ValueError:
    values = sorted(set(values))
    close = near(str(value), values)
    want = "" if close else ", ".join(values[:12]) + (f" and {len(values) - 12} more" if len(values) > 12 else "")
    fix = f"saewb.catalogue({name}={close[0]!r})" if close else ""
    return ValueError(
        explain(f"catalogue got {name}={value!r}, which nothing in it has.", near=close, want=want, fix=fix)
    )


def _checked_column(table: pd.DataFrame, name: str, value: str) -> pd.Series:
    if not (table[name] == value).any():
        everywhere = _table()[name].dropna()
        if not (everywhere == value).any():
            raise _unknown(name, value, everywhere)
    return table[name]


def _model_mask(table: pd.DataFrame, model: str) -> pd.Series:
    pairs = table[["model", "label"]].drop_duplicates().itertuples(index=False)
    name = model.lower().removeprefix("openai-community/")
    matches = [m for m, label in pairs if name in (m.lower(), m.rpartition("/")[2].lower(), str(label).lower())]
    mask = table["model"].isin(matches)
    if not mask.any():
        names = [*table["model"].unique(), *table["model"].str.rpartition("/")[2].unique(), *table["label"].dropna()]
        raise _unknown("model", model, names)
    return mask


def _layers(layer: int | Iterable[int]) -> list[int]:
    several = [layer] if isinstance(layer, (int, str)) else list(layer)
    if any(not isinstance(one, int) for one in several):
        fix = f"layer={int(layer)}" if isinstance(layer, str) and layer.isdecimal() else "layer=[5, 12, 20]"
        raise TypeError(explain(f"catalogue got layer={layer!r}.", want="a number, or several", fix=fix))
    return several


def _latents(label: str | int) -> int:
    if isinstance(label, int):
        return label
    if label.lower() not in WIDTHS and not label.isdecimal():
        raise _unknown("width", label, WIDTHS)
    return width(label.lower())


def _neuronpedia_mask(table: pd.DataFrame, neuronpedia: str | bool) -> pd.Series:
    if isinstance(neuronpedia, bool):
        return table["neuronpedia"].notna() == neuronpedia
    page = neuronpedia.partition("neuronpedia.org/")[2] or neuronpedia
    page = "/".join(page.strip("/").split("/")[:2])  # an address may end with the number of a latent
    return _checked_column(table, "neuronpedia", page) == page


def _nearest(table: pd.DataFrame, l0: float) -> pd.DataFrame:
    with_l0 = table[table["l0"].notna()]
    keys = ["release", "model", "hook", "hook_out", "d_sae", "architecture"]
    distance = (with_l0["l0"] - l0).abs().groupby([with_l0[name] for name in keys], dropna=False)
    return with_l0.loc[sorted(distance.idxmin())]
