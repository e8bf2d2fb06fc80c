"""Correlation matrix of all latents of an SAE on text, computed block by block on access."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saewb.data.tokens import token_rows
from saewb.errors import explain, near
from saewb.interventions.site import flatten_heads
from saewb.models import hook_points
from saewb.models.active import check_unmodified
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import special_ids, special_mask
from saewb.sae.base import SparseEncoder
from saewb.sae.sparse import SparseLatents
from saewb.stats._entries import Sparse
from saewb.stats.correlation_map import MatrixView

_PASS = 4096  # tokens run through the model at a time
_KINDS = ("correlation", "phi")


def latent_matrix(
    model: nn.Module,
    sae: nn.Module,
    tokens: Tensor | Sequence[str],
    *,
    by: str = "correlation",
    hook: str | None = None,
    n_tokens: int = 2**16,
    min_fires: int = 10,
    ctx_len: int = 128,
    skip_special_tokens: bool | Sequence[int] = True,
    progress: Callable[[int], Any] | None = None,
) -> MatrixView:
    """Correlation matrix of all latents over tokens, from their activations, which take 40 bytes each.

        correlation: Pearson, of activations, zeros included;    phi: the same of active or not, as 1 and 0

    65,536 latents of which 64 are active on each of 65,536 tokens take 170 MB; blocks of the matrix are computed on
    access. Counts of all pairs over many more tokens, up to 28,000 latents: `saewb.coactivation`.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x).
        sae: of any architecture.
        tokens: ids, `[rows, ctx]`, or texts, to be packed into rows of `ctx_len`.
        by: "correlation" or "phi".
        hook: hook point the SAE reads, instead of `sae.cfg.hook`.
        n_tokens: maximum of tokens to read, from the first one on.
        min_fires: latents active on fewer tokens have no entries: two that are active on a single token would correlate
            perfectly.
        ctx_len: tokens in a row, if `tokens` are texts.
        skip_special_tokens: True leaves out the tokenizer's BOS, EOS, PAD and the like; or a list of ids.
        progress: called with the number of tokens read; an exception in it ends the pass.

    Returns:
        A MatrixView over all latents of the SAE.

    Raises:
        ValueError: for another `by`, if there are no tokens, or for an SAE without a hook; if an SAE is attached there,
            or the model is steered.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> view = latent_matrix(model, sae, [d.text for d in saewb.tiny.held_out_texts()[:20]])
        >>> view, round(view.block([748], [748]).item(), 4)
        (MatrixView(correlation, 1,024 features), 1.0)
    """
    if by not in _KINDS:
        raise ValueError(explain(f"latent_matrix got by={by!r}.", near=near(by, _KINDS), want=" or ".join(_KINDS)))
    if n_tokens < 1 or (hook_name := hook or sae.cfg.hook) is None:
        fix = "latent_matrix(model, sae, tokens, hook='blocks.4.hook_resid_post')"
        raise ValueError(explain(f"latent_matrix got hook={hook!r}, n_tokens={n_tokens}.", want="both", fix=fix))
    ids = token_rows(model, tokens, ctx_len)
    mask = ~special_mask(ids, special_ids(model, skip_special_tokens))
    parts, n_read, encoder = [], 0, SparseEncoder(sae)
    with eval_mode(model):
        for part in torch.arange(len(ids)).split(max(1, _PASS // ids.shape[1])):
            x = _read(model, sae, ids[part], mask[part], hook_name)[: n_tokens - n_read]
            parts += [latents for _, latents in encoder.tiles(x)]
            n_read += len(x)
            if progress is not None:
                progress(n_read)
            if n_read == n_tokens:
                break
    if not n_read:
        what = f"all {ids.numel()} tokens are special."
        raise ValueError(explain(what, want="text", fix="latent_matrix(..., skip_special_tokens=False)"))
    entries = Sparse.of(SparseLatents.cat(parts), by, min_fires)
    return MatrixView(entries, entries.firing_counts() / n_read)


@torch.no_grad()
def _read(model: nn.Module, sae: nn.Module, ids: Tensor, mask: Tensor, hook_name: str) -> Tensor:
    """Input of the SAE at tokens that are not special, `[tokens, d_in]`."""
    device = next(model.parameters()).device
    with hook_points.lock(model):
        check_unmodified(model, [hook_name])
        activation = capture(model, ids.to(device), [hook_name])[hook_name]
    return flatten_heads(sae, activation, sae.cfg.d_in, hook_name)[mask.to(device)]
