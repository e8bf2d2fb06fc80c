"""Published results of SAEBench, a file per SAE and evaluation, as rows beside one's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from saewb._files import absolute, read_json
from saewb.errors import FormatError, explain

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "SAEBench"
_MAX_BYTES = 1 << 28  # the core results of an SAE have a row per latent
_SAME = {
    "core": {
        "kl_div_score": "kl_recovered_zero",
        "kl_div_with_ablation": "kl_zero_ablated",
        "kl_div_with_sae": "kl",
        "ce_loss_score": "ce_recovered_zero",
        "ce_loss_with_ablation": "ce_zero_ablated",
        "ce_loss_with_sae": "ce_with_sae",
        "ce_loss_without_sae": "ce_clean",
        "cossim": "cosine",
        "l2_norm_in": "l2_in",
        "l2_norm_out": "l2_out",
        "l2_ratio": "l2_ratio",
        "relative_reconstruction_bias": "relative_reconstruction_bias",
        "l0": "l0",
        "l1": "l1",
        "freq_over_1_percent": "over_1_percent_frac",
        "freq_over_10_percent": "over_10_percent_frac",
        "normalized_freq_over_1_percent": "over_1_percent_share",
        "normalized_freq_over_10_percent": "over_10_percent_share",
        "average_max_encoder_cosine_sim": "mean_max_encoder_cosine",
        "average_max_decoder_cosine_sim": "mean_max_decoder_cosine",
        "total_tokens_eval_sparsity_variance": "n_tokens",
    },
    "absorption": {
        "mean_absorption_fraction_score": "absorption_fraction",
        "mean_full_absorption_score": "absorption_full",
        "mean_num_split_features": "n_split",
    },
    "meta_structure": {"decoder_fraction_variance_explained": "meta_explained_variance"},
}
"""By evaluation: figures of SAEBench that are those of saewb, and their names here."""
_BY_N = {"scr": (r"scr_metric_threshold_(\d+)", "scr_{}"), "tpp": (r"tpp_threshold_(\d+)_total_metric", "tpp_{}")}
_IDENTITY = ("eval_type_id", "eval_result_metrics", "sae_lens_release_id", "sae_lens_id")


def read_saebench(paths: Union[str, Path, Sequence[Union[str, Path]]]) -> pd.DataFrame:
    """Read published result files of SAEBench into a table like that of `evaluate_many`, for `saewb.compare`.

    The files of all evaluations of one SAE make one row. Figures that are the same as saewb's have its names (l0, kl,
    ce_recovered_zero, absorption_fraction, tpp_20, ...); all others are "evaluation/figure" with the names of SAEBench:
    among them core/explained_variance, whose formula has been three different ones and none of them 1 - fvu, and
    core/mse. Results per latent and per class are left in the files. SAEBench writes -1 where a core figure is nan;
    here it is nan.

    Args:
        paths: a JSON file, a folder of them (searched through), or several.

    Returns:
        A row per SAE, indexed by "release/id": source, release, id, model, hook, architecture, d_sae, then the figures.

    Raises:
        FileNotFoundError: if there is no such file, or no JSON file in a folder.
        FormatError: for a file that is no result of SAEBench.
        ValueError: if two files have the same evaluation of the same SAE.

    Example:
        >>> read_saebench("nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        FileNotFoundError: no file or folder '...nowhere'.
          want: result files of SAEBench, *.json
    """
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    seen: dict[tuple[str, str], Path] = {}
    for path in _files(paths):
        result = _read(path)
        kind = str(result["eval_type_id"])
        name = f"{result['sae_lens_release_id']}/{result['sae_lens_id']}"
        if (kind, name) in seen:
            what = f"{path} and {seen[kind, name]} both have {kind} of {name!r}."
            raise ValueError(explain(what, want="one file for each evaluation of an SAE"))
        seen[kind, name] = path
        row = rows.setdefault(name, {"source": SOURCE})
        row.update({key: value for key, value in _description(result).items() if row.get(key) is None})
        row.update(_figures(result["eval_result_metrics"], kind))
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("name")


def _files(paths: Any) -> list[Path]:
    files: list[Path] = []
    for path in map(absolute, [paths] if isinstance(paths, (str, Path)) else list(paths)):
        found = sorted(path.rglob("*.json")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            what = f"no JSON file in {str(path)!r}." if path.is_dir() else f"no file or folder {str(path)!r}."
            raise FileNotFoundError(explain(what, want="result files of SAEBench, *.json"))
        files += found
    return files


def _read(path: Path) -> dict[str, Any]:
    result = read_json(path, _MAX_BYTES)
    missing = [key for key in _IDENTITY if not isinstance(result, dict) or key not in result]
    if missing or not isinstance(result["eval_result_metrics"], dict):
        what = f"{path} is no result of SAEBench: it lacks {missing or 'metrics'}."
        raise FormatError(explain(what, want="a file *_eval_results.json"))
    return result


def _description(result: Mapping[str, Any]) -> dict[str, Any]:
    cfg = result.get("sae_cfg_dict") or {}
    inner = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else {}
    config = result.get("eval_config") or {}
    return {
        "release": result["sae_lens_release_id"],
        "id": result["sae_lens_id"],
        "model": config.get("model_name") or cfg.get("model_name") or inner.get("model_name"),
        "hook": cfg.get("hook_name") or inner.get("hook_name"),
        "architecture": cfg.get("architecture"),
        "d_sae": cfg.get("d_sae"),
    }


def _figures(categories: Mapping[str, Any], kind: str) -> dict[str, float]:
    figures: dict[str, float] = {}
    same = _SAME.get(kind, {})
    pattern, form = _BY_N.get(kind, (r"(?!)", ""))
    for category in categories.values():
        for key, value in category.items() if isinstance(category, dict) else ():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            value = float("nan") if kind == "core" and value == -1 else value
            match = re.fullmatch(pattern, key)
            figures[form.format(match[1]) if match else same.get(key, f"{kind}/{key}")] = value
            if (kind, key) == ("core", "frac_alive"):
                figures["dead_frac"] = 1 - value
    return figures
