"""Active latents against the dense tensor they stand for."""

import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

from saewb.sae.sparse import SparseLatents

FEW = examples(60)
SIZES = {"rows": st.integers(0, 3), "ctx": st.integers(1, 4), "d_sae": st.integers(1, 7), "seed": st.integers(0, 999)}


def drawn(rows, ctx, d_sae, seed, share=0.4):
    rng = torch.Generator().manual_seed(seed)
    acts = torch.randn(rows, ctx, d_sae, generator=rng)
    return acts * (torch.rand(acts.shape, generator=rng) < share), rng


def as_topk(dense):
    """The same with k = d_sae, in an order of its own for each token."""
    rows = dense.flatten(0, -2)
    values, indices = rows.sort(-1)
    return SparseLatents.from_topk(values, indices, tuple(dense.shape))


def both(dense):
    return [SparseLatents.from_dense(dense), as_topk(dense)]


def check(latents, dense):
    """That it is the dense tensor, and sorted."""
    assert latents.shape == tuple(dense.shape)
    assert torch.equal(latents.dense(), dense)
    rows = dense.flatten(0, -2)
    assert torch.equal(torch.stack([latents.token, latents.latent]), rows.nonzero().T)
    assert torch.equal(latents.act, rows[rows != 0])
    assert len(latents) == int((dense != 0).sum())


@FEW
@given(**SIZES)
def test_round_trips(rows, ctx, d_sae, seed):
    dense, rng = drawn(rows, ctx, d_sae, seed)
    matrix = torch.randn(d_sae, 5, generator=rng)
    for latents in both(dense):
        check(latents, dense)
        torch.testing.assert_close(latents @ matrix, dense @ matrix, atol=1e-5, rtol=1e-5)
        assert (latents.to_scipy().toarray() == dense.flatten(0, -2).numpy()).all()
        check(latents.to("cpu"), dense)
        check(latents.to(torch.float64), dense.double())
        check(latents.view(ctx, rows), dense.reshape(ctx, rows, d_sae))
        assert (latents.dtype, latents.device.type, latents.n_tokens) == (torch.float32, "cpu", rows * ctx)


@FEW
@given(**SIZES)
def test_by_latent(rows, ctx, d_sae, seed):
    dense, _ = drawn(rows, ctx, d_sae, seed)
    for latents in both(dense):
        order = latents.by_latent()
        assert latents.by_latent() is order
        columns = dense.flatten(0, -2).T
        assert torch.equal(torch.stack([latents.latent[order.order], order.tokens]), columns.nonzero().T)
        assert torch.equal(order.sorted(latents.act), columns[columns != 0])
        assert torch.equal(order.starts, ((columns != 0).sum(1).cumsum(0) - (columns != 0).sum(1)))


@FEW
@given(**SIZES, picks=st.lists(st.integers(0, 11)))
def test_select(rows, ctx, d_sae, seed, picks):
    dense, rng = drawn(rows, ctx, d_sae, seed)
    flat = dense.flatten(0, -2)
    tokens = torch.tensor([pick for pick in picks if pick < len(flat)], dtype=torch.long)
    mask = torch.rand(len(flat), generator=rng) < 0.5
    some = torch.randperm(d_sae, generator=rng)[: d_sae // 2 + 1]
    columns = torch.rand(d_sae, generator=rng) < 0.5
    for latents in both(dense):
        check(latents.select(), flat)
        check(latents.select(tokens), flat[tokens])
        check(latents.select(mask), flat[mask])
        check(latents.select(latents=some), flat[:, some])
        if columns.any():
            check(latents.select(tokens, columns), flat[tokens][:, columns])


@FEW
@given(**SIZES)
def test_lookup(rows, ctx, d_sae, seed):
    dense, rng = drawn(rows, ctx, d_sae, seed)
    flat = dense.flatten(0, -2)
    if not len(flat):
        return
    token = torch.randint(0, len(flat), (6, 3), generator=rng)
    latent = torch.randint(0, d_sae, (6,), generator=rng)
    for latents in both(dense):
        assert torch.equal(latents.lookup(latent[:, None], token), flat[token, latent[:, None]])
        assert torch.equal(latents.lookup(latent, token[:, 0]), flat[token[:, 0], latent])


@FEW
@given(**SIZES)
def test_cat(rows, ctx, d_sae, seed):
    dense, _ = drawn(rows, ctx, d_sae, seed)
    other, _ = drawn(2, ctx, d_sae, seed + 1)
    want = torch.cat([dense, other]).flatten(0, -2)
    for parts in ([of(dense), to(other)] for of in (SparseLatents.from_dense, as_topk) for to in (as_topk,)):
        check(SparseLatents.cat(parts), want)
    check(SparseLatents.cat(both(dense)), torch.cat([dense, dense]).flatten(0, -2))
    assert SparseLatents.cat([as_topk(dense), as_topk(other)]).topk is not None


def test_gradients_pass():
    values = torch.tensor([[1.0, 0.0], [2.0, 3.0]], requires_grad=True)
    latents = SparseLatents.from_topk(values, torch.tensor([[2, 0], [0, 1]]), (2, 3))
    matrix = torch.arange(6.0).view(3, 2)
    want = torch.tensor([[9.0, 1.0], [1.0, 5.0]])
    for total in ((latents @ matrix).sum(), (latents.dense() @ matrix).sum()):
        assert torch.equal(torch.autograd.grad(total, values)[0], want)
    (latents.act * 2).sum().backward()
    assert torch.equal(values.grad, torch.tensor([[2.0, 0.0], [2.0, 2.0]]))


def test_what_does_not_fit():
    one, two = (SparseLatents.from_dense(torch.ones(2, width)) for width in (3, 4))
    with pytest.raises(ValueError, match=r"d_sae of \[3, 4\]"):
        SparseLatents.cat([one, two])
    with pytest.raises(ValueError, match="axes of 2 tokens"):
        one.view(3)
    assert repr(one) == "SparseLatents([2, 3], 6 active)"
