"""`build_index` on models: every architecture and place, weights' figures, disk, searches, interrupts."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny_models

import saewb
from saewb.features import build as building
from saewb.features import build_index, load_index
from saewb.features import neighbors as finding
from saewb.features.config import IndexInfo
from saewb.features.logit_effects import N_LOGIT_BINS, logit_effects
from saewb.features.neighbors import nearest
from saewb.features.token_texts import TokenTexts, collect_token_texts
from saewb.features.top_contexts import EMPTY
from saewb.interventions.site import flatten_heads
from saewb.kernels import select
from saewb.models.capture import capture
from saewb.models.unembed import final_norm_scale, norm_gain, unembedding, unembedding_column
from saewb.sae.matching_pursuit import PursuitConfig, PursuitSAE
from saewb.sae.temporal import TemporalConfig, TemporalSAE

RESID, MLP, Z = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
D = tiny_models.D_MODEL


def text(rows=12, ctx=9, seed=0):
    ids = tiny_models.tokens(rows, ctx, seed)
    ids[1, 4] = tiny_models.BOS  # a document that begins within a row
    ids[3] = ids[2]  # a text that is there twice
    return ids


def build(model, sae, ids=None, **how):
    how = {"n_top": 4, "window": (3, 2), "n_quantiles": 2, "per_quantile": 3, "batch_size": 5, **how}
    return build_index(model, sae, text() if ids is None else ids, **how)


PLACES = {
    "relu": lambda: tiny_models.sae(RESID),
    "topk": lambda: tiny_models.sae(RESID, "topk", k=5),
    "abstopk": lambda: tiny_models.sae(RESID, "abstopk", k=5),
    "jumprelu": lambda: tiny_models.sae(RESID, "jumprelu"),
    "transcoder": lambda: tiny_models.sae("blocks.1.hook_resid_mid", "topk", k=5, hook_out=MLP),
    "all heads": lambda: tiny_models.sae(Z),
    "one head": lambda: tiny_models.sae(Z, d_in=D // tiny_models.HEADS, head=2),
    "pursuit": lambda: PursuitSAE(PursuitConfig(d_in=D, d_sae=40, hook=RESID, max_iterations=4)),
    "temporal": lambda: TemporalSAE(
        TemporalConfig(d_in=D, d_sae=32, hook=RESID, n_heads=2, bottleneck_factor=2, activation="topk", k=5)
    ),
}


def dense(model, sae, ids, special=(tiny_models.BOS,)):
    """Latents at every token, 0 at special ones."""
    with torch.no_grad():
        x = flatten_heads(sae, capture(model, ids, [sae.cfg.hook])[sae.cfg.hook], sae.cfg.d_in, "")
        return sae.encode(x) * ~torch.isin(ids, torch.tensor(special))[..., None]


@pytest.mark.parametrize("name", PLACES)
def test_figures_are_those_of_all_activations_in_memory(model, name):
    sae, ids = PLACES[name](), text()
    index = build(model, sae, ids)
    latents = dense(model, sae, ids).flatten(0, 1)
    assert index.n_tokens == int((ids != tiny_models.BOS).sum())
    table = index.table()
    assert table.n_active.tolist() == latents.count_nonzero(0).tolist()
    np.testing.assert_allclose(table.density, latents.count_nonzero(0) / index.n_tokens)
    assert index.density.tolist() == table.density.tolist()
    assert index.largest.tolist() == table["max"].tolist()
    peak = latents.gather(0, latents.abs().argmax(0)[None])[0]
    np.testing.assert_allclose(table["max"], peak, rtol=1e-4, atol=1e-6)
    mean = latents.double().sum(0) / latents.count_nonzero(0).clamp_min(1)
    np.testing.assert_allclose(table["mean"], mean, rtol=1e-4, atol=1e-6)
    by_row = dense(model, sae, ids)
    for i in range(0, sae.cfg.d_sae, 7):
        latent = index.latent(i)
        strongest = by_row[..., i].abs().amax(1)
        distinct = [r for r in range(len(ids)) if r != 3]  # row 3 repeats row 2
        want = strongest[distinct].sort(descending=True).values
        want = want[want > 0][:4]
        assert [abs(c.value) for c in latent.top] == pytest.approx(want.tolist(), rel=1e-4)
        assert sum(latent.histogram.counts) == latent.n_active
        for c in [*latent.top, *(c for group in latent.quantiles for c in group)]:
            where = slice(c.position - c.at, c.position - c.at + len(c.ids))
            assert list(c.ids) == ids[c.row, where].tolist()
            assert list(c.acts) == pytest.approx(by_row[c.row, where, i].tolist(), rel=1e-4, abs=1e-5)
            assert c.tokens == tuple(f"w{t - 4}" if t >= 4 else "<bos>" for t in c.ids) or "".join(c.tokens).split()
        edges = torch.tensor(latent.histogram.edges)
        if latent.n_active:
            fired = by_row[..., i][by_row[..., i] != 0].abs()
            assert edges[-1] > fired.max() * 0.999
            assert float(edges[-2]) <= float(fired.max()) * 1.001


def test_special_tokens_are_what_one_says(model):
    sae, ids = tiny_models.sae(RESID), text()
    everything = build(model, sae, ids, skip_special_tokens=False)
    assert everything.n_tokens == ids.numel()
    some = build(model, sae, ids, skip_special_tokens=[5, 6])
    assert some.n_tokens == int(((ids != 5) & (ids != 6)).sum())
    only = dense(model, sae, ids, (5, 6)).flatten(0, 1)
    assert some.table().n_active.tolist() == only.count_nonzero(0).tolist()
    with pytest.raises(ValueError, match="all 8 tokens are special"):
        build(model, sae, torch.full((2, 4), tiny_models.BOS))


def test_several_saes_in_one_pass_are_each_what_they_are_alone(model):
    saes = [PLACES["relu"](), PLACES["transcoder"](), PLACES["one head"]()]
    for together, sae in zip(build(model, saes), saes, strict=True):
        same(together, build(model, sae))


def same(a, b):
    assert a.info == b.info
    assert a.tensors.keys() == b.tensors.keys()
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    assert a.token_texts.strings == b.token_texts.strings


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_do_not_matter(model, batch_size):
    sae = PLACES["topk"]()
    same(build(model, sae, batch_size=batch_size), build(model, sae))


# -- logits, neighbors -----------------------------------------------------------------------------------------------


def test_logit_effects_are_the_gradient_of_the_logits(model):
    """Through the final norm at a length of 1: what moving the last residual stream does to logits, less their mean."""
    sae = tiny_models.sae("blocks.2.hook_resid_post")
    index = build(model, sae, n_logits=tiny_models.VOCAB)
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, D, generator=rng) * 100

    def logits(stream):
        return model.unembed(model.ln_final(stream))[0, 0]

    for i in (0, 3, 17):
        direction = sae.W_dec[i].detach()
        along = direction - x[0, 0] * (direction @ x[0, 0]) / x.square().sum()  # the norm takes away the rest
        with torch.no_grad():
            moved = (logits(x + along) - logits(x - along)) / 2 * x.square().mean().sqrt()
        moved = moved - moved.mean()
        result = {w.id: w.effect for w in index.latent(i).logits_top}
        gain, _ = norm_gain(model.ln_final, direction)
        rest = (x[0, 0] * (direction @ x[0, 0]) / x.square().sum() * gain) @ model.W_U.detach()
        want = moved + rest - rest.mean()
        np.testing.assert_allclose([result[t] for t in range(tiny_models.VOCAB)], want, rtol=2e-3, atol=2e-3)


def test_logit_effects_by_hand():
    directions, w = torch.eye(2, 3), torch.tensor([[3.0, -1.0, 0.0, 2.0], [0.0, 0.0, 5.0, -5.0], [9.0, 9.0, 9.0, 9.0]])
    result = logit_effects(directions, w, 2)
    assert result["logits.top_ids"].tolist() == [[0, 3], [2, 0]] or result["logits.top_ids"].tolist() == [
        [0, 3],
        [2, 1],
    ]
    assert result["logits.top"].tolist() == [[3, 2], [5, 0]]
    assert result["logits.bottom"].tolist() == [[-1, 0], [-5, 0]]
    assert result["logits.range"].tolist() == [[-1, 3], [-5, 5]]
    assert result["logits.counts"].sum(1).tolist() == [4, 4]
    assert result["logits.counts"][1, [0, N_LOGIT_BINS // 2, N_LOGIT_BINS - 1]].tolist() == [1, 2, 1]


def test_the_gain_of_norms_of_every_kind():
    torch.manual_seed(0)
    rms, layer = torch.nn.RMSNorm(6), torch.nn.LayerNorm(6)
    for norm in (rms, layer):
        torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(layer.bias)
    like = torch.zeros(6)
    for norm, centers in ((rms, False), (layer, True)):
        gain, centered = norm_gain(norm, like)
        torch.testing.assert_close(gain, norm.weight.detach(), rtol=1e-4, atol=1e-4)
        assert centered == centers
    one_more = lambda x: torch.nn.functional.rms_norm(x, (6,)) * (1 + rms.weight)  # noqa: E731 - as Gemma's
    torch.testing.assert_close(norm_gain(one_more, like)[0], 1 + rms.weight.detach(), rtol=1e-4, atol=1e-4)
    assert torch.equal(norm_gain(None, like)[0], torch.ones(6))


@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_one_column_of_the_unembedding_and_the_length_it_is_for(kind):
    rng = torch.Generator().manual_seed(0)
    norm = {"rms": torch.nn.RMSNorm(6, eps=1e-6), "layer": torch.nn.LayerNorm(6), "none": None}[kind]
    if norm is not None:
        torch.nn.init.uniform_(norm.weight, 0.5, 2, generator=rng)
    w_u, final = torch.randn(6, 9, generator=rng), torch.randn(5, 6, generator=rng) * 3 + 1
    model = torch.nn.Module()
    model.W_U, model.ln_final, model.other = w_u, norm, torch.nn.Linear(1, 1)
    model.cfg = SimpleNamespace(d_model=6)
    columns = torch.stack([unembedding_column(model, token) for token in range(9)], 1)
    torch.testing.assert_close(columns, unembedding(model), rtol=1e-3, atol=1e-3)
    logits = (final if norm is None else norm(final)).detach() @ w_u
    got = final @ columns / final_norm_scale(model, final)[:, None]
    torch.testing.assert_close(got, logits - logits.mean(1, keepdim=True), rtol=1e-3, atol=2e-3)


def test_unembedding_is_centered(model):
    assert float(unembedding(model).mean(1).abs().max()) < 1e-5


def test_heads_reach_the_logits_through_their_output_matrix(model):
    sae = PLACES["one head"]()
    index = build(model, sae, n_logits=3)
    w_o = model.blocks[1].attn.W_O[2].detach()
    effects = (sae.W_dec.detach() @ w_o @ unembedding(model)).topk(3, dim=1)
    torch.testing.assert_close(index.tensors["logits.top"], effects.values, rtol=1e-4, atol=1e-4)


def test_what_does_not_write_into_the_stream_has_no_logits(model):
    index = build(model, tiny_models.sae("blocks.1.attn.hook_q", d_in=D // tiny_models.HEADS, head=1))
    assert index.latent(0).logits_top == ()
    assert index.latent(0).logit_histogram is None


def test_nearest_by_hand_and_by_numpy(monkeypatch):
    rows = torch.tensor([[1.0, 0], [2.0, 0.1], [0, 1.0], [-3.0, 0.5], [0, 0]])
    result = nearest(rows, 2, "decoder")
    assert result["nearest.decoder"][0].tolist() == [1, 3]
    assert result["nearest.decoder_cosine"][0].tolist() == pytest.approx([0.99875, -0.98639], abs=1e-4)
    assert result["nearest.decoder_cosine"][4].tolist() == [0, 0]
    monkeypatch.setattr("saewb.features.neighbors._ROWS", 2)
    again = nearest(rows, 2, "decoder")
    assert torch.equal(result["nearest.decoder_cosine"], again["nearest.decoder_cosine"])


@pytest.mark.parametrize("d", [16, 200])
def test_nearest_chosen_in_bf16_are_those_of_float64(d, monkeypatch):
    rows = torch.randn(1100, d, generator=torch.Generator().manual_seed(0))
    rows[100:400] = rows[100]  # more copies than there are candidates
    rows[400:420] = -rows[400] * torch.arange(1, 21)[:, None]
    rows[700:800] = rows[700] + torch.randn(100, d, generator=torch.Generator().manual_seed(1)) / 500  # all but copies
    rows[7] = 0
    real, sure = select.ApproximateTopK._decided, {}

    def watched(self, h, *how):
        result = real(self, h, *how)
        sure.update({tuple(row.tolist()): bool(yes) for row, yes in zip(h, result[2], strict=True)})
        return result

    monkeypatch.setattr(select.ApproximateTopK, "_decided", watched)
    monkeypatch.setattr(select, "next_higher_precision", lambda *_: "bf16")
    monkeypatch.setattr(select, "_TILE", 1100 * 50)
    monkeypatch.setattr("saewb.features.neighbors._ROWS", 50)
    result, unit = nearest(rows, 8, "decoder"), torch.nn.functional.normalize(rows.double(), dim=1)
    sure = torch.tensor([sure[tuple(row.tolist())] for row in finding._normalize(rows)])
    assert sure[450:700].float().mean() > 0.9
    assert not sure[100:400].any()  # done in float32
    cosine = unit @ unit.T
    cosine.fill_diagonal_(0)
    want, got = cosine.abs().topk(8).values, result["nearest.decoder"].long()
    np.testing.assert_allclose(cosine.gather(1, got).abs(), want, atol=2e-6)
    np.testing.assert_allclose(result["nearest.decoder_cosine"], cosine.gather(1, got), atol=2e-6)
    assert (got != torch.arange(1100)[:, None]).all()
    monkeypatch.setattr(select, "next_higher_precision", lambda *_: "full")
    plain = nearest(rows, 8, "decoder")["nearest.decoder_cosine"]
    np.testing.assert_allclose(result["nearest.decoder_cosine"].abs(), plain.abs(), atol=2e-6)


# -- going on, merging, disk ------------------------------------------------------------------------------------------


def test_extended_and_merged_are_the_whole(model):
    sae, ids = PLACES["topk"](), text(16)
    whole = build(model, sae, ids)
    first = build(model, sae, ids[:7])
    same(build_index(model, sae, ids[7:], extend=first, batch_size=4), whole)
    second = build(model, sae, ids[7:], first_row=7)
    same(build(model, sae, ids[:7]).merge(second), whole)
    same(second.merge(build(model, sae, ids[:7])), whole)


def test_parts_that_do_not_go_together(model):
    sae, ids = PLACES["topk"](), text()
    index = build(model, sae, ids[:6])
    with pytest.raises(ValueError, match=r"both have row 0(.|\n)*first_row=6"):
        index.merge(build(model, sae, ids[:3]))
    with pytest.raises(ValueError, match="seed 0 and 1"):
        index.merge(build(model, sae, ids[6:], first_row=6, seed=1))
    with pytest.raises(ValueError, match=r"another SAE \(by content(.|\n)*want: .* of the index: SAE\(topk"):
        build_index(model, tiny_models.sae(RESID), ids, extend=index)
    with pytest.raises(ValueError, match="rows of 7 tokens"):
        build_index(model, sae, ids[:, :7], extend=index)
    with pytest.raises(ValueError, match="got extend and n_top, seed"):
        build_index(model, sae, ids, extend=index, n_top=4, seed=1)


def test_on_disk_and_back(model, tmp_path):
    index = build(model, PLACES["relu"]())
    index.save(tmp_path / "i")
    again = load_index(tmp_path / "i")
    same(again, index)
    assert again.latent(3) == index.latent(3)
    assert repr(again) == repr(index)
    index.save(tmp_path / "i")
    assert again.latent(3) == index.latent(3), "an open index still sees what it opened"
    assert sorted(p.name[:7] for p in (tmp_path / "i").iterdir()) == ["index.j", "tensors"]


def test_a_failed_save_leaves_the_old_index(model, tmp_path, monkeypatch):
    index = build(model, PLACES["relu"]())
    index.save(tmp_path)
    monkeypatch.setattr("saewb.features.storage._texts_to_json", lambda texts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.save(tmp_path)
    monkeypatch.setattr("saewb._files.os.replace", lambda a, b: 1 / 0)
    monkeypatch.setattr("saewb.features.storage._texts_to_json", lambda texts: {})
    with pytest.raises(ZeroDivisionError):
        index.save(tmp_path)
    same(load_index(tmp_path), index)
    assert len(list(tmp_path.iterdir())) == 2


def test_folders_that_are_no_index(model, tmp_path):
    index = build(model, PLACES["relu"]())
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds other things: notes\.txt"):
        index.save(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        index.save(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="no index at"):
        load_index(tmp_path)
    index.save(tmp_path / "i")
    content = json.loads((tmp_path / "i/index.json").read_text())
    for change, match in (
        ({"version": 99}, "version 99"),
        ({"color": 1}, "color"),
        ({"tensors": "../x.safetensors"}, "a file in the same folder"),
        ({"n_top": 3}, r"top\.tokens has shape"),
    ):
        (tmp_path / "i/index.json").write_text(json.dumps(content | change))
        with pytest.raises(saewb.FormatError, match=match):
            load_index(tmp_path / "i")
    for wrong in ("{", "[]", '{"version": 1}'):
        (tmp_path / "i/index.json").write_text(wrong)
        with pytest.raises(saewb.FormatError, match=r"index\.json.* is (no index of saewb|not JSON)"):
            load_index(tmp_path / "i")
    (tmp_path / "i/index.json").write_text(json.dumps(content))
    (tmp_path / "i" / content["tensors"]).write_bytes(b"not tensors")
    with pytest.raises(saewb.FormatError, match="is damaged: its sha256"):
        load_index(tmp_path / "i")
    (tmp_path / "i/index.json").write_text(json.dumps({k: v for k, v in content.items() if k != "tensors_sha256"}))
    with pytest.raises(saewb.FormatError, match="no safetensors file"):  # an index of before hashes were written
        load_index(tmp_path / "i")


def test_stopped_by_ctrl_c_and_gone_on_with(model, tmp_path, monkeypatch):
    sae, ids = PLACES["topk"](), text(20)
    passes, real = [], building.capture

    def stopping(*arguments):
        passes.append(threading.current_thread() is threading.main_thread())
        if len(passes) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(building, "capture", stopping)
    index = build(model, sae, ids, folder=tmp_path / "i")
    assert not index.is_complete
    assert index.info.rows == ((0, 10),)
    assert "stopped after 10 of 20 rows" in repr(index)
    assert index.latent(0).n_active >= 0
    assert all(passes)
    same(load_index(tmp_path / "i"), index)
    monkeypatch.setattr(building, "capture", real)
    whole = build(model, sae, ids)
    same(build(model, sae, ids, folder=tmp_path / "i"), whole)
    same(load_index(tmp_path / "i"), whole)
    for other in (text(20, seed=1), ids[:4]):
        with pytest.raises(ValueError, match="another text"):
            build(model, sae, other, folder=tmp_path / "i")
    with pytest.raises(ValueError, match="n_top 4 and 5"):
        build(model, sae, ids, folder=tmp_path / "i", n_top=5)


def test_saved_on_the_way(model, tmp_path, monkeypatch):
    real, seen = building.capture, []

    def failing(*arguments):
        seen.append(1)
        if len(seen) == 4:
            raise RuntimeError("out of memory")
        return real(*arguments)

    monkeypatch.setattr(building, "capture", failing)
    sae, ids = PLACES["relu"](), text(20)
    with pytest.raises(RuntimeError, match="out of memory"):
        build(model, sae, ids, folder=tmp_path / "i", save_every_s=0)
    half = load_index(tmp_path / "i")
    assert not half.is_complete
    assert half.latent(3).top
    monkeypatch.setattr(building, "capture", real)
    same(build(model, sae, ids, folder=tmp_path / "i"), build(model, sae, ids))


# -- looking ----------------------------------------------------------------------------------------------------------


def test_search_finds_tokens_texts_and_patterns(model):
    import re

    index = build(model, PLACES["relu"]())
    token = int(index.tensors["top.tokens"][:, 0, index.info.before][0])
    word = index.token_texts.decode_token(token).strip()
    by_id = index.search(token)
    contexts = {
        i: [c for c in (*index.latent(i).top, *sum(index.latent(i).quantiles, ())) if token in c.ids]
        for i in range(len(index))
    }
    assert by_id[by_id.contexts > 0].contexts.to_dict() == {i: len(c) for i, c in contexts.items() if c}
    for i, row in by_id.iterrows():
        values = [a for c in contexts[i] for t, a in zip(c.ids, c.acts, strict=True) if t == token]
        assert row.activation == pytest.approx(max(values, key=abs, default=0.0))
        logits = [w.effect for w in (*index.latent(i).logits_top, *index.latent(i).logits_bottom) if w.id == token]
        assert row.logit == pytest.approx(logits[0]) if logits else np.isnan(row.logit)
    pattern = index.search(re.compile(rf"\b{word}\b"))
    assert set(pattern[pattern.contexts > 0].index) == set(by_id[by_id.contexts > 0].index)
    assert len(index.search(word.upper(), n=3)) == 3
    assert len(index.search("nowhere to be found")) == 0
    with pytest.raises(ValueError, match="empty"):
        index.search("")
    with pytest.raises(ValueError, match="got what=1.5"):
        index.search(1.5)


def test_find_says_what_fires_where(model):
    sae, ids = PLACES["topk"](), text()
    index = build(model, sae, ids)
    hits = index.find(model, sae, ids[0])
    want = dense(model, sae, ids[:1])[0]
    assert len(hits) == int((want != 0).sum())
    for row in hits.itertuples():
        assert row.activation == pytest.approx(float(want[row.position, row.latent]), rel=1e-4)
    assert hits.activation.is_monotonic_decreasing
    assert list(index.find(model, sae, "w1 w2 w3").token.unique()) != []
    with pytest.raises(ValueError, match="is not of this SAE, which has 41"):
        index.find(model, tiny_models.sae(RESID, d_sae=41), ids[0])


def test_latents_that_are_not_there(model):
    index = build(model, PLACES["relu"]())
    assert index.latent(-1).index == 39
    for wrong in (40, -41):
        with pytest.raises(ValueError, match=rf"latent {wrong}(.|\n)*0 to 39"):
            index.latent(wrong)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        ({"n_top": 0}, "n_top=0"),
        ({"per_quantile": 1.5}, r"per_quantile=1\.5"),
        ({"window": (-1, 2)}, "before=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"hook": "blocks.1.hook_nowhere"}, "no hook named"),
    ],
)
def test_wrong_arguments(model, how, match):
    with pytest.raises(ValueError, match=match):
        build(model, PLACES["relu"](), **how)


def test_loss_effects_are_the_losses_without_the_latent(model):
    sae, ids = PLACES["relu"](), text()
    index = build(model, sae, ids, loss_effect_tokens=ids.shape[1] * 45)
    with_effects = [i for i in range(40) if index.latent(i).top and index.latent(i).top[0].loss_effects]
    assert len(with_effects) == min(40, int((index.tensors["top.order"][:, 0] != EMPTY).sum()))
    second = [i for i in range(40) if len(index.latent(i).top) > 1 and index.latent(i).top[1].loss_effects]
    assert len(second) == 45 - len(with_effects)
    for i in with_effects[:3]:
        c = index.latent(i).top[0]
        row = ids[c.row : c.row + 1]
        with torch.no_grad(), saewb.attach(model, sae, error_term=True):
            clean = model(row).log_softmax(-1)

            def off(acts, hook, i=i):
                acts[..., i] = 0
                return acts

            with model.hooks(fwd_hooks=[(f"{RESID}.hook_sae_acts_post", off)]):
                without = model(row).log_softmax(-1)
        change = (clean - without)[0, :-1].gather(1, row[0, 1:, None])[:, 0]
        want = torch.cat([torch.zeros(1), change])[c.position - c.at :][: len(c.ids)]
        assert list(c.loss_effects) == pytest.approx(want.tolist(), rel=1e-3, abs=1e-4)
    assert build(model, sae, ids).latent(0).top[0].loss_effects is None


# -- words ------------------------------------------------------------------------------------------------------------


def test_characters_of_several_tokens_are_spelled_whole():
    tokenizer = saewb.load_model("tiny", device="cpu").tokenizer
    ids = tokenizer("A 🙂 and 漢字 sun", add_special_tokens=False).input_ids
    words = collect_token_texts(tokenizer, [torch.tensor([[-1, -1, *ids]])], [])
    assert "".join(words.decode(ids)) == "A 🙂 and 漢字 sun"
    assert words.decode(ids) == saewb.token_strings(tokenizer, ids)
    assert words.runs


def test_without_a_tokenizer_there_are_numbers():
    assert collect_token_texts(None, [torch.tensor([[1, 2]])], []).decode([1, 2]) == ["<1>", "<2>"]
    assert TokenTexts().merge(TokenTexts({1: "a"})).decode_token(1) == "a"


def test_rows_of_facts_join_up():
    facts = IndexInfo(2, 4, 1, 1, 1, 0, 0, 8, 2, 0, (), ((4, 6),), 8, "", "", "", "")
    assert facts.with_rows([(6, 8)], 4).rows == ((4, 8),)
    assert facts.with_rows([(0, 2)], 4).rows == ((0, 2), (4, 6))
    assert facts.with_rows([(0, 4)], 4).rows == ((0, 6),)
    assert IndexInfo.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_numbers_that_changed_on_disk_are_noticed(model, tmp_path, monkeypatch):
    build(model, PLACES["relu"]()).save(tmp_path / "i")
    (tensors,) = (tmp_path / "i").glob("tensors-*")
    raw = bytearray(tensors.read_bytes())
    raw[-3] ^= 4
    tensors.write_bytes(raw)
    with pytest.raises(saewb.FormatError, match="is damaged: its sha256"):
        load_index(tmp_path / "i")
    assert len(load_index(tmp_path / "i", verify=False)) == 40
    monkeypatch.setattr("saewb._files.HASHED_BYTES", 10)  # a large index is hashed on request only
    assert len(load_index(tmp_path / "i")) == 40
    with pytest.raises(saewb.FormatError, match="is damaged: its sha256"):
        load_index(tmp_path / "i", verify=True)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"d_sae": 10**12}, "has shape"),
        ({"d_sae": -1}, "d_sae=-1"),
        ({"n_tokens": None}, "n_tokens=None"),
        ({"hook": 3}, "hook=3"),
        ({"rows": [[0, 3], [5]]}, "rows="),
        ({"rows": [[3, 0]]}, "rows="),
        ({"special": [0.5]}, "special="),
        ({"tensors": ["a"]}, "names tensors"),
        ({"words": {"ids": [10**9], "strings": ["a"], "runs": []}}, "token id 1000000000"),
        ({"words": {"ids": [1], "strings": [], "runs": []}}, "of different length"),
        ({"words": []}, "is damaged"),
    ],
)
def test_an_index_of_a_stranger_is_checked(change, match, model, tmp_path):
    build(model, PLACES["relu"]()).save(tmp_path / "i")
    path = tmp_path / "i/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(saewb.FormatError, match=match):
        load_index(tmp_path / "i")


def test_token_ids_beyond_any_vocabulary_take_no_memory(model, tmp_path):
    index = build(model, PLACES["relu"]())
    index.tensors["top.tokens"][0, 0, 0] = 2**31 - 2
    index.save(tmp_path / "i")
    again = load_index(tmp_path / "i")
    again.latent(0).to_dict()
    for use in (lambda: again.ranking(3), again.table):
        with pytest.raises(saewb.FormatError, match="token id 2147483646"):
            use()


# -- of what it is ----------------------------------------------------------------------------------------------------


def changed(module, name):
    """A copy with one bit of one tensor changed."""
    import copy

    other = copy.deepcopy(module)
    tensor = dict(other.state_dict())[name].detach().view(-1)[-1:].view(torch.uint8)
    tensor[0] ^= 1
    return other


def test_all_that_goes_on_refuses_another_sae_by_one_bit_of_any_tensor(model):
    sae, ids = tiny_models.sae(RESID, "jumprelu", d_sae=12), text()
    index = build(model, sae, ids[:6])
    second = build(model, sae, ids[6:], first_row=6)
    reading = saewb.read_prompt(model, ids[:1], sae)
    others = [changed(sae, name) for name in sae.state_dict()]
    others += [saewb.SAE.from_tensors(sae.cfg, {name: t.double() for name, t in sae.state_dict().items()})]
    for other in others:
        calls = {
            "extend": lambda other=other: build_index(model, other, ids[6:], extend=index),
            "merge": lambda other=other: index.merge(build(model, other, ids[6:], first_row=6)),
            "find": lambda other=other: index.find(model, other, ids[0]),
            "check": lambda other=other: index.check_sae(other),
            "frame": lambda other=other: saewb.read_prompt(model, ids[:1], other).to_frame(index=index),
        }
        for call in calls.values():
            with pytest.raises(ValueError, match=r"another SAE \(by content: SAE \w{10}, not \w{10}\)(.|\n)*fix: "):
                call()
    same(build_index(model, sae, ids[6:], extend=index), index.merge(second))
    assert len(reading.to_frame(index=index)) == len(reading)
    assert len(index.find(model, sae, ids[0])) > 0


def test_all_that_goes_on_refuses_another_model(tmp_path):
    model, sae, ids = tiny_models.new_bridge(), tiny_models.sae(RESID, d_sae=12), text()
    index = build(model, sae, ids[:6], folder=tmp_path / "i")
    weight = model.blocks[0].mlp.out.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] += 1
    says = r"another model \(by content: model \w{10}, not \w{10}\)(.|\n)*want: (.|\n)*fix: "
    for call in (
        lambda: build_index(model, sae, ids[6:], extend=index),
        lambda: index.merge(build(model, sae, ids[6:], first_row=6)),
        lambda: index.find(model, sae, ids[0]),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    with torch.no_grad():
        weight.copy_(before)
    with saewb.attach(model, tiny_models.sae("blocks.0.hook_resid_post")), pytest.raises(ValueError, match=says):
        build_index(model, sae, ids[6:], extend=index)
    with model.hooks([("blocks.0.hook_resid_post", lambda x, hook: 2 * x)]), pytest.raises(ValueError, match=says):
        index.find(model, sae, ids[0])
    assert len(build_index(model, sae, ids[6:], extend=index).info.rows) == 1


def test_an_index_of_another_sae_or_model_is_moved_aside_and_the_new_one_is_right(tmp_path):
    model, sae, ids = tiny_models.new_bridge(), tiny_models.sae(RESID, d_sae=12), text()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    other = saewb.SAE.from_tensors(
        sae.cfg,
        {
            n: t[order].clone() if len(t) == 12 else t[..., order] if n == "W_enc" else t
            for n, t in sae.tensors().items()
        },
    )
    first = build(model, sae, ids, folder=tmp_path / "i")
    says = r"is of another SAE \(by content: SAE .*it is moved to .*i-earlier1(.|\n)*fix:  saewb\.load_index\("
    with pytest.warns(UserWarning, match=says) as warned:
        second = build(model, other, ids, folder=tmp_path / "i")
    assert warned[0].filename == __file__
    same(second, build(model, other, ids))
    assert torch.equal(second.density, first.density[order])
    same(load_index(tmp_path / "i"), second)
    same(load_index(tmp_path / "i-earlier1"), first)
    with torch.no_grad():
        model.blocks[0].mlp.out.weight.mul_(3)
    with pytest.warns(UserWarning, match=r"is of another model .*i-earlier2"):
        third = build(model, other, ids, folder=tmp_path / "i")
    same(third, build(model, other, ids))
    same(load_index(tmp_path / "i-earlier2"), second)
    same(build(model, other, ids, folder=tmp_path / "i"), third)  # nothing changed: opened
    assert sorted(path.name for path in tmp_path.iterdir()) == ["i", "i-earlier1", "i-earlier2"]


def test_a_text_that_differs_in_one_token_is_another(model, tmp_path):
    sae, ids = PLACES["topk"](), text()
    build(model, sae, ids, folder=tmp_path / "i")
    for row, place in ((0, 1), (5, 8), (11, 4)):
        other = ids.clone()
        other[row, place] = 4 if other[row, place] != 4 else 5
        with pytest.raises(
            ValueError, match=r"another text, by content of its first 12 rows: tokens \w{10}, not \w{10}"
        ):
            build(model, sae, other, folder=tmp_path / "i")
    longer = torch.cat([ids, text(4, seed=9)])
    same(build(model, sae, longer, folder=tmp_path / "i"), build(model, sae, longer))


def test_what_an_index_is_of_is_saved_and_checked(model, tmp_path):
    index = build(model, PLACES["relu"]())
    assert load_index(index.save(tmp_path / "i")).info == index.info
    values = json.loads((tmp_path / "i" / "index.json").read_text())
    for wrong in ({}, {"SAE": "x"}, {**values["digests"], "SAE": 3}, "x", 3):
        with pytest.raises(saewb.FormatError, match="index.json has digests="):
            IndexInfo.from_json(
                {
                    k: v
                    for k, v in {**values, "digests": wrong}.items()
                    if k not in ("words", "tensors", "tensors_sha256")
                }
            )
