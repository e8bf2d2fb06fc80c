"""What all architectures have from their base class."""

import pytest
import torch
from helpers.architecture_registry import ARCHITECTURES

import saewb
from saewb.errors import FormatError
from saewb.sae.base import SparseCoder, SparseEncoder
from saewb.sae.config import SAEConfig
from saewb.sae.cross_layer import CrossLayerConfig, CrossLayerTranscoder
from saewb.sae.sae import SAE


def cross_layer():
    cfg = CrossLayerConfig(d_in=4, d_sae=(6, 5), hooks=("a", "b"), hooks_out=("c", "d"))
    rng = torch.Generator().manual_seed(0)
    shapes = cfg.tensor_shapes().items()
    return CrossLayerTranscoder.from_tensors(
        cfg, {name: [torch.randn(shape, generator=rng) for shape in layers] for name, layers in shapes}
    )


@pytest.fixture(params=ARCHITECTURES)
def sae(request):
    return ARCHITECTURES[request.param]()


def draw(sae, *batch):
    return torch.randn(*batch, sae.d_in, generator=torch.Generator().manual_seed(1), dtype=sae.dtype)


def test_every_architecture_is_a_sparse_coder(sae):
    assert isinstance(sae, SparseCoder)
    assert (sae.d_in, sae.d_sae, sae.d_out) == (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.d_out)
    assert type(sae).__final__
    with pytest.raises(TypeError, match="abstract"):
        SparseCoder()


def test_sparse_latents_are_those_of_encode(sae):
    x, mask = draw(sae, 3, 4), torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    dense = sae.encode(x).detach()
    torch.testing.assert_close(sae.encode_sparse(x).dense(), dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.encode_sparse(x, mask).dense(), dense * mask[..., None], atol=1e-5, rtol=1e-5)
    assert sae.encode_sparse(x[:0]).shape == (0, 4, sae.d_sae)


def test_tiles_are_few_rows_at_a_time(sae, monkeypatch):
    monkeypatch.setattr("saewb.sae.base._TILE", 2 * 4 * sae.d_sae)
    x, rows = draw(sae, 5, 4), []
    for part, latents in SparseEncoder(sae).tiles(x):
        rows += range(*part.indices(5))
        torch.testing.assert_close(latents.dense(), sae.encode(x[part]).detach(), atol=1e-5, rtol=1e-5)
    assert rows == list(range(5))


def test_the_same_weights_under_another_configuration(sae):
    other = sae.with_config(model="other", metadata={"a": 1})
    assert (other.cfg.model, other.cfg.metadata, sae.cfg.model) == ("other", {"a": 1}, sae.cfg.model)
    assert type(other) is type(sae)
    assert other.W_dec.data_ptr() == sae.W_dec.data_ptr()
    x = draw(sae, 2, 3)
    assert torch.equal(other(x), sae(x))
    with pytest.raises(TypeError, match=r"Config has no field \['hok'\]"):
        sae.with_config(hok="blocks.0.hook_resid_post")


def test_a_cross_layer_one():
    clt = cross_layer()
    xs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for sparse, dense in zip(clt.encode_sparse(xs), clt.encode(xs), strict=True):
        assert torch.equal(sparse.dense(), dense)
    masked = clt.encode_sparse(xs, [None, torch.tensor([True, False, True])])[1]
    assert torch.equal(masked.dense()[[0, 2]], clt.encode(xs)[1][[0, 2]])
    assert not masked.dense()[1].any()
    other = clt.with_config(model="other")
    assert other.cfg.model == "other"
    assert all(torch.equal(a, b) for a, b in zip(other(xs), clt(xs), strict=True))


def test_latents_can_be_decoded_in_either_form():
    sae = SAE(SAEConfig(4, 9, activation="jumprelu"), seed=1)
    x = draw(sae, 2, 3)
    torch.testing.assert_close(sae.decode(sae.encode_sparse(x)), sae(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("b_enc"), r"missing \['b_enc'\], left over \[\]"),
        (lambda w: w.update(more=w["b_enc"]), r"missing \[\], left over \['more'\]"),
        (lambda w: w.update(b_enc=w["b_dec"]), r"b_enc has shape \(2,\).\n  want: \(4,\)"),
    ],
)
def test_weights_that_do_not_fit(change, says):
    sae = saewb.SAE(SAEConfig(2, 4))
    weights = dict(sae.state_dict())
    change(weights)
    with pytest.raises(FormatError, match=says):
        saewb.SAE.from_tensors(sae.cfg, weights)
