"""The Jacobian lens: closed forms, finite differences, its file, going on, and the words of an index."""

import dataclasses
import functools
import json

import pytest
import torch
from helpers import tiny_models
from helpers.tiny_models import D_MODEL, LAYERS, new_bridge, sae, tokens

import saewb
from saewb.errors import FormatError
from saewb.features import jacobian_lens
from saewb.models.forward import run_to_layer
from saewb.models.hook_points import editing

POINTS = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]
FINAL = POINTS[-1]
HOW = {"skip_first": 2, "skip_special_tokens": False, "batch_size": 5}  # 16 dimensions in 4 passes, the last one short
IDS = tokens(rows=3, length=9)


@functools.cache
def model():
    return new_bridge(torch.float64)


@functools.cache
def fitted():
    return saewb.fit_jacobian_lens(model(), IDS, **HOW)


def final_with(ids, point, addend):
    """The final residual stream when something is added at a point; of a pass that nothing else touches."""
    final = []
    edits = {point: lambda x: x + addend}
    edits[FINAL] = (lambda x: final.append(x + addend)) if point == FINAL else final.append
    with torch.no_grad(), editing(model(), edits):
        run_to_layer(model(), ids, LAYERS)
    return final[0]


@pytest.mark.parametrize("point", POINTS)
def test_finite_differences(point):
    """A column of J by the definition: what a push at one position does to all later positions, averaged."""
    valid, eps = slice(2, 8), 1e-2  # norms and softmax are computed in float32
    column, expected = 3, torch.zeros(D_MODEL, dtype=torch.float64)
    for row in IDS:
        for p in range(2, 8):
            push = torch.zeros(1, 9, D_MODEL, dtype=torch.float64)
            push[0, p, column] = eps
            up, down = final_with(row[None], point, push), final_with(row[None], point, -push)
            expected += ((up - down) / (2 * eps))[0, valid].sum(0) / (6 * len(IDS))
    torch.testing.assert_close(fitted().matrices[point][:, column].double(), expected, rtol=0, atol=1e-4)


def test_identity_at_the_last_layer():
    torch.testing.assert_close(fitted().matrices[FINAL], torch.eye(D_MODEL), rtol=0, atol=1e-7)
    assert fitted().standard_error(FINAL) == 0
    table = fitted().to_frame().set_index("hook")
    assert table.distance[FINAL] == pytest.approx(0, abs=1e-7)
    assert table.distance[POINTS[0]] > 0.1


