"""Layouts of crosscoders: saewb's own, dictionary_learning's (its crosscoder forks), and ckkissane's replication.

saewb's own, `crosscoder.json` and `crosscoder.safetensors`: the configuration, and the tensors of `CrossCoderSAE` by
their names. `write` writes it, bit for bit.

dictionary_learning, `config.json` and `model.safetensors` or `ae.pt`; M points of one width, u = scale (x - mean):

    f = relu(sum over m of u^m @ encoder.weight[m] + encoder.bias)      BatchTopK: where f c > threshold
    y^m = f @ decoder.weight[m] + decoder.bias[m]                        c: `code_normalization_id`, see `CODES`

A threshold of -1, "not yet known", keeps every f > 0 there, and here. `write_dictionary_learning` writes it.

ckkissane's `cc_weights.pt` and `cfg.json`: `W_enc [M, d, F]`, `W_dec [F, M, d]`, `b_enc`, `b_dec [M, d]`. It reads
activations scaled by factors that are not in the files: `cross.with_scale({"a": 0.276, "b": 0.244})`.

References:
    github.com/science-of-finetuning/dictionary_learning, dictionary.py (CrossCoder, BatchTopKCrossCoder);
    github.com/ckkissane/crosscoder-model-diff-replication, crosscoder.py.
"""

from __future__ import annotations

import json
import string
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from saewb._files import atomic_folder
from saewb.errors import FormatError, explain, near
from saewb.pretrained.formats._layout import Layout, Provenance, get_typed
from saewb.pretrained.formats._tensors import FLOATS, TensorFile, check_shapes
from saewb.sae.crosscoder import CrossCoderConfig, CrossCoderSAE

CONFIG, WEIGHTS = "crosscoder.json", "crosscoder.safetensors"
FILES = (CONFIG, WEIGHTS)
"""Files of a crosscoder in saewb's own layout."""
CODES = {1: "crosscoder", 2: "sae", 3: "mixed", 4: "none", 5: "decoupled"}
"""Code normalizations of dictionary_learning, by number; `saewb.training.objectives.crosscoder` has the formulas."""
_FORMAT = 1
_FIELDS = ("points", "widths", "d_sae", "activation", "model", "metadata")


class CrossCoderLayout(Layout):
    """saewb's own layout of a crosscoder."""

    name = "saewb crosscoder"
    weights = f"{{path}}/{WEIGHTS}"
    config = f"{{path}}/{CONFIG}"

    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> CrossCoderSAE:
        config = self.read_config(path)
        if config.get("saewb_crosscoder") != _FORMAT:
            what = f"{CONFIG} has saewb_crosscoder={config.get('saewb_crosscoder')!r}."
            raise FormatError(explain(what, want=str(_FORMAT)))
        if unknown := sorted(config.keys() - {*_FIELDS, "saewb_crosscoder"}):
            raise FormatError(explain(f"{CONFIG} has {', '.join(unknown)}.", want=", ".join(_FIELDS)))
        for name, kind in (("points", list), ("widths", list), ("d_sae", int), ("metadata", dict)):
            get_typed(config, name, kind, CONFIG)
        cfg = CrossCoderConfig(**{name: config[name] for name in _FIELDS if name in config})
        return _build(cfg, self.open_weights(path).tensors(), provenance, dtype, device)


