"""The k largest of a product, a block of latents at a time, are those of the whole product."""

import pytest
import torch
from helpers.peak_memory import peak_bytes

import saewb
from saewb.kernels import topk


@pytest.mark.parametrize("activation", ["topk", "abstopk"])
@pytest.mark.parametrize(("tokens", "d_sae", "k"), [(5, 4096, 3), (3, 3000, 1500), (1, 2500, 2500), (0, 2048, 4)])
def test_blocks_give_what_the_whole_product_gives(activation, tokens, d_sae, k, monkeypatch):
    monkeypatch.setattr(topk, "BLOCK", 1024)
    rng = torch.Generator().manual_seed(0)
    h, W, b = (torch.randn(*shape, generator=rng).double() for shape in ((tokens, 7), (7, d_sae), (d_sae,)))
    values, indices = topk.top_of_product(h, W, b, k, activation)
    expected, where = topk.top(torch.addmm(b, h, W), k, activation)
    dense, target = (
        torch.zeros(tokens, d_sae).double().scatter(1, i, v) for v, i in ((values, indices), (expected, where))
    )
    assert values.shape == (tokens, k)
    assert torch.allclose(dense, target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["topk", "abstopk"])
def test_a_wide_sae_keeps_the_same_with_and_without_gradients(activation):
    sae = saewb.SAE(saewb.SAEConfig(d_in=4, d_sae=2**15, activation=activation, k=8), seed=1)
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(2))
    with_gradients = sae.encode_topk(x)
    with torch.no_grad():
        without = sae.encode_topk(x)
    assert with_gradients.topk.values.requires_grad
    assert torch.allclose(without.dense(), with_gradients.dense(), atol=1e-6)


def test_a_wide_sae_holds_one_block_of_pre_activations():
    before = """
import saewb
sae = saewb.SAE(saewb.SAEConfig(d_in=8, d_sae=2**16, activation="topk", k=8))
x = torch.randn(2048, 8)
with torch.no_grad(): sae.encode_topk(x[:256])"""
    took = peak_bytes(before, "with torch.no_grad(): sae.encode_topk(x)")  # all pre-activations would be 512 MiB
    assert took < 100 * 2**20
