"""One layer of a cross-layer transcoder with the interface of an SAE, for attaching.

The layers of one transcoder share their latents in a forward pass: each writes what the latents of all layers up to its
own decode to there, after whatever hooks did to them. The error term also needs the reconstruction without edits of
hooks; for that the clean latents are kept from the first layer on where a hook may have changed something.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from saewb.errors import explain
from saewb.sae.activation_functions import Tap
from saewb.sae.cross_layer import CrossLayerTranscoder, LayerActs


def transcoder_layers(clt: CrossLayerTranscoder) -> list[TranscoderLayer]:
    """Layers of a transcoder as SAEs, to be run first to last, that share their latents in a pass."""
    latents = _PassLatents()
    return [TranscoderLayer(clt, layer, latents) for layer in range(clt.cfg.n_layers)]


@dataclass(eq=False)
class _PassLatents:
    """Latents of one forward pass, by layer of the transcoder."""

    edited: dict[int, LayerActs] = field(default_factory=dict)
    """After hooks."""
    clean: dict[int, LayerActs] = field(default_factory=dict)
    """Before hooks, where those may have changed them."""


@dataclass(frozen=True)
class TranscoderLayerConfig:
    """The fields of an SAEConfig that a splice reads."""

    d_in: int
    d_sae: int
    d_out: int
    head: None = None
    k: None = None


class TranscoderLayer:
    """One layer of a CrossLayerTranscoder with the interface of an SAE, from `transcoder_layers`."""

    looks_back = False

    def __init__(self, clt: CrossLayerTranscoder, layer: int, latents: _PassLatents) -> None:
        self.clt, self.layer, self._latents = clt, layer, latents
        self.cfg = TranscoderLayerConfig(clt.cfg.d_in, clt.cfg.d_sae[layer], clt.cfg.d_out)

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.clt.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters and the arithmetic."""
        return self.clt.dtype

    @property
    def edited(self) -> bool:
        """Whether hooks may have changed latents of an earlier layer in this pass."""
        return bool(self._latents.clean)

    def clear(self) -> None:
        """Clear the latents of the last pass."""
        self._latents.edited.clear()
        self._latents.clean.clear()

    def encode(self, x: Tensor, tap: Tap | None = None) -> Tensor:
        """This layer's latents, kept for the later layers of this pass."""
        acts = self.clt.encode_layer(x, self.layer, tap=tap)
        self._latents.edited[self.layer] = LayerActs.of(acts)
        return acts

    def decode(self, acts: Tensor, x: Tensor, tap: Tap | None = None) -> Tensor:
        """Output of this and all earlier layers at this write point."""
        if acts is not self._latents.edited[self.layer].acts:
            self._latents.edited[self.layer] = LayerActs.of(acts)
        return self._decode(self._latents.edited, x, tap)

    def __call__(self, x: Tensor) -> Tensor:
        """Output of this and all earlier layers at this write point without edits of hooks."""
        self._latents.clean[self.layer] = LayerActs.of(self.clt.encode_layer(x, self.layer))
        return self._decode({**self._latents.edited, **self._latents.clean}, x)

    def _decode(self, by_layer: Mapping[int, LayerActs], x: Tensor, tap: Tap | None = None) -> Tensor:
        missing = [layer for layer in range(self.layer) if layer not in by_layer]
        if missing:
            hook = self.clt.cfg.hooks[missing[0]]
            what = f"{self!r} needs the latents of all earlier layers, and {hook!r} was not read in this pass."
            raise ValueError(explain(what, want="a pass that starts at the model's first layer", fix="model(tokens)"))
        return self.clt._decode([by_layer[layer] for layer in range(self.layer + 1)], self.layer, x, tap)

    def __repr__(self) -> str:
        return f"layer {self.layer} of {self.clt!r}"
