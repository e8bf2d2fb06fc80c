"""One layer of a cross-layer transcoder with the interface of an SAE, for attaching.

The layers of one object share what they found in the forward pass under way: each writes what the latents of all
layers up to its own make there, after whatever hooks did to them. With an error term it also has to say what would
have been written had no hook touched any latents; for that the undisturbed latents are kept from the first layer on
where a hook may have changed something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saewb.errors import explain
from saewb.sae.activation_functions import Tap
from saewb.sae.cross_layer import Active, CrossLayerTranscoder, active


def layers_in_one_pass(clt: CrossLayerTranscoder) -> list[OneLayer]:
    """Its layers as SAEs that are to be run first to last, each knowing what the earlier ones found in this pass."""
    seen = _Seen()
    return [OneLayer(clt, layer, seen) for layer in range(clt.cfg.n_layers)]


@dataclass(eq=False)
class _Seen:
    """What the layers of one CrossLayerTranscoder share in a forward pass."""

    used: dict[int, Active] = field(default_factory=dict)  # latents after hooks, by layer
    undisturbed: dict[int, Active] = field(default_factory=dict)  # before hooks, where those may have changed them


@dataclass(frozen=True)
class OneLayerConfig:
    """The fields of an SAEConfig that attaching asks for."""

    d_in: int
    d_sae: int
    d_out: int
    hook: str
    hook_out: str
    is_transcoder: bool
    head: None = None
    k: None = None


class OneLayer:
    """One layer of a CrossLayerTranscoder with the interface of an SAE. Made by `layers_in_one_pass`; not for users."""

    carries_on = True  # later layers need its latents, even where another SAE is written over its output

    def __init__(self, whole: CrossLayerTranscoder, layer: int, seen: _Seen) -> None:
        self.whole, self.layer, self._seen = whole, layer, seen
        cfg = whole.cfg
        places = cfg.hooks[layer], cfg.hooks_out[layer]
        self.cfg = OneLayerConfig(
            cfg.d_in, cfg.d_sae[layer], cfg.d_out, *places, cfg.d_in != cfg.d_out or places[0] != places[1]
        )

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return self.whole.device

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes."""
        return self.whole.dtype

    @property
    def disturbed(self) -> bool:
        """Whether hooks may have changed what an earlier layer found in this pass."""
        return bool(self._seen.undisturbed)

    def forget(self) -> None:
        """A new pass begins."""
        self._seen.used.clear()
        self._seen.undisturbed.clear()

    def encode(self, x: Tensor, tap: Tap | None = None) -> Tensor:
        """This layer's latents, remembered for the later layers of this pass."""
        latents = self.whole.encode_layer(x, self.layer, tap=tap)
        self._seen.used[self.layer] = active(latents)
        return latents

    def decode(self, latents: Tensor, x: Tensor, tap: Tap | None = None) -> Tensor:
        """What this and all earlier layers write here."""
        if latents is not self._seen.used[self.layer].latents:
            self._seen.used[self.layer] = active(latents)
        return self._sum(self._seen.used, x, tap)

    def __call__(self, x: Tensor) -> Tensor:
        """What they would write here had no hook touched any latents."""
        self._seen.undisturbed[self.layer] = active(self.whole.encode_layer(x, self.layer))
        return self._sum({**self._seen.used, **self._seen.undisturbed}, x)

    def _sum(self, found: Mapping[int, Active], x: Tensor, tap: Tap | None = None) -> Tensor:
        missing = [layer for layer in range(self.layer) if layer not in found]
        if missing:
            read = self.whole.cfg.hooks[missing[0]]
            what = f"{self!r} needs the latents of all earlier layers, and {read!r} was not read in this pass."
            raise ValueError(explain(what, want="a pass that starts at the model's first layer", fix="model(tokens)"))
        return self.whole._decode([found[layer] for layer in range(self.layer + 1)], self.layer, x, tap)

    def __repr__(self) -> str:
        return f"layer {self.layer} of {self.whole!r}"
