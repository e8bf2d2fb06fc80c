"""Temporal SAEs as their authors published them: `conf.yaml` and `latest_ckpt.safetensors`.

Tensors are named D [d_sae, d_in], b, E [d_in, d_sae] if untied, and attn_layers.*, in the orientation of TemporalSAE.
The layer is in the folder's name; the one in conf.yaml differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._layout import Layout, Provenance
from saewb.pretrained.formats._tensors import positive
from saewb.sae.temporal import TemporalConfig, TemporalSAE

_MAX_WIDTH = 1 << 32
_STORED = {"W_dec": "D", "b_dec": "b", "W_enc": "E"}


class Temporal(Layout):
    """Temporal SAEs as published: the hook is from `Provenance`, the factor from `conf.yaml`."""

    name = "temporal SAEs"
    aliases = ("temporal",)
    weights = "{path}/latest_ckpt.safetensors"
    config = "{path}/conf.yaml"
    folds_factor = True  # the catalogue has the factor of conf.yaml as well

    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> TemporalSAE:
        settings, file = _settings(self.read_config(path)), self.open_weights(path)
        if settings["n_attn_layers"] > len(file.names):  # before a name is made for each
            what = f"conf.yaml has n_attn_layers {settings['n_attn_layers']}, {file!r} not so many."
            raise FormatError(explain(what))
        layer = provenance.number(r"layer_(\d+)", path)
        layer = provenance.layer if layer is None else layer
        hook = provenance.hook or (None if layer is None else f"blocks.{layer}.hook_resid_post")
        site = provenance.complete(model=None, hook=hook)
        cfg = TemporalConfig(**settings, **{name: value for name, value in site.items() if name != "hook_out"})
        names = {name: _STORED.get(name, name) for name in cfg.tensor_shapes()}
        file.check({names[name]: shape for name, shape in cfg.tensor_shapes().items()})
        dtype = dtype or file.dtype("D")
        weights = {name: file.tensor(stored) for name, stored in names.items()}
        return TemporalSAE.from_tensors(cfg, {name: t.to(device or "cpu", dtype) for name, t in weights.items()})


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    sae, d_in = _block(config, "sae"), _block(config, "llm").get("dimin")
    needed = ("exp_factor", "n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk")
    missing = [name for name in (*needed, "tied_weights", "scaling_factor") if name not in sae]
    if missing or type(d_in) is not int or not 0 < d_in < _MAX_WIDTH:
        what = f"conf.yaml has llm.dimin={d_in!r}" + (f" and no sae.{', sae.'.join(missing)}" if missing else "")
        raise FormatError(explain(f"{what}.", want="both, llm.dimin a width"))
    if sae["sae_diff_type"] not in ("relu", "topk"):
        raise FormatError(explain(f"conf.yaml has sae_diff_type {sae['sae_diff_type']!r}.", want="'relu' or 'topk'"))
    k = sae["kval_topk"] if sae["sae_diff_type"] == "topk" else None  # top-k without k means all latents
    counts = {name: sae[name] for name in ("n_heads", "n_attn_layers", "bottleneck_factor")}
    wrong = [name for name, n in {**counts, "kval_topk": 1 if k is None else k}.items() if type(n) is not int]
    if wrong or type(sae["tied_weights"]) is not bool:
        what = f"conf.yaml has tied_weights {sae['tied_weights']!r}, {', '.join(f'{n} {sae[n]!r}' for n in wrong)}."
        raise FormatError(explain(what, want="true or false, and integers"))
    return {
        "d_in": d_in,
        "d_sae": int(min(_MAX_WIDTH, d_in * positive(sae["exp_factor"], "exp_factor"))),
        "activation": "relu" if k is None else "topk",
        "k": k,
        **counts,
        "tied": sae["tied_weights"],
        "pre_bias": "tied",
        "factor": positive(sae["scaling_factor"], "scaling_factor"),
    }


def _block(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    block = config.get(name)
    if not isinstance(block, Mapping):
        raise FormatError(explain(f"conf.yaml has {name}={block!r}.", want="a block of settings"))
    return block
