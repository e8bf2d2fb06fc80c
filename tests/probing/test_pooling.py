"""Pooling by its definition, one text at a time; masks, special tokens, positions, roles; what is refused."""

import copy

import numpy as np
import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.interventions.site import Site
from saewb.probing.pooling import TokenizedTexts, pool_activation, pool_latents

HOOK = "blocks.1.hook_resid_post"
TEXTS = ["w1 w2 w3 w4 w5", "w7", "w3 w3 w3 w9 w1 w2 w8", "w2 w4", "w11 w12 w13 w14"]


def random_sae(activation, **fields):
    cfg = saewb.SAEConfig(d_in=tiny_models.D_MODEL, d_sae=50, activation=activation, hook=HOOK, **fields)
    return saewb.SAE(cfg, seed=3)


def by_definition(model, sae, texts, pool):
    """Each text by itself."""
    rows, residual = [], []
    for ids, mask in zip(texts.ids, texts.masks, strict=True):
        _, cache = model.run_with_cache(ids[None])
        x = cache[HOOK][0][mask]
        acts = sae.encode(x).detach()
        functions = {
            "max": lambda a: a.amax(0),
            "mean": lambda a: a.mean(0),
            "sum": lambda a: a.sum(0),
            "last": lambda a: a[-1],
            "any": lambda a: (a != 0).any(0).float(),
        }
        rows.append(functions[pool](acts))
        residual.append(x[-1] if pool == "last" else x.mean(0))
    return torch.stack(rows), torch.stack(residual).detach()


@pytest.mark.parametrize("pool", ["max", "mean", "last", "any", "sum"])
@pytest.mark.parametrize("activation", ["topk", "relu", "abstopk"])
def test_pooled_values_by_their_definition(model, pool, activation):
    sae = random_sae(activation, **({} if activation == "relu" else {"k": 5}))
    texts = TokenizedTexts.of(model, TEXTS)
    [pooled] = pool_latents(model, [Site.of(model, sae)], texts, pool)
    latents, residual = by_definition(model, sae, texts, pool)
    torch.testing.assert_close(torch.from_numpy(pooled.latents.toarray()), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled.residual, residual, atol=1e-5, rtol=1e-5)
    assert (pooled.latents.data != 0).all()
    assert pooled.latents.data.dtype == np.float32
    alone = pool_activation(model, HOOK, texts, "last" if pool == "last" else "mean")
    torch.testing.assert_close(alone, residual, atol=1e-5, rtol=1e-5)


def test_signed_latents_count_their_zeros():
    """Active and negative on some tokens, off on others: the largest value is 0."""
    model, sae = tiny_models.bridge(), saewb.neurons(tiny_models.bridge(), HOOK)
    [pooled] = pool_latents(model, [Site.of(model, sae)], texts := TokenizedTexts.of(model, TEXTS))
    latents, _ = by_definition(model, sae, texts, "max")
    assert (latents < 0).any()
    torch.testing.assert_close(torch.from_numpy(pooled.latents.toarray()), latents, atol=1e-5, rtol=1e-5)


def test_batches_do_not_matter():
    model, texts = tiny_models.bridge(), TokenizedTexts.of(tiny_models.bridge(), TEXTS * 3)
    site = Site.of(model, random_sae("topk", k=5))
    [whole] = pool_latents(model, [site], texts)
    batches = list(texts.batches(8))
    assert sorted(np.concatenate([index for index, _, _ in batches]).tolist()) == list(range(15))
    assert max(ids.numel() for _, ids, _ in batches) <= 8
    [alone] = pool_latents(model, [site], texts.select([2]))
    np.testing.assert_allclose(whole.latents[[2]].toarray(), alone.latents.toarray(), atol=1e-5)


def test_special_tokens_never_count():
    model = tiny_models.bridge()
    texts = TokenizedTexts.of(model, ["w1 w2"])
    assert texts.ids[0].tolist() == [tiny_models.BOS, 5, 6]
    assert texts.masks[0].tolist() == [False, True, True]
    ids = TokenizedTexts.of(model, [[5, 2, 6], [tiny_models.BOS, 7]])
    assert ids.ids[1].tolist() == [tiny_models.BOS, 7]  # BOS is not doubled
    assert ids.masks[0].tolist() == [False, True, False, True]  # 2 is EOS
    assert ids.n_tokens().tolist() == [2, 1]
    presence = ids.presence(tiny_models.VOCAB)
    assert presence.toarray().nonzero()[1].tolist() == [5, 6, 7]


def test_positions():
    model = tiny_models.bridge()
    last = TokenizedTexts.of(model, TEXTS, positions=slice(-2, None))
    assert last.masks[0].nonzero()[:, 0].tolist() == [4, 5]
    assert last.masks[1].nonzero()[:, 0].tolist() == [1]  # BOS does not count there either
    threes = TokenizedTexts.of(model, [TEXTS[0], TEXTS[2]], positions=lambda ids: ids == 7)
    assert [mask.sum().item() for mask in threes.masks] == [1, 3]
    cut = TokenizedTexts.of(model, TEXTS, ctx_len=3)
    assert cut.ids[2].tolist() == [tiny_models.BOS, 7, 7]
    end = TokenizedTexts.of(model, TEXTS, ctx_len=3, cut="start")
    assert end.ids[2].tolist() == [tiny_models.BOS, 6, 12]
    assert TokenizedTexts.of(model, [*TEXTS, TEXTS[1]]).first_of_equals() == [0, 1, 2, 3, 4, 1]


def test_roles_of_a_chat():
    model = tiny_models.new_bridge()
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}{{ 'w20 ' if m.role == 'user' else 'w21 ' }}{{ m.content }} w22 {% endfor %}"
        "{% if add_generation_prompt %}w21 {% endif %}"
    )
    model.tokenizer = tokenizer
    chat = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": "w3 w4 w5"},
        {"role": "user", "content": "w6"},
        {"role": "assistant", "content": "w7"},
    ]
    texts = TokenizedTexts.of(model, [chat], positions="assistant")
    words = tokenizer.convert_ids_to_tokens(texts.ids[0][texts.masks[0]].tolist())
    assert words == ["w3", "w4", "w5", "w22", "w7", "w22"]
    with pytest.raises(ValueError, match="no message has the role 'asistant'.*\n  near: assistant"):
        TokenizedTexts.of(model, [chat], positions="asistant")
    with pytest.raises(ValueError, match="that are no chats"):
        TokenizedTexts.of(model, ["w1"], positions="assistant")


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("w1 w2", {}, TypeError, "one string"),
        (None, {}, TypeError, "NoneType"),
        ([], {}, ValueError, "no texts"),
        (["w1", ""], {}, ValueError, r"texts\[1\] has no token that counts"),
        (["w1"], {"positions": slice(5, None)}, ValueError, "no token that counts"),
        (["w1"], {"positions": 3}, TypeError, "positions=3"),
        (["w1"], {"positions": lambda ids: ids}, ValueError, "a mask of booleans"),
        (["w1 " * 100], {}, ValueError, "ctx_len=64"),
        ([[5, 400]], {}, ValueError, "token ids 1 to 400"),
    ],
)
def test_refused(texts, options, error, message):
    with pytest.raises(error, match=message):
        TokenizedTexts.of(tiny_models.bridge(), texts, **options)
    with pytest.raises(ValueError, match="pool='maximum'.*\n  near: max"):
        pool_activation(tiny_models.bridge(), HOOK, TokenizedTexts.of(tiny_models.bridge(), ["w1"]), "maximum")
