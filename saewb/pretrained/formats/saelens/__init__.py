"""The SAELens layout: `cfg.json` and `sae_weights.safetensors`, of every version and architecture; read and written.

`read` makes one of saewb's classes of it, with whatever that class has no field for folded into the weights:

- gated -> jumprelu:  W_enc exp(r_mag), threshold max(b_mag - exp(r_mag) b_gate, 0)
- `scaling_factor` per latent -> W_dec;  `log_threshold` -> exp;  a scalar `topk_threshold` -> one per latent
- an average-norm factor f -> W_enc f, W_dec / f, b_dec / f;  a whitening -> W_enc, W_dec, b_dec and a b_pre
- `rescale_acts_by_decoder_norm` -> unit decoder rows, their norms in W_enc and b_enc

`write` writes version 6. What sae-lens cannot express, a b_pre of its own, is folded into b_enc; top-k transcoders get
architecture names of saewb's own, which sae-lens refuses. How often latents fire, if the folder says so, is not part
of the SAE: `read_log_sparsity` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from saewb._files import atomic_folder
from saewb.errors import FormatError, explain
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import FLOATS, TensorFile, fit
from saewb.pretrained.formats._text import read_json
from saewb.pretrained.formats.saelens.config import UNFINISHED, Described, understand
from saewb.pretrained.formats.saelens.fold import Whitening, scaled_down, ungated, unit_rows, whitened
from saewb.pretrained.formats.saelens.folding import centered, reading_centered, reads_centered, without_flag
from saewb.pretrained.formats.saelens.scaling import SCALER, WHITENING, input_scaling
from saewb.pretrained.formats.saelens.write import as_written, compose, own_memory
from saewb.sae.config import TokenNormalization
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE, SAEConfig
from saewb.sae.temporal import TemporalConfig, TemporalSAE

NAME = "SAELens"
CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
MARKS = (CONFIG, WEIGHTS)  # what a folder is recognized by
FILES = (CONFIG, WEIGHTS, SPARSITY, SCALER, WHITENING)  # all that may be read

_SCALING: dict[str, TokenNormalization] = {"layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm"}


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder `path` may need."""
    prefix = f"{escape(path)}/" if path else ""
    return [f"{prefix}{name}" for name in FILES]


def matches(place: Path) -> bool:
    """Whether the folder has the two files of this layout."""
    return all((Path(place) / name).is_file() for name in MARKS)


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE | PursuitSAE | TemporalSAE:
    """The SAE in a folder of this layout. Weights that need no folding are memory-mapped, not copied.

    Args:
        place: a folder with cfg.json and sae_weights.safetensors.
        facts: `scaling_factor` is for a file that says `expected_average_only_in` and has no activation_scaler.json
            beside it; it is folded, so the SAE reads the model's own units. `overrides` replace keys of cfg.json;
            `model` and `hook` count only where cfg.json has none.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if anything in the folder is unknown, missing, left over or contradictory.

    Example:
        >>> import tempfile
        >>> sae = SAE(SAEConfig(d_in=4, d_sae=9, activation="topk", k=2, hook="blocks.0.hook_resid_post"))
        >>> with tempfile.TemporaryDirectory() as place:
        ...     read(write(sae, Path(place) / "sae"))
        SAE(topk k=2, 4 -> 9 latents, blocks.0.hook_resid_post, float32 on cpu)
    """
    folder, facts = Path(place), facts or Facts()
    try:
        described = _with_facts(understand(_overridden(read_json(folder / CONFIG), facts)), facts)
        given = input_scaling(folder, described, facts.scaling_factor)
        tensors = TensorFile(folder / WEIGHTS).tensors()
        stored = tensors["W_dec"].dtype if "W_dec" in tensors else torch.float32
        if stored not in FLOATS:
            raise FormatError(explain(f"W_dec is stored as {stored}.", want=", ".join(map(str, FLOATS))))
        build = {"matching_pursuit": _pursuit, "temporal": _temporal}.get(described.architecture, _feed_forward)
        cls, cfg, weights = build(described, tensors, given)
        return cls.from_tensors(cfg, {n: t.to(device or "cpu", dtype or stored) for n, t in weights.items()})
    except ValueError as error:
        raise FormatError(f"cannot read {folder}: {error}") from error


def read_config(place: Path, facts: Facts | None = None) -> SAEConfig | PursuitConfig | TemporalConfig:
    """What `read(place, facts).cfg` would be, without the weights being there.

    Args:
        place: a folder with cfg.json (and activation_scaler.json, if the SAE needs it).
        facts: as for `read`.

    Raises:
        FormatError: if anything in these files is unknown, missing or contradictory.
    """
    folder, facts = Path(place), facts or Facts()
    try:
        described = _with_facts(understand(_overridden(read_json(folder / CONFIG), facts)), facts)
        d_in, d_sae = described.d_in, described.d_sae
        if described.normalize == "covariance_whitening":
            square = torch.empty(d_in, d_in, device="meta")
            given: float | Whitening | None = Whitening(square[0], square, square)
        else:
            given = input_scaling(folder, described, facts.scaling_factor)
        # The same path as the weights take, over tensors that are nothing but their shapes.
        builds = {"matching_pursuit": _pursuit, "temporal": _temporal}
        build = builds.get(described.architecture, _feed_forward)
        pursued = {"W_dec": (d_sae, d_in), "b_dec": (d_in,)}
        shapes = pursued if build is _pursuit else _stored_shapes(described)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        return build(replace(described, finetuned=False), tensors, given)[1]
    except ValueError as error:
        raise FormatError(f"cannot read {folder}: {error}") from error