class _PublishedCrossCoder(Layout):
    """Base of layouts whose tensors have an axis of points of one width."""

    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> CrossCoderSAE:
        config = self.read_config(path)
        tensors, activation, metadata = self.convert(self.open_weights(path), config)
        d_sae, n = tensors["b_enc"].shape[0], tensors.pop("points").shape[0]
        d = tensors["b_dec"].shape[0] // n
        cfg = CrossCoderConfig(_letters(n), (d,) * n, d_sae, activation, metadata=metadata)
        return _build(cfg, tensors, provenance, dtype, device)

    @abstractmethod
    def convert(self, file: TensorFile, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
        """Tensors of CrossCoderSAE (and "points", of as many numbers as there are), activation, metadata."""


class DictionaryLearningCrossCoder(_PublishedCrossCoder):
    """dictionary_learning's crosscoders, as `save_pretrained` writes them."""

    name = "dictionary_learning crosscoder"
    weights = "{path}/model.safetensors"
    config = "{path}/config.json"
    marks = ("config.json", "model.safetensors with encoder.weight of three axes")

    def detect(self, path: Path) -> bool:
        """Whether the weights have three axes; an SAE's have two."""
        return super().detect(path) and has_points(Path(self.weights_path(path)))

    def open_weights(self, path: Path) -> TensorFile:
        """Open the weights; those of a compiled module have a prefix."""
        file = super().open_weights(path)
        return file.subset("_orig_mod.") if "_orig_mod.encoder.weight" in file else file

    def convert(self, file: TensorFile, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
        """Tensors, with mean, scale and the threshold of each latent; see the module."""
        options = config.get("trainer", config)
        (n, d, d_sae), threshold = file.shape("encoder.weight"), None
        for key, width in (("activation_dim", d), ("dict_size", d_sae), ("num_layers", n)):
            if options.get(key) not in (None, width):
                raise FormatError(explain(f"config.json has {key}={options[key]!r}.", want=f"{width}, as the weights"))
        weights = {"encoder.weight": (n, d, d_sae), "encoder.bias": (d_sae,), "decoder.weight": (n, d_sae, d)}
        weights |= {"decoder.bias": (n, d)}
        side = {
            "code_normalization_id": (),
            "k": (),
            "threshold": (),
            "target_rms": (),
            "activation_global_scale": (n,),
        }
        side |= {"activation_mean": (n, d), "activation_std": (n, d)}
        file.check(weights | {name: shape for name, shape in side.items() if name in file}, any_dtype=side)
        code = _code(file, options)
        t = {name: file.tensor(name) for name in weights}
        mean, scale = _mean_and_scale(file, n, d)
        if "threshold" in file and float(file.tensor("threshold")) >= 0:
            lengths = code_lengths(t["decoder.weight"].double(), code)
            lengths = torch.where(lengths == 0, torch.ones_like(lengths), lengths)
            threshold = (float(file.tensor("threshold")) / lengths).to(t["encoder.bias"].dtype)
        tensors = {
            "W_enc": t["encoder.weight"].reshape(n * d, d_sae),
            "b_enc": t["encoder.bias"],
            "W_dec": t["decoder.weight"].transpose(0, 1).reshape(d_sae, n * d),
            "b_dec": t["decoder.bias"].reshape(n * d),
            "mean": mean.reshape(n * d),
            "scale": scale.reshape(n * d),
            "points": torch.empty(n),
        }
        if threshold is not None:
            tensors["threshold"] = threshold
        metadata = {"code": code, "dictionary_learning": dict(options)}
        return tensors, "relu" if threshold is None else "jumprelu", metadata


class DictionaryLearningCrossCoderCheckpoint(DictionaryLearningCrossCoder):
    """dictionary_learning's crosscoders, as its training writes them."""

    name = "dictionary_learning crosscoder checkpoint"
    weights = "{path}/ae.pt"
    needs_config = False
    marks = ("ae.pt with encoder.weight of three axes",)


class ReplicationCrossCoder(_PublishedCrossCoder):
    """ckkissane's replication of the crosscoder of two models."""

    name = "ckkissane crosscoder"
    weights = "{path}/cc_weights.pt"
    config = "{path}/cfg.json"

    def convert(self, file: TensorFile, config: Mapping[str, Any]) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
        """Tensors, with the factors as yet 1."""
        n, d, d_sae = file.shape("W_enc") if len(file.shape("W_enc")) == 3 else (0, 0, 0)
        file.check({"W_enc": (n, d, d_sae), "W_dec": (d_sae, n, d), "b_enc": (d_sae,), "b_dec": (n, d)})
        t = file.tensors()
        tensors = {
            "W_enc": t["W_enc"].reshape(n * d, d_sae),
            "b_enc": t["b_enc"],
            "W_dec": t["W_dec"].reshape(d_sae, n * d),
            "b_dec": t["b_dec"].reshape(n * d),
            "mean": torch.zeros(n * d),
            "scale": torch.ones(n * d),
            "points": torch.empty(n),
        }
        return tensors, "relu", {"code": "crosscoder", "hook_name": config.get("hook_point"), "cfg": dict(config)}


def has_points(weights: Path) -> bool:
    """Whether a file of dictionary_learning holds a crosscoder: its encoder has an axis of points."""
    try:
        file = TensorFile(weights)
    except FormatError:
        return False
    names = ("encoder.weight", "_orig_mod.encoder.weight")
    return any(name in file and len(file.shape(name)) == 3 for name in names)


def code_lengths(W_dec: Tensor, code: str) -> Tensor:
    """Length `[d_sae]` of each latent by `code`, of decoder blocks `[points, d_sae, d]`.

    Raises:
        FormatError: for "decoupled", which selects the latents of each point by themselves.
    """
    blocks, whole = W_dec.norm(dim=2), W_dec.square().sum((0, 2)).sqrt()
    lengths = {"crosscoder": blocks.sum(0), "sae": whole, "mixed": whole + blocks.sum(0) / 10}
    lengths["none"] = torch.ones_like(whole)
    if code not in lengths:
        what = f"a crosscoder with code normalization {code!r}, whose latents may be active at one point alone."
        raise FormatError(explain(what, near=near(code, lengths), want=", ".join(lengths)))
    return lengths[code]


def write(sae: CrossCoderSAE, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a crosscoder in saewb's own layout, atomically.

    Args:
        sae: a crosscoder.
        folder: new or empty; its parent exists.
        overwrite: replace a crosscoder in the folder. A folder with any other files is never replaced.

    Returns:
        The absolute path of the folder.

    Raises:
        FileExistsError: if the folder holds something that may not be replaced.
        TypeError: if `cfg.metadata` holds values that JSON does not have.
    """
    config = {"saewb_crosscoder": _FORMAT, **{name: getattr(sae.cfg, name) for name in _FIELDS}}
    return _write(folder, config, {n: p.detach() for n, p in sae.named_parameters()}, FILES, overwrite, repr(sae))


def write_dictionary_learning(sae: CrossCoderSAE, folder: Path, *, overwrite: bool = False) -> Path:
    """Write a crosscoder in dictionary_learning's layout, as its `from_pretrained` reads it.

    Args:
        sae: a crosscoder of points of one width, with one factor for each; its thresholds must be one number in units
            of some code normalization, as they are after training.
        folder: new or empty; its parent exists.
        overwrite: replace a crosscoder in the folder. A folder with any other files is never replaced.

    Returns:
        The absolute path of the folder.

    Raises:
        ValueError: if the layout cannot express it.
        FileExistsError: if the folder holds something that may not be replaced.
    """
    cfg, d, n = sae.cfg, sae.cfg.widths[0], len(sae.cfg.points)
    scale = sae.scale.detach().reshape(n, -1) if len(set(cfg.widths)) == 1 else torch.zeros(1, 2)
    if len(set(cfg.widths)) > 1 or not torch.equal(scale, scale[:, :1].expand_as(scale)):
        what = f"dictionary_learning's layout cannot express {sae!r}."
        raise ValueError(explain(what, want="points of one width, and one factor for each"))
    W_dec = sae.W_dec.detach().reshape(cfg.d_sae, n, d).transpose(0, 1)
    code, threshold = _one_threshold(sae, W_dec)
    tensors = {
        "encoder.weight": sae.W_enc.detach().reshape(n, d, cfg.d_sae),
        "encoder.bias": sae.b_enc.detach(),
        "decoder.weight": W_dec,
        "decoder.bias": sae.b_dec.detach().reshape(n, d),
        "code_normalization_id": torch.tensor({code: number for number, code in CODES.items()}[code]),
        "target_rms": torch.tensor(1.0),
        "activation_mean": sae.mean.detach().reshape(n, d),
        "activation_std": 1 / (scale * d**0.5),
        "activation_global_scale": scale[:, 0],
    }
    config: dict[str, Any] = {"activation_dim": d, "dict_size": cfg.d_sae, "num_layers": n}
    config |= {"code_normalization": code.upper(), "dict_class": "CrossCoder"}
    if cfg.activation == "jumprelu":
        k = cfg.metadata.get("objective", {}).get("k", 1)
        tensors |= {"threshold": torch.tensor(threshold), "k": torch.tensor(int(k), dtype=torch.int32)}
        config |= {"dict_class": "BatchTopKCrossCoder", "k": int(k)}
    return _write(folder, config, tensors, ("config.json", "model.safetensors"), overwrite, repr(sae))


def _one_threshold(sae: CrossCoderSAE, W_dec: Tensor) -> tuple[str, float]:
    """The code normalization in whose units all thresholds are one number, and that number."""
    if sae.cfg.activation == "relu":
        return "crosscoder", -1.0
    for code in ("crosscoder", "sae", "mixed", "none"):
        values = sae.threshold.detach().double() * code_lengths(W_dec.double(), code)
        if torch.allclose(values, values[:1].expand_as(values), rtol=1e-4):
            return code, float(values.median())
    what = f"dictionary_learning's layout cannot express {sae!r}: its thresholds differ in units of every code."
    raise ValueError(explain(what, want="one threshold", fix="saewb.save_sae(cross, folder)"))


def _write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    files: tuple[str, str],
    overwrite: bool,
    of: str,
) -> Path:
    try:
        text = json.dumps(config, indent=1)  # before anything is written
    except TypeError as error:
        what = f"cfg.metadata of {of} cannot be written: {error}."
        raise TypeError(explain(what, want="numbers, strings, lists, dictionaries")) from error

    def fill(new: Path) -> None:
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, new / files[1])
        (new / files[0]).write_text(text, encoding="utf-8")

    return atomic_folder(Path(folder), fill, ours=files, overwrite=overwrite)


def _build(
    cfg: CrossCoderConfig,
    tensors: Mapping[str, Tensor],
    provenance: Provenance,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> CrossCoderSAE:
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, cfg.tensor_shapes())
    if wrong := sorted(name for name, tensor in tensors.items() if tensor.dtype not in FLOATS):
        what = f"{wrong[0]} is stored as {tensors[wrong[0]].dtype}."
        raise FormatError(explain(what, want=", ".join(map(str, FLOATS))))
    if not bool((tensors["scale"] > 0).all()):
        raise FormatError(explain("its scale has numbers that are not positive.", want="positive factors"))
    dtype = dtype or tensors["W_dec"].dtype
    model = cfg.model or provenance.model
    sae = CrossCoderSAE.from_tensors(cfg, {name: tensor.to(device or "cpu", dtype) for name, tensor in tensors.items()})
    return sae.with_config(model=model)


def _code(file: TensorFile, options: Mapping[str, Any]) -> str:
    """Name of the code normalization; files of older versions, which have none, mean "crosscoder"."""
    if "code_normalization_id" not in file:
        return str(options.get("code_normalization") or "crosscoder").rpartition(".")[2].lower()
    number = int(file.tensor("code_normalization_id"))
    if number not in CODES:
        raise FormatError(explain(f"code_normalization_id is {number}.", want=", ".join(map(str, CODES))))
    return CODES[number]


def _mean_and_scale(file: TensorFile, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Mean and factor `[points, d]` of the input; NaN in the file means none."""
    names = ("activation_mean", "activation_std")
    values = [file.tensor(name, finite=False).float() for name in names if name in file]
    if len(values) < 2 or any(bool(value.isnan().any()) for value in values):
        return torch.zeros(n, d), torch.ones(n, d)
    mean, std = values
    target = float(file.tensor("target_rms")) if "target_rms" in file else 1.0
    scale = target / (std.square().sum(1) + 1e-8).sqrt()
    stored = file.tensor("activation_global_scale").float() if "activation_global_scale" in file else scale
    if torch.equal(stored, torch.ones_like(stored)) and not torch.allclose(scale, stored):
        return mean, 1 / (std + 1e-8)  # `keep_relative_variance=False`: one factor per coordinate
    return mean, stored[:, None].expand(n, d).clone()


def _letters(n: int) -> tuple[str, ...]:
    return tuple(string.ascii_lowercase[:n]) if n <= 26 else tuple(str(i) for i in range(n))
