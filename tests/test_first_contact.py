"""The errors that a newcomer makes, and that each says what to do."""

import pytest
import torch

import saewb
from saewb.devices import usable
from saewb.sae import replace_config

TEXTS = ["The river flows through the city."] * 40
HOOK = "blocks.2.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return saewb.load_model("tiny", device="cpu")


@pytest.fixture
def sae():
    return saewb.load_sae("tiny")


def test_a_hook_that_is_not_there(model, sae):
    with pytest.raises(ValueError, match=r"fix:  saewb.attach\(model, sae, hook='blocks.2.hook_resid_post'\)"):
        saewb.attach(model, sae, hook="blocks.2.resid_post")


def test_an_sae_of_another_width(model):
    other = saewb.SAE(saewb.SAEConfig(768, 64, hook=HOOK))
    with saewb.attach(model, other), pytest.raises(ValueError, match=r"128\), which do not fit[\s\S]*want: .*768"):
        model("A cat")
    assert saewb.attachments(model) == []


@pytest.mark.parametrize(
    ("made_for", "noted"), [("gpt2-small", True), ("tiny", False), (None, False), ("someone/Tiny", False)]
)
def test_an_sae_of_another_model_of_the_same_width(model, sae, made_for, noted):
    with saewb.attach(model, replace_config(sae, model=made_for)) as attached:
        assert ("made for gpt2-small, which this is not" in repr(attached)) == noted


@pytest.mark.parametrize(
    "call",
    [
        lambda model, sae: saewb.evaluate(sae, model, TEXTS),
        lambda model, sae: saewb.build_index(sae, model, TEXTS),
        lambda model, sae: saewb.attribute(sae, "A cat", model, " sat"),
    ],
)
def test_the_sae_where_the_model_goes(model, sae, call):
    with pytest.raises(TypeError, match="got SAE where the model goes[\\s\\S]*the model first"):
        call(model, sae)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    "call",
    [
        lambda model, sae: saewb.load_model("tiny", device="cuda"),
        lambda model, sae: saewb.load_model(model, device="cuda"),
        lambda model, sae: saewb.load_sae("tiny", device="cuda"),
        lambda model, sae: saewb.train(model, TEXTS, saewb.TopK(8, k=2), hook=HOOK, n_tokens=9000, device="cuda"),
    ],
)
def test_no_gpu(model, sae, call):
    with pytest.raises(ValueError, match="device 'cuda': (this torch|torch finds)[\\s\\S]*saewb doctor"):
        call(model, sae)


@pytest.mark.parametrize(("asked", "says"), [("gpu", "there is no device 'gpu'"), ("mps", "no Apple GPU")])
def test_no_such_device(asked, says):
    if asked == "mps" and torch.backends.mps.is_available():
        pytest.skip("there is an Apple GPU here")
    with pytest.raises(ValueError, match=says):
        usable(asked)


def test_a_gpu_too_many(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert usable("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="'cuda:1': there are 1, counted from 0"):
        usable("cuda:1")


def test_an_sae_that_cannot_fit(model):
    with pytest.raises(ValueError, match=r"the weights alone need [\d.]+ GiB[\s\S]*fix:  a smaller d_sae"):
        saewb.train(model, TEXTS, saewb.TopK(10**9, k=4), hook=HOOK, n_tokens=9000)


def test_the_class_instead_of_an_objective(model):
    with pytest.raises(TypeError, match=r"the class TopK[\s\S]*saewb.TopK\(d_sae=4096\)"):
        saewb.train(model, TEXTS, saewb.TopK, hook=HOOK, n_tokens=9000)


def test_one_text_instead_of_a_list(model, sae):
    with pytest.raises(TypeError, match="one string[\\s\\S]*a list of documents"):
        saewb.evaluate(model, sae, "A text")


def test_a_name_that_is_nearly_right():
    with pytest.raises(AttributeError, match="'load_models'; near: load_model"):
        saewb.load_models  # noqa: B018


def test_latents_read_too_late(model, sae):
    with saewb.attach(model, sae) as attached:
        model("A cat")
    with pytest.raises(ValueError, match="is detached[\\s\\S]*inside the with block"):
        attached.latents[sae]
