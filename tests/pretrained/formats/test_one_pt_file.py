"""DeepSeek R1, OpenAI's GPT-2 autoencoders, Qwen Scope: one .pt file each."""

from __future__ import annotations

import pytest
import torch
from helpers.format_fixtures import QWEN, D, F, K, assert_formula, deepseek_r1, inputs, openai, qwen_scope

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.linear_pt import DeepSeekR1
from saewb.pretrained.formats.openai import OpenAI
from saewb.pretrained.formats.qwen_scope import QwenScope

WRITERS = {"deepseek": deepseek_r1, "openai": openai, "qwen": qwen_scope}
OPTIONAL = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


@pytest.mark.parametrize("layout", WRITERS)
def test_arithmetic(layout, tmp_path):
    written = WRITERS[layout](tmp_path)
    sae = read(written.place, dtype=torch.float32)
    assert_formula(sae, written)
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (D, F)
    assert sae.W_dec.is_contiguous()


@pytest.mark.parametrize("layout", WRITERS)
def test_every_tensor_is_accounted_for(layout, tmp_path):
    written = WRITERS[layout](tmp_path)
    tensors = {name: value for name, value in written.stored.items() if isinstance(value, torch.Tensor)}
    for name in tensors:
        if name not in OPTIONAL:
            written.save({n: t for n, t in written.stored.items() if n != name})
            with pytest.raises(FormatError):
                read(written.place)
        written.save({**written.stored, name: torch.ones(3, 2, 2)})
        with pytest.raises(FormatError):
            read(written.place)
    written.save({**written.stored, "more": torch.ones(2)})
    with pytest.raises(FormatError):
        read(written.place)
    float16 = {n: t.half() if torch.is_tensor(t) and t.is_floating_point() else t for n, t in written.stored.items()}
    written.save(float16)
    assert read(written.place).dtype == torch.float16
    integers = {n: t.long() if torch.is_tensor(t) else t for n, t in written.stored.items()}
    written.save(integers)
    with pytest.raises(FormatError, match="stored as|stores"):
        read(written.place)


def test_deepseek_says_its_layer_and_model_by_name(tmp_path):
    sae = read(deepseek_r1(tmp_path).place)
    assert (sae.cfg.hook, sae.dtype) == ("blocks.19.hook_resid_post", torch.bfloat16)
    assert sae.cfg.model == "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    assert sae.cfg.metadata["dataset_path"] == "lmsys/lmsys-chat-1m"
    other = deepseek_r1(tmp_path, "model2.pt").place
    assert read(other).cfg.hook is None
    known = read(other, Provenance(repo="a/b", path="model2.pt", layer=4, model="gpt2")).cfg
    assert (known.hook, known.model, dict(known.metadata)) == ("blocks.4.hook_resid_post", "gpt2", {})


