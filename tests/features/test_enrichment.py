"""Token-set enrichment: the running sum by its definition, permutations, sets of any tokenizer."""

import math

import numpy as np
import pytest
import torch
from helpers.examples import examples
from hypothesis import given
from hypothesis import strategies as st

import saewb
from saewb.features.enrichment import enrich, enrichment_scores
from saewb.features.token_sets import token_sets, token_texts, tokens_where


def running_sum(effects, ids):
    """The definition, step by step, for one latent."""
    effects = np.asarray(effects, dtype=np.float64)
    order = np.argsort(-effects, kind="stable")
    hit = np.isin(order, ids)
    total = np.cumsum(np.where(hit, 1 / hit.sum(), -1 / (~hit).sum()))
    total = total[np.append(np.diff(effects[order]) != 0, True)]  # equal effects count at once
    return total[np.abs(total).argmax()], np.abs(total).max()


def random_effects(latents=20, vocab=60, seed=0):
    return torch.randn(latents, vocab, generator=torch.Generator().manual_seed(seed))


# -- perfect, baseline, scale, by hand ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
def test_perfect_all_of_the_set_first_or_last(sign):
    effects = torch.arange(50.0)[None] * sign
    assert enrichment_scores(effects, [torch.arange(44, 50)]).item() == pytest.approx(sign)
    result = enrich(effects, {"last": range(44, 50)}, n_permutations=200)
    assert result.p.item() == 1 / 201


def test_baseline_a_random_set_scores_like_chance():
    """p of sets that have nothing to do with the effects is uniform."""
    sets = {str(i): torch.randperm(400, generator=torch.Generator().manual_seed(i))[:40] for i in range(60)}
    result = enrich(random_effects(30, 400), sets, n_permutations=500)
    assert result.p.mean() == pytest.approx(0.5, abs=0.03)
    for level in (0.05, 0.25, 0.5):
        assert (result.p <= level).mean() == pytest.approx(level, abs=0.03)
    assert (result.q < 0.05).mean() < 0.01


@pytest.mark.parametrize("scale", [1e-12, 300.0])
def test_scale_and_offset_do_not_matter_and_the_sign_mirrors(scale):
    effects, sets = random_effects().double(), [torch.arange(7), torch.arange(10, 45)]
    scores = enrichment_scores(effects, sets)
    assert torch.equal(enrichment_scores(effects * scale + scale, sets), scores)
    assert enrichment_scores(-effects, sets).numpy() == pytest.approx(-scores.numpy())


def test_by_hand():
    """Order 3 0 2 1 4, set {0, 1}: -1/3, 1/6, -1/6, 1/3, 0. Both ends are as far: the promoted one counts."""
    effects = torch.tensor([[3.0, 1.0, 2.0, 4.0, 0.0]])
    assert enrichment_scores(effects, [torch.tensor([0, 1])]).item() == pytest.approx(1 / 3)
    assert enrichment_scores(effects, [torch.tensor([4])]).item() == -1
    assert enrichment_scores(effects, [torch.tensor([3, 4])]).item() == pytest.approx(0.5)


def test_the_order_of_tokens_of_equal_effect_does_not_matter():
    sets = [torch.tensor([0, 1]), torch.tensor([4, 5]), torch.tensor([0, 5])]
    assert enrichment_scores(torch.zeros(1, 6), sets).tolist() == [[0.0, 0.0, 0.0]]
    effects = torch.tensor([[2.0, 0.0, 0.0, 2.0, 0.0, 0.0]])  # set {0, 1}: 1/2 - 1/4 after the two, 0 at the end
    assert enrichment_scores(effects, sets).tolist() == [[0.25, -0.5, 0.25]]


@examples(50)
@given(st.integers(2, 40), st.integers(0, 9999), st.booleans(), st.data())
def test_the_definition(vocab, seed, ties, data):
    effects = random_effects(3, vocab, seed)
    effects = effects.round() if ties else effects
    size = data.draw(st.integers(1, vocab - 1))
    ids = torch.randperm(vocab, generator=torch.Generator().manual_seed(seed))[:size]
    for row, score in zip(effects, enrichment_scores(effects, [ids])[:, 0].tolist(), strict=True):
        signed, size_of_it = running_sum(row, ids.numpy())
        assert abs(score) == pytest.approx(size_of_it)
        assert score == pytest.approx(signed) or score == pytest.approx(-signed)  # as far to both sides


def test_a_vocabulary_in_tiles(monkeypatch):
    from saewb.features import enrichment

    effects, sets = random_effects(), {"a": [1, 2, 3], "b": range(30)}
    whole = enrich(effects, sets, n_permutations=50)
    monkeypatch.setattr(enrichment, "_TILE", 150)
    assert enrich(effects, sets, n_permutations=50).equals(whole)


def test_p_is_the_share_of_random_sets_that_score_as_high():
    effects, ids = random_effects(1, 12), [0, 3, 7]
    result = enrich(effects, {"s": ids}, n_permutations=20_000)
    rng = np.random.default_rng(0)
    score = abs(running_sum(effects[0], ids)[0])
    chance = [running_sum(effects[0], rng.permutation(12)[:3])[1] >= score - 1e-12 for _ in range(3000)]
    assert result.p.item() == pytest.approx(np.mean(chance), abs=0.03)


