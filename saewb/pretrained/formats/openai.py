"""OpenAI's GPT-2 autoencoders: one .pt file each, .../gpt2-small/resid_post_mlp_v5_32k/autoencoders/<layer>.pt.

x' = (x - mean(x)) / (std(x) + 1e-5)  per token, for TopK only, and inverted on the output
z  = relu of the k largest of (x' - pre_bias) @ encoder.weight.T + latent_bias          (ReLU: of all)
y' = z @ decoder.weight.T + pre_bias
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import OpenFiles, TableLayout

_PATH = re.compile(r"(resid_(?:delta|post)_(?:attn|mlp))(?:_[^/]*)?/autoencoders/(\d+)\.pt$")
_SITES = {
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


class OpenAI(TableLayout):
    """OpenAI's GPT-2 autoencoders; github.com/openai/sparse_autoencoder, model.py and paths.py."""

    name = "OpenAI"
    weights = "{path}"
    file_name = re.compile(r".*\.pt")
    marks = ("*.pt with pre_bias, latent_bias, encoder.weight, decoder.weight, activation",)
    has_tensors = frozenset({"pre_bias", "latent_bias"})
    table: ClassVar[Mapping[str, str]] = {
        "W_enc": "encoder.weight FD",
        "b_enc": "latent_bias F",
        "W_dec": "decoder.weight DF",
        "b_dec": "pre_bias D",
    }

    def side_tensors(self, files: OpenFiles) -> dict[str, str]:
        """Training statistics."""
        return dict.fromkeys(("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"), "F")

    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Activation from the values in the file, hook from its path."""
        activation, k = _activation(files.weights.values)
        names = _PATH.search(files.address)
        return {
            "activation": "topk" if activation == "TopK" else "relu",
            "k": k,
            "pre_bias": "tied",
            "normalization": "layer_norm" if activation == "TopK" else "none",
            "model": "gpt2-small" if names else None,
            "hook": f"blocks.{names[2]}.{_SITES[names[1]]}" if names else None,
        }


def _activation(values: dict[str, Any]) -> tuple[str, int | None]:
    supported = {"activation", "activation_state_dict/k", "activation_state_dict/postact_fn"}
    activation, k = values.get("activation"), values.get("activation_state_dict/k")
    after = values.get("activation_state_dict/postact_fn", "ReLU")
    if set(values) - supported or activation not in ("TopK", "ReLU") or after != "ReLU":
        what = f"its activation is {activation!r} with {sorted(set(values) - {'activation'})}, then {after!r}."
        raise FormatError(explain(what, want="'TopK' with k and 'ReLU' after it, or 'ReLU'"))
    if (type(k) is int) != (activation == "TopK"):
        raise FormatError(explain(f"activation {activation!r} with k={k!r}.", want="an integer for 'TopK' only"))
    return activation, k
