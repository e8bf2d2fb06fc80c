"""Benchmarks of `python -m tests.gpu`."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from helpers import tiny_models

import saewb
from saewb.training.objectives import Params, constrain, project_gradient
from saewb.training.sparse_step import clipped_step, sparse_step

LR = 1e-5
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Sizes:
    """What is measured at which size."""

    d_in: int
    d_sae: tuple[int, ...]
    k: int
    batch: int
    layers: int
    ctx_len: int
    rounds: int
    steps: int

    @property
    def hook(self):
        return f"blocks.{self.layers // 2}.hook_resid_post"


LARGE = Sizes(2304, (65_536, 262_144), 64, 4096, 8, 256, 5, 16)
SMALL = Sizes(64, (512, 1024), 8, 256, 2, 32, 1, 2)


@dataclass(frozen=True)
class Speeds:
    """What this device does at best, as measured."""

    bandwidth: float  # bytes per second, read and written by a copy
    products: float  # multiplications and additions per second of a float32 product

    def limit(self, n_bytes, operations):
        """The least seconds for these."""
        return max(n_bytes / self.bandwidth, operations / self.products)


def run(device, small, clock, table):
    """Measure everything, while there is time."""
    sizes = SMALL if small else LARGE
    speeds = measured_speeds(device, small, clock, table)
    for d_sae, name in itertools.product(sizes.d_sae, ("topk", "batchtopk", "jumprelu")):
        steps(device, sizes, d_sae, name, speeds, clock, table)
    if clock.is_over:
        table.add("**with a model**", note="left out: no time")
        return
    model = language_model(device, sizes)
    attached(model, device, sizes, clock, table)
    index(model, device, sizes, clock, table)
    end_to_end(model, device, sizes, clock, table)


def measured_speeds(device, small, clock, table):
    n = 2**20 if small else 2**28
    x, y = torch.ones(n, device=device), torch.empty(n, device=device)
    copy, _ = clock.timed(lambda: y.copy_(x), 5)
    m = 256 if small else 8192
    a, b = torch.ones(m, m, device=device), torch.ones(m, m, device=device)
    product, _ = clock.timed(lambda: torch.mm(a, b), 5)
    speeds = Speeds(2 * FLOAT * n / copy, 2 * m**3 / product)
    table.add("a copy", copy, per_second=f"{speeds.bandwidth / 1e9:,.0f} GB")
    table.add(f"a float32 product of {m} x {m}", product, per_second=f"{speeds.products / 1e12:,.2f} T operations")
    return speeds


# -- training steps ----------------------------------------------------------------------------------------------------


def free_bytes(device):
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 4 * 2**30


def fitting(device, sizes, d_sae):
    """d_sae, halved until a dense step fits: weights, gradients, two moments; five times the pre-activations."""
    while FLOAT * d_sae * (8 * sizes.d_in + 5 * sizes.batch) > 0.8 * free_bytes(device) and d_sae > 1024:
        d_sae //= 2
    return d_sae


def objective_of(name, d_sae, k):
    return {
        "topk": lambda: saewb.TopK(d_sae, k),
        "batchtopk": lambda: saewb.BatchTopK(d_sae, k),
        "jumprelu": lambda: saewb.JumpReLU(d_sae, l0=1e-3),
    }[name]()


def activations(n, d_in, device):
    """Sparse sums of 8,192 directions, with noise, as an SAE learns from."""
    rng = torch.Generator(device).manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8192, d_in, device=device, generator=rng), dim=1)
    which = torch.randint(8192, (n, 24), device=device, generator=rng)
    size = torch.exp(0.5 * torch.randn(n, 24, device=device, generator=rng))
    x = torch.nn.functional.embedding_bag(which, directions, per_sample_weights=size, mode="sum")
    x += 0.05 * torch.randn(n, d_in, device=device, generator=rng)
    return x * (d_in**0.5 / x.norm(dim=1).mean())


def parameters(name, x, d_sae, k):
    """Random weights, drawn on the device; with a threshold that about k latents per token exceed."""
    rng = torch.Generator(x.device).manual_seed(1)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, x.shape[1], device=x.device, generator=rng), dim=1)
    tensors = {"W_enc": W_dec.clone().T, "W_dec": W_dec, "b_dec": x.new_zeros(x.shape[1]), "b_enc": x.new_zeros(d_sae)}
    if name == "jumprelu":
        sample = (x[:64] @ tensors["W_enc"]).flatten()
        tensors["threshold"] = x.new_full((d_sae,), float(sample.topk(64 * k).values[-1]))
    return Params(tensors, "tied")


def step_of(objective, params, how, x):
    """One optimizer step: "dense" by autograd, or a precision of the sparse step."""
    state = objective.initial_state(x.device)
    optimizer = torch.optim.Adam(params.parameters(), lr=LR, fused=True)

    def step():
        if how == "dense":
            params.zero_grad(set_to_none=True)
            objective.losses(params, x, x, state).total.backward()
        elif sparse_step(objective, params, x, x, state, how, max_density=1.0) is None:
            raise RuntimeError("the sparse step declined")
        project_gradient(params)
        clipped_step(optimizer, params.parameters(), 1.0)
        constrain(params, "unit")

    return step


def steps(device, sizes, largest, name, speeds, clock, table):
    """Dense, sparse, and sparse with a bfloat16 selection; and sae-lens where it is installed."""
    d_sae = fitting(device, sizes, largest)
    x = activations(sizes.batch, sizes.d_in, device)
    weights = sizes.d_in * d_sae
    # Both matrices are read by the forward pass, their gradients written, and Adam reads four and writes three numbers
    # per weight; the pre-activations are written once and read once. The encoder's product is dense.
    n_bytes = FLOAT * (2 * weights * (1 + 1 + 7) + 2 * sizes.batch * d_sae)
    limit = speeds.limit(n_bytes, 2 * sizes.batch * weights)
    title = f"training step, {name}, {sizes.batch:,} x {sizes.d_in:,}, {d_sae:,} latents"
    hows = {"dense": "dense", "sparse": "full", "sparse, bf16 selects": "bf16"}
    if device.type != "cuda":
        hows.pop("sparse, bf16 selects")
    for label, how in hows.items():
        _timed_step(
            f"{title}: {label}", lambda how=how: _ours(name, how, x, d_sae, sizes.k), limit, sizes, clock, table
        )
    from benchmarks.measure import has

    if has("sae_lens") and name != "jumprelu" and largest == sizes.d_sae[0]:
        _timed_step(f"{title}: sae-lens", lambda: _peer(name, x, d_sae, sizes.k), limit, sizes, clock, table)


def _ours(name, how, x, d_sae, k):
    objective = objective_of(name, d_sae, k)
    return step_of(objective, parameters(name, x, d_sae, k), how, x)


def _peer(name, x, d_sae, k):
    from benchmarks.train_step import peer

    step = peer(name, SimpleNamespace(d_sae=d_sae, k=k, rows="unit", dead_frac=0.0), x)
    return lambda: step(x)


def _timed_step(title, make, limit, sizes, clock, table):
    if clock.is_over:
        table.add(title, note="left out: no time")
        return
    try:
        seconds, peak = clock.timed(make(), sizes.rounds)
    except (RuntimeError, NotImplementedError) as error:  # also of memory
        table.add(title, note=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:90]}")
        return
    per_second = f"{sizes.batch / seconds:,.0f} tokens"
    table.add(title, seconds, limit=limit, per_second=per_second, peak=peak)


# -- with a model ------------------------------------------------------------------------------------------------------


def language_model(device, sizes):
    """A Llama of random weights, as wide as the SAEs, in bfloat16 on a GPU; drawn on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, sizes.d_in // 128)
    config = LlamaConfig(
        vocab_size=tiny_models.VOCAB,
        hidden_size=sizes.d_in,
        intermediate_size=4 * sizes.d_in,
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4 * sizes.ctx_len,
        bos_token_id=tiny_models.BOS,
    )
    with device:
        model = LlamaForCausalLM(config).eval()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return saewb.load_model(model, dtype, tokenizer=tiny_models.tokenizer())


