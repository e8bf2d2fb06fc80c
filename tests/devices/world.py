"""What the cases of `cases` work with, on one device: a model of random weights, SAEs, activations, texts."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from helpers import architecture_registry, tiny_models

HOOK, LATER = "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
SIZES = {"d_in": tiny_models.D_MODEL, "d_sae": 40}


class World:
    """Everything on `device`; what is drawn here is drawn on the CPU, and so the same on every device.

    `draws_alike` says whether what saewb itself draws on the devices that are compared is the same: not on a GPU.
    """

    def __init__(self, device, folder, draws_alike=True):
        self.device, self.folder, self.draws_alike = torch.device(device), folder, draws_alike

    def drawn(self, results):
        """Results that depend on draws; only their shapes where devices draw differently."""
        return results if self.draws_alike else [tuple(getattr(result, "shape", ())) for result in results]

    def to(self, value):
        """A tensor or module on the device."""
        return copy.deepcopy(value).to(self.device) if isinstance(value, torch.nn.Module) else value.to(self.device)

    def randn(self, *shape, seed=0, dtype=torch.float32):
        return self.to(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))

    def generator(self):
        return torch.Generator(self.device).manual_seed(0)

    @cached_property
    def model(self):
        model = tiny_models.new_bridge()
        if self.device.type != "cpu":
            model.to(self.device, print_details=False)
        return model

    @cached_property
    def tokens(self):
        return tiny_models.tokens(rows=6, length=12)

    @property
    def texts(self):
        return [" ".join(f"w{(7 * i + j * j) % 28}" for j in range(11)) for i in range(12)]

    def sae(self, hook=HOOK, activation="relu", seed=0, **fields):
        return self.to(tiny_models.sae(hook, activation, seed=seed, **fields))

    @cached_property
    def topk(self):
        return self.sae(activation="topk", k=5)

    def architectures(self):
        """(name, SAE on the device) of every architecture."""
        return [(name, self.to(make())) for name, make in architecture_registry.ARCHITECTURES.items()]

    @cached_property
    def cross_layer(self):
        from saewb.sae.cross_layer import CrossLayerConfig, CrossLayerTranscoder

        names = tuple(f"blocks.{i}.hook_resid_mid" for i in range(2))
        outs = tuple(f"blocks.{i}.hook_mlp_out" for i in range(2))
        cfg = CrossLayerConfig(tiny_models.D_MODEL, (20, 14), names, outs)
        rng = torch.Generator().manual_seed(0)
        shapes = cfg.tensor_shapes().items()
        tensors = {name: [torch.randn(shape, generator=rng) * 0.3 for shape in of] for name, of in shapes}
        return self.to(CrossLayerTranscoder.from_tensors(cfg, tensors))

    @cached_property
    def activations(self):
        """[600, 16], from 30 features and a constant, so that no token is all zeros."""
        rng = torch.Generator().manual_seed(3)
        features = torch.nn.functional.normalize(torch.randn(30, tiny_models.D_MODEL, generator=rng), dim=1)
        active = torch.rand(600, 30, generator=rng) < 0.1
        return self.to((active * (1 + torch.rand(600, 30, generator=rng))) @ features + 0.1)

    @cached_property
    def index(self):
        import saewb

        return saewb.build_index(self.model, self.topk, self.tokens, coactive_tokens=16, ctx_len=12, n_logits=4)
