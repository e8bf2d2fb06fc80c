"""Faithfulness: exact where the model is linear, 0 for no node and 1 for all, and each set as hooks by hand have it."""

import math

import pytest
import torch
from helpers import tiny_models
from helpers.graphs import IDS, cross_layer, transcoders

import saewb
from saewb.circuits import faithfulness as module
from saewb.circuits.faithfulness import Faithfulness, faithfulness
from saewb.models import hook_points
from saewb.models.capture import capture

REFERENCE = tiny_models.tokens(9, 6, seed=8)
LAST = "blocks.2.hook_resid_post"


def metric(logits):
    return logits[0, -1, 5] - logits[0, -1, 9]


def clean_latents(model, sae, ids):
    cache = capture(model, ids, {sae.cfg.hook, sae.cfg.hook_out or sae.cfg.hook})
    x, y = (cache[name].detach() for name in (sae.cfg.hook, sae.cfg.hook_out or sae.cfg.hook))
    acts = sae.encode(x).detach()
    return acts, y - sae.decode(acts, x).detach()


def means_of(model, sae):
    acts, error = clean_latents(model, sae, REFERENCE)
    return acts[:, 1:].flatten(0, 1).mean(0), error[:, 1:].flatten(0, 1).mean(0)


def test_a_linear_model_is_a_sum_over_nodes(model):
    """With attention, norms and MLPs frozen, an SAE of the last layer: m(C) = m(none) + sum of (a - mean) W_dec . g."""
    sae = tiny_models.sae(LAST)
    with saewb.freeze(model, IDS):
        (acts, error), (mean_acts, mean_error) = clean_latents(model, sae, IDS), means_of(model, sae)
        nodes = saewb.attribute(model, IDS, sae, metric)
        curve = faithfulness(model, IDS, sae, metric, nodes, REFERENCE, sizes=range(1, len(nodes) + 1))
        leaf = {}

        def watch(y):
            leaf["y"] = y.detach().requires_grad_()
            return leaf["y"]

        with torch.enable_grad(), hook_points.editing(model, {LAST: watch}):
            (g,) = torch.autograd.grad(metric(model(IDS)), leaf["y"])
    order = nodes.effect.abs().argsort(descending=True, stable=True)
    assert float(g[0, :-1].abs().max()) < 1e-6  # the logits of the last position depend on it alone
    terms = []
    for i in order.tolist():
        position, latent = int(nodes.position[i]), int(nodes.latent[i])
        if latent < 0:
            change = error[0, position] - mean_error
        else:
            change = (acts[0, position, latent] - mean_acts[latent]) * sae.W_dec[latent].detach()
        terms.append(float(change @ g[0, position]))
    # Of the latents that are inactive in the prompt, all are at their means until the set is that of all.
    inactive = (acts[0, 1:] == 0) * -mean_acts @ sae.W_dec.detach()
    rest = float((inactive * g[0, 1:]).sum())
    none = curve.metric - sum(terms) - rest
    assert curve.metric_ablated == pytest.approx(none, rel=1e-4, abs=1e-3)
    assert int(curve.sizes[-1]) == len(nodes)
    partial = torch.tensor(terms, dtype=torch.float64).cumsum(0)
    scale = abs(curve.metric - none)
    torch.testing.assert_close(curve.metrics[1:-1], none + partial[:-1], rtol=1e-4, atol=1e-4 * scale)
    want = partial[:-1] / (curve.metric - none)
    torch.testing.assert_close(curve.faithfulness[1:-1], want, rtol=1e-3, atol=1e-3)
    # Linear, so a set and its complement share the whole.
    total = curve.faithfulness + curve.complement_faithfulness
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-3, atol=1e-3)


def test_no_node_and_all_nodes(model, monkeypatch):
    """None: the means at every write point. All: the model itself, also when each node is listed."""
    coders = transcoders()
    means = {}
    for coder in coders:
        cache = capture(model, REFERENCE, [coder.cfg.hook_out])
        means[coder.cfg.hook_out] = cache[coder.cfg.hook_out][:, 1:].flatten(0, 1).mean(0).detach()
    edits = {
        name: lambda y, mean=mean: torch.cat([y[:, :1], mean.expand_as(y[:, 1:])], 1) for name, mean in means.items()
    }
    with torch.no_grad(), hook_points.editing(model, edits):
        ablated = float(metric(model(IDS)))
    with torch.no_grad():
        clean = float(metric(model(IDS)))
    everything = [(i, p, n) for i, coder in enumerate(coders) for p in range(1, 6) for n in (*range(40), None)]
    curve = faithfulness(model, IDS, coders, metric, everything[:100], REFERENCE)
    assert [curve.metric_ablated, curve.metric] == pytest.approx([ablated, clean], rel=1e-4, abs=1e-4)
    assert [float(curve.faithfulness[0]), float(curve.faithfulness[-1])] == [0, 1]
    assert [float(curve.complement_faithfulness[0]), float(curve.complement_faithfulness[-1])] == [1, 0]
    n_nodes = module._n_nodes
    monkeypatch.setattr(module, "_n_nodes", lambda run: 10 * n_nodes(run))  # else the set of all is not run
    listed = faithfulness(model, IDS, coders, metric, everything, REFERENCE, sizes=[len(everything)])
    assert float(listed.faithfulness[1]) == pytest.approx(1, abs=1e-4)
    assert float(listed.complement_faithfulness[1]) == pytest.approx(0, abs=1e-4)