def token_rows(sizes, n_tokens):
    rng = torch.Generator().manual_seed(0)
    rows = torch.randint(4, tiny_models.VOCAB, (-(-n_tokens // sizes.ctx_len), sizes.ctx_len), generator=rng)
    rows[:, 0] = tiny_models.BOS
    return rows


def topk_sae(device, sizes, hook):
    d_sae = fitting(device, sizes, sizes.d_sae[0])
    config = saewb.SAEConfig(sizes.d_in, d_sae, activation="topk", k=sizes.k, hook=hook)
    with torch.no_grad():
        rng = torch.Generator(device).manual_seed(0)
        W_dec = torch.randn(d_sae, sizes.d_in, device=device, generator=rng) * sizes.d_in**-0.5
        b_enc, b_dec = (torch.zeros(n, device=device) for n in (d_sae, sizes.d_in))
    return saewb.SAE.from_tensors(
        config, {"W_enc": W_dec.T.contiguous(), "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    )


def attached(model, device, sizes, clock, table):
    """A forward pass of a batch, with and without an SAE; and what entering and leaving costs."""
    tokens = token_rows(sizes, sizes.batch).to(device)
    sae = topk_sae(device, sizes, sizes.hook)

    def forward():
        with torch.no_grad():
            model(tokens)

    bare, peak = clock.timed(forward, sizes.rounds)
    size = f"{tokens.numel():,} tokens, {sizes.layers} layers of {sizes.d_in:,}"
    table.add(f"forward pass, {size}", bare, per_second=f"{tokens.numel() / bare:,.0f} tokens", peak=peak)
    with saewb.attach(model, sae):
        with_sae, peak = clock.timed(forward, sizes.rounds)
    note = f"{with_sae / bare:.2f} x the bare pass"
    table.add(f"the same with an SAE of {sae.d_sae:,} latents", with_sae, limit=bare, peak=peak, note=note)
    entering, _ = clock.timed(lambda: saewb.attach(model, sae).detach(), sizes.rounds)
    table.add("attach and detach", entering)


def index(model, device, sizes, clock, table):
    """An index pass without the part from weights."""
    if clock.is_over:
        table.add("index pass", note="left out: no time")
        return
    sae, n = topk_sae(device, sizes, sizes.hook), sizes.steps * sizes.batch
    rows = token_rows(sizes, n)
    batch = max(1, sizes.batch // sizes.ctx_len)
    how = {"batch_size": batch, "n_logits": 0, "n_nearest": 0, "skip_special_tokens": [tiny_models.BOS]}
    saewb.build_index(model, sae, rows[: 2 * batch], **how)
    seconds, peak = clock.timed(lambda: saewb.build_index(model, sae, rows, **how), 1)
    title = f"index pass, {rows.numel():,} tokens, {sae.d_sae:,} latents"
    table.add(title, seconds, per_second=f"{rows.numel() / seconds:,.0f} tokens", peak=peak)


def end_to_end(model, device, sizes, clock, table):
    """Training from token rows: the model's passes, the shuffle buffer, and steps."""
    for name in ("topk", "jumprelu"):
        if clock.is_over:
            table.add(f"training end to end, {name}", note="left out: no time")
            continue
        d_sae, n = fitting(device, sizes, sizes.d_sae[0]), sizes.steps
        rows = token_rows(sizes, 4 * sizes.batch)
        stream = saewb.stream_activations(
            model, rows, sizes.hook, batch_tokens=sizes.batch, buffer_tokens=2 * sizes.batch, repeat=True
        )
        config = saewb.TrainConfig(10 * n * sizes.batch, batch_tokens=sizes.batch, normalization="none")
        training = iter(saewb.Training(stream, objective_of(name, d_sae, sizes.k), config))
        seconds, peak = clock.timed(lambda steps=training, n=n: [next(steps) for _ in range(n)], 2)
        title = f"training end to end, {name}, {d_sae:,} latents: {n} steps"
        table.add(title, seconds, per_second=f"{n * sizes.batch / seconds:,.0f} tokens", peak=peak)
