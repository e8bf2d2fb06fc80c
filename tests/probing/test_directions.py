"""Directions, neurons and differences of means as SAEs: what they compute, and that they do what an SAE does."""

import pytest
import torch
from helpers import tiny_models

import saewb

HOOK = "blocks.1.hook_resid_post"


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_direction_is_its_own_unit():
    v, w = rows(2, 16)
    sae = saewb.directions({"v": v, "w": w}, HOOK)
    torch.testing.assert_close(sae.encode(v)[0], torch.tensor(1.0))
    x = rows(7, 16, seed=1)
    torch.testing.assert_close(sae.encode(x), torch.stack([x @ v / (v @ v), x @ w / (w @ w)], 1))
    only_v = sae.encode(x) * torch.tensor([1.0, 0.0])
    torch.testing.assert_close(sae.decode(only_v), (x @ v / (v @ v))[:, None] * v)
    assert sae.cfg.metadata["latent_names"] == ["v", "w"]
    relu = saewb.directions({"v": v}, HOOK, gate="relu", bias={"v": 0.25})
    torch.testing.assert_close(relu.encode(x)[:, 0], torch.relu(x @ v / (v @ v) + 0.25))


def test_ablating_a_direction_leaves_nothing_along_it(model):
    v = rows(16)
    sae = saewb.directions({"v": v}, HOOK)
    with torch.no_grad(), saewb.ablate(model, sae, [0]):
        _, cache = model.run_with_cache("w1 w2 w3")
    assert (cache[HOOK] @ v).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("hook", "hook_out"),
    [
        ("blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out"),
        ("blocks.1.attn.hook_z", "blocks.1.hook_attn_out"),
        ("blocks.1.hook_resid_post", None),
        ("blocks.0.mlp.hook_pre", None),
        ("hook_embed", None),
    ],
)
def test_neurons_compute_what_the_model_does(model, hook, hook_out):
    sae = saewb.neurons(model, hook)
    assert sae.cfg.hook_out == hook_out
    with torch.no_grad():
        clean, cache = model.run_with_cache("w1 w2 w3 w4")
        with saewb.attach(model, sae):
            attached = model("w1 w2 w3 w4")
    torch.testing.assert_close(attached, clean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sae.encode(cache[hook].flatten(2)), cache[hook].flatten(2))


def test_neurons_of_a_model_with_biases():
    """GPT-2's MLP and attention have biases."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tiny_models.VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    hf = GPT2LMHeadModel(config).eval()
    for parameter in hf.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tiny_models.tokenizer(), device="cpu")
    for hook in ("blocks.1.mlp.hook_post", "blocks.0.attn.hook_z"):
        sae = saewb.neurons(model, hook)
        assert sae.b_dec.abs().max() > 0.1
        with torch.no_grad():
            clean = model("w1 w2 w3")
            with saewb.attach(model, sae):
                torch.testing.assert_close(model("w1 w2 w3"), clean, atol=1e-4, rtol=1e-4)


def test_they_are_indexed_saved_and_shown_like_an_sae(tmp_path):
    model = tiny_models.bridge()
    texts = ["w1 w2 w3 w4 w5 w6 w7 w8 w9"] * 5
    for sae in (saewb.directions({"v": rows(16)}, HOOK), saewb.neurons(model, "blocks.1.mlp.hook_post")):
        index = saewb.build_index(model, sae, texts, ctx_len=10, progress=False)
        assert len(index) == sae.d_sae
        assert index.latent(0).top
        again = saewb.load_sae(saewb.save_sae(sae, tmp_path / str(sae.d_sae)))
        x = rows(3, sae.d_in, seed=2)
        torch.testing.assert_close(again.encode(x), sae.encode(x))
        assert again.cfg.hook_out == sae.cfg.hook_out
        saewb.read_prompt(model, "w1 w2", sae)


def test_difference_of_means():
    model = tiny_models.bridge()
    a, b = ["w1 w2 w3", "w4 w5"], ["w6 w7 w8 w9", "w10 w11"]
    sae = saewb.difference_of_means(model, a, b, HOOK, progress=False)

    def means(texts):
        return torch.stack([model.run_with_cache(text)[1][HOOK][0, 1:].mean(0) for text in texts])

    mean_a, mean_b = means(a).mean(0), means(b).mean(0)
    torch.testing.assert_close(sae.W_dec[0].data, mean_a - mean_b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sae.encode(torch.stack([mean_a, mean_b])).flatten(), torch.tensor([0.5, -0.5]))
    last = saewb.difference_of_means(model, a, b, HOOK, pool="last", progress=False)
    expected = torch.stack([model.run_with_cache(t)[1][HOOK][0, -1] for t in a]).mean(0)
    torch.testing.assert_close(
        last.W_dec[0].data + torch.stack([model.run_with_cache(t)[1][HOOK][0, -1] for t in b]).mean(0), expected
    )


@pytest.mark.parametrize(
    ("vectors", "options", "error", "message"),
    [
        ([torch.ones(3)], {}, TypeError, "a list"),
        ({}, {}, ValueError, "no vectors"),
        ({"a": torch.ones(3), "b": torch.ones(4)}, {}, ValueError, "shapes"),
        ({"a": torch.ones(2, 3)}, {}, ValueError, "shapes"),
        ({"a": torch.zeros(3)}, {}, ValueError, "'a' is 0"),
        ({"a": torch.tensor([1.0, torch.inf])}, {}, ValueError, "not finite"),
        ({"a": torch.ones(3)}, {"gate": "gelu"}, ValueError, "gate='gelu'"),
        ({"a": torch.ones(3)}, {"bias": {"b": 1.0}}, ValueError, "bias for"),
    ],
)
def test_refused(vectors, options, error, message):
    with pytest.raises(error, match=message):
        saewb.directions(vectors, HOOK, **options)
    model = tiny_models.bridge()
    with pytest.raises(ValueError, match="gate='x'"):
        saewb.neurons(model, HOOK, gate="x")
    with pytest.raises(ValueError, match="means of a and b are equal"):
        saewb.difference_of_means(model, ["w1"], ["w1"], HOOK, progress=False)