def by_hand(model, coders, chosen, inside):
    """Metric with the other nodes (or these) at their means, each SAE by its own `encode` and `decode`."""
    clt = hasattr(coders, "encode_layer")
    hooks = coders.cfg.hooks if clt else [c.cfg.hook for c in coders]
    outs = coders.cfg.hooks_out if clt else [c.cfg.hook_out or c.cfg.hook for c in coders]
    cache = {}
    for name in {*hooks, *outs}:
        cache |= {name: value.detach() for name, value in capture(model, REFERENCE, [name]).items()}
    xs, ys = [cache[name] for name in hooks], [cache[name] for name in outs]
    dense = coders.encode(xs) if clt else [c.encode(x) for c, x in zip(coders, xs, strict=True)]
    recons = coders.decode(dense, xs) if clt else [c.decode(z, x) for c, z, x in zip(coders, dense, xs, strict=True)]
    mean_acts = [z[:, 1:].flatten(0, 1).mean(0).detach() for z in dense]
    mean_errors = [(y - r)[:, 1:].flatten(0, 1).mean(0).detach() for y, r in zip(ys, recons, strict=True)]
    state = {}

    def read(i):
        def edit(x):
            state[i] = x, coders.encode_layer(x, i) if clt else coders[i].encode(x)

        return edit

    def write(i):
        def edit(y):
            y = y.clone()
            x, z = state[i]
            old = coders.decode_layer([state[j][1] for j in range(i + 1)], i, x) if clt else coders[i].decode(z, x)
            new = []
            for j in range(i + 1) if clt else [i]:
                acts = state[j][1].clone()
                for p in range(1, 6):
                    for n in range(acts.shape[-1]):
                        if ((j, p, n) in chosen) is not inside:
                            acts[:, p, n] = mean_acts[j][n]
                new.append(acts)
            out = coders.decode_layer(new, i, x) if clt else coders[i].decode(new[0], x)
            for p in range(1, 6):
                keep = ((i, p, None) in chosen) is inside
                y[:, p] = out[:, p] + ((y - old)[:, p] if keep else mean_errors[i])
            return y

        return edit

    edits = {}
    for i, (a, b) in enumerate(zip(hooks, outs, strict=True)):
        edits.setdefault(hook_points.resolve(model, a).name, []).append((0, read(i)))
        edits.setdefault(hook_points.resolve(model, b).name, []).append((1, write(i)))
    with torch.no_grad(), hook_points.editing(model, {k: hook_points.in_order(v) for k, v in edits.items()}):
        return float(metric(model(IDS)))


CODERS = {
    "transcoders": lambda: transcoders(skip=True),
    "saes": lambda: [tiny_models.sae(f"blocks.{i}.hook_resid_post", seed=i) for i in (0, 1)],
    "clt": lambda: cross_layer(skip=True),
}


@pytest.mark.parametrize("name", CODERS)
def test_each_set_as_hooks_by_hand_have_it(model, name):
    coders = CODERS[name]()
    graph_like = saewb.attribute(model, IDS, coders, metric)
    order = graph_like.effect.abs().argsort(descending=True, stable=True).tolist()
    latent = [None if n < 0 else n for n in graph_like.latent.tolist()]
    ranked = [(int(graph_like.sae[i]), int(graph_like.position[i]), latent[i]) for i in order]
    curve = faithfulness(model, IDS, coders, metric, graph_like, REFERENCE, sizes=[3, 20], batch_size=3)
    assert curve.sizes.tolist() == [0, 3, 20, len(ranked)]
    for k, size in ((1, 3), (2, 20)):
        assert float(curve.metrics[k]) == pytest.approx(by_hand(model, coders, set(ranked[:size]), True), abs=1e-3)
        without = by_hand(model, coders, set(ranked[:size]), False)
        assert float(curve.complement_metrics[k]) == pytest.approx(without, abs=1e-3)
    listed = faithfulness(model, IDS, coders, metric, ranked[:20], REFERENCE, sizes=[3, 20])
    assert listed.metrics.tolist() == pytest.approx(curve.metrics.tolist(), abs=1e-4)


