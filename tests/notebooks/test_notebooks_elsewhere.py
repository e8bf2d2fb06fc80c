"""The notebooks promise to run on another model and SAE by changing one cell. Here `"tiny"` is another model and SAE.

Other are the width, the depth, where the SAE reads, and which latents mean what. The tokenizer is the embedded model's,
so that words of one token stay that.
"""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny_models

import saewb

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.long

HOOK, WIDTH, LATENTS = "blocks.1.hook_resid_pre", 48, 1100
WITHOUT_A_MODEL = {"02_finding_and_loading_saes", "05_toy_models"}
OF_ONE_MODEL = {"12_trace_a_circuit"}  # whose transcoders are of every layer of one model


@pytest.fixture(scope="module")
def other_model():
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(saewb.tiny.folder("model"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 2 else None
    return saewb.load_model(model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def other_sae(other_model):
    """With thresholds, where the embedded one keeps the k largest; about 16 latents fire on a token."""
    sae = tiny_models.sae(HOOK, "jumprelu", d_in=WIDTH, d_sae=LATENTS)
    with torch.no_grad():
        _, cache = other_model.run_with_cache(saewb.tiny.held_out_texts()[0].text, names_filter=HOOK)
        x = cache[HOOK][0, 1:]
        sae.threshold.fill_(0.0)
        sae.threshold.fill_(float(sae.encode(x).quantile(1 - 16 / LATENTS)))
    return sae


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return [source for source in sources if "%pip" not in source]


def run_cell(source, names):
    """As a notebook does it: what the last line is worth is shown."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<cell>", "exec"), names)
    if last is not None:
        shown = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        assert repr(shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_on_another_model_and_sae(path, other_model, other_sae, monkeypatch):
    if path.stem in WITHOUT_A_MODEL:
        assert not any("load_model" in source for source in code_cells(path))
        return
    if path.stem in OF_ONE_MODEL:
        assert any("saewb.tiny.transcoders()" in source for source in code_cells(path))
        return
    load_sae, documents = saewb.load_sae, saewb.tiny.held_out_texts()[:130]
    monkeypatch.setattr(saewb, "load_model", lambda *_, **__: other_model)
    monkeypatch.setattr(saewb, "load_sae", lambda s, *a, **how: other_sae if s == "tiny" else load_sae(s, *a, **how))
    monkeypatch.setattr(saewb.tiny, "held_out_texts", lambda: documents)
    names = {"__name__": "__main__", "sys": sys}  # as the cell for Colab leaves it
    with torch.enable_grad():  # cells switch gradients off for good
        grad = torch.is_grad_enabled()
        try:
            for source in code_cells(path):
                run_cell(source, names)
        finally:
            torch.set_grad_enabled(grad)
            saewb.detach_all(other_model)