def linear_model():
    """A model whose blocks are linear but for their norms: no attention, and an MLP x + W_2 W_1 x."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 3, "n_embd": 8, "n_head": 2, "n_positions": 32, "vocab_size": tiny_models.VOCAB}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="linear", attn_implementation="eager")).eval()
        for block in hf.transformer.h:
            torch.nn.init.zeros_(block.attn.c_proj.weight)
            for part in (block.mlp.c_fc, block.mlp.c_proj):
                torch.nn.init.normal_(part.weight, std=0.3)
    products, product = [], torch.eye(8)
    for block in reversed(hf.transformer.h):
        products.insert(0, product.clone())
        product = product @ (torch.eye(8) + (block.mlp.c_fc.weight @ block.mlp.c_proj.weight).T.detach())
    bridge = TransformerBridge.boot_transformers("small", hf_model=hf, tokenizer=tiny_models.tokenizer(), device="cpu")
    return bridge, products


def test_linear_model_has_the_product_of_its_matrices(monkeypatch):
    linear, products = linear_model()
    monkeypatch.setattr(type(linear.blocks[0].ln2), "forward", lambda self, x: x)
    lens = saewb.fit_jacobian_lens(linear, IDS, **HOW)
    for (hook, got), expected in zip(lens.matrices.items(), products, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert lens.standard_error(hook) < 1e-3, "it is the same for each prompt"


def test_mean_and_standard_error_over_prompts():
    each = [saewb.fit_jacobian_lens(model(), row[None], **HOW) for row in IDS]
    for point in POINTS[:2]:
        matrices = torch.stack([lens.matrices[point] for lens in each]).double()
        mean = matrices.mean(0)
        torch.testing.assert_close(fitted().matrices[point].double(), mean, rtol=1e-5, atol=1e-6)
        error = (matrices.var(0, correction=1).sum() / len(IDS)).sqrt() / mean.norm()
        assert fitted().standard_error(point) == pytest.approx(float(error), rel=1e-3)
        assert each[0].standard_error(point) != each[0].standard_error(point), "nan for one prompt"


def test_special_tokens_and_the_first_and_last_positions_are_left_out():
    """A row of two valid positions is the Jacobian of just these."""
    ids = IDS[:1].clone()
    ids[0, 2:6] = tiny_models.BOS
    lens = saewb.fit_jacobian_lens(model(), ids, POINTS[0], skip_first=2, skip_special_tokens=[tiny_models.BOS])
    expected = torch.zeros(D_MODEL, dtype=torch.float64)
    for p in (6, 7):
        push = torch.zeros(1, 9, D_MODEL, dtype=torch.float64)
        push[0, p, 0] = 1e-2
        change = final_with(ids, POINTS[0], push) - final_with(ids, POINTS[0], -push)
        expected += change[0, 6:8].sum(0) / 2e-2 / 2
    torch.testing.assert_close(lens.matrices[POINTS[0]][:, 0].double(), expected, rtol=0, atol=1e-4)


def test_gradients_are_recorded_wherever_it_is_called():
    before = tiny_models.snapshot(model())
    with torch.inference_mode():
        lens = saewb.fit_jacobian_lens(model(), IDS, POINTS[0], **HOW)
    assert torch.equal(lens.matrices[POINTS[0]], fitted().matrices[POINTS[0]])
    assert tiny_models.snapshot(model()) == before
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model().parameters())


# -- other points ----------------------------------------------------------------------------------------------------


def test_points_by_other_names_and_what_is_added_to_the_stream():
    lens, x = fitted(), torch.randn(4, D_MODEL)
    after = x @ lens.matrices[POINTS[0]].T
    assert torch.equal(lens.transport(x, "blocks.1.hook_resid_pre"), after)
    assert torch.equal(lens.transport(x, "blocks.0.hook_out"), after)
    assert torch.equal(lens.transport(x, "blocks.0.hook_mlp_out", model()), after)
    w_out = model().blocks[0].mlp.W_out.detach().float()
    of_neurons = lens.transport(torch.eye(len(w_out)), "blocks.0.mlp.hook_post", model())
    torch.testing.assert_close(of_neurons, w_out @ lens.matrices[POINTS[0]].T)
    direct = saewb.fit_jacobian_lens(model(), IDS, ["blocks.0.mlp.hook_post", "blocks.1.attn.hook_z"], **HOW)
    torch.testing.assert_close(
        direct.matrices["blocks.0.mlp.hook_post"], (w_out @ lens.matrices[POINTS[0]].T).T, rtol=1e-4, atol=1e-5
    )
    z = direct.matrices["blocks.1.attn.hook_z"]
    assert z.shape == (D_MODEL, D_MODEL), "all heads side by side"
    head = torch.randn(2, 4)
    assert torch.equal(direct.transport(head, "blocks.1.attn.hook_z", head=2), head @ z[:, 8:12].T)


def test_points_that_lead_nowhere():
    with pytest.raises(ValueError, match="does not exist|no hook point|unknown|near"):
        saewb.fit_jacobian_lens(model(), IDS, "blocks.0.hook_nothing", **HOW)
    with pytest.raises(ValueError, match="no matrix at 'blocks.0.hook_attn_out'"):
        fitted().transport(torch.zeros(1, D_MODEL), "blocks.0.hook_attn_out", model())
    with pytest.raises(ValueError, match="16 dimensions"):
        fitted().transport(torch.zeros(1, 3), POINTS[0])
    with pytest.raises(ValueError, match="has none after the first 16"):
        saewb.fit_jacobian_lens(model(), IDS)
    with pytest.raises(ValueError, match="n_prompts=0"):
        saewb.fit_jacobian_lens(model(), IDS, n_prompts=0)
    with saewb.attach(model(), sae(POINTS[1]).double()), pytest.raises(ValueError, match="writes to"):
        saewb.fit_jacobian_lens(model(), IDS, POINTS[1], **HOW)


def test_logits_of_the_last_layer_are_the_models():
    states, logits = {}, model()(IDS)
    with torch.no_grad(), editing(model(), {point: lambda x, p=point: states.update({p: x}) for point in POINTS}):
        run_to_layer(model(), IDS, LAYERS)
    read = fitted().logits(model(), states[FINAL], FINAL)
    torch.testing.assert_close(read, logits.detach().float(), rtol=1e-4, atol=1e-4)
    assert fitted().logits(model(), states[POINTS[0]], POINTS[0]).shape == logits.shape


# -- files, interrupts -----------------------------------------------------------------------------------------------


def test_saved_and_read(tmp_path):
    file = fitted().save(tmp_path / "lens.safetensors")
    again = saewb.JacobianLens.load(file)
    assert repr(again) == repr(fitted())
    assert again.to_frame().equals(fitted().to_frame())
    assert all(torch.equal(again.matrices[point], fitted().matrices[point]) for point in POINTS)
    again.check_model(model())
    with pytest.raises(ValueError, match="of another model"):
        again.check_model(new_bridge())
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:100])
    for name in ("cut.safetensors", "missing.safetensors"):
        with pytest.raises((FormatError, FileNotFoundError)):
            saewb.JacobianLens.load(tmp_path / name)


@pytest.mark.parametrize(
    "change",
    [
        {"n_prompts": "3"},
        {"mean_squares": {"elsewhere": 1.0}},
        {"digests": {"model": 5}},
        {"more": 1},
        {"version": 99},
    ],
    ids=str,
)
def test_damaged_descriptions_are_refused(tmp_path, change):
    from safetensors.torch import save_file

    values = {"version": 1, "model": "m", "n_prompts": 3, "ctx_len": 9, "skip_first": 2, "mean_squares": {}}
    values |= {"digests": None} | change
    save_file({"p": torch.eye(2)}, tmp_path / "x.safetensors", metadata={"jacobian_lens": json.dumps(values)})
    with pytest.raises(FormatError):
        saewb.JacobianLens.load(tmp_path / "x.safetensors")


def test_published_file(tmp_path):
    """The format of neuronpedia/jacobian-lens: matrices by layer, in float16, and the number of prompts."""
    matrices = {layer: fitted().matrices[POINTS[layer]].half() for layer in (0, 1)}
    values = {"J": matrices, "n_prompts": 1000, "source_layers": [0, 1], "d_model": D_MODEL}
    torch.save(values, tmp_path / "lens.pt")
    lens = saewb.JacobianLens.load(tmp_path / "lens.pt")
    assert list(lens.matrices) == POINTS[:2]
    assert lens.n_prompts == 1000
    assert torch.equal(lens.matrices[POINTS[1]], matrices[1].float())
    assert repr(lens) == "JacobianLens(2 points, 1000 prompts)"
    lens.check_model(model())
    with pytest.raises(ValueError, match="of a model of width 16"):
        lens.check_model(saewb.load_model("tiny", device="cpu"))

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    for name, wrong in {"evil": Evil(), "list": [1], "none": {"J": {}, "n_prompts": 1}}.items():
        torch.save(wrong, tmp_path / f"{name}.pt")
        with pytest.raises(FormatError):
            saewb.JacobianLens.load(tmp_path / f"{name}.pt")


def test_interrupted_and_continued(tmp_path, monkeypatch, capsys):
    file, inner, calls = tmp_path / "lens.safetensors", jacobian_lens._jacobians, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(jacobian_lens, "_jacobians", interrupted)
    part = saewb.fit_jacobian_lens(model(), IDS, **HOW, file=file)
    assert part.n_prompts == 2
    assert saewb.JacobianLens.load(file).n_prompts == 2
    whole = saewb.fit_jacobian_lens(model(), IDS, **HOW, file=file)
    assert len(calls) == 4, "only the third prompt is run"
    assert all(torch.equal(whole.matrices[point], fitted().matrices[point]) for point in POINTS)
    assert whole.mean_squares == fitted().mean_squares
    assert whole.digests == fitted().digests
    assert saewb.fit_jacobian_lens(model(), IDS, **HOW, file=file).n_prompts == 3
    assert len(calls) == 4
    for wrong, message in [
        ({"skip_first": 1}, "skip_first 2 and not 1"),
        ({"hooks": POINTS[:1]}, "hooks"),
        ({"n_prompts": 2}, "is of 3 prompts"),
        ({"texts": tokens(rows=3, length=9, seed=5)}, "of other tokens"),
    ]:
        arguments = {"texts": IDS, **HOW, "file": file} | wrong
        with pytest.raises(ValueError, match=message):
            saewb.fit_jacobian_lens(model(), **arguments)
    calls.extend([1, 1])
    monkeypatch.setattr(jacobian_lens, "_jacobians", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        saewb.fit_jacobian_lens(model(), IDS, **HOW, file=tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_gradients_that_are_not_finite():
    broken = new_bridge(layers=1)
    with torch.no_grad():
        broken.blocks[0].mlp.out.weight.fill_(float("inf"))
    with pytest.raises(FloatingPointError, match="not finite"):
        saewb.fit_jacobian_lens(broken, IDS, "blocks.0.hook_resid_pre", **HOW)


# -- words of an index -----------------------------------------------------------------------------------------------


def test_words_of_an_index_beside_the_direct_ones(tmp_path):
    coder = sae(POINTS[0]).double()
    plain = saewb.build_index(model(), coder, IDS)
    index = saewb.build_index(model(), coder, IDS, logits=fitted(), folder=tmp_path / "index")
    through = coder.W_dec.detach().float() @ fitted().matrices[POINTS[0]].T
    effects = through @ saewb.models.unembed.unembedding(model())
    for latent in (0, 7, 39):
        page = index.latent(latent)
        assert page.logits_top == plain.latent(latent).logits_top
        assert plain.latent(latent).jacobian_top == ()
        assert [word.id for word in page.jacobian_top] == effects[latent].topk(10).indices.tolist()
        assert [word.effect for word in page.jacobian_bottom] == pytest.approx(
            effects[latent].topk(10, largest=False).values.tolist(), rel=1e-4
        )
        assert all(word.token for word in page.jacobian_top)
    assert index.info.lens == repr(fitted())
    assert plain.info.lens is None
    read = saewb.load_index(tmp_path / "index")
    assert read.latent(7) == index.latent(7)
    assert read.info == index.info
    more = saewb.build_index(model(), coder, tokens(rows=2, length=9, seed=9), extend=read)
    assert more.latent(7).jacobian_top == index.latent(7).jacobian_top
    assert more.info.lens == index.info.lens
    assert saewb.explanations.index_sha(plain) == saewb.explanations.index_sha(index), "the contexts are the same"
    file = index.save_html(tmp_path / "page.html").read_text()
    assert "Through later layers" in file
    assert repr(fitted()) in file


def test_at_the_last_layer_both_words_are_the_same():
    page = saewb.build_index(model(), sae(FINAL).double(), IDS, logits=fitted()).latent(3)
    assert [word.id for word in page.jacobian_top] == [word.id for word in page.logits_top]


def test_index_fits_its_own_lens():
    ids = tokens(rows=3, length=20)
    coder = sae("blocks.0.hook_mlp_out").double()
    index = saewb.build_index(model(), coder, ids, logits="jacobian", skip_special_tokens=False)
    how = {"skip_first": 5, "skip_special_tokens": False}
    lens = saewb.fit_jacobian_lens(model(), ids, "blocks.0.hook_mlp_out", **how)
    assert index.info.lens == repr(lens)
    one = saewb.build_index(model(), coder, ids, logits=lens, skip_special_tokens=False)
    assert one.latent(3).jacobian_top == index.latent(3).jacobian_top != ()


def test_wrong_lenses_are_refused_before_the_pass():
    coder = sae(POINTS[0]).double()
    with pytest.raises(TypeError, match="logits='jacobi'"):
        saewb.build_index(model(), coder, IDS, logits="jacobi")
    other = dataclasses.replace(fitted(), digests={"model": "0" * 64, "tokens": "0"})
    with pytest.raises(ValueError, match="another model"):
        saewb.build_index(model(), coder, IDS, logits=other)
    with pytest.raises(ValueError, match="no matrix at 'blocks.1.hook_attn_out'"):
        saewb.build_index(model(), sae("blocks.1.hook_attn_out").double(), IDS, logits=fitted())
