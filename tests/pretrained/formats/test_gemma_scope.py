"""params.npz of Gemma Scope, as published: names say everything but the numbers."""

import numpy as np
import pytest
import torch
from helpers.format_tensors import D, F, O, assert_computes, gated, inputs, near_the_median, weights, wide

from saewb.errors import FormatError
from saewb.pretrained.formats import Provenance, detect, read
from saewb.pretrained.formats.gemma_scope import GemmaScope

RES = "google/gemma-scope-2b-pt-res"
PATH = "layer_20/width_16k/average_l0_71"


def written(folder, w=None, *, save=np.savez, **more):
    folder.mkdir(parents=True, exist_ok=True)
    w = w or published_weights()
    save(folder / "params.npz", **w, **more)
    return folder


def published_weights(**shape):
    w = weights(**shape)
    return {**w, "threshold": near_the_median(w, inputs(d_in=w["W_enc"].shape[0]))}


def expected(w, x):
    w, x = wide(w), x.astype(np.float64)
    latents = gated(x @ w["W_enc"] + w["b_enc"], w["threshold"])
    return latents, latents @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_residual_stream_sae(save, tmp_path):
    w, x = published_weights(), inputs()
    folder = written(tmp_path / "anywhere", w, save=save)
    assert type(detect(folder)) is GemmaScope
    assert type(detect(folder / "params.npz")) is GemmaScope
    sae = read(folder, Provenance(repo=RES, path=PATH))
    assert_computes(sae, x, *expected(w, x))
    assert (sae.cfg.activation, sae.cfg.pre_bias, sae.dtype) == ("jumprelu", "none", torch.float32)
    assert (sae.cfg.model, sae.cfg.hook, sae.cfg.hook_out) == ("gemma-2-2b", "blocks.20.hook_resid_post", None)
    assert sae.cfg.metadata == {
        "prepend_bos": True,
        "context_size": 1024,
        "dataset_path": "monology/pile-uncopyrighted",
        "l0": 71,
    }
    for name, array in w.items():
        assert torch.equal(getattr(sae, name), torch.from_numpy(array))


def test_strictly_above_the_threshold(tmp_path):
    w = {name: np.zeros_like(array) for name, array in published_weights().items()}
    w["b_enc"] += np.float32(0.5)
    w["threshold"] += np.float32(0.5)
    assert not read(written(tmp_path, w), Provenance(repo=RES, path=PATH)).encode(torch.zeros(1, D)).any()


@pytest.mark.parametrize("names", [str.lower, lambda n: n.replace("W_", "w_"), lambda n: n.replace("_", "")])
def test_other_spellings_of_the_arrays(names, tmp_path):
    w, x = published_weights(), inputs()
    sae = read(written(tmp_path, {names(name): array for name, array in w.items()}), Provenance(repo=RES, path=PATH))
    assert_computes(sae, x, *expected(w, x))


def test_two_spellings_of_one_array_are_refused(tmp_path):
    w = published_weights()
    with pytest.raises(FormatError, match="both W_enc and w_enc"):
        read(written(tmp_path, {**w, "w_enc": w["W_enc"]}), Provenance(repo=RES, path=PATH))


@pytest.mark.parametrize(
    ("repo", "path", "model", "hook", "hook_out"),
    [
        ("google/gemma-scope-2b-pt-res", PATH, "gemma-2-2b", "blocks.20.hook_resid_post", None),
        ("google/gemma-scope-9b-it-res", PATH, "gemma-2-9b-it", "blocks.20.hook_resid_post", None),
        (
            "google/gemma-scope-27b-pt-res",
            "layer_22/width_131k/average_l0_82",
            "gemma-2-27b",
            "blocks.22.hook_resid_post",
            None,
        ),
        (
            "google/gemma-scope-9b-pt-mlp",
            "layer_0/width_16k/average_l0_50",
            "gemma-2-9b",
            "blocks.0.hook_mlp_out",
            None,
        ),
        ("google/gemma-scope-2b-pt-att", PATH, "gemma-2-2b", "blocks.20.attn.hook_z", None),
        (RES, "embedding/width_4k/average_l0_6", "gemma-2-2b", "hook_embed", None),
        (
            "google/gemma-scope-2b-pt-transcoders",
            "layer_3/width_16k/average_l0_54",
            "gemma-2-2b",
            "blocks.3.ln2.hook_normalized",
            "blocks.3.hook_mlp_out",
        ),
    ],
)
@pytest.mark.parametrize("how", ["facts", "on disk", "in the hub's cache"])
def test_where_it_belongs_is_in_the_names(repo, path, model, hook, hook_out, how, tmp_path):
    if how == "facts":
        sae = read(written(tmp_path / "x"), Provenance(repo=repo, path=path))
    elif how == "on disk":
        sae = read(written(tmp_path / "research" / "matter" / repo / path))  # "res" and "att" in the folders above
    else:
        blob = written(tmp_path / "blobs") / "params.npz"
        folder = tmp_path / f"models--{repo.replace('/', '--')}" / "snapshots" / "0123abc" / path
        folder.mkdir(parents=True)
        (folder / "params.npz").symlink_to(blob)
        sae = read(folder)
    assert (sae.cfg.model, sae.cfg.hook, sae.cfg.hook_out) == (model, hook, hook_out)
    assert sae.cfg.metadata["l0"] == int(path.rpartition("_")[2])


