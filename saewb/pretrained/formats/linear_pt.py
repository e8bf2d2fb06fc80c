"""Goodfire: one .pt or .pth file with `encoder_linear` and `decoder_linear`; SAEs of Llama 3 Instruct.

Both matrices lie transposed. The activation is a ReLU, and no bias is subtracted from the input.
"""

from __future__ import annotations

import re
import zipfile
from glob import escape
from pathlib import Path

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import built, reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import TensorFile
from saewb.sae.sae import SAE, SAEConfig

NAME = "Goodfire"
MARKS = ("<name>.pt with encoder_linear.weight",)

_KEYS = ("encoder_linear.weight", "encoder_linear.bias", "decoder_linear.weight", "decoder_linear.bias")
_FILE = re.compile(r"(Llama-3\.\d-\d+B-Instruct)-SAE-l(\d+)")


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the file `path` needs."""
    return [escape(path)] if path.endswith((".pt", ".pth")) else []


def matches(place: Path) -> bool:
    """Whether it is a .pt file with these four tensors; a file that cannot be read is none."""
    place = Path(place)
    if place.suffix not in (".pt", ".pth") or not place.is_file() or not zipfile.is_zipfile(place):
        return False
    try:
        return _KEYS[0] in TensorFile(place)
    except FormatError:
        return False


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE in a file of this layout. The encoder is memory-mapped, the decoder copied once into rows.

    Args:
        place: the file.
        facts: `model`, `hook` and `layer` count where the file's name does not say them.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if the file holds other tensors than these four.
    """
    facts, path = facts or Facts(), Path(place)
    with reading(path):
        facts.no_factor(NAME)
        file = TensorFile(path)
        enc = file.shape(_KEYS[0])
        if len(enc) != 2:
            raise FormatError(explain(f"{_KEYS[0]} has shape {enc}.", want="[d_sae, d_in]"))
        d_sae, d_in = enc
        file.fit(dict(zip(_KEYS, ((d_sae, d_in), (d_sae,), (d_in, d_sae), (d_in,)), strict=True)))
        w = file.tensors()
        weights = {
            "W_enc": w["encoder_linear.weight"].T,
            "b_enc": w["encoder_linear.bias"],
            "W_dec": w["decoder_linear.weight"].T.contiguous(),
            "b_dec": w["decoder_linear.bias"],
        }
        named = _FILE.search(facts.where(path))
        layer = int(named[2]) if named else facts.layer
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            **facts.placed(
                model=f"meta-llama/{named[1]}" if named else None,
                hook=None if layer is None else f"blocks.{layer}.hook_resid_post",
                dataset_path="lmsys/lmsys-chat-1m",
                prepend_bos=True,
            ),
        )
        return built(cfg, weights, file.dtype(_KEYS[2]), dtype, device)