def write(sae: SAE | PursuitSAE | TemporalSAE, folder: Path, *, overwrite: bool = False) -> Path:
    """Write an SAE in this layout, version 6; sae-lens reads it and computes the same. All of it or nothing.

    Args:
        sae: any of saewb's classes.
        folder: a new or empty one, in one that is there.
        overwrite: replace an SAE that is there. A folder with any other files in it is never replaced.

    Returns:
        The folder's full path.

    Raises:
        FileExistsError: if there is something that may not be replaced.
        ValueError: if the layout cannot express this SAE (a skip matrix together with scaling).
        TypeError: if `cfg.metadata` holds what JSON does not.
    """
    architecture, tied, options, tensors = as_written(sae)
    try:
        text = json.dumps(compose(sae, architecture, tied, options), indent=1)
    except TypeError as error:
        raise TypeError(
            explain(
                f"cfg.metadata of {sae!r} cannot be written: {error}.", want="numbers, strings, lists, dictionaries"
            )
        ) from error

    def fill(place: Path) -> None:
        (place / CONFIG).write_text(text, encoding="utf-8")
        save_file(own_memory(tensors), place / WEIGHTS)

    return atomic_folder(Path(folder), fill, ours=(CONFIG, WEIGHTS, SPARSITY), overwrite=overwrite)


def read_log_sparsity(folder: Path) -> Float[Tensor, " d_sae"]:
    """How often each latent fired in training: log10(fraction of tokens + 1e-10), from -10 to 0.

    Raises:
        FileNotFoundError: if the folder does not say.
    """
    path = Path(folder) / SPARSITY
    if not path.is_file():
        raise FileNotFoundError(
            explain(f"{folder} has no {SPARSITY}.", want="a folder that says how often latents fire")
        )
    return TensorFile(path).tensor("sparsity")


def _overridden(raw: Any, facts: Facts) -> Any:
    return {**raw, **facts.overrides} if isinstance(raw, Mapping) else raw


def _with_facts(described: Described, facts: Facts) -> Described:
    known = {"model": facts.model, "hook": facts.hook, "hook_out": facts.hook_out if described.is_transcoder else None}
    return replace(described, places={n: known.get(n) if v is None else v for n, v in described.places.items()})


def _fitting(tensors: Mapping[str, Tensor], want: Mapping[str, tuple[int, ...]]) -> None:
    fit({name: tuple(t.shape) for name, t in tensors.items()}, want)


def _stored_shapes(described: Described) -> dict[str, tuple[int, ...]]:
    d_in, d_sae, d_out = described.d_in, described.d_sae, described.d_out
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    per_latent = ["b_gate", "b_mag", "r_mag"] if described.architecture == "gated" else ["b_enc"]
    if described.architecture.startswith("jumprelu"):
        per_latent.append("threshold")
    shapes |= {name: (d_sae,) for name in per_latent}
    if "skip" in described.architecture:
        shapes["W_skip"] = (d_out, d_in)
    if described.architecture in UNFINISHED:
        shapes["topk_threshold"] = ()
    return shapes


def _feed_forward(
    described: Described, tensors: dict[str, Tensor], given: float | Whitening | None
) -> tuple[type[SAE], SAEConfig, dict[str, Tensor]]:
    if described.normalize == "constant_scalar_rescale":
        raise FormatError(
            explain(f"a {described.architecture!r} SAE with 'constant_scalar_rescale'.", want="'temporal'")
        )
    w = _renamed(tensors)
    finetuned = _finetuning(w, described)
    _fitting(w, _stored_shapes(described))
    if finetuned is not None:
        w["W_dec"] = w["W_dec"].double() * finetuned.double()[:, None]
    if described.architecture == "gated":
        w = ungated(w)
    if "topk_threshold" in w:
        w["threshold"] = w.pop("topk_threshold").double().repeat(described.d_sae)
    if "W_skip" in w:
        w["W_skip"] = w["W_skip"].T.contiguous()
    pre_bias = "tied" if described.tied else "none"
    rescale = described.options.get("rescale_acts_by_decoder_norm", False)
    if isinstance(given, Whitening):
        w = whitened(unit_rows(w) if rescale else w, given, own=not described.tied)
        pre_bias = "tied" if described.tied else "own"
    else:
        w = w if given is None else scaled_down(w, given, rescale)
        w = unit_rows(w) if rescale else w
    places = described.places
    if described.is_transcoder and reads_centered(described.metadata, places["hook"], places["model"]):
        w = reading_centered(w)
    cfg = SAEConfig(
        d_in=described.d_in,
        d_sae=described.d_sae,
        d_out=described.d_out,
        activation=_gate(described.architecture),
        k=_whole(described.options["k"]) if "k" in described.options else None,
        skip="skip" in described.architecture,
        pre_bias=pre_bias,
        normalization=_scaling(described),
        metadata=without_flag(described.metadata, _scaling(described)),
        **places,
    )
    return SAE, cfg, w


