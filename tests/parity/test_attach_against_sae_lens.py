"""The same SAE attached by sae-lens and by saewb: the same values at every inner point, and the same logits."""

import copy

import pytest
import torch
from helpers import tiny_models

from saewb.interventions.attachment import attach
from saewb.models import hook_points
from saewb.pretrained.load import load_sae, save_sae

sae_lens = pytest.importorskip("sae_lens", reason="the oracle is installed in the second environment only")

RESID = "blocks.1.hook_resid_post"
KEYS = ["input", "acts_pre", "acts_post", "recons", "error", "output"]
KINDS = {
    "relu": lambda: tiny_models.sae(RESID, pre_bias="tied"),
    "jumprelu": lambda: tiny_models.sae(RESID, "jumprelu"),
    "topk": lambda: tiny_models.sae(RESID, "topk", k=5),
    "abstopk": lambda: tiny_models.sae(RESID, "abstopk", k=5),
    "layer norm": lambda: tiny_models.sae(RESID, normalization="layer_norm", pre_bias="tied"),
    "constant norm": lambda: tiny_models.sae(RESID, normalization="constant_norm"),
    "hook_z": lambda: tiny_models.sae("blocks.2.attn.hook_z", "topk", k=5),
    "attn_out": lambda: tiny_models.sae("blocks.0.hook_attn_out"),
    "transcoder": lambda: tiny_models.sae("blocks.1.hook_resid_pre", "jumprelu", hook_out="blocks.1.hook_mlp_out"),
}


@pytest.fixture(scope="module", params=["bridge", "hooked"])
def peer(request):
    """(their model, our model): one kind, one set of weights."""
    if request.param == "bridge":
        theirs = sae_lens.SAETransformerBridge.boot_transformers(
            "small", hf_model=copy.deepcopy(tiny_models.hf_llama()), tokenizer=tiny_models.tokenizer(), device="cpu"
        )
        return theirs, tiny_models.bridge()
    ours = tiny_models.hooked()
    theirs = sae_lens.HookedSAETransformer(ours.cfg, tokenizer=ours.tokenizer)
    weights = {name: ours.state_dict().get(name, value) for name, value in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_inner_point(peer, tmp_path, kind, error_term):
    theirs, ours = peer
    sae, tokens = KINDS[kind](), tiny_models.tokens()
    their_sae = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path / "sae"))
    with torch.no_grad():
        want_logits, want = theirs.run_with_cache_with_saes(tokens, saes=[their_sae], use_error_term=error_term)
        with attach(ours, sae, error_term=error_term):
            logits, cache = ours.run_with_cache(tokens)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=1e-4)
    their_points = {name.rpartition(".hook_sae_")[2]: name for name in want if ".hook_sae_" in name}
    our_points = {name.rpartition(".hook_sae_")[2]: name for name in cache if ".hook_sae_" in name}
    # The peer's cache drops a point that did not fire; the error fires only where there is an error term.
    assert set(our_points) == {key for key in KEYS if error_term or key != "error"}
    assert set(their_points) == set(our_points)
    for key, name in our_points.items():
        got, expected = cache[name], want[their_points[key]]
        torch.testing.assert_close(got.reshape(expected.shape), expected, atol=1e-5, rtol=1e-5, msg=f"{key} differs")


