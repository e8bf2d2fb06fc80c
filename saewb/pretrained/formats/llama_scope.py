"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`; SAEs and transcoders of Llama 3.1 8B.

Trained on activations of norm sqrt(d_model), whose mean norm the file says, so the factor is folded without asking a
catalogue; a transcoder has one for what it reads and one for what it writes. The one threshold of the file is in units
of the model, and of a latent times its decoder's norm, which is folded too. See `_lm_saes` for the formula.
"""

from __future__ import annotations

import re
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

NAME = "Llama Scope"
CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
MARKS = (CONFIG, WEIGHTS)


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the folder `path` needs."""
    prefix = f"{path}/" if path else ""
    return [escape(f"{prefix}{name}") for name in MARKS]


def matches(place: Path) -> bool:
    """Whether the folder has the two files of this layout."""
    return all((Path(place) / name).is_file() for name in MARKS)


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE or transcoder in a folder of this layout, with its factors and norms folded: it reads the model's units.

    Args:
        place: the folder.
        facts: `scaling_factor` is not needed, and checked against the file's (0.1 %) if given; `model` counts where
            the repository's name is not one of Llama Scope.
        dtype: of the parameters; None means as stored (bfloat16, in which folding rounds once more).
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if hyperparams.json asks for what saewb cannot compute, or the tensors are not those it says.
    """
    facts, folder = facts or Facts(), Path(place)
    with reading(folder):
        config = object_of(read_json(folder / CONFIG), folder / CONFIG)
        refuse_variants(config, CONFIG)
        file = TensorFile(folder / WEIGHTS)
        d_in, d_sae, d_out = sizes(file, config)
        file.fit(shapes(d_in, d_sae, d_out))
        f_in, f_out = _factors(config, facts, d_in, d_out)
        with_norms = config.get("sparsity_include_decoder_norm", True)
        raw = positive(config.get("jump_relu_threshold"), "jump_relu_threshold")
        # p n / f_out is what the threshold is compared with where norms count, p / f_in where they do not.
        threshold = torch.full((d_sae,), raw * (f_out if with_norms else f_in))
        stored = file.dtype("decoder.weight")
        weights = folded(file, threshold, f_in, f_out, with_norms=with_norms, dtype=dtype or stored)
        cfg = SAEConfig(d_in=d_in, d_sae=d_sae, d_out=d_out, activation="jumprelu", **_placed(config, facts, folder))
        return built(cfg, weights, stored, dtype, device)


def _factors(config: Mapping[str, Any], facts: Facts, d_in: int, d_out: int) -> tuple[float, float]:
    kind = config.get("norm_activation", "dataset-wise")
    if kind == "inference":  # folded by whoever wrote the file
        return 1.0, 1.0
    norms = config.get("dataset_average_activation_norm")
    if kind != "dataset-wise" or not isinstance(norms, Mapping):
        what = f"{CONFIG} has norm_activation={kind!r}, dataset_average_activation_norm={norms!r}."
        raise FormatError(explain(what, want="'dataset-wise' and {'in': ..., 'out': ...}"))
    f_in = d_in**0.5 / positive(norms.get("in"), "dataset_average_activation_norm.in")
    f_out = d_out**0.5 / positive(norms.get("out", norms["in"]), "dataset_average_activation_norm.out")
    given = facts.scaling_factor
    if given is not None and not abs(given - f_in) <= 1e-3 * f_in:
        raise FormatError(explain(f"scaling_factor={given} was given.", want=f"{f_in}, as {CONFIG} says, or none"))
    return f_in, f_out


def _placed(config: Mapping[str, Any], facts: Facts, folder: Path) -> dict[str, Any]:
    hook, hook_out = config.get("hook_point_in"), config.get("hook_point_out")
    for name in (hook, hook_out):
        if not isinstance(name, str | None):
            raise FormatError(explain(f"{CONFIG} has a hook {name!r}.", want="text"))
    named = re.search(r"Llama3_1-8B-Base-L(X|\d+)", facts.where(folder))
    return facts.placed(
        model="meta-llama/Llama-3.1-8B" if named else None,
        hook=hook,
        hook_out=None if hook_out == hook else hook_out,
        prepend_bos=True,
        context_size=1024,
        dataset_path="cerebras/SlimPajama-627B",
    )
