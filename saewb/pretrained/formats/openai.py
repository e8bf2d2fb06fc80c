"""OpenAI's GPT-2 autoencoders: one .pt file each, .../gpt2-small/resid_post_mlp_v5_32k/autoencoders/<layer>.pt

x' = (x - mean(x)) / (std(x) + 1e-5)  per token, for TopK only, and undone on the output
z  = relu of the k largest of (x' - pre_bias) @ encoder.weight.T + latent_bias          (ReLU: of all)
y' = z @ decoder.weight.T + pre_bias
"""

from __future__ import annotations

import re
from glob import escape
from pathlib import Path
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._layout import opened, published, turned
from saewb.pretrained.formats._tensors import TensorFile, fit
from saewb.sae.sae import SAE

NAME = "OpenAI"
MARKS = ("*.pt with pre_bias, latent_bias, encoder.weight, decoder.weight, activation",)
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")  # of training; not needed
_PATH = re.compile(r"(resid_(?:delta|post)_(?:attn|mlp))(?:_[^/]*)?/autoencoders/(\d+)\.pt$")
_SITES = {
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading the file `path` needs."""
    return [escape(path)] if path.endswith(".pt") else []


def matches(place: Path) -> bool:
    """Whether it is a .pt file with these tensors."""
    place = Path(place)
    file = opened(place) if place.suffix == ".pt" else None
    return file is not None and {"pre_bias", "latent_bias"} <= set(file.names)


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE in such a file. The encoder is memory-mapped, the decoder transposed.

    Args:
        place: the file; its path says where it belongs.
        facts: `hook` and `model` count where the path does not say it.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if anything is unknown, missing, left over or does not fit.

    References:
        github.com/openai/sparse_autoencoder, model.py and paths.py.
    """
    place, facts = Path(place), facts or Facts()
    with reading(place):
        file = TensorFile(place)
        activation, k = _activation(file.values)
        _check_tensors(file)
        found = _PATH.search(facts.where(place))
        return published(
            {
                "W_enc": file.tensor("encoder.weight").T,
                "b_enc": file.tensor("latent_bias"),
                "W_dec": turned(file.tensor("decoder.weight")),
                "b_dec": file.tensor("pre_bias"),
            },
            facts,
            NAME,
            dtype=dtype,
            device=device,
            activation="topk" if activation == "TopK" else "relu",
            k=k,
            pre_bias="tied",
            normalization="layer_norm" if activation == "TopK" else "none",
            hook=f"blocks.{found[2]}.{_SITES[found[1]]}" if found else None,
            model="gpt2-small" if found else None,
            metadata={},
        )


def _activation(values: dict[str, Any]) -> tuple[str, int | None]:
    known = {"activation", "activation_state_dict/k", "activation_state_dict/postact_fn"}
    activation, k = values.get("activation"), values.get("activation_state_dict/k")
    after = values.get("activation_state_dict/postact_fn", "ReLU")
    if set(values) - known or activation not in ("TopK", "ReLU") or after != "ReLU":
        what = f"its activation is {activation!r} with {sorted(set(values) - {'activation'})}, then {after!r}."
        raise FormatError(explain(what, want="'TopK' with k and 'ReLU' after it, or 'ReLU'"))
    if (type(k) is int) != (activation == "TopK"):
        raise FormatError(explain(f"activation {activation!r} with k={k!r}.", want="an integer for 'TopK' only"))
    return activation, k


def _check_tensors(file: TensorFile) -> None:
    d_sae, d_in = file.shape("encoder.weight") if len(file.shape("encoder.weight")) == 2 else (0, 0)
    want = {"pre_bias": (d_in,), "latent_bias": (d_sae,)}
    want |= {"encoder.weight": (d_sae, d_in), "decoder.weight": (d_in, d_sae)}
    want |= {name: (d_sae,) for name in _STATISTICS if name in file}
    fit({name: file.shape(name) for name in file.names}, want, file.path.name)
