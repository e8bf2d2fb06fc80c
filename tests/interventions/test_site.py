"""Where SAEs read and write: names, points, shapes; without attaching anything."""

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.interventions.site import Site, check_reconstructs, flatten_heads
from saewb.models import hook_points
from saewb.sae.cross_layer import CrossLayerConfig, CrossLayerTranscoder

RESID = "blocks.1.hook_resid_post"
MLP_IN, MLP_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
Z = "blocks.1.attn.hook_z"


def transcoder(hooks, hooks_out):
    """A cross-layer transcoder with 5, 6, 7 latents."""
    cfg = CrossLayerConfig(16, (5, 6, 7), hooks, hooks_out, activation="relu")
    tensors = {name: [torch.zeros(shape) for shape in shapes] for name, shapes in cfg.tensor_shapes().items()}
    return CrossLayerTranscoder.from_tensors(cfg, tensors)


@pytest.fixture(params=tiny_models.kinds())
def model(request):
    return getattr(tiny_models, request.param)()


def test_an_sae_reads_where_it_writes(model):
    before = tiny_models.snapshot(model)
    sae = tiny_models.sae(RESID)
    site = Site.of(model, sae)
    assert tiny_models.snapshot(model) == before  # nothing is attached to learn it
    assert saewb.attachments(model) == []
    assert site.is_one_point
    assert site.read is site.write
    assert site.read.module is hook_points.resolve(model, RESID).module
    assert (site.hook_name, site.hook_name_out, site.name) == (RESID, RESID, RESID)
    assert (site.layer, site.head, site.d_in, site.d_out, site.d_sae) == (1, None, 16, 16, 40)
    assert site.clt_layer is None
    assert site.sae is sae


def test_names_stay_as_they_were_typed(model):
    point = hook_points.resolve(model, RESID)
    for name in point.names:
        site = Site.of(model, tiny_models.sae(None), hook=name)
        assert site.hook_name == site.hook_name_out == name
        assert site.read.module is point.module


def test_a_transcoder_keeps_the_point_it_writes_to(model):
    coder = tiny_models.sae(MLP_IN, hook_out=MLP_OUT)
    site = Site.of(model, coder)
    assert not site.is_one_point
    assert site.name == f"{MLP_IN} => {MLP_OUT}"
    moved = Site.of(model, coder, hook="blocks.0.mlp.hook_in")
    assert (moved.hook_name, moved.hook_name_out, moved.layer) == ("blocks.0.mlp.hook_in", MLP_OUT, 0)
    assert Site.of(model, coder, hook_out=RESID).hook_name_out == RESID


def test_an_sae_that_is_moved_reads_and_writes_there(model):
    site = Site.of(model, tiny_models.sae(RESID), hook="blocks.0.hook_resid_post")
    assert site.is_one_point
    assert site.hook_name_out == "blocks.0.hook_resid_post"
    assert site.layer == 0


def test_layers_of_a_cross_layer_transcoder(model):
    hooks, hooks_out = ([f"blocks.{i}.{end}" for i in range(3)] for end in ("mlp.hook_in", "hook_mlp_out"))
    clt = transcoder(tuple(hooks), tuple(hooks_out))
    sites = Site.of_layers(model, clt)
    assert [s.hook_name for s in sites] == hooks
    assert [s.hook_name_out for s in sites] == hooks_out
    assert [(s.layer, s.clt_layer, s.d_sae) for s in sites] == [(0, 0, 5), (1, 1, 6), (2, 2, 7)]
    x = torch.randn(1, 4, 16)
    assert torch.equal(sites[1].encode(x), clt.encode_layer(x, 1))
    with pytest.raises(TypeError, match=r"reads and writes at every layer[\s\S]*saewb.attach"):
        Site.of(model, clt)


def test_activations_of_all_heads_and_of_one(model):
    z = torch.randn(2, 5, tiny_models.HEADS, 4)
    whole = Site.of(model, tiny_models.sae(Z))
    assert torch.equal(whole.read_input(z), z.flatten(2))
    assert torch.equal(whole.write_output(whole.read_target(z) * 2, z), z * 2)
    one = Site.of(model, tiny_models.sae(Z, d_in=4, head=2))
    assert one.head == 2
    assert torch.equal(one.read_input(z), z[:, :, 2])
    out = one.write_output(torch.zeros(2, 5, 4), z)
    assert not out[:, :, 2].any()
    assert torch.equal(out[:, :, [0, 1, 3]], z[:, :, [0, 1, 3]])
    with pytest.raises(ValueError, match=r"gives activations of shape \(2, 5, 4, 4\)[\s\S]*heads > 2, 16\] for head 2"):
        flatten_heads(tiny_models.sae(Z, head=2), z, 16, Z)


@pytest.mark.parametrize(
    ("sae", "hooks", "error", "message"),
    [
        (lambda: tiny_models.sae(None), {}, ValueError, r"does not say where it belongs[\s\S]*fix:"),
        (lambda: tiny_models.sae(MLP_IN, d_out=8), {}, ValueError, "does not say where it writes"),
        (lambda: tiny_models.sae(RESID), {"hook": "blocks.1.resid_post"}, ValueError, r"no hook[\s\S]*resid_post"),
        (lambda: tiny_models.sae(RESID), {"hook_out": "blocks.9.hook_z"}, ValueError, "no hook named"),
        (lambda: "tiny", {}, TypeError, r"got str as an SAE[\s\S]*saewb.load_sae\('tiny'\)"),
        (lambda: torch.nn.Linear(2, 2), {}, TypeError, "Linear as an SAE"),
    ],
)
def test_what_does_not_fit(model, sae, hooks, error, message):
    with pytest.raises(error, match=message):
        Site.of(model, sae(), **hooks)


def test_a_model_without_hook_points():
    with pytest.raises(TypeError, match="has no hook points"):
        Site.of(torch.nn.Linear(2, 2), tiny_models.sae(RESID))


def test_a_point_that_can_be_read_but_not_written():
    model, sae = tiny_models.bridge(), tiny_models.sae("blocks.1.hook_resid_mid")
    with pytest.raises(ValueError, match="is what the MLP reads"):
        Site.of(model, sae)
    assert Site.of(model, sae, writable=False).hook_name == "blocks.1.hook_resid_mid"


def test_one_layer_of_a_cross_layer_transcoder_reconstructs_nothing():
    check_reconstructs(tiny_models.sae(RESID))
    with pytest.raises(ValueError, match="reconstructs nothing by itself"):
        check_reconstructs(tiny_models.sae(RESID, metadata={"summed_over_layers": 3}))