def test_without_names_the_caller_says(tmp_path):
    folder = written(tmp_path / "mine")
    nowhere = read(folder)
    assert (nowhere.cfg.model, nowhere.cfg.hook) == (None, None)
    sae = read(folder, Provenance(model="gemma-2-2b", hook="blocks.4.hook_resid_post"))
    assert (sae.cfg.model, sae.cfg.hook) == ("gemma-2-2b", "blocks.4.hook_resid_post")
    named = read(folder, Provenance(repo=RES, path="", layer=7))
    assert named.cfg.hook == "blocks.7.hook_resid_post"


def test_an_embedding_sae_reads_what_gemma_multiplied(tmp_path):
    """The published weights computed x -> out on the bare embedding; the hook is behind the multiplication."""
    w, x = published_weights(), inputs()
    folder = written(tmp_path, w)
    sae = read(folder, Provenance(repo=RES, path="embedding/width_4k/average_l0_6"))
    latents, out = expected(w, x)
    assert_computes(sae, (x * np.sqrt(np.float32(D))), latents, out * np.sqrt(D))
    assert torch.equal(sae.threshold, torch.from_numpy(w["threshold"]))  # the latents' own units did not change
    assert torch.equal(sae.b_enc, torch.from_numpy(w["b_enc"]))


def test_a_transcoder(tmp_path):
    w = published_weights(d_out=O)
    x = inputs()
    sae = read(
        written(tmp_path, w), Provenance(repo="google/gemma-scope-2b-pt-transcoders", path="layer_3/width_16k/a")
    )
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.d_out, sae.cfg.is_transcoder) == (D, F, O, True)
    assert sae.cfg.metadata["model_from_pretrained_kwargs"] == {"fold_ln": False}  # it reads before the norm's gain
    assert_computes(sae, x, *expected(w, x))


def test_the_width_is_the_arrays_not_the_names(tmp_path):
    """sae-lens takes 131 * 1024 latents for a transcoder of "131k"."""
    sae = read(written(tmp_path), Provenance(repo="google/gemma-scope-2b-pt-transcoders", path="layer_3/width_131k/a"))
    assert sae.cfg.d_sae == F


def test_a_factor_per_latent_of_ones_is_nothing_and_others_are_refused(tmp_path):
    facts = Provenance(repo=RES, path=PATH)
    assert read(written(tmp_path / "a", scaling_factor=np.ones(F, np.float32)), facts).cfg.d_sae == F
    with pytest.raises(FormatError, match="scaling_factor"):
        read(written(tmp_path / "b", scaling_factor=np.full(F, 2, np.float32)), facts)


def test_what_the_catalogue_overrides(tmp_path):
    overrides = {"dataset_path": "mine", "neuronpedia_id": "gemma-2-2b/20-x", "dtype": "float32", "hook_name": "h"}
    sae = read(written(tmp_path), Provenance(repo=RES, path=PATH, overrides=overrides))
    assert (sae.cfg.metadata["dataset_path"], sae.cfg.metadata["neuronpedia_id"]) == ("mine", "gemma-2-2b/20-x")
    assert sae.cfg.hook == "h"
    assert "dtype" not in sae.cfg.metadata
    with pytest.raises(FormatError, match="apply_b_dec_to_input"):
        read(written(tmp_path), Provenance(repo=RES, path=PATH, overrides={"apply_b_dec_to_input": True}))
    with pytest.raises(FormatError, match="scaling_factor=2"):
        read(written(tmp_path), Provenance(repo=RES, path=PATH, scaling_factor=2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": None}, "threshold missing"),
        ({"W_enc": None}, "W_enc"),
        ({"W_skip": np.ones((D, D), np.float32)}, "W_skip left over"),
        ({"b_enc": np.ones(F + 1, np.float32)}, r"b_enc \(41,\) instead of \(40,\)"),
        ({"W_dec": np.ones((D, F), np.float32)}, "W_dec"),
        ({"W_dec": np.ones((F, D), np.int64)}, "int64"),
        ({"threshold": np.full(F, np.nan, np.float32)}, "NaN or infinity in threshold"),
    ],
)
def test_other_arrays_than_these_are_refused(change, message, tmp_path):
    w = {name: a for name, a in {**published_weights(), **change}.items() if a is not None}
    with pytest.raises(FormatError, match=message):
        read(written(tmp_path, w), Provenance(repo=RES, path=PATH))


def test_dtype_and_device(tmp_path):
    sae = read(written(tmp_path), Provenance(repo=RES, path=PATH), dtype=torch.bfloat16, device="meta")
    assert (sae.dtype, sae.device.type) == (torch.bfloat16, "meta")


def test_files():
    assert GemmaScope().patterns(PATH) == [f"{PATH}/params.npz"]
    assert GemmaScope().patterns("") == ["params.npz"]
    assert GemmaScope().patterns(f"{PATH}/params.npz") == [f"{PATH}/params.npz"]
