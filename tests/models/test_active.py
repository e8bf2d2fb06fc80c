"""What is attached where something is measured is refused; elsewhere it is part of the model, and of its digest."""

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.models import hook_points
from saewb.models.active import check_unmodified, model_digest

RESID, EARLY, LATE = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"
MLP = "blocks.1.hook_mlp_out"
HOW = {"n_top": 2, "window": 2, "n_quantiles": 1, "per_quantile": 1, "n_logits": 0, "n_nearest": 0}
IDS = tiny_models.tokens(6, 9)


def sae():
    return tiny_models.sae(RESID, d_sae=12)


def transcoder():
    return tiny_models.sae(EARLY, hook_out=MLP, d_sae=12)


MEASURED = {
    "index": lambda model, of: saewb.build_index(model, of, IDS, **HOW).density,
    "matrix": lambda model, of: saewb.latent_matrix(model, of, IDS, min_fires=1).density,
    "stream": lambda model, of: next(saewb.stream_activations(model, IDS, of.cfg.hook, batch_tokens=20)).values,
    "find": lambda model, of: saewb.build_index(tiny_models.bridge(), of, IDS, **HOW).find(model, of, IDS[0]),
    "evaluate": lambda model, of: saewb.evaluate(model, of, IDS).fvu,
    "read_prompt": lambda model, of: saewb.read_prompt(model, IDS[:1], of).activation,
    "attribute": lambda model, of: saewb.attribute(model, IDS[:1], of, 7).effect,
    "next_tokens": lambda model, of: saewb.next_tokens(model, IDS[:1], of, n=2).kl,
}
STEERED = ("evaluate", "read_prompt", "attribute", "next_tokens")  # about the model as it is made to behave


@pytest.fixture(scope="module")
def model():
    return tiny_models.new_bridge()


@pytest.mark.parametrize("name", MEASURED)
def test_an_sae_left_attached_at_a_point_is_refused(model, name):
    before = tiny_models.snapshot(model)
    for measured, attached in (
        (sae(), sae()),
        (sae(), tiny_models.sae(RESID, seed=3)),
        (transcoder(), tiny_models.sae(EARLY)),  # where it reads
    ):
        left = saewb.attach(model, attached)
        try:
            with pytest.raises(ValueError, match=r"writes to .* already(.|\n)*fix:  saewb\.detach_all\(model\)"):
                MEASURED[name](model, measured)
        finally:
            left.detach()
    assert tiny_models.snapshot(model) == before
    MEASURED[name](model, sae())


@pytest.mark.parametrize("name", [name for name in MEASURED if name not in ("matrix", "stream", "find")])
def test_one_where_a_transcoder_writes_is_refused(model, name):
    with saewb.attach(model, tiny_models.sae(MLP)), pytest.raises(ValueError, match="writes to .* already"):
        MEASURED[name](model, transcoder())


@pytest.mark.parametrize("name", [name for name in MEASURED if name != "find"])
def test_elsewhere_it_is_part_of_the_model(model, name):
    with saewb.attach(model, tiny_models.sae(LATE)):
        MEASURED[name](model, sae())
    with saewb.attach(model, tiny_models.sae(EARLY)):
        MEASURED[name](model, sae())


@pytest.mark.parametrize("name", MEASURED)
def test_steering_is_refused_where_the_models_own_activations_are_kept(model, name):
    with saewb.steer(model, tiny_models.sae(EARLY), {3: 5.0}):
        if name in STEERED:
            MEASURED[name](model, sae())
        else:
            with pytest.raises(ValueError, match=r"^Steering(.|\n)* is on the model(.|\n)*saewb\.detach_all\(model\)"):
                MEASURED[name](model, sae())


def test_a_stream_goes_on_once_it_is_detached(model):
    whole = list(saewb.stream_activations(model, IDS, RESID, batch_tokens=12, pass_tokens=18))
    stream = saewb.stream_activations(model, IDS, RESID, batch_tokens=12, pass_tokens=18)
    batches = [next(stream)]
    with saewb.attach(model, sae()), pytest.raises(ValueError, match="writes to .* already"):
        list(stream)
    batches += list(stream)
    assert [b.ids.tolist() for b in batches] == [b.ids.tolist() for b in whole]
    assert all(torch.equal(a.values[RESID], b.values[RESID]) for a, b in zip(batches, whole, strict=True))


def test_attached_while_an_index_is_built_it_stops_and_keeps_what_was_read(model, tmp_path, monkeypatch):
    from saewb.features import build as building

    real, left = building.capture, []

    def attaching(*arguments):
        result = real(*arguments)
        left.append(saewb.attach(model, sae()))
        return result

    monkeypatch.setattr(building, "capture", attaching)
    with pytest.raises(ValueError, match="writes to .* already"):
        saewb.build_index(model, sae(), IDS, batch_size=2, folder=tmp_path / "i", **HOW)
    monkeypatch.setattr(building, "capture", real)
    saewb.detach_all(model)
    assert saewb.load_index(tmp_path / "i").info.rows == ((0, 2),)
    whole = saewb.build_index(model, sae(), IDS, batch_size=2, folder=tmp_path / "i", **HOW)
    assert torch.equal(whole.density, saewb.build_index(model, sae(), IDS, batch_size=2, **HOW).density)


def test_the_digest_tells_what_is_on_the_model(model):
    coder, other = sae(), tiny_models.sae(RESID, seed=1)
    before = model_digest(model)
    digests = [before]
    for on in (
        lambda: saewb.attach(model, coder),
        lambda: saewb.attach(model, other),
        lambda: saewb.attach(model, coder, error_term=True),
        lambda: saewb.attach(model, coder, skip_special_tokens=True),
        lambda: saewb.attach(model, coder, hook=EARLY),
        lambda: saewb.steer(model, coder, {3: 1.0}),
        lambda: saewb.steer(model, coder, {3: 2.0}),
        lambda: saewb.steer(model, coder, {4: 1.0}),
        lambda: saewb.steer(model, coder, {3: 1.0}, how="clamp"),
        lambda: saewb.steer(model, coder, {3: 1.0}, positions=[2]),
        lambda: saewb.steer(model, coder, {3: 1.0}, positions=torch.ones(9, dtype=torch.bool)),
        lambda: model.hooks([(RESID, lambda x, hook: x)]),
        lambda: model.hooks([(RESID, lambda x, hook: x)]),  # another function: it cannot be compared
        lambda: hook_points.editing(model, {RESID: lambda x: x}),
    ):
        for _ in range(2):
            with on():
                digests.append(model_digest(model))
                assert model_digest(model) == digests[-1]
        assert model_digest(model) == before
    on_model = [*digests[1::2], *digests[2::2]]
    assert len(set(digests[:1] + digests[1::2])) == 1 + len(digests[1::2])
    assert digests[1:23:2] == digests[2:23:2]  # the same once more
    assert len(set(on_model)) == 11 + 2 * 3


def test_dropout_counts_where_the_model_runs_in_its_own_mode(model):
    model.original_model.add_module("drop", torch.nn.Dropout(0.1))
    try:
        model.original_model.eval()
        plain = model_digest(model, in_training=True)
        model.original_model.drop.train()
        assert model_digest(model, in_training=True) != plain
        assert model_digest(model) == model_digest(model)
    finally:
        del model.original_model.drop
        model.eval()


def test_points_by_any_name(model):
    with saewb.attach(model, sae()):
        for name in hook_points.resolve(model, RESID).names:
            with pytest.raises(ValueError, match="already"):
                check_unmodified(model, [name])
        check_unmodified(model, [EARLY, LATE])
