"""What one training step costs: `python -m tests.benchmarks.train_step [--objective topk] [--d-sae 4608] [--memory]`.

Whole steps (losses, gradients, clipping, Adam) on the same batch from the same weights, the candidates taken in turn so
that a busy machine troubles all alike: saewb by sparse steps in full precision and with a low-precision product
selecting, saewb by autograd, and sae-lens and, for TopK, sparsify where they are installed. Beside the medians: how
many times quicker than sae-lens (or autograd) a step is, paired, by the clock and in processor time (the surer figure
on a busy machine); how far the first step's squared error and loss are from autograd's; and with --memory the peak
memory of a fresh process above what importing and the data took (Linux). Passes or fails nothing.

Latents of the objectives without a k get biases with which k are on per token, as after training.
"""

import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import threading
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import saewb
from saewb.kernels.precision import next_higher_precision
from saewb.kernels.threads import sleep_while_contended
from saewb.training.sparse_step import best_precision, clipped_step, sparse_step

from .measure import Report, Row, Table, arguments, busy_process, has, peak_mb, reset_peak, seconds

OBJECTIVES = ("topk", "abstopk", "batchtopk", "matryoshka", "standard", "jumprelu", "gated")


def activations(n, d_in, seed=0):
    """Sparse sums of 8,192 random directions, some often and most seldom, with noise and a mean."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(8192, d_in, generator=rng), dim=1)
    weight = torch.arange(1, 8193).float() ** -0.5
    which = torch.multinomial(weight, n * 24, replacement=True, generator=rng).view(n, 24)
    size = torch.exp(0.5 * torch.randn(n, 24, generator=rng))
    x = torch.nn.functional.embedding_bag(which, directions, per_sample_weights=size, mode="sum")
    x += 0.05 * torch.randn(n, d_in, generator=rng) + 0.3
    return x * (d_in**0.5 / x.norm(dim=1).mean())


def objective_for(name, d_sae, k, rows):
    """The objective as sae-lens has it, with free rows unless told otherwise."""
    free = {"rows": rows, "init_norm": 1.0 if rows == "unit" else 0.1}
    return {
        "topk": lambda: saewb.TopK(d_sae, k, aux=1.0, **free),
        "abstopk": lambda: saewb.AbsTopK(d_sae, k, aux=1.0, **free),
        "batchtopk": lambda: saewb.BatchTopK(d_sae, k, aux=1.0, **free),
        "matryoshka": lambda: saewb.Matryoshka(d_sae, k, widths=(d_sae // 8, d_sae // 2), aux=1.0, **free),
        "standard": lambda: saewb.Standard(d_sae, l1=1.0, **free),
        "jumprelu": lambda: saewb.JumpReLU(d_sae, l0=1.0, **free),
        "gated": lambda: saewb.Gated(d_sae, l1=1.0, frozen=False, **free),
    }[name]()


def sparse_bias(W_enc, x, k):
    """With this bias each latent is on for its share of tokens, k per token together."""
    pre = x[:1024] @ W_enc
    return -pre.kthvalue(int(len(pre) * (1 - k / W_enc.shape[1])), dim=0).values


def evenly(n, share):
    """A mask of this share of n latents, spread over them."""
    steps = (torch.arange(n + 1, dtype=torch.float64) * share).floor()
    return steps[1:] > steps[:-1]


def weights(name, objective, x, k):
    """Weights to begin with."""
    params = objective.init_params(x.shape[1])
    if name in ("standard", "jumprelu", "gated"):
        bias = sparse_bias(params.W_enc.detach(), x, k)
        for bias_name in ("b_enc", "b_gate", "b_mag"):
            if bias_name in params._parameters:
                params.get_parameter(bias_name).data.copy_(bias)
    return params


def ours(name, options, how, x):
    """A saewb step by `how`: "plain", or a precision of the sparse one."""
    objective = objective_for(name, options.d_sae, options.k, options.rows)
    params = weights(name, objective, x, options.k).to(x.device)
    state = objective.initial_state(x.device)
    if options.dead_frac:
        state = state.with_dead(evenly(objective.d_sae, options.dead_frac).to(x.device))
    optimizer = torch.optim.Adam(params.parameters(), lr=options.lr, fused=True)

    def step(batch):
        if how == "plain":
            params.zero_grad(set_to_none=True)
            losses = objective.losses(params, batch, batch, state)
            losses.total.backward()
        else:
            losses = sparse_step(objective, params, batch, batch, state, how)
            assert losses is not None, "too dense"
        if objective.rows == "unit":
            saewb.training.objectives.project_gradient(params)
        clipped_step(optimizer, params.parameters(), 1.0)
        saewb.training.objectives.constrain(params, objective.rows)
        return losses.terms["mse"].detach(), losses.total.detach()

    return step


def peer(name, options, x):
    """A sae-lens step on the same weights."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    size = {"d_in": x.shape[1], "d_sae": options.d_sae, "device": str(x.device)}
    kinds = {
        "topk": ("TopK", {"k": options.k}),
        "batchtopk": ("BatchTopK", {"k": options.k}),
        "matryoshka": (
            "MatryoshkaBatchTopK",
            {"k": options.k, "matryoshka_widths": [options.d_sae // 8, options.d_sae // 2, options.d_sae]},
        ),
        "standard": ("Standard", {"l1_coefficient": 1.0}),
        "jumprelu": ("JumpReLU", {"l0_coefficient": 1.0}),
        "gated": ("Gated", {"l1_coefficient": 1.0}),
    }
    if name not in kinds:
        return None
    kind, own = kinds[name]
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(getattr(sae_lens, f"{kind}TrainingSAEConfig")(**size, **own))
    params = weights(name, objective_for(name, options.d_sae, options.k, options.rows), x, options.k)
    for key, value in params.state_dict().items():
        if hasattr(sae, key):
            getattr(sae, key).data.copy_(value)
    del params
    batches = itertools.repeat(x)
    config = SAETrainerConfig(
        total_training_samples=10**9,
        train_batch_size_samples=len(x),
        lr=options.lr,
        lr_end=options.lr,
        device=str(x.device),
    )
    trainer = SAETrainer(config, sae, batches)
    dead = evenly(options.d_sae, options.dead_frac) if options.dead_frac else None

    def step(batch):
        if dead is not None:
            trainer.n_forward_passes_since_fired[dead] = 10**6
        output = trainer.step(batch)
        trainer.n_training_steps += 1
        return output.losses["mse_loss"].detach(), output.loss.detach()

    return step


def sparsify(options, x):
    """A step of EleutherAI's sparsify on the same weights, as its `Trainer` makes it with Adam: it does not clip."""
    from sparsify import SparseCoder, SparseCoderConfig

    d_in, unit = x.shape[1], options.rows == "unit"
    config = SparseCoderConfig(num_latents=options.d_sae, k=options.k, normalize_decoder=unit)
    coder = SparseCoder(d_in, config, device=str(x.device), dtype=torch.float32)
    params = weights("topk", objective_for("topk", options.d_sae, options.k, options.rows), x, options.k).state_dict()
    coder.encoder.weight.data.copy_(params["W_enc"].T)
    coder.encoder.bias.data.copy_(params["b_enc"])
    coder.W_dec.data.copy_(params["W_dec"])
    coder.b_dec.data.copy_(params["b_dec"])
    optimizer = torch.optim.Adam(coder.parameters(), lr=options.lr)
    fired = torch.zeros(options.d_sae, dtype=torch.bool, device=x.device)

    def step(batch):
        if unit:
            coder.set_decoder_norm_to_unit_norm()
        out = coder(batch)
        fired[out.latent_indices.flatten()] = True
        out.fvu.backward()
        if unit:
            coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        mse = (out.fvu * (batch - batch.mean(0)).square().sum() / len(batch)).detach()
        return mse, mse

    return step


def candidates(name, options, x):
    """The steps to compare, by name."""
    result = {"saewb": lambda: ours(name, options, "full", x)}
    best = best_precision(x.device)
    for how in dict.fromkeys((next_higher_precision(best, x.device), best)) if best != "full" else ():
        if how != "full":
            result[f"saewb, {how} selects"] = lambda how=how: ours(name, options, how, x)
    if not options.no_plain:
        result["saewb, autograd"] = lambda: ours(name, options, "plain", x)
    if has("sae_lens") and name != "abstopk" and not options.no_peer:
        result["sae-lens"] = lambda: peer(name, options, x)
    if has("sparsify") and name == "topk" and not (options.no_peer or options.dead_frac):
        result["sparsify"] = lambda: sparsify(options, x)
    return result


def medians(steps, x, repeats):
    """(clock, processors) in milliseconds of each step and (mse, loss) of the first; the first round warms up."""
    times, first = {name: [] for name in steps}, {}
    for n in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter(), time.process_time()
            result = step(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if n:
                times[name].append(((time.perf_counter() - start[0]) * 1e3, (time.process_time() - start[1]) * 1e3))
            else:
                first[name] = tuple(float(value) for value in result)
    return times, first


def measured_alone(name, candidate, options):
    """Peak memory of three steps in a fresh process, above import and data, in MB."""
    return fresh(name, candidate, options)["peak_mb"]


def fresh(name, candidate, options, *more, busy=False):
    """What a fresh process with this candidate alone prints."""
    command = [sys.executable, "-m", "tests.benchmarks.train_step", "--objective", name, "--alone", candidate, *more]
    for key in ("d_in", "d_sae", "batch", "k", "rows", "dead_frac", "repeats", "device"):
        command += ["--" + key.replace("_", "-"), str(getattr(options, key))]
    with busy_process(busy):
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    return json.loads(done.stdout.splitlines()[-1])


def measured_busy(name, candidate, options):
    """Median seconds of a step in fresh processes: on its own, beside a busy process, beside a busy cell."""
    calls = {"quiet": (), "process": (), "cell": ("--cell",)}
    still = ("--pace", "--lr", "1e-9")  # after many steps on one batch, more latents are on
    return [
        fresh(name, candidate, options, *still, *more, busy=by == "process")["seconds"] for by, more in calls.items()
    ]


def pace(options, x):
    """The fresh process's part: as a run makes its steps, whose threads sleep where cores are contended."""
    ours = options.alone.startswith("saewb")
    with sleep_while_contended() if ours else nullcontext(), busy_cell() if options.cell else nullcontext():
        step = candidates(options.objective, options, x)[options.alone]()
        start = time.perf_counter()
        while time.perf_counter() - start < 4:  # kernels, memory, and how threads wait
            step(x)
        times = []
        while len(times) < 3 * options.repeats:
            times.append(seconds(lambda: step(x)))
    print(json.dumps({"seconds": statistics.median(times)}))


@contextmanager
def busy_cell():
    """What a user's cell may do meanwhile: it computes with torch all the time."""
    over, x = threading.Event(), torch.randn(512, 512)

    def work():
        while not over.is_set():
            x @ x

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def alone(options, x):
    """The fresh process's part."""
    if options.alone in ("sae-lens", "sparsify"):
        importlib.import_module(options.alone.replace("-", "_"))
    torch._dynamo  # noqa: B018  importing it is not the step's memory
    held = reset_peak()
    step = candidates(options.objective, options, x)[options.alone]()
    for _ in range(3):
        step(x)
    print(json.dumps({"peak_mb": peak_mb() - held}))


def table(name, options, x):
    """One objective's candidates."""
    steps = {label: make() for label, make in candidates(name, options, x).items()}
    times, first = medians(steps, x, options.repeats)
    del steps
    base = "sae-lens" if "sae-lens" in times else "saewb, autograd" if "saewb, autograd" in times else "saewb"
    reference = first.get("saewb, autograd", first["saewb"])
    rows = []
    for label, values in times.items():
        clock = statistics.median(v[0] for v in values) / 1e3
        faster, less = (
            statistics.median(b[i] / max(v[i], 1e-3) for b, v in zip(times[base], values, strict=True)) for i in (0, 1)
        )
        off = max(abs(a / b - 1) for a, b in zip(first[label], reference, strict=True))
        note = f"{faster:.1f} x faster than {base}, {less:.1f} x less processor time; loss off by {off:.0e}"
        memory = f"; peak +{measured_alone(name, label, options):.0f} MB" if options.memory else ""
        rows.append(Row(label, clock, note + memory))
    size = f"{options.batch:,} tokens x {options.d_in}, {options.d_sae:,} latents, k {options.k}, {options.rows} rows"
    dead = f", {options.dead_frac:.0%} dead" if options.dead_frac else ""
    return Table(f"a training step, {name}: {size}{dead}", tuple(rows), "saewb")


def busy_table(name, options, x):
    """One objective's candidates, each alone and beside a busy process."""
    labels, rows = list(candidates(name, options, x)), []
    paces = {label: measured_busy(name, label, options) for label in labels}
    base = "sae-lens" if "sae-lens" in paces else labels[0]
    for label, (quiet, process, cell) in paces.items():
        note = f"beside a busy process {process * 1e3:,.0f} ms: {process / quiet:.2f} x slower, "
        note += f"{paces[base][1] / process:.1f} x faster than {base} there; "
        rows.append(Row(label, quiet, f"{note}beside a busy cell {cell * 1e3:,.0f} ms: {cell / quiet:.2f} x slower"))
    size = f"{options.batch:,} tokens x {options.d_in}, {options.d_sae:,} latents, k {options.k}, {options.rows} rows"
    return Table(f"a training step in a process of its own, {name}: {size}", tuple(rows), "saewb")


def main() -> None:
    """Measure."""
    parser = arguments(__doc__)
    parser.add_argument("--objective", default="topk", help=f"one of {', '.join(OBJECTIVES)}, several with commas; all")
    parser.add_argument("--d-in", type=int, default=576)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--batch", type=int, default=4096, help="tokens")
    parser.add_argument("--k", type=int, default=32, help="latents on per token")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", choices=("unit", "free"), default="free")
    parser.add_argument("--dead-frac", type=float, default=0.0, help="share of latents that are dead")
    parser.add_argument("--memory", action="store_true", help="peak memory too, each candidate in a process of its own")
    parser.add_argument("--no-plain", action="store_true", help="without the autograd step")
    parser.add_argument("--no-peer", action="store_true", help="without sae-lens and sparsify")
    parser.add_argument("--busy", action="store_true", help="each candidate alone, beside a busy process and cell")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    parser.add_argument("--pace", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--cell", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.quick:
        options.d_sae, options.batch, options.repeats, options.d_in = 1024, 256, 1, 64
    x = activations(options.batch, options.d_in).to(options.device)
    if options.alone:
        (pace if options.pace else alone)(options, x)
        return
    report = Report(options)
    for name in OBJECTIVES if options.objective == "all" else options.objective.split(","):
        report.add((busy_table if options.busy else table)(name, options, x))


if __name__ == "__main__":
    main()
