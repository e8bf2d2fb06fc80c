"""Temporal SAEs in their authors' own files: conf.yaml beside tensors D, b, E and attn_layers."""

import copy

import numpy as np
import pytest
import torch
import yaml
from helpers.format_tensors import rounded, tensors
from safetensors.torch import save_file

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.temporal import Temporal

D, F, HEADS, K = 8, 32, 2, 3
CONF = {
    "llm": {"dimin": D, "name": "google/gemma-2-2b", "block_id": 1},  # not the layer
    "data": {"dtype": "bfloat16", "num_total_steps": 100000},
    "sae": {
        "exp_factor": 4,
        "n_heads": HEADS,
        "n_attn_layers": 1,
        "bottleneck_factor": 1,
        "sae_diff_type": "topk",
        "kval_topk": K,
        "tied_weights": True,
        "scaling_factor": 0.00666666667,
    },
}
FACTS = Provenance(
    repo="canrager/temporalSAEs",
    path="gemma-2-2B/layer_12/temporal",
    scaling_factor=0.00666666667,  # the catalogue has it too
    overrides={"model_name": "gemma-2-2b", "dataset_path": "monology/pile-uncopyrighted"},
)
FOUR = ("k_ctx", "q_target", "v_ctx", "c_proj")


def conf(**sae):
    result = copy.deepcopy(CONF)
    result["sae"] |= sae
    return result


def weights(tied=True, layers=1, bottleneck=1, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"D": (F, D), "b": (D,)} | ({} if tied else {"E": (D, F)})
    for i in range(layers):
        for name in FOUR:
            width = F // bottleneck if name in ("k_ctx", "q_target") else F
            shapes |= {f"attn_layers.{i}.{name}.weight": (width, F), f"attn_layers.{i}.{name}.bias": (width,)}
    return rounded({name: rng.standard_normal(shape) * 0.5 for name, shape in shapes.items()}, torch.bfloat16)


def written(folder, w, content=CONF, **more):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "conf.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    save_file({**tensors(w, torch.bfloat16), **more}, folder / "latest_ckpt.safetensors")
    return folder


def native(w, x, sae):
    """Novel codes and reconstruction of one text x [pos, d_in], after the authors' forward pass."""
    w, scale = {name: a.astype(np.float64) for name, a in w.items()}, sae["scaling_factor"]
    E, lam = w.get("E", w["D"].T), 1 / (4 * D)
    r, predicted = x.astype(np.float64) * scale - w["b"], 0
    for i in range(sae["n_attn_layers"]):
        z = np.maximum(lam * r @ E, 0)
        before = np.concatenate([np.zeros_like(z[:1]), z[:-1]])
        q, k, v = (
            part @ w[f"attn_layers.{i}.{name}.weight"].T + w[f"attn_layers.{i}.{name}.bias"]
            for name, part in (("q_target", z), ("k_ctx", before), ("v_ctx", before))
        )
        mixed = []
        for qh, kh, vh in zip(*(np.split(t, HEADS, axis=1) for t in (q, k, v)), strict=True):
            score = np.where(np.tri(len(x)), qh @ kh.T / np.sqrt(qh.shape[1]), -np.inf)
            share = np.exp(score - score.max(1, keepdims=True))
            mixed.append(share / share.sum(1, keepdims=True) @ vh)
        weight, bias = (w[f"attn_layers.{i}.c_proj.{part}"] for part in ("weight", "bias"))
        codes = np.maximum(np.concatenate(mixed, axis=1) @ weight.T + bias, 0)
        along = codes @ w["D"]
        alpha = (along * r).sum(1, keepdims=True) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-6) ** 2
        predicted, r = predicted + alpha * codes, r - alpha * along
    novel = np.maximum(lam * r @ E, 0)
    if sae["sae_diff_type"] == "topk" and sae["kval_topk"] is not None:
        saved = np.argsort(-novel, axis=1)[:, : sae["kval_topk"]]
        novel = np.where(_mask(saved, novel.shape), novel, 0)
    return novel, ((novel + predicted) @ w["D"] + w["b"]) / scale


