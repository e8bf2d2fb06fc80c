"""What the tests of panels look at: an index of the embedded model, one of hostile tokens, one with many latents."""

import functools
import json
from dataclasses import replace

import torch

import saewb
from helpers import tiny_models
from saewb.features import build_index
from saewb.features.accumulate import LatentAccumulator
from saewb.features.config import IndexInfo
from saewb.features.token_texts import TokenTexts

HOSTILE = "<img src=x onerror=alert(1)>"
NAMES = (HOSTILE, "</script><script>alert(1)</script>", "<!--", "\u2028", "\n", "&lt;", '"', "\\", "__proto__", "")


@functools.cache
def embedded():
    return saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")


@functools.cache
def index():
    texts = [d.text for d in saewb.tiny.held_out_texts()[:30]]
    return build_index(*embedded(), texts, n_top=6, n_quantiles=3, per_quantile=2, window=(9, 5))


@functools.cache
def hostile():
    """Tokens, and a name of the model, that would be markup if anything let them."""
    sae = tiny_models.sae("blocks.1.hook_resid_post", model=HOSTILE)
    result = build_index(tiny_models.bridge(), sae, tiny_models.tokens(8, 9), batch_size=8)
    strings = dict(zip(range(4, tiny_models.VOCAB), NAMES * 3, strict=False))
    return replace(result, info=replace(result.info, model=HOSTILE, sae=HOSTILE), token_texts=TokenTexts(strings))


@functools.cache
def silent():
    """An index whose latent 3 never fires."""
    sae = tiny_models.sae("blocks.1.attn.hook_q", d_in=4, head=1)
    sae.b_enc.data[3] = -1e6
    return build_index(tiny_models.bridge(), sae, tiny_models.tokens(8, 9), n_nearest=0)


@functools.cache
def many(n=65_536):
    """An index of many latents; what they do is made up."""
    rng = torch.Generator().manual_seed(0)
    sizes = (n, 16, 2, 1, 2, 4, 4, 64, n, 0)
    info = IndexInfo(*sizes, (0,), ((0, 1000),), 16_000, "SAE(many)", "many", "blocks.0.hook_resid_post", "")
    tensors = {k: t.clone() for k, t in LatentAccumulator(info.config).tensors().items()}
    for shelf in ("top", "sample"):
        tensors[f"{shelf}.tokens"] = torch.randint(1, 500, tensors[f"{shelf}.tokens"].shape, generator=rng).int()
        tensors[f"{shelf}.acts"] = torch.rand(tensors[f"{shelf}.acts"].shape, generator=rng)
        tensors[f"{shelf}.value"] = tensors[f"{shelf}.acts"][:, :, 4].clone()
        tensors[f"{shelf}.order"].fill_(1)
    tensors["counts.by_position"] = torch.randint(0, 99, tensors["counts.by_position"].shape, generator=rng)
    tensors["decoder_norm"] = torch.ones(n)
    return saewb.FeatureIndex(info, tensors, TokenTexts({i: f" word{i}" for i in range(500)}))


class Gone(dict):
    """Tensors of an index whose file was deleted: every look at them fails, until it is back."""

    there = True

    def __getitem__(self, name):
        if not self.there:
            raise OSError("stale file handle")
        return super().__getitem__(name)


def sent(panel):
    """Bytes that a first view costs."""
    return len(json.dumps(panel.get_state(), default=str)) + len(json.dumps(panel._repr_mimebundle_()[0]))
