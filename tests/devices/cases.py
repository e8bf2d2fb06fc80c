"""One case for each public function or class that computes: what it gives on a device, to compare with the CPU's.

    CASES      by name: what it covers, and a function of a `World` that returns a dictionary of results
    NO_TENSORS public names that need no case, each with the reason

A case's results are anything `compare` can walk: tensors, tables, numbers, dataclasses, modules. Tensors must be on the
world's device, except under keys that begin with "host ": those are documented to be on the CPU.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from devices.compare import differences
from devices.world import HOOK, LATER, World
from helpers import objective_registry
from helpers.public_names import public

import saewb
from saewb import metrics, synthetic


@dataclass(frozen=True)
class Case:
    run: Callable[[World], dict]
    covers: tuple[str, ...]
    host_products: str = ""
    """Why it multiplies, sorts or selects on the CPU; empty: it must not."""


CASES: dict[str, Case] = {}


def case(*covers: str, host_products: str = ""):
    def add(run):
        CASES[run.__name__] = Case(run, covers, host_products)
        return run

    return add


FILES, TEXT, VALUES = (
    "reads or writes files and names",
    "texts and token ids",
    "holds results or settings, computes nothing",
)
NO_TENSORS: dict[str, str] = {
    **dict.fromkeys(("catalogue", "load_config", "push_to_hub", "read_run", "TextFiles", "PastRun"), FILES),
    **dict.fromkeys(("read_saebench", "compare", "Comparison"), "tables on the host"),
    **dict.fromkeys(("load_graph", "tiny.transcoders"), FILES),
    **dict.fromkeys(("tiny.Document", "tiny.texts", "tiny.held_out_texts", "tiny.folder", "token_strings"), TEXT),
    **dict.fromkeys(("pack", "stream_tokens", "token_sets", "token_texts", "tokens_where"), TEXT),
    **dict.fromkeys(("data.tokens.check_context", "data.tokens.check_vocabulary", "data.tokens.model_tokens"), TEXT),
    **dict.fromkeys(("models.tokenizer.end_ids", "models.tokenizer.single_texts"), TEXT),
    **dict.fromkeys(("models.tokenizer.tokenizer_of", "models.tokenizer.special_token_ids"), TEXT),
    **dict.fromkeys(
        ("SAEConfig", "PursuitConfig", "TemporalConfig", "CrossLayerConfig", "CrossCoderConfig", "TrainConfig"), VALUES
    ),
    **dict.fromkeys(("Trainee", "TrainOption", "training_options", "training_code", "FormatError"), VALUES),
    **dict.fromkeys(("training_memory", "attachments", "detach_all"), VALUES),
    **dict.fromkeys(("training.loggers.Event", "training.loggers.saelens_keys"), VALUES),
    **dict.fromkeys(("training.loggers.Wandb", "training.loggers.TensorBoard"), "gets numbers of the host"),
    **dict.fromkeys(
        (f"features.neuronpedia.{name}" for name in ("NeuronpediaPage", "page", "source_of")),
        "addresses of pages",
    ),
    **dict.fromkeys(
        (f"features.neuronpedia.{name}" for name in ("explanations", "quick_list", "make_list", "upload_graph")),
        "asks a server",
    ),
    **dict.fromkeys(
        (
            "synthetic.constant",
            "synthetic.linear",
            "synthetic.random",
            "synthetic.zipfian",
            "synthetic.random_hierarchy",
        ),
        "probabilities and trees, on the CPU; moved where they are used",
    ),
    "synthetic.Node": VALUES,
    **dict.fromkeys(("Explanation", "Explanations"), VALUES),
    **dict.fromkeys(("explain", "Chat", "explanations.Judge", "explanations.index_sha"), TEXT),
    **dict.fromkeys((f"explanations.{name}" for name in ("Answer", "AnswerToken", "Cost", "Request")), TEXT),
    "explanations.Scripted": TEXT,
}


def missing() -> tuple[set[str], set[str]]:
    """Public names without a case or a reason; and names in this file that are not public."""
    names = {name for name, _ in public()}
    named = {name for one in CASES.values() for name in one.covers} | NO_TENSORS.keys()
    return names - named, named - names


# -- SAEs --------------------------------------------------------------------------------------------------------------


@case("SAE", "PursuitSAE", "TemporalSAE", "SparseCoder")
def architectures(world):
    results = {}
    for name, sae in world.architectures():
        x = world.randn(3, 5, sae.d_in, seed=1) * 1.5
        acts = sae.encode(x)
        sparse = sae.encode_sparse(x, mask=x[..., 0] > -1)
        results[name] = acts, sae.decode(acts, x), sae(x), sparse.dense(), sae.encode(x, latents=[1, 3])
        loss = sae(x).square().sum()
        if loss.requires_grad:
            results[name + " gradients"] = torch.autograd.grad(loss, [p for p in sae.parameters()], allow_unused=True)
    for name, sae in world.architectures():
        if hasattr(sae, "encode_topk") and sae.cfg.k:
            results[name + " top"] = sae.encode_topk(world.randn(7, sae.d_in)).dense()
        if hasattr(sae, "fold_scaling") and sae.cfg.normalization == "none" and not getattr(sae.cfg, "skip", False):
            results[name + " folded"] = sae.fold_scaling(2.0)
    return results


@case("CrossLayerTranscoder")
def cross_layer(world):
    clt = world.cross_layer
    xs = [world.randn(2, 5, clt.d_in, seed=i) for i in range(clt.cfg.n_layers)]
    acts = clt.encode(xs)
    masks = [x[..., 0] > 0 for x in xs]
    return {"acts": acts, "out": clt.decode(acts, xs), "sparse": [s.dense() for s in clt.encode_sparse(xs, masks)]}


@case("SparseLatents")
def sparse_latents(world):
    dense = torch.relu(world.randn(4, 6, 20) - 0.8)
    a, b = saewb.SparseLatents.from_dense(dense), world.topk.encode_sparse(world.randn(9, 16))
    tokens = world.to(torch.tensor([3, 1, 1, 20]))
    mask = dense.sum((0, 1)) > 0.5
    return {
        "parts": [(s.token, s.latent, s.act, s.starts, s.dense(), s.by_latent().order) for s in (a, b)],
        "select": a.select(tokens, mask).dense(),
        "select top": b.select(tokens.clamp(max=8), torch.arange(5, device=world.device)).dense(),
        "lookup": a.lookup(torch.arange(20, device=world.device), torch.arange(20, device=world.device)),
        "product": (a @ world.randn(20, 3), b @ world.randn(40, 3)),
        "cat": saewb.SparseLatents.cat([a, a]).dense(),
        "host scipy": a.to_scipy().toarray(),
        "host moved": a.to("cpu").dense(),
        "half": a.to(torch.float16).dense(),
    }


@case("load_sae", "save_sae")
def files(world):
    saewb.save_sae(world.topk, world.folder / "sae", overwrite=True)
    loaded = saewb.load_sae(world.folder / "sae", device=world.device)
    return {"loaded": loaded, "out": loaded(world.randn(3, 16))}


# -- models ------------------------------------------------------------------------------------------------------------


@case("load_model", "models.tokenizer.special_ids", "models.tokenizer.special_mask", "data.tokens.token_rows")
def load_model(world):
    model = saewb.load_model(world.model, device=world.device)
    from saewb.data.tokens import token_rows
    from saewb.models.tokenizer import special_ids, special_mask

    ids = special_ids(model, True)
    rows = token_rows(model, world.texts, 12)
    return {
        "logits": model(world.to(world.tokens)),
        "special": special_mask(world.to(world.tokens), ids),
        "host rows": rows,
    }


@case("attach", "Attachment", "data.tokens.prompt_ids")
def attach(world):
    from saewb.data.tokens import prompt_ids

    model, tokens, results = world.model, world.to(world.tokens), {}
    results["host prompt"] = prompt_ids(model, "w1 w2").cpu()
    kinds = {
        "relu": world.sae(),
        "topk": world.topk,
        "transcoder": world.sae("blocks.1.hook_resid_mid", hook_out="blocks.1.hook_mlp_out", d_out=16),
        "clt": world.cross_layer,
    }
    for name, sae in kinds.items():
        for error_term in (False, True):
            with saewb.attach(model, sae, error_term=error_term, skip_special_tokens=True) as attached:
                logits, _cache = model.run_with_cache(tokens)
                results[f"{name} {error_term}"] = logits, attached.latents[sae]
    with saewb.attach(model, [world.sae(), world.sae(LATER, seed=1)]):
        loss = model(tokens).square().sum()
        results["gradients"] = torch.autograd.grad(loss, model.embed.W_E)
        results["host text"] = model.generate("w1 w2 w3", max_new_tokens=6, do_sample=False, verbose=False)
    return results


@case("steer", "ablate", "Steering")
def steer(world):
    model, tokens, results = world.model, world.to(world.tokens), {}
    transcoder = world.sae("blocks.1.hook_resid_mid", hook_out="blocks.1.hook_mlp_out", d_out=16)
    for name, sae in {"relu": world.sae(), "norm": world.sae(normalization="layer_norm"), "tc": transcoder}.items():
        for how in ("add", "clamp", "scale"):
            with saewb.steer(
                model, sae, {3: 2.0, 7: -1.0}, how=how, positions=slice(2, None), skip_special_tokens=True
            ):
                results[f"{name} {how}"] = model(tokens)
    mask = tokens > 9
    with saewb.ablate(model, world.topk, [1, 2, 3], positions=mask):
        results["ablate"] = model(tokens)
    with saewb.steer(model, world.sae(), {3: 2.0}, positions=[1, 3]):
        results["host text"] = model.generate("w1 w2 w3", max_new_tokens=6, do_sample=False, verbose=False)
    return results


# -- circuits ----------------------------------------------------------------------------------------------------------


@case("freeze", "FrozenModel")
def freeze(world):
    with saewb.freeze(world.model, "w1 w2 w3") as frozen, torch.no_grad():
        return {"logits": world.model(frozen.tokens), "scales": frozen.scales, "patterns": frozen.patterns}


@case(
    *("attribution_graph", "AttributionGraph", "intervene", "LatentIntervention"),
    host_products="rows are ranked, pruned and scored on the host, documented",
)
def attribution_graph(world):
    points = [(f"blocks.{i}.mlp.hook_in", f"blocks.{i}.hook_mlp_out") for i in range(2)]
    plain = [world.sae(read, hook_out=write, seed=i, skip=i == 1) for i, (read, write) in enumerate(points)]
    results = {}
    for name, coders in {"plain": plain, "clt": world.cross_layer}.items():
        graph = saewb.attribution_graph(world.model, "w1 w2 w3", coders, max_latents=20, batch_size=8, progress=False)
        results[f"{name} nodes"], results[f"host {name} edges"] = graph.pruned().nodes, graph.edges
        for direct in (True, False):
            result = saewb.intervene(world.model, "w1 w2 w3", coders, [(1, -1, 3, 2.0)], direct=direct)
            results[f"host {name} logits {direct}"] = result.logits
            results[f"{name} latents {direct}"] = result.latents
    return results


# -- prompts -----------------------------------------------------------------------------------------------------------


@case("attribute", "Attribution", "attribute_edges")
def attribute(world):
    saes, results = [world.sae(), world.sae(LATER, seed=1)], {}
    for method in ("gradient", "integrated", "ablation"):
        how = {"n_steps": 3, "n_nodes": 12} if method != "gradient" else {}
        results[method] = saewb.attribute(world.model, "w1 w2 w3", saes, (" w4", " w5"), method=method, **how).to_frame(
            9
        )
    results["totals"] = saewb.attribute(world.model, "w1 w2 w3", saes, "w4").totals()
    results["edges"] = saewb.attribute_edges(world.model, "w1 w2 w3", *saes, n_targets=3)
    clt = world.cross_layer
    results["clt edges"] = saewb.attribute_edges(world.model, "w1 w2 w3", clt, clt, n_targets=3)
    results["clt"] = saewb.attribute(world.model, "w1 w2 w3", clt, "w4", method="ablation", n_nodes=12).to_frame(9)
    return results


@case("faithfulness", "Faithfulness")
def faithfulness(world):
    results, texts = {}, world.texts[:4]
    for name, coders in {"saes": [world.sae(), world.sae(LATER, seed=1)], "clt": world.cross_layer}.items():
        nodes = saewb.attribute(world.model, "w1 w2 w3", coders, "w4")
        curve = saewb.faithfulness(world.model, "w1 w2 w3", coders, "w4", nodes, texts, sizes=[3], ctx_len=8)
        results[f"host {name}"] = curve.metrics
    return results


@case("read_prompt", "read_in_turn", "PromptReading", host_products="the reading is on the host, documented")
def read_prompt(world):
    saes = [world.sae(), world.sae(LATER, seed=1)]
    reading = saewb.read_prompt(world.model, "w1 w2 w3 w4", saes, target="w5", attribution="gradient")
    return {
        "frame": reading.to_frame(position=-1, by="logit_effect", n=5),
        "attribution": reading.to_frame(by="attribution", n=5),
        "index": saewb.read_prompt(world.model, "w1 w2", world.topk).to_frame(index=world.index, n=5),
        "host activations": reading.activations(0, 3),
        "steps": [pair[1].to_frame() for pair in saewb.read_in_turn(world.model, "w1 w2 w3", saes, saes[0])],
    }


@case("next_tokens", "NextTokens", "next_token_changes")
def next_tokens(world):
    change = saewb.next_token_changes(
        world.model, "w1 w2", lambda: saewb.steer(world.model, world.sae(), {3: 4.0}), n=6
    )
    return {"table": saewb.next_tokens(world.model, "w1 w2 w3", world.sae(), n=5).to_frame(), "change": change}


@case("generate_tokens", "NewToken")
def generate_tokens(world):
    def steered():
        return saewb.steer(world.model, world.topk, {3: 4.0})

    how = {"max_new_tokens": 6, "seed": 1}
    return {
        f"{temperature} {cache}": list(
            saewb.generate_tokens(
                world.model, "w1 w2", steered, temperature=temperature, use_past_kv_cache=cache, **how
            )
        )
        for temperature, cache in itertools.product((0.0, 1.0), (True, False))
    }


# -- evaluation and index ----------------------------------------------------------------------------------------------


@case("evaluate", "evaluate_many", "Evaluation", "LatentFigures")
def evaluate(world):
    sae, results = world.sae(), {}
    result = saewb.evaluate(world.model, sae, world.tokens, batch_size=2)
    results["host figures"] = result.figures(), result.latents.to_frame(), result.latents.density_histogram(5)
    many = saewb.evaluate_many(world.model, {"a": sae, "b": world.topk}, world.texts, ctx_len=12, batch_size=4)
    results["many"] = many.drop(columns=[c for c in many.columns if many[c].dtype == object])
    clt = saewb.evaluate(world.model, sae, world.tokens, losses=False, core=True)
    results["no losses"] = clt.figures()
    return results


@case(
    "build_index",
    "FeatureIndex",
    "load_index",
    "features.neuronpedia.export_json",
    host_products="an index is on the host",
)
def build_index(world):
    index = world.index
    wide = saewb.build_index(
        world.model,
        world.sae(),
        world.texts,
        ctx_len=12,
        coactive_tokens=16,
        n_top=3,
        loss_effect_tokens=20,
        batch_size=2,
    )
    index.save(world.folder / "an.index")
    longer = saewb.build_index(world.model, world.topk, world.texts, extend=saewb.load_index(world.folder / "an.index"))
    return {
        "host tensors": [dict(one.tensors) for one in (index, wide, longer)],
        "table": index.table(),
        "search": index.search("w7"),
        "ranking": index.ranking(5),
        "find": index.find(world.model, world.topk, "w1 w2"),
        "latent": [(context.text, context.value) for context in index.latent(3).top],
        "host matrix": index.matrix(1).block([0, 1], [2, 3]),
    }


@case("fit_jacobian_lens", "JacobianLens", host_products="the mean over prompts is on the host, in float32")
def fit_jacobian_lens(world):
    hooks = ["blocks.0.hook_resid_post", "blocks.1.hook_mlp_out"]
    how = {"n_prompts": 2, "skip_first": 1, "batch_size": 5}
    lens = saewb.fit_jacobian_lens(world.model, world.tokens, hooks, **how)
    index = saewb.build_index(world.model, world.topk, world.tokens, logits="jacobian")
    directions = world.topk.W_dec.detach()[:3]
    return {
        "host matrices": list(lens.matrices.values()),
        "table": lens.to_frame(),
        "transported": lens.transport(directions, hooks[0]),
        "logits": lens.logits(world.model, directions, hooks[0]),
        "words": [x.effect for x in index.latent(0).jacobian_top],
    }


@case("score", "LocalChat", host_products="windows and figures are on the host")
def score(world):
    explained = saewb.Explanations.from_labels({3: "three", 5: "five"})
    how = {"model": world.model, "sae": world.topk, "texts": world.tokens, "window": 6}
    asked = []

    def answer(request):
        asked.append(request.prompt)
        return str([1] * request.prompt.count("Text "))

    scored = saewb.score(world.index, explained, saewb.explanations.Scripted(answer), by=["detection", "fuzz"], **how)
    model = copy.copy(world.model)
    model.tokenizer = copy.deepcopy(world.model.tokenizer)
    model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    request = saewb.explanations.Request((("user", "w1 w2"),), max_tokens=4, logprobs=True)
    ((_, local),) = saewb.LocalChat(model).ask([request])
    tops = torch.tensor([[logprob for _, logprob in token.top] for token in local.tokens])
    return {"table": scored.to_frame(), "prompts": asked, "text": local.text, "host logprobs": tops}


@case("latent_matrix", "matrix_view", "MatrixView", host_products="a view is on the host: it is drawn")
def latent_matrix(world):
    view = saewb.latent_matrix(world.model, world.topk, world.tokens, min_fires=1)
    views = {
        "latents": view,
        "dense": saewb.matrix_view(world.to(saewb.random_correlation(12, max_strength=0.1))),
        "low rank": saewb.matrix_view(saewb.LowRankCorrelation.of(world.randn(12, 3) * 0.2)),
        "decoder": saewb.matrix_view(world.sae()),
    }
    return {
        f"host {name}": (
            v.block([0, 1, 2], [2, 3]),
            v.pooled((0, 8), (0, 8), 2),
            v.order("clusters"),
            v.partners(1, 3),
            v.stats(),
        )
        for name, v in views.items()
    }


@case("enrich")
def enrich(world):
    effects = world.randn(5, 40)
    return {"table": saewb.enrich(effects, {"a": [1, 2, 3, 4, 5], "b": list(range(20, 30))}, n_permutations=50)}


@case("contrast", "Contrast", "sparse_probe", "Probes", host_products="pooled values are on the host: 8 bytes each")
def contrast(world):
    texts = [" ".join(f"w{(i * i + i * j + j) % 27}" for j in range(3 + i)) for i in range(12)]
    a, b = texts[:6], texts[6:]
    options = {"n_permutations": 20, "progress": False}
    results = {}
    for pool in ("max", "last", "any"):  # mean is in the probes
        result = saewb.contrast(world.model, world.topk, a, b, pool=pool, **options)
        results[f"host {pool}"] = result.table, result.pooled.residual
    labels = [i % 2 for i in range(12)]
    probes = saewb.sparse_probe(world.model, world.topk, a + b, labels, ks=[1, 3], C=1.0, train=0.5, progress=False)
    results["host maxima"] = [(one.index, one.activations) for one in result.maxima(world.model, 3)]
    results["host probes"] = probes.to_frame()
    results["host direction"] = result.direction().W_dec
    return results


@case("absorption", "Absorption", "scr_tpp", "ScrTpp", host_products="pooled values and probes are on the host")
def saebench(world):
    words = {f"w{i}": i % 3 for i in range(27)}
    how = {"progress": False, "max_k": 2}
    absorbed = saewb.absorption(world.model, {"a": world.topk}, labels=words, **how)
    texts = [" ".join(f"w{(i * i + i * j + j) % 27}" for j in range(3 + i % 5)) for i in range(24)]
    labels = [i % 3 for i in range(24)]
    perturbed = saewb.scr_tpp(world.model, {"a": world.topk}, texts, labels, ns=[2], progress=False)
    return {"host absorbed": absorbed.to_frame().drop(columns="latents"), "host perturbed": perturbed.to_frame()}


@case("meta_sae", "MetaSAE")
def meta_sae(world):
    result = saewb.meta_sae(world.topk, width=6, k=2, n_steps=3, batch=16)
    return {"sae": world.drawn([result.sae]), "host table": world.drawn([result.to_frame()])}


@case("directions", "neurons", "difference_of_means")
def directions(world):
    vectors = {"a": world.randn(16), "b": world.randn(16, seed=1)}
    neurons = saewb.neurons(world.model, "blocks.1.mlp.hook_post")
    means = saewb.difference_of_means(world.model, world.texts[:6], world.texts[6:], HOOK, progress=False)
    return {
        "neurons": (neurons(world.randn(3, neurons.d_in)), neurons.W_dec),
        "host directions": saewb.directions(vectors, HOOK).W_dec,
        "host means": (means.W_dec, means.b_enc),
    }


# -- statistics --------------------------------------------------------------------------------------------------------


@case("superposition")
def superposition(world):
    overlap = saewb.superposition(world.randn(50, 16), neighbors=3)
    return {f"host {name}": value for name, value in vars(overlap).items()}


@case("coactivation", "CoactivationStream", "Coactivation")
def coactivation(world):
    acts = [torch.relu(world.randn(30, 20, seed=i)) for i in range(3)]
    counts = saewb.coactivation(acts)
    pairs = saewb.CoactivationStream(20, 12, device=world.device)
    pairs.update(acts[0], torch.relu(world.randn(30, 12, seed=9)))
    counts.save(world.folder / "counts.safetensors")
    loaded = type(counts).load(world.folder / "counts.safetensors", device=world.device)
    pairs, rows = pairs.result(), [0, 3, 5]
    return {
        "counts": counts.counts(rows, rows),
        "all": (counts.phi(rows, rows), counts.jaccard(rows, rows), counts.correlation(rows, rows)),
        "pairs": (pairs.counts(rows, rows), pairs.phi(rows, rows)),
        "tables": (counts.partners(rows, 4), counts.top_pairs(5, min_together=1)),
        "stats": counts.stats(),
        "loaded": loaded.counts(rows, rows),
        "sparse": saewb.coactivation([saewb.SparseLatents.from_dense(a) for a in acts]).counts(rows, rows),
    }


@case(
    "correlation_stats", "random_correlation", "random_low_rank_correlation", "LowRankCorrelation", "CorrelatedNormals"
)
def correlation(world):
    full = saewb.random_correlation(30, max_strength=0.1, device=world.device)
    low = saewb.random_low_rank_correlation(30, 4, device=world.device)
    normals = [saewb.CorrelatedNormals(c) for c in (full, low)]
    fixed = saewb.LowRankCorrelation.of(world.randn(30, 4) * 0.2)
    return {
        "matrices": world.drawn([full, low.dense()]),
        "stats": (saewb.correlation_stats(fixed), saewb.correlation_stats(fixed.dense())),
        "samples": world.drawn([n.sample(20, world.generator()) for n in normals]),
        "fires": world.drawn([n.fires(20, world.to(torch.full((30,), 0.1)), world.generator()) for n in normals]),
    }


METRICS = ("cosine", "density", "explained_variance", "fvu", "l0", "mse", "Reconstruction", "ReconstructionStream")


@case(*(f"metrics.{name}" for name in METRICS))
def reconstruction(world):
    x, recon = world.randn(30, 16), world.randn(30, 16, seed=1)
    stream, other = metrics.ReconstructionStream(), metrics.ReconstructionStream()
    stream.update(x, recon)
    other.update(recon, x)
    stream.merge(other)
    acts = torch.relu(recon)
    values = [getattr(metrics, name)(x, recon) for name in ("cosine", "explained_variance", "fvu", "mse")]
    return {"values": values, "latents": (metrics.l0(acts), metrics.density(acts)), "stream": stream.result()}


SYNTHETIC = [
    "FeatureDictionary",
    "Hierarchy",
    "Magnitudes",
    "Recovery",
    "RecoveryStream",
    "Sample",
    "SyntheticData",
    "HierarchyAbsorption",
    "absorption",
    "score",
    "best_matches",
    "best_ordering",
    "load_synthetic",
    "matched_sae",
    "mean_correlation_coefficient",
    "ordered_cosines",
    "orthogonalized",
    "random_dictionary",
    "recovery",
    "uniqueness",
]


@case(*(f"synthetic.{name}" for name in SYNTHETIC), host_products="the Hungarian algorithm is scipy's, documented")
def synthetic_data(world):
    dictionary = synthetic.random_dictionary(24, 16, device=world.device, bias_scale=0.1)
    hierarchy = synthetic.random_hierarchy(24, 4)
    data = synthetic.SyntheticData(
        dictionary,
        synthetic.linear(24),
        synthetic.Magnitudes("folded_normal", 1.0, 0.2),
        saewb.LowRankCorrelation.of(world.randn(24, 3) * 0.2),
        hierarchy,
        noise=0.01,
    )
    sae = synthetic.matched_sae(world.to(saewb.SAE(saewb.SAEConfig(16, 24))), dictionary, noise=0.05)
    sample = data.sample(50, world.generator())
    data.save(world.folder / "synthetic")
    rows = synthetic.orthogonalized(world.randn(24, 16)), dictionary.directions
    return {
        "dictionary": dictionary.directions,
        "sample": world.drawn([sample.activations, sample.firings.dense()]),
        "recovery": world.drawn([synthetic.recovery(sae, data, 200, batch_size=100).to_frame()]),
        "absorption": world.drawn([synthetic.absorption(data, sae, 100, batch_size=50).to_frame()]),
        "score": world.drawn([synthetic.score(data, {"a": sae}, 100, batch_size=50)]),
        "loaded": synthetic.load_synthetic(world.folder / "synthetic").dictionary.directions.cpu().sum().item(),
        "matches": synthetic.best_matches(*rows),
        "numbers": (synthetic.uniqueness(*rows), synthetic.mean_correlation_coefficient(*rows)),
        "ordering": synthetic.best_ordering(*rows),
        "cosines": synthetic.ordered_cosines(*rows),
    }


# -- data --------------------------------------------------------------------------------------------------------------


@case("stream_activations", "ActivationStream", "Activations", "stream_tensors", "stream_iterable", "stream_draws")
def streams(world):
    x = world.activations
    how = {"batch_tokens": 20, "buffer_tokens": 40, "ctx_len": 12}
    stream = saewb.stream_activations(world.model, world.texts, [HOOK, "blocks.0.attn.hook_z"], **how)
    first = [dict(next(stream).values) for _ in range(2)]
    state = stream.state()
    again = saewb.stream_activations(world.model, world.texts, [HOOK, "blocks.0.attn.hook_z"], **how)
    again.restore(state)
    return {
        "model": first,
        "restored": [dict(batch.values) for batch in (next(stream), next(again))],
        "prefetched": next(saewb.stream_activations(world.model, world.texts, HOOK, prefetch=2, **how)).values,
        "tensors": next(saewb.stream_tensors(x, batch_tokens=30, shuffle_seed=1)).values,
        "iterable": next(saewb.stream_iterable(iter(x.split(50)), batch_tokens=64, buffer_tokens=128)).values,
        "draws": next(saewb.stream_draws(lambda n, rng: world.to(torch.randn(n, 4, generator=rng)), seed=0)).values,
    }


@case("cache_activations", "ActivationCache", host_products="what is written is checked on the CPU")
def cache(world):
    folder = world.folder / "cache"
    stored = saewb.cache_activations(world.model, world.texts, HOOK, folder, 60, ctx_len=12, shard_tokens=32)
    return {"host batch": next(stored.stream(batch_tokens=20)).values, "text": str(stored)}


# -- training ----------------------------------------------------------------------------------------------------------


def trained(world, objective, steps=4, read="hook", write=None, values=None, **options):
    x = world.activations
    values = {"hook": x} if values is None else values
    options = {"batch_tokens": 60, "lr": 1e-3, "dead_after_tokens": 60, "look_every_steps": 1, **options}
    stream = saewb.stream_tensors(values, batch_tokens=options["batch_tokens"], repeat=True)
    config = saewb.TrainConfig(steps * options["batch_tokens"], **options)
    held_out = {name: value[:50] for name, value in values.items()}
    training = saewb.Training(stream, saewb.Trainee(objective, read=read, write=write), config, held_out=held_out)
    metrics = [(step.only.numbers(), step.only.numbers_and_density(), step.warnings) for step in training]
    return {"sae": training.saes["sae"], "metrics": metrics, "host state": training.state()["learners"]}


OBJECTIVES = ("Standard", "Gated", "TopK", "AbsTopK", "BatchTopK", "Matryoshka", "JumpReLU", "MatchingPursuit")


@case(*OBJECTIVES, "Training", "TrainStep")
def objectives(world):
    return {name: trained(world, objective) for name, objective in objective_registry.OBJECTIVES.items()}


@case()
def sparse_steps(world):
    names = [name for name in objective_registry.OBJECTIVES if name not in ("pursuit", "jumprelu_quadratic")]
    return {name: trained(world, objective_registry.OBJECTIVES[name], step="sparse") for name in names}


@case()
def selection_in_bf16(world):
    """The sparse step as CUDA devices take it: a product in bf16 selects, float32 decides."""
    from saewb.training.sparse_step import sparse_step

    results, x = {}, world.activations[:200]
    kinds = {
        "topk": saewb.TopK(600, k=4, aux=0.0),
        "abstopk": saewb.AbsTopK(600, k=4, aux=0.0),
        "batchtopk": saewb.BatchTopK(600, k=4, aux=0.0),
        "matryoshka": saewb.Matryoshka(600, k=4, widths=(50, 200), aux=0.0),
        "standard": saewb.Standard(600, l1=0.1),
        "jumprelu": saewb.JumpReLU(600, l0=0.1, init_threshold=1.2, bandwidth=0.2),
    }
    for name, objective in kinds.items():
        params = objective.init_params(x.shape[1], device=world.device)
        state = objective.initial_state(world.device)
        losses = sparse_step(objective, params, x, x, state, "bf16", max_density=1.0)
        gradients = {key: parameter.grad for key, parameter in params.named_parameters()}
        results[name] = losses.terms, losses.l0, losses.fvu, losses.fired, gradients
    return results


@case()
def transcoders(world):
    values = {"hook": world.activations, "out": world.activations[:, :6] * 2 + 1}
    return {
        name: trained(world, objective, write="out", values=values)
        for name, objective in objective_registry.SKIPS.items()
    }


@case("CrossCoder", "L1CrossCoder", "CrossCoderSAE", "diff", "ModelDiff")
def crosscoders(world):
    values = {"a": world.activations, "b": world.activations[:, :6] * 2 + 1}
    objectives = {
        "crosscoder": saewb.CrossCoder(24, k=4.0, exclusive=0.1, k_start=8.0, k_anneal_tokens=120),
        "l1": saewb.L1CrossCoder(24, l1=0.1),
    }
    results = {}
    for name, objective in objectives.items():
        for step in ("plain", "sparse"):
            results[name, step] = trained(world, objective, read=None, values=values, step=step)
        cross = results[name, "plain"]["sae"]
        acts = cross.encode(values)
        results[name] = acts, cross.decode(acts), cross.encode_sparse(values).dense(), cross.norms(), cross.as_sae()
    pair = {"a": values["a"], "b": values["a"].flip(1)}
    cross = trained(world, objectives["crosscoder"], read=None, values=pair)["sae"]
    return {**results, "diff": saewb.diff(cross, pair, batch_tokens=60).table}


@case("stream_pair")
def two_models(world):
    pair = {"a": world.model, "b": world.model}
    hooks, how = {"a": HOOK, "b": LATER}, {"batch_tokens": 20, "ctx_len": 12}
    both = next(saewb.stream_pair(pair, world.texts, hooks, **how)).values
    return {
        "both": both,
        "difference": next(saewb.stream_pair(pair, world.texts, hooks, difference=True, **how)).values,
    }


@case()
def normalizations(world):
    kinds = ("none", "constant", "centered", "whitened", "layer_norm", "constant_norm")
    objective = saewb.TopK(24, k=4)
    results = {kind: trained(world, objective, normalization=kind) for kind in kinds}
    fitted = saewb.JumpReLU(24, target_l0=4.0)
    return {**results, "b_dec": trained(world, objective, b_dec="mean"), "fitted": trained(world, fitted)}


@case()
def resumed(world):
    """Between two looks at the dead latents, whose counts are used later than on a CPU: the same bits."""

    def fresh():
        config = saewb.TrainConfig(24 * 60, batch_tokens=60, dead_after_tokens=60, look_every_steps=4)
        stream = saewb.stream_tensors(world.activations, batch_tokens=60, repeat=True)
        return saewb.Training(stream, saewb.TopK(200, k=2, aux=1.0), config)

    def states(training, n):
        return [training.state()["learners"] for _ in itertools.islice(training, n)]

    whole, again = fresh(), fresh()
    states(whole, 14)
    again.restore(whole.state())
    differ = list(differences(states(whole, 10), states(again, 10), 0.0))
    looked = whole.state()["learners"]["sae"]["looked"]
    return {"differ": differ, "some are dead": bool(looked.any())}


@case("train", "Run", "resume_run", "run_curves", "run_densities")
def train(world):
    how = {"hook": HOOK, "batch_tokens": 24, "buffer_tokens": 48, "ctx_len": 12, "log_every_steps": 2}
    how["look_every_steps"] = 1  # the default depends on the device
    folder = world.folder / "run"
    objective = saewb.TopK(30, k=4)
    run = saewb.train(
        world.model, world.texts, objective, n_tokens=240, folder=folder, held_out=world.texts[:3], **how
    ).wait()
    resumed = saewb.resume_run(
        folder, model=world.model, tokens=world.texts, held_out=world.texts[:3], n_tokens=288
    ).wait()
    history = resumed.history
    keep = [c for c in history.columns if "second" not in c and "per_s" not in c and history[c].dtype != object]
    return {"sae": run.sae, "resumed": resumed.sae, "history": history[keep], "state": resumed.state}


@case("doctor", host_products="it compares with the CPU")
def doctor(world):
    checks = [f for f in saewb.doctor(check=str(world.device)).findings if f.name.startswith("check: ")]
    return {"states": [(f.name, f.state, f.detail if f.state == "wrong" else "") for f in checks]}
