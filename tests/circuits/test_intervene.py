"""Interventions: exact in the frozen model, predicted by the graph's edges, and what the model itself does."""

import pytest
import torch
from helpers import tiny_models
from helpers.families import FAMILIES, family
from helpers.graphs import IDS, cross_layer, transcoders

import saewb


def changes_of(graph, n=3):
    """Some strong latents of the first layers, at other values."""
    latents = graph.nodes[(graph.nodes["kind"] == "latent") & (graph.nodes["layer"] < 2)].nlargest(n, "activation")
    rows = zip(
        latents["id"], latents["layer"], latents["position"], latents["latent"], latents["activation"], strict=True
    )
    return [
        (node, (layer, position, latent, factor * a))
        for factor, (node, layer, position, latent, a) in zip((0.0, 2.0, -1.0), rows, strict=True)
    ]


@pytest.mark.parametrize("coders", ["plain", "skip", "clt", "clt_skip"])
@pytest.mark.parametrize("name", FAMILIES)
def test_direct_effects_are_the_edges(name, coders):
    model = family(name)
    coder = {
        "plain": lambda: transcoders(),
        "skip": lambda: transcoders(skip=True),
        "clt": lambda: cross_layer(),
        "clt_skip": lambda: cross_layer(skip=True),
    }[coders]()
    graph = saewb.attribution_graph(model, IDS, coder, targets=[5, 6], progress=False)
    before = tiny_models.snapshot(model)
    chosen = changes_of(graph)
    result = saewb.intervene(model, IDS, coder, [change for _, change in chosen], direct=True)
    assert tiny_models.snapshot(model) == before
    columns = [graph.index(node) for node, _ in chosen]
    factors = [change[3] / graph.nodes["activation"][i] - 1 for i, (_, change) in zip(columns, chosen, strict=True)]
    want = graph.edges[:, columns] @ torch.tensor(factors, dtype=torch.float32)
    scale = float(want.abs().max())
    rows = {graph.nodes["id"][i]: i for i in range(len(graph))}
    latents = result.latents
    ids = [f"{a}_{b}_{c}" for a, b, c in zip(latents["layer"], latents["latent"], latents["position"], strict=True)]
    known = [i for i, node in enumerate(ids) if node in rows]
    assert len(known) > 20
    expected = want[[rows[ids[i]] for i in known]]
    for column in ("predicted", "measured"):
        got = torch.tensor(latents[column].to_numpy())[known].float()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * scale)
    change = result.logits - result.clean_logits
    torch.testing.assert_close(change[[5, 6]], want[-2:], rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(result.predicted_logits[[5, 6]], want[-2:], rtol=1e-4, atol=1e-4 * scale)


def test_the_model_itself_responds(model):
    """With nothing frozen it is a pass with the difference added at the MLP's output; attention may be held."""
    coders = transcoders()
    graph = saewb.attribution_graph(model, IDS, coders, targets=[5], progress=False)
    (_, (layer, position, latent, value)), *_ = changes_of(graph)
    activation = graph.nodes.set_index("id").loc[f"{layer}_{latent}_{position}", "activation"]

    def add(x, hook):
        x = x.clone()
        x[0, position] += (value - activation) * coders[layer].W_dec[latent]
        return x

    point = f"blocks.{layer}.hook_mlp_out"
    with torch.no_grad():
        want = model.run_with_hooks(IDS, fwd_hooks=[(point, add)])[0, -1]
    change = [(layer, position - 6, latent, value)]  # from the end
    result = saewb.intervene(model, IDS, coders, change, freeze_attention=False)
    torch.testing.assert_close(result.logits, want.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.clean_logits, model(IDS)[0, -1].detach().float(), rtol=1e-4, atol=1e-4)
    held = saewb.intervene(model, IDS, coders, change)
    with torch.no_grad(), saewb.freeze(model, IDS, norms=False, mlps=False):
        want = model.run_with_hooks(IDS, fwd_hooks=[(point, add)])[0, -1]
    torch.testing.assert_close(held.logits, want.float(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(held.logits, result.logits, atol=1e-3)
    assert set(result.latents["layer"]) <= {1, 2}


def test_a_later_change_sees_an_earlier_one(model):
    """A latent is set to its value, not moved by the clean difference."""
    coders = transcoders()
    graph = saewb.attribution_graph(model, IDS, coders, targets=[5], progress=False)
    latents = graph.nodes[graph.nodes["kind"] == "latent"]
    one, two = (latents[latents["layer"] == i].nlargest(1, "activation").iloc[0] for i in (0, 1))
    first = (0, int(one["position"]), int(one["latent"]), 5 * one["activation"])
    both = saewb.intervene(model, IDS, coders, [first, (1, int(two["position"]), int(two["latent"]), 0.0)])
    alone = saewb.intervene(model, IDS, coders, [first])
    assert not torch.allclose(both.logits, alone.logits, atol=1e-4)


def test_saes_of_the_stream(model):
    saes = [tiny_models.sae(f"blocks.{i}.hook_resid_post", seed=i) for i in (0, 1)]
    graph = saewb.attribution_graph(model, IDS, saes, targets=[5], progress=False)
    _, change = changes_of(graph)[0]
    result = saewb.intervene(model, IDS, saes, [change])
    assert (result.latents["layer"] == 1).all()
    assert result.latents["measured"].abs().max() > 1e-4
    frame = result.next_tokens(4)
    assert frame.columns.tolist() == ["token", "id", "probability", "clean_probability", "predicted", "measured"]
    whole = result.next_tokens(tiny_models.VOCAB).set_index("id")
    some = result.next_tokens(tokens=[7, 2])
    assert some["id"].tolist() == [7, 2]
    assert some.set_index("id").equals(whole.loc[[7, 2]])
    with pytest.raises(ValueError, match="token"):
        result.next_tokens(tokens=[tiny_models.VOCAB])
    assert "later latents" in repr(result)
    assert "probability" in result._repr_html_()


def test_from_inside_of_inference_mode(model):
    with torch.inference_mode():
        result = saewb.intervene(
            model, "w5 w6" if model.tokenizer else IDS, transcoders(), [(0, -1, 3, 1.0)], direct=True
        )
    want = result.latents["predicted"]
    assert result.latents["measured"].to_numpy() == pytest.approx(want.to_numpy(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ([], "no changes"),
        ([(7, 0, 0, 1.0)], r"one of \[0, 1, 2\]"),
        ([(0, 9, 0, 1.0)], "position"),
        ([(0, 0, 99, 1.0)], "latent"),
        ([(0, 0, 1.0)], "layer, position, latent, value"),
        ([(0, 0, 1, float("nan"))], "value nan for latent 1"),
    ],
)
def test_wrong_changes(changes, text):
    with pytest.raises(ValueError, match=text):
        saewb.intervene(tiny_models.bridge(), IDS, transcoders(), changes)