def _scaling(described: Described) -> TokenNormalization:
    scaling = _SCALING.get(described.normalize, "none")
    if described.is_transcoder:
        return scaling
    return centered(scaling, described.metadata, described.places["hook"], described.places["model"])


def _gate(architecture: str) -> str:
    if architecture in ("gated", *UNFINISHED) or architecture.startswith("jumprelu"):
        return "jumprelu"
    first = architecture.split("_")[0]
    return first if first in ("topk", "abstopk", "groupmax") else "relu"


def _whole(k: object) -> object:
    return int(k) if isinstance(k, float) and k.is_integer() else k


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    w = dict(tensors)
    if "log_threshold" in w and "threshold" not in w:
        w["threshold"] = w.pop("log_threshold").double().exp()
    return w


def _finetuning(w: dict[str, Tensor], described: Described) -> Tensor | None:
    """Takes the per-latent factor out of `w`; None if there is none, or it changes nothing."""
    found = [name for name in ("scaling_factor", "finetuning_scaling_factor") if name in w]
    if not found:
        if described.finetuned:
            raise FormatError(explain("finetuning_scaling_factor is true, and there is no tensor `scaling_factor`."))
        return None
    factor = w.pop(found[0])
    _fitting({found[0]: factor}, {found[0]: (described.d_sae,)})
    if bool((factor == 1).all()):
        return None
    if not described.finetuned:
        raise FormatError(
            explain(
                f"`{found[0]}` is not all ones, and cfg.json does not say finetuning_scaling_factor.",
                want='"finetuning_scaling_factor": true if latents are to be multiplied with it',
            )
        )
    return factor


def _pursuit(
    described: Described, tensors: dict[str, Tensor], given: float | Whitening | None
) -> tuple[type[PursuitSAE], PursuitConfig, dict[str, Tensor]]:
    if described.normalize == "constant_scalar_rescale":
        raise FormatError(explain("a 'matching_pursuit' SAE with 'constant_scalar_rescale'.", want="'temporal'"))
    options = described.options
    factor = given if isinstance(given, float) else 1.0
    cfg = PursuitConfig(
        d_in=described.d_in,
        d_sae=described.d_sae,
        residual_threshold=float(options["residual_threshold"]) / factor,
        max_iterations=options["max_iterations"],
        stop_on_duplicate=options["stop_on_duplicate_support"],
        pre_bias="tied" if described.tied else "none",
        normalization=_scaling(described),
        metadata=without_flag(described.metadata, _scaling(described)),
        **_within(described.places),
    )
    _fitting(tensors, {"W_dec": (described.d_sae, described.d_in), "b_dec": (described.d_in,)})
    return PursuitSAE, cfg, {**tensors, "b_dec": tensors["b_dec"] / factor}


def _temporal(
    described: Described, tensors: dict[str, Tensor], given: float | Whitening | None
) -> tuple[type[TemporalSAE], TemporalConfig, dict[str, Tensor]]:
    options = described.options
    if options["sae_diff_type"] not in ("relu", "topk"):
        raise FormatError(explain(f"sae_diff_type is {options['sae_diff_type']!r}.", want="'relu' or 'topk'"))
    n_layers = options["n_attn_layers"]
    if type(n_layers) is not int or n_layers > len(tensors):  # before a name is made for each
        raise FormatError(explain(f"n_attn_layers is {n_layers!r}, and there are {len(tensors)} tensors."))
    # A top-k without its k keeps all, as sae-lens computes it.
    k = _whole(options["kval_topk"]) if options["sae_diff_type"] == "topk" else None
    fixed = options["activation_normalization_factor"] if described.normalize == "constant_scalar_rescale" else 1.0
    cfg = TemporalConfig(
        d_in=described.d_in,
        d_sae=described.d_sae,
        activation="relu" if k is None else "topk",
        k=k,
        n_heads=options["n_heads"],
        n_attn_layers=options["n_attn_layers"],
        bottleneck_factor=options["bottleneck_factor"],
        tied=options["tied_weights"],
        pre_bias="tied" if described.tied else "none",
        factor=given if isinstance(given, float) else float(fixed),
        normalization=_scaling(described),
        metadata=without_flag(described.metadata, _scaling(described)),
        **_within(described.places),
    )
    return TemporalSAE, cfg, tensors


def _within(places: Mapping[str, Any]) -> dict[str, Any]:
    if places["hook_out"] not in (None, places["hook"]):
        raise FormatError(explain(f"it reads {places['hook']!r} and writes {places['hook_out']!r}.", want="one hook"))
    return {name: place for name, place in places.items() if name != "hook_out"}
