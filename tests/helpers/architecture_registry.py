"""The one list of architectures: a new one is added here, and every conformance test runs on it.

All dimensions differ (8 read, 24 latents, 6 written), biases are not zero, decoder rows differ in norm, and thresholds
lie among the pre-activations, so that a missing transpose, bias, norm or comparison cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE, SAEConfig
from saewb.sae.temporal import TemporalConfig, TemporalSAE

D_IN, D_SAE, D_OUT = 8, 24, 6
HOOK, HOOK_OUT = "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out"


def activations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Inputs with a mean, `[*shape, d_in]`."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, D_IN, generator=rng, dtype=torch.float64) * 1.5 + 0.3).to(dtype)


def _drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    result = {name: torch.randn(shape, generator=rng) * 0.4 for name, shape in shapes.items()}
    if "threshold" in result:
        result["threshold"] = result["threshold"].abs()
    return result


def feed_forward(seed: int = 1, **fields: object) -> SAE:
    """An SAE with random weights; its decoder rows have norms from about 0.4 to 1.8."""
    cfg = SAEConfig(**{"d_in": D_IN, "d_sae": D_SAE, "hook": HOOK, "model": "gpt2", **fields})
    return SAE.from_tensors(cfg, _drawn(cfg.tensor_shapes(), seed))


def pursuit(seed: int = 2, **fields: object) -> PursuitSAE:
    """A PursuitSAE whose rows have norms from 0.8 to 1.2; the pursuit diverges from a norm of sqrt(2) on."""
    cfg = PursuitConfig(**{"d_in": D_IN, "d_sae": D_SAE, "hook": HOOK, "model": "gpt2", "max_iterations": 5, **fields})
    drawn = _drawn({"W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}, seed)
    norms = torch.linspace(0.8, 1.2, D_SAE)[:, None]
    return PursuitSAE.from_tensors(cfg, {**drawn, "W_dec": nn.functional.normalize(drawn["W_dec"], dim=1) * norms})


def temporal(seed: int = 3, **fields: object) -> TemporalSAE:
    """A TemporalSAE whose decoder rows are long enough for its codes not to be tiny."""
    base = {"d_in": D_IN, "d_sae": D_SAE, "hook": HOOK, "model": "gpt2", "n_heads": 2, "bottleneck_factor": 3}
    cfg = TemporalConfig(**{**base, **fields})
    drawn = _drawn(cfg.tensor_shapes(), seed)
    return TemporalSAE.from_tensors(cfg, {**drawn, "W_dec": drawn["W_dec"] * 3})


def transcoder(seed: int = 4, **fields: object) -> SAE:
    """A transcoder from 8 to 6 dimensions, another point of the model."""
    return feed_forward(seed, d_out=D_OUT, hook_out=HOOK_OUT, **fields)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: feed_forward(pre_bias="tied"),
    "relu_untied": lambda: feed_forward(),
    "relu_own_b_pre": lambda: feed_forward(pre_bias="own"),
    "relu_layer_norm": lambda: feed_forward(normalization="layer_norm", pre_bias="tied"),
    "relu_centered": lambda: feed_forward(normalization="centered", pre_bias="tied"),
    "jumprelu": lambda: feed_forward(activation="jumprelu", pre_bias="tied"),
    "jumprelu_constant_norm": lambda: feed_forward(activation="jumprelu", normalization="constant_norm"),
    "topk": lambda: feed_forward(activation="topk", k=5, pre_bias="tied"),
    "topk_layer_norm": lambda: feed_forward(activation="topk", k=5, normalization="layer_norm", pre_bias="tied"),
    "abstopk": lambda: feed_forward(activation="abstopk", k=5, pre_bias="tied"),
    "lineartopk": lambda: feed_forward(activation="lineartopk", k=15),
    "lineartopk_transcoder": lambda: transcoder(activation="lineartopk", k=5),
    "groupmax": lambda: feed_forward(activation="groupmax", k=6, pre_bias="tied"),
    "abstopk_own_b_pre": lambda: feed_forward(activation="abstopk", k=5, pre_bias="own", normalization="constant_norm"),
    "hook_z_head": lambda: feed_forward(hook="blocks.1.attn.hook_z", head=2),
    "skip_same_point": lambda: feed_forward(skip=True, pre_bias="tied"),
    "transcoder": lambda: transcoder(),
    "transcoder_own_b_pre": lambda: transcoder(pre_bias="own"),
    "skip_transcoder": lambda: transcoder(skip=True),
    "jumprelu_transcoder": lambda: transcoder(activation="jumprelu"),
    "jumprelu_skip_transcoder": lambda: transcoder(activation="jumprelu", skip=True),
    "topk_transcoder": lambda: transcoder(activation="topk", k=5),
    "abstopk_skip_transcoder": lambda: transcoder(activation="abstopk", k=5, skip=True),
    "pursuit": lambda: pursuit(),
    "pursuit_untied": lambda: pursuit(pre_bias="none", stop_on_duplicate=False, residual_threshold=1.0),
    "pursuit_layer_norm": lambda: pursuit(normalization="layer_norm", max_iterations=None),
    "pursuit_centered": lambda: pursuit(normalization="centered"),
    "temporal": lambda: temporal(activation="topk", k=3),
    "temporal_untied": lambda: temporal(tied=False, pre_bias="none", n_attn_layers=2),
    "temporal_no_bias": lambda: temporal(pre_bias="none", normalization="layer_norm"),
    "temporal_factor": lambda: temporal(activation="topk", k=3, factor=0.25),
}


def with_metadata(sae: nn.Module, **metadata: object) -> nn.Module:
    """The same weights with something in `cfg.metadata`."""
    tensors = {name: t.clone() for name, t in sae.state_dict().items()}
    return type(sae).from_tensors(replace(sae.cfg, metadata=metadata), tensors)
