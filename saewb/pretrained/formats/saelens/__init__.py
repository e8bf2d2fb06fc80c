"""The SAELens layout, `cfg.json` and `sae_weights.safetensors`: read all versions and architectures, write version 6.

`SAELens.read` returns one of saewb's classes, with everything it has no field for folded into the weights:

- gated -> jumprelu:  W_enc exp(r_mag), threshold max(b_mag - exp(r_mag) b_gate, 0)
- `scaling_factor` per latent -> W_dec;  `log_threshold` -> exp;  a scalar `topk_threshold` -> one per latent
- an average-norm factor f -> W_enc f, W_dec / f, b_dec / f;  a whitening -> W_enc, W_dec, b_dec and a b_pre
- `rescale_acts_by_decoder_norm` -> unit decoder rows, their norms in W_enc and b_enc

`write` folds a separate b_pre, which sae-lens does not have, into b_enc; top-k transcoders get architecture names that
only saewb has, and sae-lens refuses. `read_log_sparsity` reads the firing frequencies of latents, if the folder has
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saewb._files import atomic_folder, check_sha256, read_json, sha256_of
from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import Layout, Provenance
from saewb.pretrained.formats._tensors import FLOATS, TensorFile, check_shapes
from saewb.pretrained.formats.saelens.config import SHA256, UNFINISHED, Description, describe
from saewb.pretrained.formats.saelens.folding import (
    SCALER,
    WHITENING,
    Whitening,
    fold_centering,
    fold_decoder_norms,
    fold_factor,
    fold_gate,
    fold_whitening,
    input_transform,
    is_centered,
    metadata_read,
    token_normalization,
)
from saewb.pretrained.formats.saelens.write import compose, separate_memory, to_file
from saewb.sae.config import TOP_K
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE, SAEConfig
from saewb.sae.temporal import TemporalConfig, TemporalSAE

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
FILES = (CONFIG, WEIGHTS, SPARSITY)
"""Files of an SAE in this layout."""


class SAELens(Layout):
    """The SAELens layout.

    `Provenance.scaling_factor` is for a file with `expected_average_only_in` and without activation_scaler.json in its
    folder. `overrides` replace keys of cfg.json; `model` and `hook` are used only where cfg.json has none.

    Example:
        >>> import tempfile
        >>> sae = SAE(SAEConfig(d_in=4, d_sae=9, activation="topk", k=2, hook="blocks.0.hook_resid_post"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     SAELens().read(write(sae, Path(folder) / "sae"))
        SAE(topk k=2, 4 -> 9 latents, blocks.0.hook_resid_post, float32 on cpu)
    """

    name = "SAELens"
    aliases = ("sae_lens",)
    weights = f"{{path}}/{WEIGHTS}"
    config = f"{{path}}/{CONFIG}"
    extra_files = (f"{{path}}/{SPARSITY}", f"{{path}}/{SCALER}", f"{{path}}/{WHITENING}")
    folds_factor = True

    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> SAE | PursuitSAE | TemporalSAE:
        description = _describe(path, provenance)
        fix = f"remove {SHA256!r} from {CONFIG} if the weights were changed on purpose"
        check_sha256(Path(self.weights_path(path)), description.sha256, fix=fix)
        transform = input_transform(path, description, provenance.scaling_factor)
        tensors = self.open_weights(path).tensors()
        dtype = dtype or (tensors["W_dec"].dtype if "W_dec" in tensors else torch.float32)
        wrong = sorted(name for name, tensor in tensors.items() if tensor.dtype not in FLOATS)
        if wrong:
            what = f"{wrong[0]} is stored as {tensors[wrong[0]].dtype}."
            raise FormatError(explain(what, want=", ".join(map(str, FLOATS))))
        cls, cfg, weights = _convert(description, tensors, transform)
        return cls.from_tensors(cfg, {name: t.to(device or "cpu", dtype) for name, t in weights.items()})


def read_config(path: Path, provenance: Provenance | None = None) -> SAEConfig | PursuitConfig | TemporalConfig:
    """Read the configuration of an SAE from its folder, without the weights.

    Args:
        path: a folder with cfg.json (and activation_scaler.json, if the SAE needs it).
        provenance: as for `SAELens.read`.

    Raises:
        FormatError: if anything in these files is unknown, missing or inconsistent.
    """
    folder, provenance = Path(path), provenance or Provenance()
    try:
        description = _describe(folder, provenance)
        if description.normalize == "covariance_whitening":
            square = torch.empty(description.d_in, description.d_in, device="meta")
            transform: float | Whitening | None = Whitening(square[0], square, square)
        else:
            transform = input_transform(folder, description, provenance.scaling_factor)
        # Convert as with weights, on meta tensors that have shapes only.
        tensors = {name: torch.empty(shape, device="meta") for name, shape in _stored_shapes(description).items()}
        return _convert(replace(description, finetuned=False), tensors, transform)[1]
    except ValueError as error:
        raise FormatError(f"cannot read {folder}: {error}") from error


def write(sae: SAE | PursuitSAE | TemporalSAE, folder: Path, *, overwrite: bool = False) -> Path:
    """Write an SAE in this layout, version 6, atomically; sae-lens reads it and computes the same.

    Args:
        sae: any of saewb's classes.
        folder: new or empty; its parent exists.
        overwrite: replace an SAE in the folder. A folder with any other files is never replaced.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: if the folder holds something that may not be replaced.
        ValueError: if the layout cannot express this SAE (a skip matrix together with scaling).
        TypeError: if `cfg.metadata` holds values that JSON does not have.
    """
    architecture, tied, options, tensors = to_file(sae)
    config = compose(sae, architecture, tied, options)
    try:
        json.dumps(config)  # before anything is written
    except TypeError as error:
        what = f"cfg.metadata of {sae!r} cannot be written: {error}."
        raise TypeError(explain(what, want="numbers, strings, lists, dictionaries")) from error

    def fill(new: Path) -> None:
        save_file(separate_memory(tensors), new / WEIGHTS)
        config["metadata"][SHA256] = sha256_of(new / WEIGHTS)
        (new / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")

    return atomic_folder(Path(folder), fill, ours=FILES, overwrite=overwrite)


def read_log_sparsity(folder: Path) -> Float[Tensor, " d_sae"]:
    """Read the firing frequency of each latent in training: log10(fraction of tokens + 1e-10), from -10 to 0.

    Raises:
        FileNotFoundError: if the folder does not have it.
    """
    path = Path(folder) / SPARSITY
    if not path.is_file():
        want = "a folder that says how often latents fire"
        raise FileNotFoundError(explain(f"{folder} has no {SPARSITY}.", want=want))
    return TensorFile(path).tensor("sparsity")


def _describe(folder: Path, provenance: Provenance) -> Description:
    """Read cfg.json with the catalogue's overrides, and complete model and hooks."""
    raw = read_json(folder / CONFIG)
    description = describe({**raw, **provenance.overrides} if isinstance(raw, Mapping) else raw)
    hook_out = provenance.hook_out if description.is_transcoder else None
    defaults = {"model": provenance.model, "hook": provenance.hook, "hook_out": hook_out}
    site = {name: defaults.get(name) if value is None else value for name, value in description.site.items()}
    return replace(description, site=site)


def _check(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)


def _stored_shapes(description: Description) -> dict[str, tuple[int, ...]]:
    d_in, d_sae, d_out = description.d_in, description.d_sae, description.d_out
    if description.architecture == "matching_pursuit":
        return {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    per_latent = ["b_gate", "b_mag", "r_mag"] if description.architecture == "gated" else ["b_enc"]
    if description.architecture.startswith("jumprelu"):
        per_latent.append("threshold")
    shapes |= {name: (d_sae,) for name in per_latent}
    if "skip" in description.architecture:
        shapes["W_skip"] = (d_out, d_in)
    if description.architecture in UNFINISHED:
        shapes["topk_threshold"] = ()
    return shapes


_Converted = tuple[Any, Any, dict[str, Tensor]]  # class, its configuration, its weights by name


def _convert(description: Description, tensors: dict[str, Tensor], transform: float | Whitening | None) -> _Converted:
    if description.normalize == "constant_scalar_rescale" and description.architecture != "temporal":
        what = f"a {description.architecture!r} SAE with 'constant_scalar_rescale'."
        raise FormatError(explain(what, want="'temporal'"))
    converters: dict[str, Callable[..., _Converted]] = {"matching_pursuit": _to_pursuit, "temporal": _to_temporal}
    return converters.get(description.architecture, _to_sae)(description, tensors, transform)


def _to_sae(description: Description, tensors: dict[str, Tensor], transform: float | Whitening | None) -> _Converted:
    w = dict(tensors)
    if "log_threshold" in w and "threshold" not in w:
        w["threshold"] = w.pop("log_threshold").double().exp()
    finetuning = _pop_finetuning_factor(w, description)
    _check(w, _stored_shapes(description))
    if finetuning is not None:
        w["W_dec"] = w["W_dec"].double() * finetuning.double()[:, None]
    if description.architecture == "gated":
        w = fold_gate(w)
    if "topk_threshold" in w:
        w["threshold"] = w.pop("topk_threshold").double().repeat(description.d_sae)
    if "W_skip" in w:
        w["W_skip"] = w["W_skip"].T.contiguous()
    pre_bias = "tied" if description.tied else "none"
    rescale = description.options.get("rescale_acts_by_decoder_norm", False)
    if isinstance(transform, Whitening):
        w = fold_whitening(fold_decoder_norms(w) if rescale else w, transform, separate=not description.tied)
        pre_bias = "tied" if description.tied else "own"
    else:
        w = w if transform is None else fold_factor(w, transform, rescale)
        w = fold_decoder_norms(w) if rescale else w
    site = description.site
    if description.is_transcoder and is_centered(description.metadata, site["hook"], site["model"]):
        w = fold_centering(w)
    cfg = SAEConfig(
        d_in=description.d_in,
        d_sae=description.d_sae,
        d_out=description.d_out,
        activation=_activation(description.architecture),
        k=_to_int(description.options["k"]) if "k" in description.options else None,
        skip="skip" in description.architecture,
        pre_bias=pre_bias,
        **_common_fields(description),
        **site,
    )
    return SAE, cfg, w


def _common_fields(description: Description) -> dict[str, Any]:
    normalization = token_normalization(description)
    return {"normalization": normalization, "metadata": metadata_read(description.metadata, normalization)}


def _activation(architecture: str) -> str:
    if architecture in ("gated", *UNFINISHED) or architecture.startswith("jumprelu"):
        return "jumprelu"
    first = architecture.split("_")[0]
    return first if first in TOP_K else "relu"


def _to_int(k: object) -> object:
    return int(k) if isinstance(k, float) and k.is_integer() else k


def _pop_finetuning_factor(w: dict[str, Tensor], description: Description) -> Tensor | None:
    """Remove the factor per latent from `w` and return it; None if missing or all ones."""
    name = next((name for name in ("scaling_factor", "finetuning_scaling_factor") if name in w), None)
    if name is None:
        if description.finetuned:
            raise FormatError(explain("finetuning_scaling_factor is true, and there is no tensor `scaling_factor`."))
        return None
    factor = w.pop(name)
    _check({name: factor}, {name: (description.d_sae,)})
    if bool((factor == 1).all()):
        return None
    if not description.finetuned:
        want = '"finetuning_scaling_factor": true if latents are to be multiplied with it'
        what = f"`{name}` is not all ones, and cfg.json does not say finetuning_scaling_factor."
        raise FormatError(explain(what, want=want))
    return factor


def _to_pursuit(
    description: Description, tensors: dict[str, Tensor], transform: float | Whitening | None
) -> _Converted:
    options, factor = description.options, transform if isinstance(transform, float) else 1.0
    cfg = PursuitConfig(
        d_in=description.d_in,
        d_sae=description.d_sae,
        residual_threshold=float(options["residual_threshold"]) / factor,
        max_iterations=options["max_iterations"],
        stop_on_duplicate=options["stop_on_duplicate_support"],
        pre_bias="tied" if description.tied else "none",
        **_common_fields(description),
        **_site_without_out(description.site),
    )
    _check(tensors, _stored_shapes(description))
    return PursuitSAE, cfg, {**tensors, "b_dec": tensors["b_dec"] / factor}


def _to_temporal(
    description: Description, tensors: dict[str, Tensor], transform: float | Whitening | None
) -> _Converted:
    options = description.options
    if options["sae_diff_type"] not in ("relu", "topk"):
        raise FormatError(explain(f"sae_diff_type is {options['sae_diff_type']!r}.", want="'relu' or 'topk'"))
    n_layers = options["n_attn_layers"]
    if type(n_layers) is not int or n_layers > len(tensors):  # before a name is made for each
        raise FormatError(explain(f"n_attn_layers is {n_layers!r}, and there are {len(tensors)} tensors."))
    # Top-k without k means all latents, as in sae-lens.
    k = _to_int(options["kval_topk"]) if options["sae_diff_type"] == "topk" else None
    fixed = options["activation_normalization_factor"] if description.normalize == "constant_scalar_rescale" else 1.0
    cfg = TemporalConfig(
        d_in=description.d_in,
        d_sae=description.d_sae,
        activation="relu" if k is None else "topk",
        k=k,
        n_heads=options["n_heads"],
        n_attn_layers=options["n_attn_layers"],
        bottleneck_factor=options["bottleneck_factor"],
        tied=options["tied_weights"],
        pre_bias="tied" if description.tied else "none",
        factor=transform if isinstance(transform, float) else float(fixed),
        **_common_fields(description),
        **_site_without_out(description.site),
    )
    return TemporalSAE, cfg, tensors


def _site_without_out(site: Mapping[str, Any]) -> dict[str, Any]:
    if site["hook_out"] not in (None, site["hook"]):
        what = f"it reads {site['hook']!r} and writes {site['hook_out']!r}."
        raise FormatError(explain(what, want="one hook"))
    return {name: value for name, value in site.items() if name != "hook_out"}
