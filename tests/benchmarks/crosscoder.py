"""What a step of a crosscoder costs: python -m tests.benchmarks.crosscoder [--d-sae 18432] [--tokens 1024]

Losses and gradients of one batch of two points, by the sparse step and by autograd, taken in turn. Prints how many
times quicker the sparse step is.
"""

from __future__ import annotations

import torch

import saewb
from saewb.training.sparse_step import best_precision, sparse_step

from .measure import Report, Table, arguments, medians
from .train_step import activations, sparse_bias


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument("--d-sae", type=int, default=18432)
    parser.add_argument("--d-in", type=int, default=384, help="of each of the two points")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.quick:
        options.d_sae, options.d_in, options.tokens, options.repeats = 1024, 32, 128, 1
    report, d_in = Report(options), 2 * options.d_in
    x = torch.cat([activations(options.tokens, options.d_in, seed) for seed in (0, 1)], 1).to(options.device)
    objectives = {
        "CrossCoder": saewb.CrossCoder(options.d_sae, k=float(options.k)),
        "L1CrossCoder": saewb.L1CrossCoder(options.d_sae, l1=1.0),
    }
    for name, objective in objectives.items():
        params = objective.init_params(d_in, device=options.device)
        if name == "L1CrossCoder":  # with as many latents on as after training
            params.b_enc.data.copy_(sparse_bias(params.W_enc.detach(), x, options.k))
        report.add(_steps(name, objective, params, x, options))


def _steps(name, objective, params, x, options) -> Table:
    state, precision = objective.initial_state(options.device), best_precision(x.device)

    def by_autograd() -> None:
        params.zero_grad(set_to_none=True)
        objective.losses(params, x, x, state).total.backward()

    def by_pairs() -> None:
        assert sparse_step(objective, params, x, x, state, precision) is not None

    took = medians({"sparse step": by_pairs, "autograd": by_autograd}, options.repeats, options.device)
    ratio = f"the sparse step is {took['autograd'] / took['sparse step']:.1f} times as quick as autograd"
    title = f"{name}, {options.tokens} tokens of 2 x {options.d_in}, {options.d_sae:,} latents: {ratio}"
    return Table.made(title, took, "autograd")


if __name__ == "__main__":
    main()
