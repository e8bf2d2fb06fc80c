"""The errors that a newcomer makes, and that each says what to do."""

import json
import subprocess
import sys

import pytest
import torch

import saewb
from saewb.errors import check_device

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
    with saewb.attach(model, sae.with_config(model=made_for)) as attached:
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
        check_device(asked)


def test_a_gpu_too_many(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_device("cuda") == torch.device("cuda")
    with pytest.raises(ValueError, match="'cuda:1': there are 1, counted from 0"):
        check_device("cuda:1")


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


def test_a_hook_by_the_name_transformers_has_for_it(model, sae):
    with pytest.raises(ValueError, match=r"fix:  saewb.attach\(model, sae, hook='blocks.2.hook_resid_post'\)"):
        saewb.attach(model, sae, hook="model.layers.2")


def test_a_number_of_a_layer_as_hook(model, sae):
    with pytest.raises(ValueError, match="got hook=2 for 1 SAE.\n  want: a name, e.g. 'blocks.2.hook_resid_post'"):
        saewb.attach(model, sae, hook=2)


@pytest.fixture(scope="module")
def hugging_face_model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(saewb.tiny.folder("model"))


@pytest.mark.parametrize(
    "call",
    [
        lambda model, sae: saewb.attach(model, sae),
        lambda model, sae: saewb.evaluate(model, sae, TEXTS),
        lambda model, sae: saewb.build_index(model, sae, TEXTS),
        lambda model, sae: saewb.read_prompt(model, "A cat", sae),
        lambda model, sae: saewb.train(model, TEXTS, saewb.TopK(8, k=2), hook=HOOK, n_tokens=9000),
    ],
)
def test_a_model_of_transformers(hugging_face_model, sae, call):
    with pytest.raises(
        TypeError, match=r"no model of TransformerLens[\s\S]*fix:  model = saewb.load_model\(model, tok"
    ):
        call(hugging_face_model, sae)


@pytest.mark.parametrize("wrong", [["a model"], "tiny"])
def test_a_model_in_a_list_or_by_name(sae, wrong):
    with pytest.raises(TypeError, match="no model of TransformerLens[\\s\\S]*want: a TransformerBridge"):
        saewb.attach(wrong, sae)


def test_an_sae_by_name(model):
    with pytest.raises(TypeError, match=r"got str as an SAE[\s\S]*fix:  sae = saewb.load_sae\('tiny'\)"):
        saewb.attach(model, "tiny")


@pytest.mark.parametrize(
    ("name", "instead"), [("learning_rate", "lr"), ("batch_size", "batch_tokens"), ("context_size", "ctx_len")]
)
def test_an_option_as_others_call_it(model, name, instead):
    with pytest.raises(TypeError, match=rf"train has no option '{name}'.\n  near: {instead}"):
        saewb.train(model, TEXTS, saewb.TopK(8, k=2), hook=HOOK, n_tokens=9000, **{name: 1})


def test_an_option_that_nobody_has(model):
    with pytest.raises(TypeError, match=r"fix:  print\(\*saewb.training_options\(\)"):
        saewb.train(model, TEXTS, saewb.TopK(8, k=2), hook=HOOK, n_tokens=9000, quux=1)


def test_training_without_tokens_or_hook(model):
    with pytest.raises(ValueError, match="got no documents"):
        saewb.train(model, [], saewb.TopK(8, k=2), hook=HOOK, n_tokens=9000)
    with pytest.raises(TypeError, match="got a NoneType for documents"):
        saewb.train(model, None, saewb.TopK(8, k=2), hook=HOOK, n_tokens=9000)
    with pytest.raises(ValueError, match='fix:  hook="blocks.2.hook_resid_post"'):  # a layer that it has
        saewb.train(model, TEXTS, saewb.TopK(8, k=2), n_tokens=9000)


@pytest.mark.parametrize(("batch_tokens", "says"), [(4096, ["2 steps only"]), (32, [])])
def test_a_run_of_very_few_steps(model, batch_tokens, says):
    how = {"hook": HOOK, "n_tokens": 9000, "batch_tokens": batch_tokens, "buffer_tokens": 0}
    run = saewb.train(model, TEXTS, saewb.TopK(8, k=2), **how).stop()
    assert [note.partition(":")[0] for note in run.notes] == says


def test_tokens_of_another_model(model, sae):
    with pytest.raises(ValueError, match=r"token ids 50,256 to 50,256; this model has 4,096"):
        saewb.evaluate(model, sae, torch.full((2, 8), 50_256))


def test_texts_that_are_too_short(model, sae):
    with pytest.raises(ValueError, match="do not fill one row: 3 tokens for rows of 128.[\\s\\S]*fix:  ctx_len="):
        saewb.evaluate(model, sae, ["A cat"])


def test_the_model_in_place_of_its_tokenizer(model):
    assert torch.equal(saewb.pack(TEXTS, model, 16), saewb.pack(TEXTS, model.tokenizer, 16))


def test_latents_of_an_sae_that_is_not_attached(model, sae):
    with saewb.attach(model, sae) as attached:
        model("A cat")
        with pytest.raises(ValueError, match="is not attached here.\n  want: one of blocks.2.hook_out"):
            attached.latents[saewb.load_sae("tiny")]


@pytest.mark.parametrize(
    ("arguments", "error", "fix"),
    [
        (("gpt2",), FileNotFoundError, r"'gpt2' is a language model[\s\S]*saewb.catalogue\(model='gpt2'\)"),
        (("blocks.8.hook_resid_pre", "gpt2-small-res-jb"), ValueError, r"load_sae\('gpt2-small-res-jb', 'blocks.8"),
        ((None,), TypeError, "got a NoneType"),
    ],
)
def test_what_is_no_name_of_an_sae(arguments, error, fix):
    with pytest.raises(error, match=fix):
        saewb.load_sae(*arguments)


def test_the_catalogue_as_a_newcomer_asks_it():
    assert len(saewb.catalogue("gpt2")) == len(saewb.catalogue(model="gpt2")) > 10
    with pytest.raises(TypeError, match="got layer='8'[\\s\\S]*fix:  layer=8"):
        saewb.catalogue("gpt2", layer="8")


def test_an_sae_where_its_effects_go_and_texts_where_activations_go():
    """In a process of its own: while testing, shapes in the signatures are checked first."""
    tries = """
import saewb
for call in (
    lambda: saewb.enrich(saewb.load_sae("tiny"), {"a": [1]}),
    lambda: saewb.coactivation(["a text"]),
):
    try:
        call()
    except TypeError as error:
        print(error)
"""
    text = subprocess.run([sys.executable, "-c", tries], capture_output=True, text=True, check=True).stdout
    assert "enrich got SAE for effects" in text
    assert "fix:  saewb.enrich(sae.W_dec @ saewb.models.unembed.unembedding(model), sets)" in text
    assert "coactivation got a str for a batch" in text
    assert "fix:  coactivation([sae.encode(x)])" in text


MISTAKES = """
import json, numpy as np, torch, saewb

hooks = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
cfg = saewb.CrossLayerConfig(8, (12, 12), hooks)
zeros = {name: [torch.zeros(shape) for shape in shapes] for name, shapes in cfg.tensor_shapes().items()}
saes = {
    "pursuit": saewb.PursuitSAE(saewb.PursuitConfig(8, 12)),
    "temporal": saewb.TemporalSAE(saewb.TemporalConfig(8, 12, n_heads=1, bottleneck_factor=4)),
    "transcoder": saewb.SAE(saewb.SAEConfig(8, 12, d_out=6, hook=hooks[0], hook_out=hooks[1])),
    "clt": saewb.CrossLayerTranscoder.from_tensors(cfg, zeros),
    "topk": saewb.SAE(saewb.SAEConfig(8, 12, activation="topk", k=3)),
}
x = torch.zeros(1, 3, 8)
wrong = {
    "text": "A cat sat", "texts": ["A cat", "A dog"], "array": np.zeros((2, 3, 8), np.float32),
    "list": [[0.0] * 8, [0.0] * 8], "nothing": None, "ids": torch.tensor([[1, 2, 3]]), "short": x[..., :5], "x": x,
}
said = {}
for name, sae in saes.items():
    several = [x, x] if name == "clt" else x
    calls = {"encode": sae.encode, "forward": sae, "decode": lambda given: sae.decode(given, several)}
    for verb, call in calls.items():
        for what, given in wrong.items():
            each = [given, given] if name == "clt" and isinstance(given, torch.Tensor) else given
            try:
                call(each)
                said[f"{name} {verb} {what}"] = "", ""
            except Exception as error:
                said[f"{name} {verb} {what}"] = type(error).__name__, str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said():
    """What an SAE says to wrong arguments, outside of the tests' own checks of annotations, which come before."""
    run = subprocess.run([sys.executable, "-c", MISTAKES], capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


ARCHITECTURES = ["pursuit", "temporal", "transcoder", "clt", "topk"]
NO_TENSOR = {
    "text": "the text 'A cat sat'",
    "texts": "the text 'A cat'",
    "array": "ndarray for",
    "list": "list for",
    "nothing": "NoneType for",
}
FIX = {
    "text": "saewb.read_prompt(model, 'A cat sat', sae)",
    "array": "torch.from_numpy(",
    "list": "torch.tensor(",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("verb", ["encode", "decode", "forward"])
@pytest.mark.parametrize("wrong", NO_TENSOR)
def test_what_is_no_tensor_given_to_an_sae(said, name, verb, wrong):
    kind, text = said[f"{name} {verb} {wrong}"]
    assert kind == "TypeError"
    assert NO_TENSOR[wrong] in text
    assert FIX.get(wrong, "") in text
    assert ("latents, as sae.encode(x) gives them" if verb == "decode" else "activations of a model") in text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tensors_of_another_width_given_to_an_sae(said, name):
    for verb in ("encode", "forward"):
        assert said[f"{name} {verb} x"] == ["", ""]
        kind, text = said[f"{name} {verb} short"]
        assert kind == "ValueError"
        assert "x of shape (1, 3, 5)" in text
        assert "d_in=8]" in text
    for what, width in (("x", 8), ("short", 5)):
        kind, text = said[f"{name} decode {what}"]
        assert kind == "ValueError"
        assert f"latents of shape (1, 3, {width})" in text
        assert "want: [..., d_sae=12]" in text
        assert ("fix:  sae.decode(sae.encode(x), x)" in text) == (width == 8)


@pytest.mark.parametrize("name", ["pursuit", "transcoder", "clt", "topk"])
def test_token_ids_given_to_an_sae(said, name):
    kind, text = said[f"{name} encode ids"]
    assert kind == "ValueError"
    assert "fix:  saewb.read_prompt(model, tokens, sae)" in text


def test_what_it_says_to_type_for_a_text_works(model, sae):
    assert len(saewb.read_prompt(model, "A cat sat", sae).tokens) > 2
