"""`evaluate` against closed forms, and against the same figures written down plainly, with whole tensors."""

import html
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
import tqdm
from helpers import tiny_models
from torch import nn

import saewb.evals.evaluation as evals
import saewb.evals.model_losses as model_losses
from saewb.data.tokens import pack
from saewb.evals.evaluation import evaluate, evaluate_many
from saewb.evals.result import Evaluation
from saewb.interventions.attachment import attach, attachments
from saewb.interventions.steering import steer
from saewb.models import hook_points
from saewb.sae.base import SparseCoder
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.sae import SAE, SAEConfig
from saewb.sae.temporal import TemporalConfig, TemporalSAE

RESID, MLP, Z = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
D, LOSSES = tiny_models.D_MODEL, ("ce_clean", "ce_with_sae", "ce_zero_ablated", "ce_mean_ablated")


def rows(special=True):
    """10 rows of 12 tokens: BOS in front, and in some rows another special token further on."""
    ids = tiny_models.tokens(10, 12)
    if special:
        ids[3, 5], ids[4, 11], ids[7, 1] = tiny_models.BOS, 2, 3
    return ids


def identity(hook, d=D):
    """Latents are the positive and negative parts of the coordinates: the reconstruction is the input, bit for bit."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    weights = {"W_enc": both.T.contiguous(), "b_enc": torch.zeros(2 * d), "W_dec": both, "b_dec": torch.zeros(d)}
    return SAE.from_tensors(SAEConfig(d_in=d, d_sae=2 * d, hook=hook), weights)


def constant(hook, value):
    """Writes `value` whatever it reads; no latent ever fires."""
    d = len(value)
    weights = {"W_enc": torch.zeros(d, 5), "b_enc": -torch.ones(5), "W_dec": torch.ones(5, d), "b_dec": value}
    return SAE.from_tensors(SAEConfig(d_in=d, d_sae=5, hook=hook), weights)


def mean_at(model, hook, ids, keep):
    _, cache = model.run_with_cache(ids, names_filter=lambda name: name in hook_points.resolve(model, hook).names)
    return cache[hook].flatten(2)[keep].double().mean(0).float()


def plainly(model, sae, ids, special=(1, 2, 3), read=None, write=None):
    """What `evaluate` should find, with nothing streamed: whole tensors, in numpy where it is arithmetic."""
    read, write = read or sae.cfg.hook, write or sae.cfg.hook_out or sae.cfg.hook
    skip = torch.isin(ids, torch.tensor(special, dtype=torch.long))
    keep, seen = ~skip, {}
    with torch.no_grad():

        def note(name):
            def edit(a):
                seen[name] = a.flatten(2).clone()

            return edit

        def logits(edit=None, **notes):
            with hook_points.editing(model, {write: edit} if edit else notes):
                return model(ids).double()

        clean = logits(**{name: note(name) for name in {read, write}})
        x, target = seen[read], seen[write]
        latents = sae.encode(x)
        recon = sae.decode(latents, x)

        def instead(value):
            new = torch.where(skip[..., None], target, value.expand_as(target))
            return logits(lambda a: new.reshape(a.shape))

        mean = target[keep].double().mean(0).float()
        passes = [clean, instead(recon), instead(torch.zeros(1)), instead(mean)]
    logp = [p - p.logsumexp(-1, keepdim=True) for p in passes]
    predicts = (keep[:, :-1] & keep[:, 1:]).numpy()
    result = {
        name: -np.take_along_axis(p[:, :-1].numpy(), ids[:, 1:, None].numpy(), 2)[..., 0][predicts].mean()
        for name, p in zip(LOSSES, logp, strict=True)
    }
    kl = (logp[0].exp() * (logp[0] - logp[1])).sum(-1)[keep].mean().item()
    t, r, a = (v[keep].double().numpy() for v in (target, recon, latents))
    error, spread = np.square(t - r).sum(), np.square(t - t.mean(0)).sum()
    cosine = ((t * r).sum(1) / np.linalg.norm(t, axis=1) / np.linalg.norm(r, axis=1)).mean()
    fired = (a != 0).mean(0)
    zero, mean, ours, clean = (result[f"ce_{n}"] for n in ("zero_ablated", "mean_ablated", "with_sae", "clean"))
    return result | {
        "ce_recovered_zero": (zero - ours) / (zero - clean),
        "ce_recovered_mean": (mean - ours) / (mean - clean),
        "kl": kl,
        "l0": (a != 0).sum(1).mean(),
        "mse": error / len(t),
        "fvu": error / spread,
        "explained_variance": 1 - error / spread,
        "cosine": cosine,
        "l2_ratio": (np.linalg.norm(r, axis=1) / np.linalg.norm(t, axis=1)).mean(),
        "relative_reconstruction_bias": np.square(r).sum() / (t * r).sum(),
        "dead_frac": (fired == 0).mean(),
        "dense_frac": (fired > 0.1).mean(),
        "n_tokens": len(t),
        "n_predictions": predicts.sum(),
    }


def assert_same(found, expected):
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=2e-4, abs=2e-5), name


@pytest.mark.parametrize("hook", [RESID, "blocks.0.hook_resid_pre", "blocks.2.hook_resid_post", MLP, Z])
@pytest.mark.parametrize("skip", [True, False])
def test_every_figure_as_written_down_plainly(model, hook, skip):
    sae = tiny_models.sae(hook)
    evaluation = evaluate(model, sae, rows(), batch_size=4, skip_special_tokens=skip)
    assert_same(evaluation, plainly(model, sae, rows(), special=(1, 2, 3) if skip else ()))


@pytest.mark.parametrize(("activation", "k"), [("jumprelu", None), ("topk", 4), ("abstopk", 4)])
def test_every_gate(model, activation, k):
    sae = tiny_models.sae(RESID, activation=activation, k=k)
    evaluation = evaluate(model, sae, rows())
    assert_same(evaluation, plainly(model, sae, rows()))
    if activation == "abstopk":
        assert evaluation.l0 == 4  # with their signs


@pytest.mark.parametrize("sae", [
    PursuitSAE(PursuitConfig(d_in=D, d_sae=40, hook=RESID, residual_threshold=0.5)),
    TemporalSAE(TemporalConfig(d_in=D, d_sae=40, activation="topk", k=4, n_heads=2, bottleneck_factor=4, hook=RESID)),
])  # fmt: skip
def test_the_other_kinds_of_sae(model, sae):
    """The temporal one looks back at special tokens too."""
    evaluation = evaluate(model, sae, rows(), batch_size=4)
    assert_same(evaluation, plainly(model, sae, rows()))
    assert evaluation.l0 > 1


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_is_compared_with_what_stands_where_it_writes(model, skip):
    sae = tiny_models.sae("blocks.1.mlp.hook_in", hook_out=MLP)
    evaluation = evaluate(model, sae, rows(), skip_special_tokens=skip)
    assert_same(evaluation, plainly(model, sae, rows(), special=(1, 2, 3) if skip else ()))
    assert (evaluation.hook, evaluation.hook_out) == ("blocks.1.mlp.hook_in", MLP)


def test_another_place_than_its_own(model):
    sae = tiny_models.sae("blocks.0.hook_resid_post")
    assert_same(evaluate(model, sae, rows(), hook=RESID), plainly(model, sae, rows(), read=RESID, write=RESID))
    transcoder = tiny_models.sae("blocks.0.mlp.hook_in", hook_out="blocks.0.hook_mlp_out")
    evaluation = evaluate(model, transcoder, rows(), hook="blocks.1.mlp.hook_in", hook_out=MLP)
    assert_same(evaluation, plainly(model, transcoder, rows(), read="blocks.1.mlp.hook_in", write=MLP))


def test_scaled_input_and_a_list_of_special_tokens(model):
    sae = tiny_models.sae(RESID, normalization="layer_norm", pre_bias="own")
    evaluation = evaluate(model, sae, rows(), skip_special_tokens=[1, 9])
    assert_same(evaluation, plainly(model, sae, rows(), special=(1, 9)))


def test_one_head(model):
    """Reads, writes and is ablated at this head only."""
    width = D // tiny_models.HEADS
    whole, part = identity(Z), identity(Z, width)
    ids, ablated = rows(special=False), []
    head = SAE.from_tensors(SAEConfig(d_in=width, d_sae=2 * width, hook=Z, head=2), part.state_dict())
    if not _is_4d(model, Z):
        with pytest.raises(ValueError, match="gives activations of shape"):
            evaluate(model, head, ids)
        return
    evaluation = evaluate(model, head, ids, skip_special_tokens=False)
    assert (evaluation.ce_recovered_zero, evaluation.fvu, evaluation.mse) == (1, 0, 0)

    def edit(a):
        a = a.clone()
        a[:, :, 2] = 0
        ablated.append(a)
        return a

    with torch.no_grad(), hook_points.editing(model, {Z: edit}):
        logp = model(ids).log_softmax(-1)
    expected = -logp[:, :-1].gather(2, ids[:, 1:, None]).mean().item()
    assert evaluation.ce_zero_ablated == pytest.approx(expected, rel=1e-5)
    assert evaluation.ce_zero_ablated != pytest.approx(evaluate(model, whole, ids).ce_zero_ablated, rel=1e-3)


def _is_4d(model, hook):
    seen = []
    with torch.no_grad(), hook_points.editing(model, {hook: seen.append}):
        model(rows())
    return seen[0].ndim == 4


# -- closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", [RESID, MLP, Z])
@pytest.mark.parametrize("skip", [True, False])
def test_a_perfect_sae_recovers_all(model, hook, skip):
    evaluation = evaluate(model, identity(hook), rows(), batch_size=3, skip_special_tokens=skip)
    assert (evaluation.ce_recovered_zero, evaluation.ce_recovered_mean, evaluation.kl) == (1, 1, 0)
    assert (evaluation.ce_with_sae, evaluation.fvu, evaluation.mse, evaluation.explained_variance) == (
        evaluation.ce_clean,
        0,
        0,
        1,
    )
    assert (evaluation.cosine, evaluation.l2_ratio) == pytest.approx((1, 1), abs=1e-12)
    assert evaluation.relative_reconstruction_bias == pytest.approx(1, abs=1e-12)
    assert evaluation.l0 == pytest.approx(D, abs=0.1)  # one of each pair, but for a coordinate that is exactly 0


@pytest.mark.parametrize("hook", [RESID, MLP, Z])
@pytest.mark.parametrize("skip", [True, False])
def test_an_sae_that_writes_zero_recovers_nothing_of_zero_ablation(model, hook, skip):
    evaluation = evaluate(model, constant(hook, torch.zeros(D)), rows(), batch_size=3, skip_special_tokens=skip)
    assert (evaluation.ce_recovered_zero, evaluation.ce_with_sae) == (0, evaluation.ce_zero_ablated)
    assert (evaluation.cosine, evaluation.l2_ratio, evaluation.l0, evaluation.dead_frac) == (0, 0, 0, 1)
    assert math.isnan(evaluation.relative_reconstruction_bias)
    assert evaluation.ce_clean != evaluation.ce_zero_ablated


@pytest.mark.parametrize("hook", [RESID, MLP, Z])
@pytest.mark.parametrize("skip", [True, False])
def test_an_sae_that_writes_the_mean_recovers_nothing_of_mean_ablation(model, hook, skip):
    keep = ~torch.isin(rows(), torch.tensor([1, 2, 3])) if skip else torch.ones_like(rows(), dtype=torch.bool)
    sae = constant(hook, mean_at(model, hook, rows(), keep))
    evaluation = evaluate(model, sae, rows(), batch_size=3, skip_special_tokens=skip)
    assert evaluation.ce_recovered_mean == pytest.approx(0, abs=1e-5)
    assert (evaluation.fvu, evaluation.explained_variance) == pytest.approx((1, 0), abs=1e-6)


def test_ablation_of_an_activation_that_is_not_contiguous(model):
    """Heads may come as a transposed view, which cannot be flattened in place."""
    sae = constant(Z, torch.zeros(D))
    expected = evaluate(model, sae, rows())
    with hook_points.editing(model, {Z: lambda a: a.transpose(1, 2).contiguous().transpose(1, 2)}):
        evaluation = evaluate(model, sae, rows())
    assert evaluation.ce_recovered_zero == 0
    assert evaluation.ce_zero_ablated == pytest.approx(expected.ce_zero_ablated, rel=1e-6)


def test_an_offset_counts_as_error(model):
    sae = identity(RESID)
    with torch.no_grad():
        sae.b_dec += 2.0
    evaluation = evaluate(model, sae, rows())
    assert evaluation.mse == pytest.approx(4 * D, rel=1e-5)
    assert evaluation.fvu == pytest.approx(
        4 * D / (evaluate(model, constant(RESID, torch.zeros(D)), rows()).mse - mean_norm(model)), rel=1e-4
    )


def mean_norm(model):
    """||mean||², which with the spread makes up the mean squared length."""
    keep = ~torch.isin(rows(), torch.tensor([1, 2, 3]))
    return mean_at(model, RESID, rows(), keep).double().square().sum().item()


def test_figures_do_not_depend_on_the_batches(model):
    sae = tiny_models.sae(RESID)
    whole = evaluate(model, sae, rows(), batch_size=10)
    for batch_size in (1, 3, 100):
        evaluation = evaluate(model, sae, rows(), batch_size=batch_size)
        for name, value in whole.figures().items():
            if not isinstance(value, str):
                assert getattr(evaluation, name) == pytest.approx(value, rel=1e-5), name
        for f in fields(whole.latents):
            torch.testing.assert_close(
                getattr(evaluation.latents, f.name), getattr(whole.latents, f.name), equal_nan=True
            )


def test_special_tokens_have_no_part_in_any_figure(model):
    """At them the model is as it is: an SAE that is perfect elsewhere and absurd there is perfect."""

    class AbsurdAtBOS(SparseCoder):
        taps = ()
        _kind = "absurd"

        def __init__(self):
            super().__init__()
            self.inner = identity(RESID)
            self.cfg, self.W_dec, self.b_dec = self.inner.cfg, self.inner.W_dec, self.inner.b_dec

        def encode(self, x, latents=None, tap=None):
            return self.inner.encode(x) * torch.where(torch.isin(rows(), torch.tensor([1, 2, 3])), 1e6, 1.0)[..., None]

        def decode(self, latents, x=None, tap=None):
            return self.inner.decode(latents, x)

    evaluation = evaluate(model, AbsurdAtBOS(), rows(), batch_size=10)
    assert (evaluation.ce_recovered_zero, evaluation.kl, evaluation.fvu, evaluation.mse) == (1, 0, 0, 0)
    assert evaluate(model, AbsurdAtBOS(), rows(), batch_size=10, skip_special_tokens=False).fvu > 1e6
    assert (evaluation.n_tokens, evaluation.n_predictions) == (
        120 - 10 - 3,
        110 - 10 - 4,
    )  # the last special ends its row


def test_nan_where_ablation_changes_nothing(model):
    blind = {"blocks.2.hook_resid_post": lambda a: a * 0}  # nothing before the last layer's end matters
    with hook_points.editing(model, blind):
        evaluation = evaluate(model, tiny_models.sae(RESID), rows())
    assert math.isnan(evaluation.ce_recovered_zero)
    assert math.isnan(evaluation.ce_recovered_mean)
    assert evaluation.ce_clean == evaluation.ce_with_sae == evaluation.ce_zero_ablated
    assert "nan" in str(evaluation)


def test_an_activation_that_never_varies_is_an_error(model):
    with hook_points.editing(model, {MLP: torch.zeros_like}), pytest.raises(ValueError, match="rows of x are the same"):
        evaluate(model, tiny_models.sae(MLP), rows())


# -- what it leaves behind -------------------------------------------------------------------------------------------


def test_the_model_is_as_before_also_after_an_error(model):
    """Hooks are checked by the fixture."""
    model.train()
    model.blocks[1].eval()
    modes = [part.training for part in model.modules()]
    sae = tiny_models.sae(RESID).train()
    before = [p.clone() for p in sae.parameters()]
    try:
        evaluate(model, sae, rows())
        assert [part.training for part in model.modules()] == modes
        assert sae.training

        def failing(a):
            raise RuntimeError("on purpose")

        with (
            hook_points.editing(model, {"blocks.2.hook_resid_post": failing}),
            pytest.raises(RuntimeError, match="on purpose"),
        ):
            evaluate(model, sae, rows())
        assert [part.training for part in model.modules()] == modes
        assert attachments(model) == []
    finally:
        model.eval()
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(sae.parameters(), before, strict=True))


def test_passes_and_memory(model, monkeypatch):
    """Of each batch: one pass to the hook only, then four whole ones; two logits tensors at a time, and no history."""
    layers, whole, sizes = [], [], []
    sae = tiny_models.sae("blocks.0.hook_resid_post")
    encode = type(sae).encode
    monkeypatch.setattr(
        type(sae), "encode", lambda self, x, *a, **k: (sizes.append(len(x)), encode(self, x, *a, **k))[1]
    )
    last = "blocks.1.hook_resid_post"  # the next layer already does not run in the first part
    with hook_points.editing(
        model, {"blocks.0.hook_resid_post": lambda a: layers.append(len(a)), last: lambda a: whole.append(len(a))}
    ):
        evaluate(model, sae, rows(), batch_size=4)
    assert layers == [4, 4, 2] + [4] * 8 + [2] * 4
    assert whole == [4] * 8 + [2] * 4
    assert sizes == [4, 4, 2, 4, 4, 2]


def test_log_probabilities_are_taken_a_few_tokens_at_a_time(model, monkeypatch):
    sae, expected = tiny_models.sae(RESID), evaluate(model, tiny_models.sae(RESID), rows())
    monkeypatch.setattr(model_losses, "_TILE", 5 * tiny_models.VOCAB)
    seen, tiles = [], model_losses._tiles
    monkeypatch.setattr(model_losses, "_tiles", lambda *t: (seen.append(len(part[0])) or part for part in tiles(*t)))
    evaluation = evaluate(model, sae, rows())
    assert max(seen) == 5
    for name in (*LOSSES, "kl"):
        assert getattr(evaluation, name) == pytest.approx(getattr(expected, name), rel=1e-6)


def test_hooks_of_the_user_are_part_of_the_model(model):
    sae = tiny_models.sae(RESID)
    with hook_points.editing(model, {"blocks.0.hook_resid_post": lambda a: a * 1.5}):
        evaluation = evaluate(model, sae, rows())
        assert_same(evaluation, plainly(model, sae, rows()))
    assert evaluation.ce_clean != evaluate(model, sae, rows()).ce_clean


def test_with_an_sae_attached_elsewhere_but_not_at_the_same_point(model):
    sae, other = tiny_models.sae(RESID), tiny_models.sae("blocks.0.hook_resid_post", seed=5)
    alone = evaluate(model, sae, rows())
    with attach(model, other):
        evaluation = evaluate(model, sae, rows())
        assert_same(evaluation, plainly(model, sae, rows()))
        assert len(attachments(model)) == 1
    assert evaluation.ce_clean != alone.ce_clean
    with attach(model, other), pytest.raises(ValueError, match=r"writes to .* already"):
        evaluate(model, tiny_models.sae("blocks.0.hook_resid_post"), rows())


def test_in_bfloat16():
    model = tiny_models.new_bridge(torch.bfloat16)
    evaluation = evaluate(model, identity(RESID), rows())
    assert (evaluation.ce_recovered_zero, evaluation.kl, evaluation.fvu) == (1, 0, 0)
    sae = tiny_models.sae(RESID).to(torch.bfloat16)
    in_float32 = evaluate(tiny_models.bridge(), tiny_models.sae(RESID), rows())
    assert evaluate(model, sae, rows()).fvu == pytest.approx(in_float32.fvu, rel=0.1)


# -- what goes in ----------------------------------------------------------------------------------------------------


def test_texts_are_packed(model):
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14 w15 w16", "w3 w1 w4 w1 w5 w9 w2 w6"]
    evaluation = evaluate(model, tiny_models.sae(RESID), texts, ctx_len=9)
    ids = pack(texts, model.tokenizer, 9)
    assert ids[:, 0].tolist() == [tiny_models.BOS] * len(ids)
    assert evaluation == evaluate(model, tiny_models.sae(RESID), ids)
    assert evaluation.n_tokens == int((ids > 3).sum())


def test_a_model_that_is_not_used_with_bos_gets_texts_without(model):
    before = model.cfg.default_prepend_bos
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14 w15 w16"]
    try:
        model.cfg.default_prepend_bos = False
        evaluation = evaluate(model, tiny_models.sae(RESID), texts, ctx_len=8)
    finally:
        model.cfg.default_prepend_bos = before
    assert (evaluation.n_tokens, evaluation.n_predictions) == (15, 13)  # two rows; EOS between the texts


def test_int32_and_a_row_of_two(model):
    evaluation = evaluate(model, tiny_models.sae(RESID), rows()[:, 1:3].int().clamp_min(4), skip_special_tokens=False)
    assert (evaluation.n_tokens, evaluation.n_predictions) == (20, 10)


@pytest.mark.parametrize(("tokens", "error", "text"), [
    (torch.zeros(0, 8, dtype=torch.long), ValueError, r"shape \(0, 8\)"),
    (torch.full((3, 1), 5), ValueError, r"shape \(3, 1\)"),
    (torch.full((8,), 5), ValueError, r"shape \(8,\)"),
    (torch.full((3, 8), 5.0), TypeError, "float32"),
    (torch.full((3, 8), True), TypeError, "bool"),
    (torch.full((3, 8), 1), ValueError, "of 24 tokens 0 are not special"),
    (torch.tensor([[1, 5, 1, 5]]), ValueError, "of 4 tokens 2 are not special, and no two"),
    ("w1 w2", TypeError, "one string"),
    ([], ValueError, "no documents"),
    (["w1 w2"], ValueError, "do not fill one row"),
])  # fmt: skip
def test_wrong_tokens(model, tokens, error, text):
    with pytest.raises(error, match=text):
        evaluate(model, tiny_models.sae(RESID), tokens, ctx_len=32)


def test_wrong_hooks_and_saes(model):
    with pytest.raises(ValueError, match=r"(?s)no hook named 'blocks.1.hook_resid_pots'.*blocks.1.hook_resid_post"):
        evaluate(model, tiny_models.sae(RESID), rows(), hook="blocks.1.hook_resid_pots")
    with pytest.raises(ValueError, match="does not say where"):
        evaluate(model, tiny_models.sae(None), rows())
    with pytest.raises(ValueError, match=r"gives activations of shape \(8, 12, 16\)"):
        evaluate(model, tiny_models.sae(RESID, d_in=10), rows())
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(model, tiny_models.sae(RESID), rows(), batch_size=0)
    with pytest.raises(TypeError, match="no hook points"):
        evaluate(nn.Linear(2, 2), tiny_models.sae(RESID), rows(), skip_special_tokens=[1])


def test_no_tokenizer_is_an_error_only_where_one_is_needed(model):
    tokenizer = model.tokenizer
    model.tokenizer = None
    try:
        with pytest.raises(ValueError, match="no tokenizer"):
            evaluate(model, tiny_models.sae(RESID), rows())
        with pytest.raises(ValueError, match="no tokenizer"):
            evaluate(model, tiny_models.sae(RESID), ["w1 w2"])
        assert evaluate(model, tiny_models.sae(RESID), rows(), skip_special_tokens=[1]).n_tokens == 109
    finally:
        model.tokenizer = tokenizer


# -- how it shows itself ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    return evaluate(tiny_models.bridge(), tiny_models.sae(RESID), rows(), dead_below=0.2, dense_above=0.5)


def test_thresholds_are_those_asked_for(found):
    latents = tiny_models.sae(RESID).encode(_resid())
    rate = (latents != 0).double().mean(0)
    assert (found.dead_frac, found.dense_frac) == ((rate < 0.2).double().mean(), (rate > 0.5).double().mean())
    assert (found.dead_below, found.dense_above) == (0.2, 0.5)


def _resid():
    _, cache = tiny_models.bridge().run_with_cache(rows())
    return cache[RESID][~torch.isin(rows(), torch.tensor([1, 2, 3]))]


def test_it_is_frozen_and_each_field_says_what_it_is(found):
    with pytest.raises(FrozenInstanceError):
        found.fvu = 0
    assert all(f.metadata["meaning"] for f in fields(found))
    assert [f.name for f in fields(found) if not f.metadata["unit"]] == [
        "hook",
        "hook_out",
        "model",
        "sae",
        "latents",
    ]


def test_it_prints_as_an_aligned_table_with_units(found):
    title, *lines = str(found).splitlines()
    assert title == f"{found.sae} on {found.model} at {RESID}"
    assert len(lines) == len(fields(found)) - 7
    column = lines[0].index("nats/token")
    assert all(line[column - 1] == " " and line[column] != " " and line[column - 3] != " " for line in lines)
    assert any(line.startswith(f"fvu{' ' * 10}") and f"{found.fvu:.4g}  fraction" in line for line in lines)


def test_repr_is_one_line(found):
    assert "\n" not in repr(found)
    assert repr(found).startswith(f"Evaluation(ce_recovered_zero={found.ce_recovered_zero:.4g}, kl=")


def test_html_is_escaped_and_without_colors(found):
    fake = Evaluation(**{f.name: getattr(found, f.name) for f in fields(found)} | {"model": "<script>&", "hook": "<b>"})
    shown = fake._repr_html_()
    assert "<script>" not in shown
    assert "<b>" not in shown
    assert "&lt;script&gt;&amp; at &lt;b&gt; =&gt;" in shown
    assert "color" not in shown
    assert "background" not in shown
    assert shown.count("<tr>") == len(fields(found)) - 7
    assert html.escape("loss with the SAE's output in place of the activation") in shown


def test_frames_of_several_can_be_put_together(found):
    import pandas as pd

    both = pd.concat([found.to_frame(), found.to_frame()])
    assert list(both.columns) == list(found.figures())
    assert both["fvu"].tolist() == [found.fvu] * 2
    assert both["sae"].tolist() == [found.sae] * 2


def test_a_bar_only_if_asked_for(capfd, monkeypatch):
    evaluate(tiny_models.bridge(), tiny_models.sae(RESID), rows(), batch_size=5)
    assert capfd.readouterr() == ("", "")
    bars = []
    monkeypatch.setattr("saewb.evals.evaluation.tqdm", lambda **how: bars.append(tqdm.tqdm(**how)) or bars[-1])
    evaluate(tiny_models.bridge(), tiny_models.sae(RESID), rows(), batch_size=5, progress=True)
    (bar,) = bars
    assert (bar.n, bar.total, bar.leave) == (4, 4, False)  # two batches, to the hook and through the model
    assert "0/4" in capfd.readouterr().err


# -- per latent, and many at once ------------------------------------------------------------------------------------


def test_latent_figures_are_those_of_all_activations_in_memory(model):
    sae, ids = tiny_models.sae(RESID, "topk", k=6), rows()
    evaluation = evaluate(model, sae, ids, batch_size=3, losses=False).latents
    _, cache = model.run_with_cache(ids, names_filter=RESID)
    plain = (ids > 3).numpy()
    acts = sae.encode(cache[RESID]).detach().double().numpy()
    saved, on = acts[plain], (acts != 0) & plain[..., None]
    np.testing.assert_allclose(evaluation.density.numpy(), (saved != 0).mean(0))
    np.testing.assert_allclose(evaluation.max_activation.numpy(), np.abs(saved).max(0), rtol=1e-6)
    with np.errstate(invalid="ignore", divide="ignore"):
        np.testing.assert_allclose(
            evaluation.mean_activation.numpy(), np.abs(saved).sum(0) / (saved != 0).sum(0), rtol=1e-6
        )
        heuristic = on.sum((0, 1)) / on.any(1).sum(0)
    np.testing.assert_allclose(evaluation.consistent_activation.numpy(), heuristic)
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec).detach()
    torch.testing.assert_close(evaluation.encoder_decoder_cosine.float(), cosine)
    frame = evaluation.to_frame()
    assert frame.shape == (40, 10)
    assert frame.decoder_norm.to_numpy() == pytest.approx(sae.W_dec.norm(dim=1).detach().numpy(), rel=1e-6)
    counts, edges = evaluation.density_histogram(10)
    assert counts.sum() == (evaluation.density > 0).sum()
    assert len(edges) == 11


def test_without_losses_the_model_runs_to_the_hook_once(model, monkeypatch):
    passes = []
    forward = type(model).forward

    def count(self, *args, **kwargs):
        passes.append(kwargs.get("stop_at_layer"))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", count)
    evaluation = evaluate(model, tiny_models.sae(RESID), rows(), batch_size=5, losses=False)
    assert passes == [2, 2]
    assert math.isnan(evaluation.ce_clean)
    assert evaluation.n_predictions == 0
    assert "ce_" not in str(evaluation)
    assert "kl" not in repr(evaluation)
    passes.clear()
    many = {"a": tiny_models.sae(RESID), "b": tiny_models.sae(MLP, seed=4), "c": tiny_models.sae(RESID, seed=9)}
    evaluate_many(model, many, rows(), batch_size=10)
    assert passes == [2] + [None] * (1 + 3 + 2 * 2)  # clean, three with an SAE, zeros and mean at two points


@pytest.mark.parametrize("losses", [True, False])
def test_many_at_once_are_each_as_alone(model, losses):
    saes = {
        "relu": tiny_models.sae(RESID),
        "topk": tiny_models.sae(RESID, "topk", k=6, seed=3),
        "transcoder": tiny_models.sae("blocks.1.hook_resid_mid", hook_out=MLP),
        "heads": tiny_models.sae(Z),
        "head": tiny_models.sae(Z, d_in=tiny_models.D_MODEL // tiny_models.HEADS, head=1),
    }
    table = evaluate_many(model, saes, rows(), at_once=3, losses=losses)
    assert list(table.index) == list(saes)
    for name, sae in saes.items():
        alone = evaluate(model, sae, rows(), losses=losses).figures()
        for figure, value in alone.items():
            got = table.loc[name, figure]
            assert got == (value if isinstance(value, str) else pytest.approx(value, rel=1e-9, nan_ok=True)), figure


def test_kl_of_ablations_by_hand(model):
    evaluation, ids = evaluate(model, tiny_models.sae(RESID), rows(), batch_size=10), rows()
    plain = ids > 3

    def zero(x, hook):
        return torch.where(plain[..., None], 0.0, x)

    p = model(ids).double().log_softmax(-1)
    q = model.run_with_hooks(ids, fwd_hooks=[(RESID, zero)]).double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)[plain].mean().item()
    assert evaluation.kl_zero_ablated == pytest.approx(kl, rel=1e-5)
    assert evaluation.kl_recovered_zero == pytest.approx((kl - evaluation.kl) / kl, rel=1e-5)


def test_what_is_in_the_folder_is_not_computed_again(model, tmp_path, monkeypatch):
    saes = {"a": tiny_models.sae(RESID), "b": tiny_models.sae(RESID, seed=3)}
    whole = evaluate_many(model, saes, rows())
    items = []
    real = evals.evaluate_at_hooks
    monkeypatch.setattr(evals, "evaluate_at_hooks", lambda m, s, *r: items.extend(x.sae for x in s) or real(m, s, *r))
    evaluate_many(model, {"a": saes["a"]}, rows(), folder=tmp_path)
    table = evaluate_many(model, saes, rows(), folder=tmp_path)
    assert items == [saes["a"], saes["b"]]
    assert table.equals(whole)
    assert evaluate_many(model, saes, rows(), folder=tmp_path).equals(whole)
    assert len(items) == 2
    evaluate_many(model, saes, rows(special=False), folder=tmp_path)  # other tokens
    with torch.no_grad():
        saes["a"].b_dec.add_(1)
    evaluate_many(model, saes, rows(special=False), folder=tmp_path)  # another SAE of that name
    assert items[2:] == [saes["a"], saes["b"], saes["a"]]
    assert (tmp_path / "evaluations.csv").read_text().startswith("name,")
    assert not [f for f in tmp_path.iterdir() if f.suffix not in (".json", ".csv")]


def test_a_failure_keeps_what_is_finished(model, tmp_path):
    good, bad = tiny_models.sae(RESID), tiny_models.sae(RESID, d_in=12)
    with pytest.raises(ValueError, match="do not fit"):
        evaluate_many(model, {"good": good, "bad": bad}, rows(), folder=tmp_path, at_once=1)
    assert len(list(tmp_path.glob("good.*.json"))) == 1


def test_saes_by_name_are_loaded(tmp_path):
    from saewb.pretrained.load import save_sae

    sae = tiny_models.sae(RESID)
    folder = save_sae(sae, tmp_path / "mine")
    table = evaluate_many(
        tiny_models.bridge(), {"one": str(folder), "two": (str(tmp_path), "mine")}, rows(), losses=False
    )
    assert table.fvu.tolist() == [evaluate(tiny_models.bridge(), sae, rows(), losses=False).fvu] * 2


@pytest.mark.parametrize(("saes", "says"), [([], "got no SAE"), (["x", "x"], "'x' twice")])
def test_many_say_what_is_wrong(saes, says):
    with pytest.raises(ValueError, match=says):
        evaluate_many(tiny_models.bridge(), saes, rows())


def test_stored_results_are_of_this_model_and_these_weights(tmp_path, monkeypatch):
    from saewb.pretrained.load import save_sae

    model, runs = tiny_models.new_bridge(), []
    real = evals.evaluate_at_hooks
    monkeypatch.setattr(evals, "evaluate_at_hooks", lambda m, s, *r: runs.append(len(s)) or real(m, s, *r))
    sae = tiny_models.sae(RESID)
    source = str(save_sae(sae, tmp_path / "sae"))

    def table():
        before = len(runs)
        got = evaluate_many(model, [source], rows(), folder=tmp_path / "kept")
        computed, runs[before:] = len(runs) > before, []
        assert got.equals(evaluate_many(model, [source], rows()))
        runs.clear()
        return computed

    assert (table(), table()) == (True, False)
    weight = model.blocks[2].mlp.out.weight
    with torch.no_grad():
        weight[0, 0] += 1
    assert (table(), table()) == (True, False)
    weight.data[0, 0] -= 1  # a write that torch does not count
    assert (table(), table()) == (True, False)
    with steer(model, sae, {3: 5.0}):
        assert (table(), table()) == (True, False)
    with attach(model, tiny_models.sae("blocks.0.hook_resid_post")):
        assert (table(), table()) == (True, False)
    with hook_points.editing(model, {"blocks.0.hook_resid_post": lambda a: a * 1.5}):
        assert (table(), table()) == (True, False)
    with torch.no_grad():
        sae.b_dec[3] += 0.5
    save_sae(sae, tmp_path / "sae", overwrite=True)
    assert (table(), table()) == (True, False)


def test_an_empty_folder_is_refused(model):
    with pytest.raises(ValueError, match="got an empty path"):
        evaluate_many(model, {"a": tiny_models.sae(RESID)}, rows(), folder="")
