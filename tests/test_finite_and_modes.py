"""Activations that are not finite, dtypes, autocast, inference mode and dropout: right, or refused in one line."""

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.models.capture import eval_mode

RESID = "blocks.1.hook_resid_post"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_are_refused(value, tmp_path):
    model, sae, ids = tiny_models.new_bridge(), tiny_models.sae(RESID), tiny_models.tokens(4, 9)
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: x.index_fill(1, torch.tensor([3]), value))
    for call in (
        lambda: saewb.build_index(model, sae, ids),
        lambda: saewb.evaluate(model, sae, ids),
        lambda: saewb.latent_matrix(model, sae, ids),
        lambda: saewb.read_prompt(model, ids[0], sae),
        lambda: saewb.attribute(model, ids[0], sae, 9),
        lambda: saewb.next_tokens(model, ids[0]),
        lambda: saewb.cache_activations(model, ids, RESID, tmp_path / "cache", 16),
    ):
        with pytest.raises(FloatingPointError, match="not finite"):
            call()


def test_one_infinite_token_ends_a_run_and_leaves_its_sae_intact():
    n_calls = 0

    def draw(n, rng):
        nonlocal n_calls
        n_calls += 1
        x = torch.randn(n, 8, generator=rng)
        return x.index_fill(0, torch.tensor([3]), torch.inf) if n_calls == 20 else x

    run = saewb.train(
        None,
        saewb.stream_draws(draw, seed=0, batch_tokens=64),
        saewb.TopK(d_sae=16, k=2),
        n_tokens=64 * 40,
        batch_tokens=64,
    )
    with pytest.raises(FloatingPointError, match="activations at 'activations' are not finite: 8 of 512 numbers"):
        run.wait()
    assert all(bool(p.isfinite().all()) for p in run.sae.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_saes_of_every_dtype_in_tables(dtype):
    model, sae, ids = tiny_models.bridge(), tiny_models.sae(RESID, "topk", k=4), tiny_models.tokens(6, 9)
    reference = saewb.attribute(model, ids[:1], sae, 9)
    sae = tiny_models.sae(RESID, "topk", k=4).to(dtype)
    got = saewb.attribute(model, ids[:1], sae, 9)
    assert got.metric == reference.metric
    assert got.to_frame().effect.abs().max() == pytest.approx(float(reference.effect.abs().max()), rel=0.1)
    assert len(saewb.build_index(model, sae, ids).table()) == 40


def test_an_sae_keeps_its_precision_inside_of_autocast():
    sae, x = tiny_models.sae(RESID), torch.randn(5, 16)
    expected = sae(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae(x), expected)
        assert saewb.matrix_view(sae).block([1], [2]).dtype == torch.float32
        assert saewb.evaluate(tiny_models.bridge(), sae, tiny_models.tokens(4, 9)).fvu > 0


def test_what_needs_gradients_works_in_inference_mode():
    model, sae, ids = tiny_models.bridge(), tiny_models.sae(RESID), tiny_models.tokens(6, 9)
    expected = saewb.attribute(model, ids[:1], sae, 9).effect
    with torch.inference_mode():
        assert torch.equal(saewb.attribute(model, ids[:1], sae, 9).effect, expected)
        assert len(saewb.read_prompt(model, ids[:1], sae, target=9, attribution="gradient").attribution)
        assert saewb.build_index(model, sae, ids).n_tokens > 0


def test_dropout_of_parts_without_a_component_is_off_in_eval_mode():
    model = tiny_models.new_bridge()
    model.original_model.extra = torch.nn.Dropout(0.5)  # registered with the wrapped model alone
    model.original_model.extra.train()
    with eval_mode(model):
        assert not model.original_model.extra.training
    assert model.original_model.extra.training


def test_options_that_lack_what_they_need_are_refused_at_the_start():
    stream = saewb.stream_draws(lambda n, rng: torch.randn(n, 8, generator=rng), seed=0, batch_tokens=32)
    for options, says in (
        ({"checkpoint_every_tokens": 64}, "no folder"),
        ({"keep_saes": True}, "no folder"),
        ({"folder": ""}, "folder=''"),
        ({"eval_every_tokens": 64}, "held_out"),
    ):
        with pytest.raises(ValueError, match=says):
            saewb.train(None, stream, saewb.TopK(d_sae=16, k=2), n_tokens=128, batch_tokens=32, **options)
    with pytest.raises(TypeError, match="loggers"):
        saewb.train(None, stream, saewb.TopK(d_sae=16, k=2), n_tokens=128, batch_tokens=32, loggers=["wandb"])


def test_positions_count_from_the_text_in_a_padded_batch():
    model, sae = tiny_models.bridge(), tiny_models.sae(RESID)
    ids = torch.tensor([[3, 3, 1, 9, 8], [1, 5, 6, 7, 9]])
    mask = (ids != 3).long()
    with saewb.steer(model, sae, {5: 9.0}, positions=slice(1, 2)), torch.no_grad():
        _, there = model.run_with_cache(ids, names_filter=RESID, attention_mask=mask)
    _, before = model.run_with_cache(ids, names_filter=RESID, attention_mask=mask)
    assert (there[RESID] - before[RESID]).norm(dim=-1).gt(1e-4).int().tolist() == [[0, 0, 0, 1, 0], [0, 1, 0, 0, 0]]
