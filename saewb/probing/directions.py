"""Directions and neurons as latents: SAEs that are indexed, attached, steered and shown like any other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb.errors import explain
from saewb.models import hook_points
from saewb.models.capture import capture, eval_mode
from saewb.models.tokenizer import text_ids
from saewb.probing.pooling import Positions, TokenizedTexts, pool_activation
from saewb.sae.config import SAEConfig
from saewb.sae.sae import SAE

Gate = Literal["linear", "relu"]


def directions(
    vectors: Mapping[str, Float[Tensor, " d"]],
    hook: str,
    *,
    gate: Gate = "linear",
    bias: Mapping[str, float] | None = None,
    model: str | None = None,
) -> SAE:
    """An SAE with one latent per direction, for vectors of any origin: differences of means, probes, PCA, refusal.

        activation_i = gate(x . v_i / ||v_i||^2 + bias_i)          W_dec[i] = v_i

    So the activation of v_i itself is 1, steering with value c adds c v_i, and ablating removes the component of the
    activation along v_i. Directions that are not orthogonal do not know of one another: together they do not
    reconstruct what they span.

    Args:
        vectors: by name, all `[d]`, of any length but 0; the names are in `sae.cfg.metadata["latent_names"]`.
        hook: hook point that they are read from and written to.
        gate: "linear" keeps the sign; "relu" keeps what is positive.
        bias: added to the activation, by name; 0 where a name is missing.
        model: name of the language model, for the configuration.

    Returns:
        The SAE, float32 on the CPU, latents in the order of `vectors`.

    Raises:
        TypeError: if `vectors` is no mapping of names to vectors.
        ValueError: without vectors; for vectors of different or zero lengths, or infinities; for an unknown gate, or a
            bias without a vector.

    Example:
        >>> import saewb
        >>> sae = saewb.directions({"up": torch.tensor([0.0, 2.0])}, "blocks.2.hook_resid_post")
        >>> sae.encode(torch.tensor([[5.0, 2.0], [0.0, -1.0]])).tolist()
        [[1.0], [-0.5]]
    """
    rows = _matrix(vectors)
    if gate not in get_args(Gate):
        raise ValueError(explain(f"directions got gate={gate!r}.", want="'linear' or 'relu'"))
    bias = dict(bias or {})
    if unknown := sorted(set(bias) - set(vectors)):
        raise ValueError(explain(f"directions got a bias for {unknown}.", want=", ".join(map(repr, vectors))))
    cfg = _config(rows.shape[1], len(rows), gate, hook=hook, model=model, metadata={"latent_names": list(vectors)})
    tensors = {
        "W_enc": (rows / rows.square().sum(1, keepdim=True)).T.contiguous(),
        "b_enc": torch.tensor([float(bias.get(name, 0.0)) for name in vectors]),
        "W_dec": rows,
        "b_dec": torch.zeros(rows.shape[1]),
    }
    return SAE.from_tensors(cfg, tensors)


def _matrix(vectors: Any) -> Float[Tensor, "n d"]:
    if not isinstance(vectors, Mapping):
        what = f"directions got a {type(vectors).__name__}."
        raise TypeError(explain(what, want="vectors by name", fix='saewb.directions({"name": vector}, hook)'))
    if not vectors:
        raise ValueError(explain("directions got no vectors.", want="at least one"))
    rows = {name: torch.as_tensor(vector).detach().to("cpu", torch.float32) for name, vector in vectors.items()}
    shapes = {name: tuple(row.shape) for name, row in rows.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        raise ValueError(explain(f"directions got vectors of shapes {shapes}.", want="one axis, of one length"))
    for name, row in rows.items():
        if not bool(row.isfinite().all()) or not bool(row.any()):
            what = f"the vector {name!r} is {'not finite' if bool(row.any()) else '0'}."
            raise ValueError(explain(what, want="a direction"))
    return torch.stack(list(rows.values()))


def _config(d_in: int, n: int, gate: Gate, **fields: Any) -> SAEConfig:
    # All latents by magnitude: what is not 0 passes, with its sign.
    activation = {"activation": "relu"} if gate == "relu" else {"activation": "abstopk", "k": n}
    return SAEConfig(d_in=d_in, d_sae=n, **activation, **fields)


@torch.no_grad()
def neurons(model: nn.Module, hook: str, *, gate: Gate = "linear") -> SAE:
    """The neurons of a hook point as an SAE with one latent per dimension: the identity.

    At `mlp.hook_post` it writes what a neuron adds to the output of the MLP, at `hook_z` what a dimension of a head
    adds to that of attention: `W_dec` are the rows of W_out or W_O, `b_dec` is the bias, and its output is the model's
    own. At every other point it writes where it reads. Its encoder has d x d numbers: 0.5 GB for 11,008 neurons.

    Args:
        model: a TransformerBridge or HookedTransformer.
        hook: hook point, e.g. "blocks.2.mlp.hook_post".
        gate: "linear" keeps the sign; "relu" keeps what is positive.

    Returns:
        The SAE, of the dtype and on the device of the model.

    Raises:
        ValueError: for an unknown point or gate, or one whose activation is no vector per token.

    References:
        Bricken et al. 2023, "Towards Monosemanticity", where neurons are the baseline.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> sae = saewb.neurons(model, "blocks.2.mlp.hook_post")
        >>> sae.d_sae, sae.cfg.hook_out
        (384, 'blocks.2.hook_mlp_out')
    """
    if gate not in get_args(Gate):
        raise ValueError(explain(f"neurons got gate={gate!r}.", want="'linear' or 'relu'"))
    point = hook_points.resolve(model, hook)
    tokens = text_ids(model, "a").to(next(model.parameters()).device)
    with eval_mode(model):
        activation = capture(model, tokens, [hook])[hook]
    if activation.ndim not in (3, 4) or not activation.is_floating_point():
        what = f"{hook!r} gives activations of shape {tuple(activation.shape)}."
        raise ValueError(explain(what, want="a point with [batch, pos, d] or [batch, pos, heads, d_head]"))
    d = activation.shape[2:].numel()
    eye = torch.eye(d, dtype=activation.dtype, device=activation.device)
    written, bias, hook_out = _written(model, point, d)
    w_dec = eye if written is None else written.to(eye)
    b_dec = w_dec.new_zeros(w_dec.shape[1]) if bias is None else bias.to(eye)
    name = str(model.cfg.model_name)
    cfg = _config(d, d, gate, d_out=w_dec.shape[1], hook=hook, hook_out=hook_out, model=name)
    tensors = {"W_enc": eye, "b_enc": eye.new_zeros(d), "W_dec": w_dec.clone(), "b_dec": b_dec.clone()}
    return SAE.from_tensors(cfg, tensors)


def _written(model: nn.Module, point: hook_points.HookPoint, d: int) -> tuple[Tensor | None, Tensor | None, str | None]:
    """What each dimension of a point writes, the bias, and where; None where it writes at the point itself."""
    block = None if point.layer is None else model.blocks[point.layer]
    if block is None:
        return None, None, None
    if any(name.endswith("mlp.hook_post") for name in point.names):
        part, weight, bias, end = block.mlp, "W_out", "b_out", "hook_mlp_out"
    elif any(name.endswith("attn.hook_z") for name in point.names):
        part, weight, bias, end = block.attn, "W_O", "b_O", "hook_attn_out"
    else:
        return None, None, None
    matrix = getattr(part, weight, None)
    if not isinstance(matrix, Tensor) or matrix.numel() != d * model.cfg.d_model:  # experts have one each
        return None, None, None
    offset = getattr(part, bias, None)
    is_vector = isinstance(offset, Tensor) and offset.shape == (model.cfg.d_model,)
    return matrix.detach().reshape(d, -1), offset.detach() if is_vector else None, f"blocks.{point.layer}.{end}"


def difference_of_means(
    model: nn.Module,
    a: Any,
    b: Any,
    hook: str,
    *,
    name: str = "a - b",
    pool: Literal["mean", "last"] = "mean",
    positions: Positions = None,
    ctx_len: int | None = None,
    gate: Gate = "linear",
    progress: bool = True,
) -> SAE:
    """The difference between the mean activations of two sets of texts, as an SAE with one latent.

        v = mean over texts of a (activation, pooled over tokens) - the same of b

    Args:
        model: a TransformerBridge or HookedTransformer.
        a: texts, chats or token ids.
        b: others.
        hook: hook point.
        name: of the direction.
        pool: the mean over a text's tokens that are not special, or the last of them.
        positions: tokens that count, as for `saewb.contrast`.
        ctx_len: tokens of a text at most; longer ones are cut.
        gate: as for `directions`; its activation is 0 half way between the means, 0.5 at that of a.
        progress: whether to show a progress bar.

    Returns:
        The SAE, on the CPU: steering with value 1 moves by the difference.

    Raises:
        ValueError: as `saewb.contrast`; if the means are equal.

    References:
        Marks & Tegmark 2023, arXiv:2310.06824 (mass-mean probe); Rimsky et al. 2023, arXiv:2312.06681 (steering).

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> science, rivers = ["The physicist won a prize."] * 2, ["The river flows south."] * 2
        >>> sae = saewb.difference_of_means(model, science, rivers, "blocks.2.hook_resid_post", progress=False)
        >>> sae.d_sae, sae.cfg.metadata["latent_names"]
        (1, ['a - b'])
    """
    if pool not in ("mean", "last"):
        raise ValueError(explain(f"difference_of_means got pool={pool!r}.", want="'mean' or 'last'"))
    means = []
    for side, texts in (("a", a), ("b", b)):
        tokenized = TokenizedTexts.of(model, texts, name=side, positions=positions, ctx_len=ctx_len)
        means.append(pool_activation(model, hook, tokenized, pool, progress=progress).mean(0))
    return mean_difference(*means, hook, name=name, gate=gate, model=str(model.cfg.model_name))


def mean_difference(
    mean_a: Float[Tensor, " d"], mean_b: Float[Tensor, " d"], hook: str, *, name: str, gate: Gate, model: str | None
) -> SAE:
    """The latent of `difference_of_means`, from the means: 0 half way between them.

    Raises:
        ValueError: if they are equal.

    Example:
        >>> sae = mean_difference(torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]), "hook_embed",
        ...                       name="x", gate="linear", model=None)
        >>> sae.encode(torch.tensor([[3.0, 7.0], [1.0, 7.0]])).tolist()
        [[0.5], [-0.5]]
    """
    v = (mean_a - mean_b).float()
    if not bool(v.any()):
        raise ValueError(explain("the means of a and b are equal.", want="texts that differ"))
    middle = (mean_a + mean_b).float() / 2
    return directions({name: v}, hook, gate=gate, bias={name: -float(middle @ v / (v @ v))}, model=model)
