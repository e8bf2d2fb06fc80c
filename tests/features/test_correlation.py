"""Latents' correlation on text, by what fires, against all activations in numpy."""

import doctest

import numpy as np
import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.features import correlation as module
from saewb.models.capture import capture

HOOK = "blocks.1.hook_resid_post"


def dense(sae, ids, plain, n_tokens=10**9, head=None):
    model = tiny_models.bridge()
    with torch.no_grad():
        x = capture(model, ids, [sae.cfg.hook])[sae.cfg.hook]
        x = x[:, :, head] if head is not None else x
        return sae.encode(x[plain][:n_tokens])


@pytest.mark.parametrize("by", ["correlation", "phi"])
@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_it_is_the_correlation_of_activations(by, activation, monkeypatch):
    monkeypatch.setattr(module, "_PASS", 40)  # in several passes
    monkeypatch.setattr("saewb.sae.base._TILE", 400)
    sae = tiny_models.sae(HOOK, activation=activation, **({"k": 9} if activation == "topk" else {}))
    ids, seen = tiny_models.tokens(14, 10), []
    how = {"by": by, "skip_special_tokens": [tiny_models.BOS], "n_tokens": 100, "min_fires": 1, "progress": seen.append}
    view = saewb.latent_matrix(tiny_models.bridge(), sae, ids, **how)
    acts = dense(sae, ids, ids != tiny_models.BOS, 100).double()
    acts = acts if by == "correlation" else (acts != 0).double()
    with np.errstate(all="ignore"):
        want = torch.tensor(np.corrcoef(acts.numpy().T))
    got = view.block(range(40), range(40))
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0, equal_nan=True)
    torch.testing.assert_close(view.density.double(), (acts != 0).double().mean(0))
    assert seen == [36, 72, 100]


def test_heads_and_mistakes():
    sae = tiny_models.sae("blocks.1.attn.hook_q", d_in=4, head=1)
    ids = tiny_models.tokens(8, 9)
    view = saewb.latent_matrix(tiny_models.bridge(), sae, ids, skip_special_tokens=False, min_fires=1)
    want = torch.corrcoef(dense(sae, ids, ids >= 0, head=1).double().T)
    torch.testing.assert_close(view.block(range(40), range(40)).double(), want, atol=1e-5, rtol=0, equal_nan=True)
    for how, says in (
        ({"by": "ph"}, "near: phi"),
        ({"n_tokens": 0}, "n_tokens=0"),
        ({"skip_special_tokens": list(range(tiny_models.VOCAB))}, "all 72 tokens are special"),
    ):
        with pytest.raises(ValueError, match=says):
            saewb.latent_matrix(tiny_models.bridge(), sae, ids, **how)
    with pytest.raises(ValueError, match="hook=None"):
        saewb.latent_matrix(tiny_models.bridge(), tiny_models.sae(None), ids)


def test_it_can_be_ended():
    def stop(seen):
        raise InterruptedError(str(seen))

    with pytest.raises(InterruptedError, match="64"):
        saewb.latent_matrix(
            tiny_models.bridge(),
            tiny_models.sae(HOOK),
            tiny_models.tokens(8, 9),
            skip_special_tokens=[tiny_models.BOS],
            progress=stop,
        )


def test_an_index_knows_which_fire_together():
    sae, ids = tiny_models.sae(HOOK), tiny_models.tokens(12, 9)
    index = saewb.build_index(tiny_models.bridge(), sae, ids, skip_special_tokens=[tiny_models.BOS])
    view = index.matrix(min_fires=5)
    fires = (dense(sae, ids, ids != tiny_models.BOS) != 0).double()
    want = torch.corrcoef(fires.T)
    rare = fires.sum(0) < 5
    want[rare], want[:, rare] = torch.nan, torch.nan
    torch.testing.assert_close(view.block(range(40), range(40)).double(), want, atol=1e-5, rtol=0, equal_nan=True)
    assert view.density.tolist() == pytest.approx([latent.density for latent in index])
    pair = view.pair(3, 4)
    assert pair.together == int((fires[:, 3] * fires[:, 4]).sum())
    assert pair.n_tokens == 96
    none = saewb.build_index(tiny_models.bridge(), sae, ids, skip_special_tokens=[tiny_models.BOS], coactive_tokens=0)
    with pytest.raises(ValueError, match=r"no sampled tokens[\s\S]*coactive_tokens=65_536"):
        none.matrix()


def test_examples_run():
    assert doctest.testmod(module).failed == 0
