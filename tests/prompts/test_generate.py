"""Text token by token: as `model.generate` writes it, by seed, stopped, steered, and clean for everybody else."""

import itertools
import threading

import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.interventions.steering import steer
from saewb.prompts.generate import generate_tokens, next_token_changes
from saewb.sae.temporal import TemporalConfig, TemporalSAE

RESID = "blocks.1.hook_resid_post"


def chosen(*args, **kwargs):
    return [token.token_id for token in generate_tokens(*args, **kwargs)]


@pytest.mark.parametrize("steered", [False, True])
def test_greedy_is_what_generate_writes(model, steered):
    sae, ids = tiny_models.sae(RESID), tiny_models.tokens(1, 5)
    make = (lambda: steer(model, sae, {3: 9.0, 7: -4.0})) if steered else None
    got = chosen(model, ids, make, max_new_tokens=8)
    args = {"max_new_tokens": 8, "do_sample": False, "verbose": False}
    if steered:
        with steer(model, sae, {3: 9.0, 7: -4.0}):
            want = model.generate(ids, **args)
    else:
        want = model.generate(ids, **args)
    want = want[0, 5:].tolist()
    assert got == (want[: want.index(2) + 1] if 2 in want else want)


def test_a_seed_is_a_text_and_leaves_the_global_state_alone(model):
    ids, before = tiny_models.tokens(1, 5), torch.get_rng_state()
    texts = [chosen(model, ids, max_new_tokens=12, temperature=2.0, seed=seed) for seed in (0, 0, 1, 2)]
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts}) > 1
    assert torch.equal(torch.get_rng_state(), before)


def test_stopping_half_way_leaves_the_model_as_it_was(model):
    before = tiny_models.snapshot(model)
    sae = tiny_models.sae(RESID)
    going = generate_tokens(model, tiny_models.tokens(1, 5), lambda: steer(model, sae, {3: 9.0}), max_new_tokens=50)
    list(itertools.islice(going, 1))
    going.close()
    assert tiny_models.snapshot(model) == before


def test_another_thread_between_two_tokens_is_not_held_up_and_not_steered(model):
    sae, ids, got = tiny_models.sae(RESID), tiny_models.tokens(1, 5), []
    with torch.no_grad():
        clean = model(ids)
    going = generate_tokens(model, ids, lambda: steer(model, sae, {3: 50.0}), max_new_tokens=5)
    next(going)

    def other():
        with torch.no_grad(), steer(model, sae, {4: 0.0}):  # takes the lock
            got.append(model(ids))

    thread = threading.Thread(target=other, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    torch.testing.assert_close(got[0], clean)
    going.close()


def test_changes_of_probabilities_by_hand(model):
    sae, ids = tiny_models.sae(RESID), tiny_models.tokens(1, 5)
    table = next_token_changes(model, ids, lambda: steer(model, sae, {3: 9.0}), n=1000)
    with torch.no_grad():
        clean = model(ids)[0, -1].softmax(-1)
        push = 9.0 * sae.W_dec[3]
        steered = model.run_with_hooks(ids, fwd_hooks=[(RESID, lambda x, hook: x + push)])[0, -1].softmax(-1)
    assert sorted(table.token_id) == list(range(len(clean)))
    order = torch.tensor(table.token_id.to_numpy())
    torch.testing.assert_close(torch.tensor(table.clean.to_numpy()), clean[order])
    torch.testing.assert_close(torch.tensor(table.changed.to_numpy()), steered[order], atol=1e-5, rtol=1e-4)
    assert table.change.abs().is_monotonic_decreasing
    assert table.change.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("bad", "why"), [({"temperature": -1.0}, "temperature=-1"), ({"max_new_tokens": 0}, "max_new_tokens=0")]
)
def test_what_it_does_not_take(model, bad, why):
    with pytest.raises(ValueError, match=why):
        generate_tokens(model, tiny_models.tokens(1, 5), **bad)


def test_a_prompt_of_no_tokens(model):
    with pytest.raises(ValueError, match="one text at a time"):
        generate_tokens(model, torch.zeros(1, 0, dtype=torch.long))


def test_a_prompt_longer_than_the_context_is_refused_and_a_full_context_ends_it(model):
    n = model.cfg.n_ctx
    with pytest.raises(ValueError, match=f"a prompt of {n + 1:,} tokens; .* takes {n:,} at most"):
        generate_tokens(model, tiny_models.tokens(1, n + 1))
    assert len(chosen(model, tiny_models.tokens(1, n), max_new_tokens=5)) == 1
    ids = tiny_models.tokens(1, n - 2)
    assert chosen(model, ids, max_new_tokens=9) == chosen(model, ids, max_new_tokens=3)


def test_a_long_text_is_not_cut_in_silence():
    model = saewb.load_model("tiny", device="cpu")
    with pytest.raises(ValueError, match="takes 512 at most"):
        next_token_changes(model, "word " * 2000, lambda: steer(model, saewb.load_sae("tiny"), {1: 1.0}))


@pytest.mark.parametrize("how", [None, "add", "clamp", "scale"])
def test_tokens_are_the_same_with_and_without_keys_and_values_kept(model, how):
    sae, ids = tiny_models.sae(RESID), tiny_models.tokens(1, 6)
    make = None if how is None else lambda: steer(model, sae, {3: 4.0, 7: 2.0}, how=how, positions=slice(1, None))
    for temperature in (0.0, 1.5):
        both = [
            list(
                generate_tokens(
                    model, ids, make, max_new_tokens=20, temperature=temperature, seed=3, use_past_kv_cache=saved
                )
            )
            for saved in (True, False)
        ]
        assert [t.token_id for t in both[0]] == [t.token_id for t in both[1]]
        assert [t.probability for t in both[0]] == pytest.approx([t.probability for t in both[1]], abs=1e-4)


def test_each_token_is_read_once(model):
    seen = []
    with saewb.models.hook_points.editing(model, {RESID: lambda x: seen.append(x.shape[1])}):
        assert len(chosen(model, tiny_models.tokens(1, 6), max_new_tokens=4, seed=1, temperature=1.5)) == 4
        assert seen == [6, 1, 1, 1]
        seen.clear()
        chosen(model, tiny_models.tokens(1, 6), max_new_tokens=4, seed=1, temperature=1.5, use_past_kv_cache=False)
    assert seen == [6, 7, 8, 9]


def test_a_prompt_that_ends_with_the_padding_token_is_read_whole(model):
    """A HookedTransformer takes it for padding, and leaves it out, where it keeps keys and values."""
    ids = torch.cat([tiny_models.tokens(1, 5), torch.tensor([[3, 3]])], dim=1)
    assert chosen(model, ids, max_new_tokens=6) == chosen(model, ids, max_new_tokens=6, use_past_kv_cache=False)


def test_an_sae_that_looks_back_reads_the_whole_text(model):
    sae = TemporalSAE(TemporalConfig(d_in=tiny_models.D_MODEL, d_sae=40, n_heads=2, bottleneck_factor=2, hook=RESID))
    ids = tiny_models.tokens(1, 5)

    def scaled():
        return steer(model, sae, {3: 0.0}, how="clamp")

    with pytest.raises(ValueError, match="use_past_kv_cache=False"):
        chosen(model, ids, scaled, max_new_tokens=4, temperature=1.5, seed=1)
    assert len(chosen(model, ids, scaled, max_new_tokens=4, temperature=1.5, seed=1, use_past_kv_cache=False)) == 4
