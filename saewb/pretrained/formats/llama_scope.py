"""Llama Scope and Llama Scope R1: weights of the library lm_saes, trained on activations of a fixed mean norm.

With f = sqrt(d) / (mean norm of the activations), once for inputs and once for outputs, n_i = ||W_dec[i]||,
and thresholds t in the normalized space:

    p = f_in x W_enc + b_enc;  latent_i = p_i n_i if p_i n_i > t_i else 0;  out = (latents / n W_dec + b_dec) / f_out

Folded, that is W_enc f_in n, b_enc n, W_dec / (n f_out), b_dec / f_out; n = 1 where the configuration excludes decoder
norms. Latents are in the normalized space, as in sae-lens.

- Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`. One threshold for all latents, in units of the
  model. The mean norms are in the file.
- Llama Scope R1: `config.json` and `sae_weights.safetensors`. The logarithm of a threshold per latent. The mean norms
  are in the file, or else the catalogue has the factor. The weights have the file name of SAELens' layout, so the
  names of the tensors decide.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import OpenFiles, TableLayout
from saewb.pretrained.formats._tensors import TensorFile, positive

_NORM = "dataset_average_activation_norm"
_CHUNK = 1 << 22  # numbers folded at a time
_SUPPORTED = {
    "act_fn": ("jumprelu",),
    "apply_decoder_bias_to_pre_encoder": (False,),
    "use_decoder_bias": (True,),
    "use_glu_encoder": (False,),
    "sparsity_include_decoder_norm": (True, False),
}


class _LMSaes(TableLayout):
    """Shared base of both layouts; a subclass defines thresholds and factors."""

    folds_factor = True
    table: ClassVar[Mapping[str, str]] = {
        "W_enc": "encoder.weight FD",
        "b_enc": "encoder.bias F",
        "W_dec": "decoder.weight OF",
        "b_dec": "decoder.bias O",
    }

    @abstractmethod
    def factors(self, files: OpenFiles, d_in: int, d_out: int) -> tuple[float, float]:
        """Factors f_in and f_out."""

    @abstractmethod
    def threshold(self, files: OpenFiles, d_sae: int, factor: float) -> Tensor:
        """Threshold t per latent; `factor` converts units of the model to those of latents."""

    @abstractmethod
    def model(self, files: OpenFiles) -> str | None:
        """Name of the language model, from the repository's name."""

    def read_config(self, path: Path) -> dict[str, Any]:
        """Read the configuration; refuse settings that the formula above does not cover."""
        config = super().read_config(path)
        for name, values in _SUPPORTED.items():
            if config.get(name, values[0]) not in values:
                what = f"{self.config_path(path).name} has {name}={config[name]!r}, which saewb cannot compute."
                raise FormatError(explain(what, want=" or ".join(map(repr, values))))
        return config

    def tensors(self, files: OpenFiles, table: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        """Weights folded by the formula above, in float32 or better."""
        config, file = files.config, files.weights
        (d_sae, d_in), d_out = file.shape("encoder.weight"), file.shape("decoder.weight")[0]
        _check_widths(config, d_in, d_sae)
        f_in, f_out = self.factors(files, d_in, d_out)
        with_norms = config.get("sparsity_include_decoder_norm", True)
        # A threshold in the model's units is compared with p n / f_out if norms count, else with p / f_in.
        threshold = self.threshold(files, d_sae, f_out if with_norms else f_in)
        dtype = files.dtype or file.dtype("decoder.weight")
        return {**_fold(file, f_in, f_out, with_norms=with_norms, dtype=dtype), "threshold": threshold}

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Hooks from the configuration."""
        hooks = {name: files.config.get(f"hook_point_{side}") for name, side in (("hook", "in"), ("hook_out", "out"))}
        for hook in hooks.values():
            if not isinstance(hook, str | None):
                raise FormatError(explain(f"the configuration has a hook {hook!r}.", want="text"))
        metadata = {"prepend_bos": True, "context_size": 1024, "dataset_path": "cerebras/SlimPajama-627B"}
        return {"activation": "jumprelu", "model": self.model(files), **hooks, "metadata": metadata}


class LlamaScope(_LMSaes):
    """Llama Scope: SAEs and transcoders of Llama 3.1 8B.

    A `scaling_factor` is not needed; if passed, it is checked against the file's (to 0.1 %).
    """

    name = "Llama Scope"
    aliases = ("llama_scope",)
    weights = "{path}/checkpoints/final.safetensors"
    config = "{path}/hyperparams.json"

    def factors(self, files: OpenFiles, d_in: int, d_out: int) -> tuple[float, float]:
        """Factors from the mean norms in the file; 1 if they are already folded."""
        kind, norms = files.config.get("norm_activation", "dataset-wise"), files.config.get(_NORM)
        if kind == "inference":
            return 1.0, 1.0
        if kind != "dataset-wise" or not isinstance(norms, Mapping):
            what = f"hyperparams.json has norm_activation={kind!r}, {_NORM}={norms!r}."
            raise FormatError(explain(what, want="'dataset-wise' and {'in': ..., 'out': ...}"))
        f_in, f_out = _factors_of(norms, d_in, d_out)
        factor = files.provenance.scaling_factor
        if factor is not None and not abs(factor - f_in) <= 1e-3 * f_in:
            what = f"scaling_factor={factor} was given."
            raise FormatError(explain(what, want=f"{f_in}, as hyperparams.json says, or none"))
        return f_in, f_out

    def threshold(self, files: OpenFiles, d_sae: int, factor: float) -> Tensor:
        """The single threshold of hyperparams.json, in units of latents."""
        threshold = positive(files.config.get("jump_relu_threshold"), "jump_relu_threshold")
        return torch.full((d_sae,), threshold * factor)

    def model(self, files: OpenFiles) -> str | None:
        """Llama 3.1 8B, from a name such as Llama3_1-8B-Base-L15R-8x."""
        return "meta-llama/Llama-3.1-8B" if re.search(r"Llama3_1-8B-Base-L(X|\d+)", files.address) else None


class LlamaScopeR1(_LMSaes):
    """Llama Scope R1: SAEs of the R1-distilled Llama 8B.

    A `scaling_factor` is needed where the file has no mean norm.
    """

    name = "Llama Scope R1"
    aliases = ("llama_scope_r1_distill",)
    weights = "{path}/sae_weights.safetensors"
    config = "{path}/config.json"
    table: ClassVar[Mapping[str, str]] = {**_LMSaes.table, "threshold": "log_jumprelu_threshold F"}

    def detect(self, path: Path) -> bool:
        """Detect by the name of thresholds; accept a damaged file unless it is SAELens', so that `read` reports it."""
        if not super().detect(path):
            return False
        try:
            return "log_jumprelu_threshold" in self.open_weights(path)
        except FormatError:
            return not (path / "cfg.json").is_file()

    def side_tensors(self, files: OpenFiles) -> dict[str, None]:
        """Mean norms, which newer files also have as tensors."""
        return dict.fromkeys(name for name in files.weights.names if name.startswith(_NORM))

    def factors(self, files: OpenFiles, d_in: int, d_out: int) -> tuple[float, float]:
        """Factors from the mean norms in configuration or tensors, else from `Provenance.scaling_factor`."""
        if files.config.get("norm_activation") == "inference":
            return 1.0, 1.0
        norms = files.config.get(_NORM)
        if not isinstance(norms, Mapping) or norms.get("in") is None:
            stored = {end: f"{_NORM}.{end}" for end in ("in", "out") if f"{_NORM}.{end}" in files.weights}
            norms = {end: float(files.weights.tensor(name).double().mean()) for end, name in stored.items()}
        if norms:
            return _factors_of(norms, d_in, d_out)
        if files.provenance.scaling_factor is None:
            what = "it was trained on activations scaled to norm sqrt(d_in), and the factor is not in the folder."
            want = "sqrt(d_in) / (mean norm of the model's activations), as its authors measured it"
            raise FormatError(explain(what, want=want, fix="saewb.load_sae(..., scaling_factor=...)"))
        return (positive(files.provenance.scaling_factor, "scaling_factor"),) * 2

    def threshold(self, files: OpenFiles, d_sae: int, factor: float) -> Tensor:
        """Thresholds of the file, which are in units of latents."""
        return files.weights.tensor("log_jumprelu_threshold").double().exp()

    def model(self, files: OpenFiles) -> str | None:
        """Name from the catalogue, else from the repository's name (sae-lens names the base model)."""
        is_distilled = "R1-Distill" in files.address
        return files.provenance.model or ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if is_distilled else None)


