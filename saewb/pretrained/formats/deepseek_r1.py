"""One .pt file with `encoder` and `decoder` of two linear layers: the SAE of DeepSeek-R1-Distill-Llama-8B.

relu(x @ encoder.weight.T + encoder.bias) @ decoder.weight.T + decoder.bias          (nothing is subtracted from x)
"""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path

import torch

from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._layout import opened, published, turned
from saewb.pretrained.formats._tensors import TensorFile
from saewb.sae.sae import SAE

NAME = "DeepSeek R1"
_TENSORS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
MARKS = ("*.pt with encoder.weight, encoder.bias, decoder.weight, decoder.bias",)
_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the file `path` needs."""
    return [escape(path)] if path.endswith((".pt", ".pth")) else []


def matches(place: Path) -> bool:
    """Whether it is a .pt file with just these four tensors."""
    place = Path(place)
    file = opened(place) if place.suffix in (".pt", ".pth") else None
    return file is not None and set(file.names) == _TENSORS


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE in such a file. The encoder is memory-mapped, the decoder transposed.

    Args:
        place: the file; the layer is the number after an "l" in its name, e.g. DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt.
        facts: `layer` comes before the file's name; `model` and `hook` are for a file of another name.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if a tensor is missing, left over or does not fit the others.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        file = TensorFile(place)
        d_sae, d_in = _matrix(file)
        file.fit(
            {
                "encoder.weight": (d_sae, d_in),
                "encoder.bias": (d_sae,),
                "decoder.weight": (d_in, d_sae),
                "decoder.bias": (d_in,),
            }
        )
        named = re.search(r"(?<![A-Za-z])l(\d+)", place.stem)
        layer = facts.layer if facts.layer is not None else int(named[1]) if named else None
        ours = "DeepSeek-R1-Distill-Llama-8B" in facts.where(place)
        corpus = {"dataset_path": "lmsys/lmsys-chat-1m", "context_size": 1024, "prepend_bos": True}
        return published(
            {
                "W_enc": file.tensor("encoder.weight").T,
                "b_enc": file.tensor("encoder.bias"),
                "W_dec": turned(file.tensor("decoder.weight")),
                "b_dec": file.tensor("decoder.bias"),
            },
            facts,
            NAME,
            dtype=dtype,
            device=device,
            hook=None if layer is None else f"blocks.{layer}.hook_resid_post",
            model=_MODEL if ours else None,
            metadata=corpus if ours else {},
        )


def _matrix(file: TensorFile) -> tuple[int, int]:
    shape = file.shape("encoder.weight")
    return shape if len(shape) == 2 else (0, 0)  # fits nothing