@pytest.mark.parametrize("activation", ["TopK", "ReLU"])
def test_openai_activations(activation, tmp_path):
    written = openai(tmp_path, activation)
    sae = read(written.place)
    assert_formula(sae, written)
    assert sae.cfg.normalization == ("layer_norm" if activation == "TopK" else "none")
    assert sae.cfg.pre_bias == "tied"
    if activation == "TopK":  # its output is in the units of its input, whatever those are
        x = torch.from_numpy(inputs(4)).float()
        torch.testing.assert_close(sae(x * 100 + 3), sae(x) * 100 + 3, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(
    ("site", "hook"),
    [
        ("resid_delta_attn_v5_32k", "hook_attn_out"),
        ("resid_post_attn_v5_128k", "hook_resid_mid"),
        ("resid_delta_mlp", "hook_mlp_out"),
        ("resid_delta_mlp_v4", "hook_mlp_out"),
        ("resid_post_mlp_v5_32k", "hook_resid_post"),
    ],
)
def test_openai_hooks(site, hook, tmp_path):
    cfg = read(openai(tmp_path, site=site, layer=11).place).cfg
    assert (cfg.hook, cfg.model) == (f"blocks.11.{hook}", "gpt2-small")


@pytest.mark.parametrize(
    "change",
    [
        {"activation": "Identity"},
        {"activation": "ReLU"},
        {"activation": None},
        {"activation_state_dict": {"k": "5", "postact_fn": "ReLU"}},
        {"activation_state_dict": {"k": K, "postact_fn": "Identity"}},
        {"activation_state_dict": {"k": F + 1, "postact_fn": "ReLU"}},
        {"activation_state_dict": {"k": K, "postact_fn": "ReLU", "more": 1}},
        {"activation_state_dict": {}},
    ],
)
def test_openai_activations_that_are_not_known(change, tmp_path):
    written = openai(tmp_path)
    written.save({**written.stored, **change})
    with pytest.raises(FormatError):
        read(written.place)


def test_qwen_prefers_config_json(tmp_path):
    cfg = read(
        qwen_scope(tmp_path).place, Provenance(repo="Qwen/SAE-Res-Qwen3-8B-Base-W32K-L0_3", path="layer9.sae.pt")
    ).cfg
    assert (cfg.k, cfg.model, cfg.hook) == (K, "Qwen/Qwen3-1.7B-Base", "blocks.9.hook_resid_post")
    assert (cfg.activation, cfg.pre_bias) == ("topk", "none")


def test_qwen_without_config_json_goes_by_the_repository(tmp_path):
    written = qwen_scope(tmp_path, config=None)
    wide = torch.nn.functional.pad
    tensors = {
        "W_enc": wide(written.stored["W_enc"], (0, 0, 0, 1024 - F)),
        "W_dec": wide(written.stored["W_dec"], (0, 1024 - F)),
        "b_enc": wide(written.stored["b_enc"], (0, 1024 - F), value=-9),
        "b_dec": written.stored["b_dec"],
    }
    with pytest.raises(FormatError, match=r"k is None"):
        read(written.place)
    named = Provenance(repo="Qwen/SAE-Res-Qwen3.5-27B-W1K-L0_5", path="layer9.sae.pt")
    with pytest.raises(FormatError, match="should have 1K latents"):
        read(written.place, named)
    assert read(written.place, Provenance(overrides={"k": 4})).cfg.k == 4
    written.save(tensors)
    sae = read(written.place, named)
    assert (sae.cfg.k, sae.cfg.model) == (5, "Qwen/Qwen3.5-27B")
    x = inputs(4)
    want, _ = written.expected(x)
    torch.testing.assert_close(sae.encode(torch.from_numpy(x).float())[:, :F], torch.from_numpy(want).float())


@pytest.mark.parametrize(
    "change",
    [{"k": "50"}, {"k": 10**9}, {"d_model": D + 1}, {"d_sae": 10**15}, {"hook_point": "mlp"}, {"base_model": 3}],
)
def test_qwen_config_that_does_not_fit(change, tmp_path):
    with pytest.raises(FormatError):
        read(qwen_scope(tmp_path, config={**QWEN, **change}).place)


def test_each_file_is_recognized_as_what_it_is(tmp_path):
    assert type(detect(deepseek_r1(tmp_path / "a").place)) is DeepSeekR1
    assert type(detect(openai(tmp_path / "b").place)) is OpenAI
    assert type(detect(qwen_scope(tmp_path / "c").place)) is QwenScope
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.ones(2, 3)}, other)
    with pytest.raises(FormatError, match="no layout that saewb knows"):
        detect(other)
    with pytest.raises(FormatError, match="no layout that saewb knows"):
        detect(tmp_path)


def test_files_to_download():
    assert DeepSeekR1().patterns("a-l19.pt") == OpenAI().patterns("a-l19.pt") == ["a-l19.pt"]
    assert QwenScope().patterns("layer9.sae.pt") == ["config.json", "layer9.sae.pt"]
    for layout in (DeepSeekR1(), OpenAI(), QwenScope()):
        assert layout.patterns("") == layout.patterns("folder") == []  # not every file of a repository