def test_seed_order_names_and_q():
    effects, sets = random_effects(), {"a": [1, 2, 3], "b": torch.arange(30)}
    state = torch.random.get_rng_state()
    first, again = (enrich(effects, sets, n_permutations=99, seed=1) for _ in range(2))
    assert first.equals(again)
    assert not first.equals(enrich(effects, sets, n_permutations=99, seed=2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(first.columns) == ["latent", "set", "size", "score", "p", "q"]
    assert first.p.is_monotonic_increasing
    assert len(first) == 40
    assert set(first[["set", "size"]].itertuples(index=False, name=None)) == {("a", 3), ("b", 30)}
    named = enrich(effects[[4, 9]], sets, latents=[4, 9], n_permutations=99)
    assert set(named.latent) == {4, 9}
    p = np.sort(first.p.to_numpy())
    stepped = np.minimum.accumulate((p * 40 / np.arange(1, 41))[::-1])[::-1].clip(max=1)
    assert np.sort(first.q.to_numpy()) == pytest.approx(stepped)


@pytest.mark.parametrize(("sets", "kwargs", "text"), [
    ({"none": []}, {}, "'none' has 0 of 60"),
    ({"all": range(60)}, {}, "'all' has 60 of 60"),
    ({"far": [3, 60]}, {}, "set 'far' .60"),
    ({"far": [3, -1]}, {}, "set 'far' .-1"),
    ({}, {}, "no sets"),
    ({"a": [1]}, {"n_permutations": 0}, "n_permutations=0"),
    ({"a": [1]}, {"latents": [1, 2]}, "2 latents for 20 rows"),
])  # fmt: skip
def test_wrong_input(sets, kwargs, text):
    with pytest.raises(ValueError, match=text):
        enrich(random_effects(), sets, **kwargs)


def test_nan_has_no_order():
    effects = random_effects()
    effects[3, 3] = math.nan
    with pytest.raises(ValueError, match="nan"):
        enrich(effects, {"a": [1]})


# -- sets --------------------------------------------------------------------------------------------------------------


def tokenizer_of(kind):
    """Byte-level, sentencepiece-like and word-piece tokenizers of the same words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["Paris", "river", "1987", "42", "USA", "x", ",", "москва", "été", "東京", "ing"]
    mark = {"byte-level": "Ġ", "sentencepiece": "▁", "word-piece": ""}[kind]
    spelled = words
    if kind == "byte-level":
        alphabet = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        spelled = [alphabet.pre_tokenize_str(word)[0][0] for word in words]
    vocab = ["<unk>", "<bos>", *([mark + word for word in spelled] if mark else words)]
    vocab += spelled if mark else [f"##{word}" for word in words]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocab)}, unk_token="<unk>"))
    inner.decoder = {
        "byte-level": decoders.ByteLevel(),
        "sentencepiece": decoders.Metaspace(),
        "word-piece": decoders.WordPiece(),
    }[kind]
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>"), words


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_sets_of_any_tokenizer(kind):
    tokenizer, words = tokenizer_of(kind)
    texts = token_texts(tokenizer)
    assert list(texts.values()) == [f" {word}" for word in words] + words
    sets = token_sets(tokenizer, {"places": ["PARIS", "москва", "Oz"]}, min_tokens=1)
    named = {name: {texts[i] for i in ids} for name, ids in sets.items()}
    assert named["starts with space"] == {f" {word}" for word in words}
    assert named["goes on a word"] == set(words) - {"1987", "42", ","}
    assert named["years"] == {" 1987", "1987"}
    assert named["digits"] == {" 1987", "1987", " 42", "42"}
    assert named["capitalized"] == {" Paris", "Paris"}
    assert named["all capitals"] == {" USA", "USA"}
    assert named["single letter"] == {" x", "x"}
    assert named["punctuation"] == {" ,", ","}
    assert named["cyrillic"] == {" москва", "москва"}
    assert named["cjk"] == {" 東京", "東京"}
    assert named["accented latin"] == {" été", "été"}
    assert named["places"] == {" Paris", "Paris", " москва", "москва"}
    assert not {0, 1} & set().union(*map(set, sets.values()))


def test_word_pieces():
    tokenizer, words = tokenizer_of("word-piece")
    texts = token_texts(tokenizer)
    assert list(texts.values())[: len(words)] == words


def test_sets_of_the_embedded_tokenizer_and_ones_own():
    model = saewb.load_model("tiny", device="cpu")
    sets, texts = token_sets(model), token_texts(model.tokenizer)
    assert {"digits", "capitalized", "punctuation", "pronouns", "part of a character", "latin"} <= set(sets)
    assert all(5 <= len(ids) < len(texts) and ids == sorted(set(ids)) for ids in sets.values())
    assert {texts[i] for i in sets["pronouns"]} >= {" he", " He", " her"}
    endings = tokens_where(model, lambda text: text.endswith("ing"))
    assert endings == tokens_where(model, "ing$")
    assert " the" not in {texts[i] for i in endings}
    with pytest.raises(ValueError, match="no token reads as a word of the set 'mine'"):
        token_sets(model, {"mine": ["supercalifragilistic"]})


@torch.no_grad()
def test_the_embedded_sae_has_a_latent_for_digits():
    model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
    result = enrich(sae.W_dec @ model.W_U, {"digits": token_sets(model)["digits"]})
    best = result[result.score > 0].iloc[0]
    assert best.score > 0.9
    promoted = (sae.W_dec[best.latent] @ model.W_U).topk(10).indices.tolist()
    assert sum(token_texts(model)[i].strip().isdecimal() for i in promoted) >= 8
