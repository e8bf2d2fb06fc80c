"""What the two Llama Scope layouts have in common: weights of lm_saes, trained on activations of a fixed norm.

With f = sqrt(d) / (mean norm of the activations), once for inputs and once for outputs, n_i = ||W_dec[i]||,
and thresholds t in the normalized space:

    p = f_in x W_enc + b_enc;  latent_i = p_i n_i if p_i n_i > t_i else 0;  out = (latents / n W_dec + b_dec) / f_out

which is, folded, W_enc f_in n, b_enc n, W_dec / (n f_out), b_dec / f_out; n = 1 where a configuration says that the
norms of the decoder take no part. Latents are in the normalized space, as sae-lens has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._tensors import TensorFile

SHARED = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
_ROWS = 1 << 22  # numbers that are computed with at a time


def sizes(file: TensorFile, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """d_in, d_sae, d_out, as the encoder and decoder have them and the configuration says.

    Raises:
        FormatError: if they are not matrices, or of other widths than the configuration's.
    """
    enc, dec = file.shape("encoder.weight"), file.shape("decoder.weight")
    if len(enc) != 2 or len(dec) != 2:
        raise FormatError(explain(f"encoder.weight has shape {enc}, decoder.weight {dec}.", want="two axes each"))
    (d_sae, d_in), d_out = enc, dec[0]
    for name, got in (("d_model", d_in), ("d_sae", d_sae)):
        if config.get(name, got) != got:
            raise FormatError(explain(f"{name} is {config[name]}, but encoder.weight has shape {enc}."))
    factor = config.get("expansion_factor", d_sae / d_in)
    if type(factor) not in (int, float) or factor * d_in != d_sae:
        raise FormatError(explain(f"expansion_factor is {factor!r}, but encoder.weight has shape {enc}."))
    return d_in, d_sae, d_out


def shapes(d_in: int, d_sae: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Of the four tensors that both layouts have."""
    return dict(zip(SHARED, ((d_sae, d_in), (d_sae,), (d_out, d_sae), (d_out,)), strict=True))


def refuse_variants(config: Mapping[str, Any], where: str) -> None:
    """Check that the configuration asks for nothing that neither the formula above nor saewb has.

    Raises:
        FormatError: naming the first key that does.
    """
    for name, known in (
        ("act_fn", ("jumprelu",)),
        ("apply_decoder_bias_to_pre_encoder", (False,)),
        ("use_decoder_bias", (True,)),
        ("use_glu_encoder", (False,)),
        ("sparsity_include_decoder_norm", (True, False)),
    ):
        if config.get(name, known[0]) not in known:
            want = " or ".join(map(repr, known))
            raise FormatError(explain(f"{where} has {name}={config[name]!r}, which saewb cannot compute.", want=want))


def folded(
    file: TensorFile, threshold: Tensor, f_in: float, f_out: float, *, with_norms: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Weights of saewb's SAE by the formula above, computed in float32 or better, in `dtype`.

    Args:
        file: with the four tensors.
        threshold: t, one per latent.
        f_in: what training inputs were multiplied with.
        f_out: the same for targets.
        with_norms: whether norms of the decoder take part.
        dtype: of the result.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    decoder = file.tensor("decoder.weight")
    d_out, d_sae = decoder.shape
    norms = torch.ones(d_sae, dtype=wide)
    W_dec = torch.empty(d_sae, d_out, dtype=dtype)
    for rows in _slices(d_sae, d_out):
        part = decoder[:, rows].T.to(wide)
        if with_norms:
            found = part.norm(dim=1)
            norms[rows] = found
            part = part / torch.where(found == 0, torch.ones_like(found), found)[:, None]
        W_dec[rows] = (part / f_out).to(dtype)
    encoder = file.tensor("encoder.weight")
    W_enc = torch.empty(d_sae, encoder.shape[1], dtype=dtype)
    for rows in _slices(*encoder.shape):
        W_enc[rows] = (encoder[rows].to(wide) * (norms[rows, None] * f_in)).to(dtype)
    return {
        "W_enc": W_enc.T,
        "b_enc": file.tensor("encoder.bias").to(wide) * norms,
        "W_dec": W_dec,
        "b_dec": file.tensor("decoder.bias").to(wide) / f_out,
        "threshold": threshold,
    }


def _slices(n: int, width: int) -> list[slice]:
    step = max(1, _ROWS // max(1, width))
    return [slice(at, at + step) for at in range(0, n, step)]
