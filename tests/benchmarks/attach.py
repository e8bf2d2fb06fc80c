"""What attaching costs: `python -m tests.benchmarks.attach [--model tiny|smollm2-135m]`.

Entering and leaving, with no forward pass, and the forward pass with ten top-k SAEs, against the bare forward pass of
the same run; and against sae-lens where it is installed. Entering and leaving is measured twice: in turn with the
peer, after which the processor has to fetch everything from memory again, and again and again by itself; each beside
plain hooks, which do nothing, on the same points. Prints medians and ratios; passes or fails nothing.
"""

import tempfile
import warnings

import torch

import saewb

from .measure import Report, Table, arguments, has, medians


def saes_for(model, n):
    """`n` random top-k SAEs, 8 times as wide as the model, spread over its layers."""
    d_in = model.cfg.d_model
    places = [f"blocks.{i}.{p}" for i in range(model.cfg.n_layers) for p in ("hook_resid_post", "hook_mlp_out")]
    chosen = [places[round(i * (len(places) - 1) / max(1, n - 1))] for i in range(n)]
    config = {"d_in": d_in, "d_sae": 8 * d_in, "activation": "topk", "k": 32}
    return [saewb.SAE(saewb.SAEConfig(hook=hook, **config), seed=i) for i, hook in enumerate(dict.fromkeys(chosen))]


def peer_saes(saes):
    """The same ones in sae-lens."""
    import sae_lens

    with tempfile.TemporaryDirectory() as folder:
        return [sae_lens.SAE.load_from_disk(saewb.save_sae(sae, f"{folder}/{i}")) for i, sae in enumerate(saes)]


def peer_model(name, device):
    """Another Bridge on the same weights, of the class that sae-lens attaches to."""
    import sae_lens

    model = saewb.load_model(name, device=device)
    model.__class__ = sae_lens.SAETransformerBridge  # as the peer's own boot_transformers does
    model._acts_to_saes, model._transcoder_output_hooks = {}, {}
    return model


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    report, device = Report(options), options.device
    model = saewb.load_model(options.model, device=device)
    tokens = torch.randint(5, 2000, (4, 128), generator=torch.Generator().manual_seed(0)).to(device)
    many = [sae.to(device) for sae in saes_for(model, 8 if options.model == "tiny" else 10)]
    n, there = len(many), dict(model.hook_dict)

    def enter_and_leave(saes):
        saewb.attach(model, saes).detach()

    def hooks_only(saes):
        points = [there[sae.cfg.hook] for sae in saes]
        for point in points:
            point.add_hook(lambda activation, hook: None)
        for point in points:
            point.remove_hooks()

    def forward(**how):
        with torch.no_grad(), saewb.attach(model, many, **how):
            model(tokens)

    def bare():
        with torch.no_grad():
            model(tokens)

    def entering(saes):
        return {"saewb": lambda: enter_and_leave(saes), "plain hooks": lambda: hooks_only(saes)}

    one, all_of_them = entering(many[:1]), entering(many)
    passes = {"bare": bare, "saewb": forward, "saewb, error term": lambda: forward(error_term=True)}
    if has("sae_lens"):
        theirs = peer_model(options.model, device)
        their_saes = [sae.to(device) for sae in peer_saes([sae.to("cpu") for sae in many])]
        many = [sae.to(device) for sae in many]

        def peer_enter(saes):
            with theirs.saes(saes=saes):
                pass

        def peer_forward(error_term):
            with torch.no_grad():
                theirs.run_with_saes(tokens, saes=their_saes, use_error_term=error_term)

        one["sae-lens"] = lambda: peer_enter(their_saes[:1])
        all_of_them["sae-lens"] = lambda: peer_enter(their_saes)
        passes |= {"sae-lens": lambda: peer_forward(False), "sae-lens, error term": lambda: peer_forward(True)}
    enters = 20 if options.quick else 200
    for calls, what in ((one, "1 SAE"), (all_of_them, f"{n} SAEs")):
        title = f"attach and detach {what}, no forward pass, {options.model}"
        took = medians(calls, enters, device)
        for name in ("saewb", "plain hooks"):
            took |= {f"{name}, again and again": medians({name: calls[name]}, enters, device)[name]}
        report.add(Table.made(title, took, "saewb"))
    took = medians(passes, 2 if options.quick else options.rounds, device)
    report.add(Table.made(f"a forward pass of 4 x 128 tokens with {n} top-k SAEs, {options.model}", took, "bare"))


if __name__ == "__main__":
    main()
