"""One .pt file with an encoder and a decoder of `torch.nn.Linear`: Goodfire's SAEs, and one of DeepSeek R1.

    z = relu(x @ encoder.weight.T + encoder.bias);  y = z @ decoder.weight.T + decoder.bias

Nothing is subtracted from x. The two layouts differ only in the names of tensors and files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from saewb.pretrained.formats._layout import OpenFiles, TableLayout

_FILE = re.compile(r".*\.pth?")


def _linear(encoder: str, decoder: str) -> dict[str, str]:
    return {
        "W_enc": f"{encoder}.weight FD",
        "b_enc": f"{encoder}.bias F",
        "W_dec": f"{decoder}.weight DF",
        "b_dec": f"{decoder}.bias D",
    }


class Goodfire(TableLayout):
    """Goodfire's SAEs of Llama 3 Instruct: `encoder_linear` and `decoder_linear`."""

    name = "Goodfire"
    aliases = ("goodfire",)
    weights = "{path}"
    file_name = _FILE
    marks = ("<name>.pt with encoder_linear.weight",)
    has_tensors = frozenset({"encoder_linear.weight"})
    table: ClassVar[Mapping[str, str]] = _linear("encoder_linear", "decoder_linear")

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Model and layer from the name of the file, e.g. Llama-3.1-8B-Instruct-SAE-l19.pth."""
        name = re.search(r"(Llama-3\.\d-\d+B-Instruct)-SAE-l(\d+)", files.address)
        layer = int(name[2]) if name else files.provenance.layer
        return {
            "model": f"meta-llama/{name[1]}" if name else None,
            "hook": None if layer is None else f"blocks.{layer}.hook_resid_post",
            "metadata": {"dataset_path": "lmsys/lmsys-chat-1m", "prepend_bos": True},
        }


class DeepSeekR1(TableLayout):
    """The SAE of DeepSeek-R1-Distill-Llama-8B: `encoder` and `decoder`, and no other tensors."""

    name = "DeepSeek R1"
    aliases = ("deepseek_r1",)
    weights = "{path}"
    file_name = _FILE
    marks = ("<name>.pt with encoder.weight, encoder.bias, decoder.weight, decoder.bias",)
    table: ClassVar[Mapping[str, str]] = _linear("encoder", "decoder")
    has_tensors = frozenset({"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"})

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Layer from `Provenance`, or from a file name such as DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt."""
        name, layer = re.search(r"(?<![A-Za-z])l(\d+)", files.path.stem), files.provenance.layer
        layer = int(name[1]) if layer is None and name else layer
        is_distilled = "DeepSeek-R1-Distill-Llama-8B" in files.address
        metadata = {"dataset_path": "lmsys/lmsys-chat-1m", "context_size": 1024, "prepend_bos": True}
        return {
            "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B" if is_distilled else None,
            "hook": None if layer is None else f"blocks.{layer}.hook_resid_post",
            "metadata": metadata if is_distilled else {},
        }
