"""Llama Scope R1: `config.json` and `sae_weights.safetensors` with `log_jumprelu_threshold`; R1-distilled Llama 8B.

As Llama Scope, but with a threshold per latent, its logarithm in the file, and in the normalized space already. The
factor of the inputs comes from the file's mean norm if it has one, or else from a catalogue. The weights have the file
name of SAELens' layout, so a look at their names decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import built, reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._lm_saes import folded, refuse_variants, shapes, sizes
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, positive, read_json
from saewb.sae.sae import SAE, SAEConfig

NAME = "Llama Scope R1"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
MARKS = (CONFIG, WEIGHTS)

_LOG_THRESHOLD = "log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm"
_WHO = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder `path` needs."""
    prefix = f"{path}/" if path else ""
    return [escape(f"{prefix}{name}") for name in MARKS]


def matches(place: Path) -> bool:
    """Whether the folder has the two files, and the weights have these names."""
    folder = Path(place)
    if not all((folder / name).is_file() for name in MARKS):
        return False
    try:
        return _LOG_THRESHOLD in TensorFile(folder / WEIGHTS)
    except FormatError:
        return not (folder / "cfg.json").is_file()  # damaged: `read` says how


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE in a folder of this layout, with its factor and norms folded: it reads the model's units.

    Args:
        place: the folder.
        facts: `scaling_factor`, needed where the file has no mean norm; `model`, which wins over the name that
            sae-lens would give (the base model's).
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if the factor is not known, config.json asks for what saewb cannot compute, or the tensors are not
            those it says.
    """
    facts, folder = facts or Facts(), Path(place)
    with reading(folder):
        config = object_of(read_json(folder / CONFIG), folder / CONFIG)
        refuse_variants(config, CONFIG)
        file = TensorFile(folder / WEIGHTS)
        d_in, d_sae, d_out = sizes(file, config)
        # Newer files have their mean norms as tensors too.
        norms = [name for name in file.names if name.startswith(_NORM)]
        file.fit({**shapes(d_in, d_sae, d_out), _LOG_THRESHOLD: (d_sae,)}, ignore=norms)
        threshold = file.tensor(_LOG_THRESHOLD).double().exp()
        f_in, f_out = _factors(config, file, facts, d_in, d_out)
        with_norms = config.get("sparsity_include_decoder_norm", True)
        stored = file.dtype("decoder.weight")
        weights = folded(file, threshold, f_in, f_out, with_norms=with_norms, dtype=dtype or stored)
        hook, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
        places = facts.placed(
            model=facts.model or (_WHO if "R1-Distill" in facts.where(folder) else None),
            hook=hook,
            hook_out=None if hook_out == hook else hook_out,
            prepend_bos=True,
            context_size=1024,
            dataset_path="cerebras/SlimPajama-627B",
        )
        cfg = SAEConfig(d_in=d_in, d_sae=d_sae, d_out=d_out, activation="jumprelu", **places)
        return built(cfg, weights, stored, dtype, device)


def _factors(config: Mapping[str, Any], file: TensorFile, facts: Facts, d_in: int, d_out: int) -> tuple[float, float]:
    if config.get("norm_activation") == "inference":  # folded by whoever wrote the file
        return 1.0, 1.0
    found = _mean_norms(config, file)
    if found:
        f_in = d_in**0.5 / positive(found.get("in"), f"{_NORM}.in")
        return f_in, d_out**0.5 / positive(found.get("out", found["in"]), f"{_NORM}.out")
    if facts.scaling_factor is None:
        raise FormatError(
            explain(
                "it was trained on activations scaled to norm sqrt(d_in), and the factor is not in the folder.",
                want="sqrt(d_in) / (mean norm of the model's activations), as its authors measured it",
                fix="saewb.load_sae(..., scaling_factor=...)",
            )
        )
    factor = positive(facts.scaling_factor, "scaling_factor")
    return factor, factor


def _mean_norms(config: Mapping[str, Any], file: TensorFile) -> dict[str, float]:
    said = config.get(_NORM)
    if isinstance(said, Mapping) and said.get("in") is not None:
        return dict(said)
    stored = {end: f"{_NORM}.{end}" for end in ("in", "out") if f"{_NORM}.{end}" in file}
    return {end: float(file.tensor(name).double().mean()) for end, name in stored.items()}