def _mask(kept, shape):
    mask = np.zeros(shape, bool)
    np.put_along_axis(mask, kept, True, axis=1)
    return mask


@pytest.mark.parametrize(
    "sae",
    [
        {},
        {"tied_weights": False},
        {"n_attn_layers": 2, "tied_weights": False, "bottleneck_factor": 4},
        {"sae_diff_type": "relu"},
        {"kval_topk": None},
        {"scaling_factor": 0.029},
    ],
)
def test_by_the_authors_arithmetic(sae, tmp_path):
    content = conf(**sae)
    w = weights(content["sae"]["tied_weights"], content["sae"]["n_attn_layers"], content["sae"]["bottleneck_factor"])
    folder = written(tmp_path / "anywhere", w, content)
    assert type(detect(folder)) is Temporal
    ours = read(folder, FACTS, dtype=torch.float64)
    x = np.random.default_rng(5).standard_normal((2, 7, D)) * 3 / content["sae"]["scaling_factor"]
    for row in x:
        novel, out = native(w, row, content["sae"])
        got = ours.encode(torch.from_numpy(row[None]))[0].detach().numpy()
        np.testing.assert_allclose(got, novel, atol=1e-5 * novel.max())
        np.testing.assert_allclose(ours(torch.from_numpy(row[None]))[0].detach().numpy(), out, rtol=1e-5, atol=1e-6)
    assert 0.02 < (novel > 0).mean() < 0.98


def test_where_it_belongs(tmp_path):
    sae = read(written(tmp_path, weights()), FACTS)
    assert (sae.cfg.hook, sae.cfg.model, sae.dtype) == ("blocks.12.hook_resid_post", "gemma-2-2b", torch.bfloat16)
    assert sae.cfg.metadata == {"dataset_path": "monology/pile-uncopyrighted"}
    assert sae.cfg.factor == 0.00666666667
    elsewhere = Provenance(overrides={"hook_name": "blocks.3.hook_resid_mid"})
    assert read(tmp_path, elsewhere).cfg.hook == "blocks.3.hook_resid_mid"
    assert read(tmp_path, Provenance(layer=5)).cfg.hook == "blocks.5.hook_resid_post"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**CONF, "sae": None}, "sae=None"),
        ({**CONF, "llm": {"dimin": "8"}}, "llm.dimin='8'"),
        (conf(exp_factor="4"), "exp_factor"),
        (conf(sae_diff_type="gated"), "gated"),
        (conf(kval_topk=99), "k=99"),
        (conf(n_heads=3), "n_heads"),
        (conf(tied_weights="yes"), "tied_weights 'yes'"),
        (conf(n_attn_layers=1 << 60), "not so many"),
        (conf(exp_factor=1e308), "bottleneck_factor|do not fit"),
        (conf(n_attn_layers=2), r"attn_layers\.1\.k_ctx\.weight missing"),
        (conf(tied_weights=False), "E missing"),
        ({**CONF, "sae": {k: v for k, v in CONF["sae"].items() if k != "scaling_factor"}}, r"no sae\.scaling_factor"),
        ("", "conf.yaml holds a NoneType"),
        ("a: [1", "not YAML"),
        ("!!python/object/apply:os.system ['touch ran']", "not YAML of plain values"),
    ],
)
def test_another_conf_is_refused(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FormatError, match=message):
        read(written(tmp_path / "sae", weights(), content))
    assert not (tmp_path / "ran").exists()


def test_other_tensors_are_refused(tmp_path):
    w = weights()
    for name in w:
        with pytest.raises(FormatError, match=f"{name} missing"):
            read(written(tmp_path, {n: a for n, a in w.items() if n != name}))
    with pytest.raises(FormatError, match="step left over"):
        read(written(tmp_path, w, step=torch.ones(1)))
    with pytest.raises(FormatError, match=r"b \(9,\) instead of \(8,\)"):
        read(written(tmp_path, w | {"b": np.ones(9, np.float32)}))


def test_files():
    assert Temporal().patterns("a/b") == ["a/b/conf.yaml", "a/b/latest_ckpt.safetensors"]