def _factors_of(norms: Mapping[str, Any], d_in: int, d_out: int) -> tuple[float, float]:
    f_in = d_in**0.5 / positive(norms.get("in"), f"{_NORM}.in")
    return f_in, d_out**0.5 / positive(norms.get("out", norms["in"]), f"{_NORM}.out")


def _check_widths(config: Mapping[str, Any], d_in: int, d_sae: int) -> None:
    for name, width in (("d_model", d_in), ("d_sae", d_sae)):
        if config.get(name, width) != width:
            raise FormatError(explain(f"{name} is {config[name]}, but encoder.weight has shape {(d_sae, d_in)}."))
    factor = config.get("expansion_factor", d_sae / d_in)
    if type(factor) not in (int, float) or factor * d_in != d_sae:
        what = f"expansion_factor is {factor!r}, but encoder.weight has shape {(d_sae, d_in)}."
        raise FormatError(explain(what))


def _fold(file: TensorFile, f_in: float, f_out: float, *, with_norms: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """Fold factors and (`with_norms`) decoder norms into the weights, chunk by chunk; matrices in `dtype`."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    encoder, decoder = file.tensor("encoder.weight"), file.tensor("decoder.weight")
    (d_sae, d_in), d_out = encoder.shape, decoder.shape[0]
    norms = torch.ones(d_sae, dtype=wide)
    W_dec, W_enc = torch.empty(d_sae, d_out, dtype=dtype), torch.empty(d_sae, d_in, dtype=dtype)
    for rows in _slices(d_sae, d_out):
        part = decoder[:, rows].T.to(wide)
        if with_norms:
            norms[rows] = part.norm(dim=1)
            part = part / torch.where(norms[rows] == 0, 1, norms[rows])[:, None]
        W_dec[rows] = (part / f_out).to(dtype)
    for rows in _slices(d_sae, d_in):
        W_enc[rows] = (encoder[rows].to(wide) * (norms[rows, None] * f_in)).to(dtype)
    b_enc, b_dec = file.tensor("encoder.bias").to(wide) * norms, file.tensor("decoder.bias").to(wide) / f_out
    return {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}


def _slices(n: int, width: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, width))
    return [slice(start, start + step) for start in range(0, n, step)]