THEIRS = {
    "gated": ("GatedSAE", "GatedSAEConfig", {}),
    "topk, rescaled": ("TopKSAE", "TopKSAEConfig", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    "matching_pursuit": ("MatchingPursuitSAE", "MatchingPursuitSAEConfig", {"max_iterations": 4}),
    "temporal": ("TemporalSAE", "TemporalSAEConfig", {"n_heads": 2, "bottleneck_factor": 2, "kval_topk": 5}),
    "skip_transcoder": ("SkipTranscoder", "SkipTranscoderConfig", {"d_out": 16, "apply_b_dec_to_input": False}),
    "jumprelu_transcoder": (
        "JumpReLUTranscoder",
        "JumpReLUTranscoderConfig",
        {"d_out": 16, "apply_b_dec_to_input": False},
    ),
}
# What the peer's attachment leaves out of the output: the skip matrix, the predicted part.
PARTIAL = {"temporal", "skip_transcoder"}


def their_sae(kind, seed=3):
    """One made by the peer, with random weights."""
    from sae_lens.saes.sae import SAEMetadata

    cls, cfg, options = THEIRS[kind]
    places = {"hook_name": RESID}
    if "transcoder" in kind:
        places = {"hook_name": "blocks.1.hook_resid_pre", "hook_name_out": "blocks.1.hook_mlp_out"}
    import sae_lens.saes as saes

    config = getattr(saes, cfg)(d_in=16, d_sae=40, metadata=SAEMetadata(**places), **options)
    made = getattr(saes, cls)(config)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return made


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("kind", list(THEIRS))
def test_saes_of_the_peers_own_making(peer, tmp_path, kind, error_term):
    theirs, ours = peer
    result, tokens = their_sae(kind), tiny_models.tokens()
    result.save_model(tmp_path)
    sae = load_sae(tmp_path)
    with torch.no_grad():
        want_logits, want = theirs.run_with_cache_with_saes(tokens, saes=[result], use_error_term=error_term)
        with attach(ours, sae, error_term=error_term):
            logits, cache = ours.run_with_cache(tokens)
    their_points = {name.rpartition(".hook_sae_")[2]: value for name, value in want.items() if ".hook_sae_" in name}
    our_points = {name.rpartition(".hook_sae_")[2]: value for name, value in cache.items() if ".hook_sae_" in name}
    if kind == "topk, rescaled":  # folded here, so that pre-activations are what the top k are chosen by
        their_points["acts_pre"] = their_points["acts_pre"] * result.W_dec.norm(dim=-1)
    same = {"input", "acts_pre", "acts_post"} if kind in PARTIAL else set(KEYS)
    for key in same & set(our_points) & set(their_points):
        got, expected = our_points[key], their_points[key]
        torch.testing.assert_close(got.reshape(expected.shape), expected, atol=1e-5, rtol=1e-5, msg=f"{key} differs")
    assert {"input", "acts_post"} <= set(our_points)
    assert kind in PARTIAL or {"input", "recons", "output"} <= set(their_points)
    if kind not in PARTIAL:
        torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=1e-4)
    elif not error_term:
        assert not torch.allclose(logits, want_logits)  # the peer's is the one that is incomplete:
        with torch.no_grad():
            read, write = sae.cfg.hook, sae.cfg.hook_out or sae.cfg.hook
            seen = {}
            edits = {read: lambda a: seen.update(x=a.clone())}
            if write == read:
                edits = {read: result}
            else:
                edits[write] = lambda a: result(seen["x"])
            with hook_points.editing(ours, edits):
                torch.testing.assert_close(ours(tokens), logits, atol=1e-4, rtol=1e-4)


def test_special_tokens_on_a_hooked_transformer(peer, tmp_path):
    theirs, ours = peer
    if type(theirs).__name__ != "HookedSAETransformer":
        pytest.skip("the peer passes special tokens by on a HookedTransformer only")
    sae, tokens = tiny_models.sae(RESID), tiny_models.tokens()
    their_sae = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path / "sae"))
    with torch.no_grad():
        want = theirs.run_with_saes(tokens, saes=[their_sae], exclude_special_tokens=[tiny_models.BOS, 7])
        with attach(ours, sae, skip_special_tokens=[tiny_models.BOS, 7]):
            torch.testing.assert_close(ours(tokens), want, atol=1e-5, rtol=1e-5)


def test_several_saes(peer, tmp_path):
    theirs, ours = peer
    saes = [
        tiny_models.sae("blocks.0.hook_resid_post"),
        tiny_models.sae("blocks.1.hook_mlp_out", "topk", k=4),
        tiny_models.sae(RESID),
    ]
    paths = [save_sae(sae, tmp_path / str(i)) for i, sae in enumerate(saes)]
    with torch.no_grad():
        want = theirs.run_with_saes(tiny_models.tokens(), saes=[sae_lens.SAE.load_from_disk(path) for path in paths])
        with attach(ours, saes):
            torch.testing.assert_close(ours(tiny_models.tokens()), want, atol=1e-4, rtol=1e-4)