def test_nodes_of_a_graph(model):
    coders = transcoders()
    graph = saewb.attribution_graph(model, IDS, coders, targets=[5, 9], progress=False).pruned(0.6)
    curve = faithfulness(model, IDS, coders, metric, graph, REFERENCE)
    frame = graph.nodes[graph.nodes["kind"].isin(["latent", "error"])]
    frame = frame[(frame["influence"] > 0) & (frame["position"] > 0)].sort_values("influence", ascending=False)
    assert len(frame) in curve.sizes.tolist()
    latents = frame["latent"].astype(object).where(frame["latent"].notna(), None)
    rows = list(zip(frame["layer"], frame["position"], latents, strict=True))
    listed = faithfulness(model, IDS, coders, metric, rows, REFERENCE, sizes=curve.sizes[1:-1].tolist())
    assert listed.metrics.tolist() == pytest.approx(curve.metrics.tolist(), abs=1e-4)


def test_areas_by_hand():
    curve = Faithfulness(
        torch.tensor([0, 1, 5, 10]),
        torch.tensor([1.0, 2.0, 4.0, 3.0], dtype=torch.float64),
        torch.tensor([3.0, 2.5, 1.0, 1.0], dtype=torch.float64),
    )
    assert curve.faithfulness.tolist() == [0, 0.5, 1.5, 1]
    assert curve.complement_faithfulness.tolist() == [1, 0.75, 0, 0]
    assert curve.shares.tolist() == [0, 0.1, 0.5, 1]
    assert curve.cpr == pytest.approx(0.1 * 0.25 + 0.4 * 1 + 0.5 * 1.25)
    assert curve.cmd == pytest.approx(0.1 * 0.75 + 0.4 * 0.5 + 0.5 * 0.25)
    frame = curve.to_frame()
    assert frame["size"].tolist() == [0, 1, 5, 10]
    assert "CPR 1.050, CMD 0.400" in repr(curve)
    figure = curve.plot()
    assert [trace.name for trace in figure.data] == ["the nodes alone", "without them"]
    assert list(figure.data[0].y) == [0, 0.5, 1.5, 1]
    assert list(figure.data[1].y) == [1, 0.75, 0, 0]
    assert figure.data[1].customdata[1].tolist() == [0.1, 2.5]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"nodes": []}, ValueError, "no nodes"),
        ({"nodes": "latents"}, TypeError, "nodes='latents'"),
        ({"nodes": [(0, 1)]}, ValueError, r"\(layer, position, latent\)"),
        ({"nodes": [(7, 1, 0)]}, ValueError, "0 SAEs write at layer 7"),
        ({"nodes": [(0, 0, 0)]}, ValueError, "special token"),
        ({"nodes": [(0, 9, 0)]}, ValueError, "position"),
        ({"nodes": [(0, 1, 99)]}, ValueError, "latent"),
        ({"nodes": [(0, 1, 2), (0, -5, 2)]}, ValueError, "is there twice"),
        ({"nodes": [(0, 1, 2)], "sizes": [2]}, ValueError, "0 to 1"),
        ({"batch_size": 0}, ValueError, "1 or more"),
        ({"metric": lambda logits: logits.sum() * 0}, ValueError, "with every node at its mean"),
        ({"reference": REFERENCE[:, :1]}, ValueError, "token"),
        ({"saes": transcoders()[:1] * 2}, ValueError, "write at one point"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_wrong_arguments(change, error, text):
    settings = {"saes": transcoders(), "metric": metric, "nodes": [(0, 1, 2)], "reference": REFERENCE, **change}
    with pytest.raises(error, match=text):
        faithfulness(tiny_models.bridge(), IDS, **settings)


def test_an_attribution_of_other_saes_is_refused(model):
    nodes = saewb.attribute(model, IDS, tiny_models.sae(LAST), metric)
    with pytest.raises(ValueError, match="the attribution is of"):
        faithfulness(model, IDS, transcoders(), metric, nodes, REFERENCE)
    signed, by_size = (
        faithfulness(model, IDS, tiny_models.sae(LAST), metric, nodes, REFERENCE, sizes=[4], signed=s) for s in (1, 0)
    )
    assert float(signed.metrics[1]) > float(by_size.metrics[1])
    assert math.isfinite(signed.cpr)
