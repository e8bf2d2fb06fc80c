"""Jacobian lens: the average effect of an activation on the final residual stream, for the words of early layers.

    J = mean over prompts and positions p of  sum over later positions t of  d h_final[t] / d h[p]     [d_model, d]

1. A prompt is run once, in `batch_size` copies, and every output dimension is a backward pass of one copy: a gradient
   of 1 on that dimension of the final residual stream at all positions at once gives a row of J.
2. The mean and the mean squared norm over prompts are all that is held, so a fit can stop and go on at any prompt.

The first 16 positions (attention sinks) and the last one are left out, as are special tokens.

References:
    Anthropic's Jacobian lens (2026), whose estimator and file of matrices these are; Hernandez et al. (2023),
    "Linearity of relation decoding in transformer language models" (arXiv:2308.09124), for Jacobians as a readout.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saewb._files import absolute, atomic_write
from saewb.data.tokens import token_rows
from saewb.errors import FormatError, explain
from saewb.features.logit_effects import project_to_residual
from saewb.fingerprint import check_same, rows_digest
from saewb.models import hook_points
from saewb.models.active import check_unmodified, model_digest
from saewb.models.capture import eval_mode
from saewb.models.forward import run_to_layer
from saewb.models.tokenizer import special_ids, special_mask
from saewb.models.unembed import logit_scale

if TYPE_CHECKING:
    import pandas as pd

_STREAM = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_out|hook_resid_pre|hook_in)")
_FORMAT = 1
_DIGESTS = ("model", "tokens")


@dataclass(frozen=True, eq=False, repr=False)
class JacobianLens:
    """Average Jacobians from hook points to the final residual stream, from `saewb.fit_jacobian_lens` or a file.

    `saewb.build_index(..., logits=lens)` lists the words of every latent through them, beside the direct ones.

    Example:
        >>> import saewb
        >>> model, sae = saewb.load_model("tiny", device="cpu"), saewb.load_sae("tiny")
        >>> texts = [d.text for d in saewb.tiny.held_out_texts()[:4]]
        >>> lens = saewb.fit_jacobian_lens(model, texts, sae.cfg.hook, n_prompts=3, ctx_len=32, batch_size=64)
        >>> lens
        JacobianLens(1 point of tiny, 3 prompts of 32 tokens, standard error 13 %)
        >>> words = lens.logits(model, sae.W_dec[748], sae.cfg.hook)
        >>> model.tokenizer.decode(words.argmax())
        ' who'
    """

    matrices: Mapping[str, Float[Tensor, "d_model d"]]
    """Jacobian at each hook point, float32 on the CPU."""
    model: str
    """Name of the model; "" if the file does not say."""
    n_prompts: int
    """Prompts that it is the mean of."""
    ctx_len: int | None = None
    """Tokens in a prompt; None if the file does not say."""
    skip_first: int = 16
    """Positions at the start of a prompt that are left out."""
    mean_squares: Mapping[str, float] = field(default_factory=dict)
    """Mean over prompts of the squared Frobenius norm of a prompt's Jacobian; empty if the file does not say."""
    digests: Mapping[str, str] | None = None
    """By content: "model", and "tokens" of the prompts; None if the file does not say."""

    def __repr__(self) -> str:
        n, errors = len(self.matrices), [self.standard_error(hook) for hook in self.matrices]
        known = [error for error in errors if not math.isnan(error)]
        length = "" if self.ctx_len is None else f" of {self.ctx_len} tokens"
        about = f"{n} point{'s' * (n != 1)}{f' of {self.model}' * bool(self.model)}, {self.n_prompts} prompt"
        about += "s" * (self.n_prompts != 1) + length
        return f"JacobianLens({about}{f', standard error {max(known):.0%}'.replace('%', ' %') if known else ''})"

    def standard_error(self, hook: str) -> float:
        """Standard error of a matrix over prompts, relative to its Frobenius norm; nan for one prompt, or if unknown.

            sqrt((mean_n |J_n|^2 - |J|^2) / (n - 1)) / |J|

        Raises:
            ValueError: if the lens has no matrix there.
        """
        name, matrix = self._find((hook,), hook)
        if self.n_prompts < 2 or name not in self.mean_squares:
            return math.nan
        square = float(matrix.double().square().sum())
        variance = max(0.0, self.mean_squares[name] - square) / (self.n_prompts - 1)
        return math.sqrt(variance / square) if square else math.nan

    def to_frame(self) -> pd.DataFrame:
        """Table with one row for each hook point: hook, norm (of the matrix), standard_error, distance.

        `distance` is the norm of J - 1, relative to that of 1: how far the point is from the final residual stream;
        nan where the point has another width.
        """
        import pandas as pd

        rows = []
        for hook, matrix in self.matrices.items():
            n_out, n_in = matrix.shape
            distance = float((matrix - torch.eye(n_out)).norm()) / math.sqrt(n_out) if n_out == n_in else math.nan
            rows.append((hook, float(matrix.norm()), self.standard_error(hook), distance))
        return pd.DataFrame(rows, columns=["hook", "norm", "standard_error", "distance"])

    def transport(
        self, x: Float[Tensor, "*any d"], hook: str, model: nn.Module | None = None, head: int | None = None
    ) -> Float[Tensor, "*any d_model"]:
        """Activations or directions at a hook point, as they are in the final residual stream on average: J x.

        Args:
            x: of a float dtype, on any device; computed in float32.
            hook: the hook point.
            model: finds the point by its other names; and a matrix after the block then serves for what is added to the
                stream at its end: the MLP's output, and its neurons times `W_out`.
            head: of which `x` is, at a point with heads; None for all of them side by side.

        Raises:
            ValueError: if the lens has no matrix there, or `x` another width.
        """
        names = (hook,) if model is None else (hook, *hook_points.resolve(model, hook).names)
        x = x.float()
        if model is not None and self._known(names) is None:
            point = hook_points.resolve(model, hook)
            after = f"blocks.{point.layer}.hook_resid_post"
            ends_block = any(n.endswith(("hook_mlp_out", "mlp.hook_post")) for n in point.names)
            if ends_block and self._known((after,)) is not None:
                projected = project_to_residual(model, x.flatten(0, -2), hook)
                if projected is not None:
                    return self.transport(projected.unflatten(0, x.shape[:-1]), after)
        _, matrix = self._find(names, hook)
        if head is not None:
            matrix = matrix[:, head * x.shape[-1] : (head + 1) * x.shape[-1]]
        if matrix.shape[1] != x.shape[-1]:
            what = f"{hook!r} has {matrix.shape[1]} dimensions in {self!r}, and {x.shape[-1]} here."
            raise ValueError(explain(what, want="activations or decoder directions at that point"))
        return x @ matrix.to(x.device).T

    @torch.no_grad()
    def logits(self, model: nn.Module, x: Float[Tensor, "*any d"], hook: str) -> Float[Tensor, "*any d_vocab"]:
        """Logits that the lens reads out of activations at a hook point: unembed(norm(J x)), before a soft cap.

        Args:
            model: that the lens is of.
            x: activations, or directions.
            hook: the hook point.

        Raises:
            ValueError: if the lens is of another model, or has no matrix there.
        """
        self.check_model(model)
        weight = model.W_U
        final = self.transport(x.to(weight.device), hook, model).to(weight.dtype)
        norm = getattr(model, "ln_final", None)
        batch = final.reshape(1, -1, final.shape[-1])
        logits = model.unembed(batch if norm is None else norm(batch)) * logit_scale(model)
        return logits.reshape(*final.shape[:-1], -1).float()

    def check_model(self, model: nn.Module) -> None:
        """Check that the lens is of this model: by content; one from another tool by its width and layers.

        Raises:
            ValueError: if it is of another one.
        """
        fix = "lens = saewb.fit_jacobian_lens(model, texts)"
        if self.digests is not None:
            check_same(repr(self), self.digests, {"model": model_digest(model, reuse=True)}, fix=fix)
        d_model, n_layers = model.cfg.d_model, model.cfg.n_layers
        last = max((int(m[1]) for hook in self.matrices if (m := _STREAM.match(hook))), default=0)
        width = next(iter(self.matrices.values())).shape[0]
        if width != d_model or last >= n_layers:
            what = f"{self!r} is of a model of width {width} with more than {last} layers; "
            what += f"{model.cfg.model_name} has {d_model} and {n_layers}."
            raise ValueError(explain(what, want="the model that it is of", fix=fix))

    def _known(self, names: Sequence[str]) -> str | None:
        """Name of the matrix of a point with these names; None if there is none."""
        by_point = {_point(hook): hook for hook in self.matrices}
        return next((by_point[_point(name)] for name in names if _point(name) in by_point), None)

    def _find(self, names: Sequence[str], hook: str) -> tuple[str, Tensor]:
        if (name := self._known(names)) is None:
            what = f"{self!r} has no matrix at {hook!r}."
            want = f"one of {', '.join(list(self.matrices)[:8])}"
            raise ValueError(explain(what, want=want, fix=f"saewb.fit_jacobian_lens(model, texts, {hook!r})"))
        return name, self.matrices[name]

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, atomically: float32, with what the lens is of.

        Args:
            path: of the file.

        Returns:
            The absolute path.
        """
        from safetensors.torch import save_file

        target = absolute(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        names = ("model", "n_prompts", "ctx_len", "skip_first", "mean_squares", "digests")
        values = {name: getattr(self, name) for name in names}
        text = json.dumps({"version": _FORMAT, **values}, default=dict)
        content = {hook: matrix.contiguous() for hook, matrix in self.matrices.items()}
        atomic_write(target, lambda fresh: save_file(content, fresh, metadata={"jacobian_lens": text}))
        return target

    @staticmethod
    def load(path: str | Path) -> JacobianLens:
        """Read a lens that `save` wrote; or a published one (`neuronpedia/jacobian-lens`), a file ".pt" of matrices.

        A published file does not say of which model it is: `build_index` can check the width and the layers only. It is
        read with `weights_only=True`, which runs no code.

        Args:
            path: of the file.

        Raises:
            FileNotFoundError: if there is none.
            FormatError: if it is damaged, or another file.
        """
        file = absolute(path)
        if not file.is_file():
            raise FileNotFoundError(explain(f"no file {str(file)!r}.", want="what JacobianLens.save(path) writes"))
        return _read_published(file) if file.suffix in (".pt", ".pth", ".bin") else _read_saved(file)


def _point(name: str) -> str:
    """One name for each point of the stream: before a block is after the one before it."""
    match = _STREAM.fullmatch(name)
    if match is None:
        return name
    after = int(match[1]) - (match[2] in ("hook_resid_pre", "hook_in"))
    return f"blocks.{after}.hook_resid_post"


# -- files -----------------------------------------------------------------------------------------------------------


def _read_saved(file: Path) -> JacobianLens:
    from safetensors import SafetensorError, safe_open

    want = "what JacobianLens.save(path) writes"
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get("jacobian_lens")
            matrices = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        values = json.loads(text or "null")
    except (SafetensorError, ValueError, RecursionError) as error:
        raise FormatError(explain(f"{file} is no Jacobian lens: {error}.", want=want)) from error
    if not isinstance(values, dict) or values.pop("version", None) != _FORMAT:
        raise FormatError(explain(f"{file} is no Jacobian lens of this version of saewb.", want=want))
    sizes, texts = {"n_prompts", "skip_first"}, {"model"}
    squares, digests, ctx_len = (values.get(name) for name in ("mean_squares", "digests", "ctx_len"))
    right = (
        set(values) == {*sizes, *texts, "mean_squares", "digests", "ctx_len"}
        and all(type(values[name]) is int and values[name] >= 0 for name in sizes)
        and isinstance(values["model"], str)
        and (ctx_len is None or type(ctx_len) is int)
        and isinstance(squares, dict)
        and all(name in matrices and isinstance(value, float) for name, value in squares.items())
        and (digests is None or (isinstance(digests, dict) and all(type(digests.get(d)) is str for d in _DIGESTS)))
    )
    if not right:
        raise FormatError(explain(f"{file} says {reprlib.repr(values)}.", want=want))
    _check_matrices(file, matrices)
    return JacobianLens(matrices, **values)


def _read_published(file: Path) -> JacobianLens:
    want = '{"J": {layer: [d_model, d_model]}, "n_prompts": ...}'
    try:
        values = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, UnpicklingError, EOFError, ValueError, LookupError, TypeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise FormatError(explain(f"{file} cannot be read: {why}.", want=want)) from error
    layers = values.get("J") if isinstance(values, dict) else None
    n_prompts = values.get("n_prompts") if isinstance(values, dict) else None
    if (
        not isinstance(layers, dict)
        or type(n_prompts) is not int
        or not all(type(layer) is int and layer >= 0 and isinstance(m, Tensor) for layer, m in layers.items())
    ):
        raise FormatError(explain(f"{file} is no Jacobian lens: {reprlib.repr(values)}.", want=want))
    matrices = {f"blocks.{layer}.hook_resid_post": layers[layer].float() for layer in sorted(layers)}
    _check_matrices(file, matrices)
    return JacobianLens(matrices, "", n_prompts)


def _check_matrices(file: Path, matrices: Mapping[str, Tensor]) -> None:
    shapes = {name: tuple(matrix.shape) for name, matrix in matrices.items()}
    if not shapes or any(len(shape) != 2 for shape in shapes.values()) or len({s[0] for s in shapes.values()}) > 1:
        what = f"{file} has matrices of shapes {reprlib.repr(shapes)}."
        raise FormatError(explain(what, want="one or more [d_model, d], all with one d_model"))
    for name, matrix in matrices.items():
        if matrix.dtype != torch.float32 or not bool(matrix.isfinite().all()):
            raise FormatError(explain(f"{file}: {name} is {matrix.dtype}, or not finite.", want="finite, in float32"))


# -- fit -------------------------------------------------------------------------------------------------------------


@torch.inference_mode(False)  # gradients are needed, wherever it is called
def fit_jacobian_lens(
    model: nn.Module,
    texts: Any,
    hooks: str | Sequence[str] | None = None,
    *,
    n_prompts: int = 100,
    ctx_len: int = 128,
    skip_first: int = 16,
    batch_size: int = 8,
    skip_special_tokens: bool | Sequence[int] = True,
    file: str | Path | None = None,
    save_every_s: float = 60.0,
    progress: bool = False,
) -> JacobianLens:
    """Fit a Jacobian lens: the average derivative of the final residual stream by the activation at hook points.

        J = mean over prompts and positions p of  sum over positions t >= p of  d h_final[t] / d h[p]

    Both p and t run over a prompt's positions without the first `skip_first`, the last one and special tokens. One
    forward and ceil(d_model / batch_size) backward passes of `batch_size` copies for each prompt, from the final layer
    to the earliest of the hook points: all of them cost what the earliest one costs. The tiny model takes 2 s a
    prompt on a CPU; the time grows with d_model and the cost of a pass. Fit once, and save. 100 prompts make a good
    lens, 10 a usable one; `lens.to_frame()` has the standard error of every matrix.

    Ctrl-C stops after the last whole prompt and returns the lens of the prompts so far. With a `file` it is there too,
    and the same call goes on from it, also with more prompts.

    Memory: the model's activations for `batch_size * ctx_len` tokens from the earliest hook point on, and for each hook
    point 12 bytes times d_model times its width.

    Args:
        model: a TransformerBridge (transformer-lens 3.x, 4.x) or HookedTransformer (3.x); computed in its dtype, and
            summed in float32.
        texts: whatever `saewb.build_index` takes; its first `n_prompts` rows are the prompts.
        hooks: hook points, such as `sae.cfg.hook`; None means the residual stream after each block.
        n_prompts: prompts, at most.
        ctx_len: tokens in a prompt, if `texts` are texts.
        skip_first: positions at the start of a prompt that are left out.
        batch_size: output dimensions for each backward pass.
        skip_special_tokens: as for `saewb.build_index`.
        file: safetensors file to save to, and to go on from.
        save_every_s: seconds between saves.
        progress: whether to show a progress bar.

    Returns:
        A JacobianLens.

    Raises:
        ValueError: for a hook point that does not exist or on which the final residual stream does not depend; if rows
            are too short; if an SAE is attached at a hook point, or the model is steered; if `file` is of another
            model, text or settings.
        FloatingPointError: if gradients are not finite, as they may be in float16.

    Example:
        >>> import saewb
        >>> model = saewb.load_model("tiny", device="cpu")
        >>> texts = [d.text for d in saewb.tiny.held_out_texts()[:4]]
        >>> lens = fit_jacobian_lens(model, texts, n_prompts=2, ctx_len=24, batch_size=64)
        >>> lens.to_frame().distance.round(2).tolist()[-1]
        0.0
    """
    numbers = {"n_prompts": n_prompts, "skip_first": skip_first, "batch_size": batch_size}
    for name, value in numbers.items():
        if type(value) is not int or value < (name != "skip_first"):
            least = int(name != "skip_first")
            raise ValueError(explain(f"got {name}={value!r}.", want=f"an integer, at least {least}"))
    names = _hook_names(model, hooks)
    ids = token_rows(model, texts, ctx_len)[:n_prompts]
    valid = _valid_positions(ids, special_ids(model, skip_special_tokens), skip_first)
    target = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    check_unmodified(model, [*names, target])
    about = {"model": str(model.cfg.model_name), "ctx_len": ids.shape[1], "skip_first": skip_first}
    digest = model_digest(model)
    path = None if file is None else absolute(file)
    lens = JacobianLens({}, n_prompts=0, **about, digests={"model": digest, "tokens": "0"})
    if path is not None and path.exists():
        lens = JacobianLens.load(path)
        _check_continues(lens, path, names, about, digest, ids)
    return _fit(model, lens, names, ids, valid, batch_size, path, save_every_s, progress)


def _hook_names(model: nn.Module, hooks: str | Sequence[str] | None) -> tuple[str, ...]:
    if hooks is None:
        hooks = [f"blocks.{layer}.hook_resid_post" for layer in range(model.cfg.n_layers)]
    names = (hooks,) if isinstance(hooks, str) else tuple(dict.fromkeys(hooks))
    if not names:
        raise ValueError(explain("got no hook points.", want="at least one", fix="hooks=sae.cfg.hook"))
    for name in names:
        hook_points.resolve_writable(model, name)  # raises where nothing goes on through the model
    return names


def _valid_positions(ids: Int[Tensor, "rows ctx"], special: Sequence[int], skip_first: int) -> Bool[Tensor, "rows ctx"]:
    valid = ~special_mask(ids, special)
    valid[:, :skip_first] = False
    valid[:, -1] = False
    if bool((empty := ~valid.any(1)).any()):
        what = f"row {int(empty.nonzero()[0, 0])} of {ids.shape[1]} tokens has none after the first {skip_first}, "
        what += "without special tokens and the last one."
        raise ValueError(explain(what, want="longer rows, or a smaller skip_first", fix="skip_first=0"))
    return valid


def _check_continues(
    lens: JacobianLens, path: Path, names: Sequence[str], about: Mapping[str, Any], digest: str, ids: Tensor
) -> None:
    """Raise unless a file is of this model, these settings and the first of these prompts."""
    fix = "saewb.fit_jacobian_lens(..., file=another)    # anew"
    if lens.n_prompts > len(ids):
        what = f"{path} is of {lens.n_prompts} prompts, {len(ids)} are asked for."
        raise ValueError(explain(what, want="as many, or more", fix=f"saewb.JacobianLens.load({str(path)!r})"))
    now = {"model": digest, "tokens": rows_digest(ids[: lens.n_prompts])}
    check_same(f"the lens in {path}", lens.digests or {}, now, fix=fix)
    written = {"hooks": set(lens.matrices), "ctx_len": lens.ctx_len, "skip_first": lens.skip_first}
    wanted = {"hooks": set(names), "ctx_len": about["ctx_len"], "skip_first": about["skip_first"]}
    if different := [name for name in written if written[name] != wanted[name]]:
        of = ", ".join(
            f"{name} {reprlib.repr(written[name])} and not {reprlib.repr(wanted[name])}" for name in different
        )
        raise ValueError(explain(f"the lens in {path} has {of}.", want="the same settings", fix=fix))


def _fit(
    model: nn.Module,
    lens: JacobianLens,
    names: Sequence[str],
    ids: Int[Tensor, "rows ctx"],
    valid: Bool[Tensor, "rows ctx"],
    batch_size: int,
    path: Path | None,
    save_every_s: float,
    progress: bool,
) -> JacobianLens:
    """The lens with these prompts too; Ctrl-C stops it between two."""
    from tqdm.auto import tqdm

    n_passes, saved_at, saved = math.ceil(model.cfg.d_model / batch_size), time.monotonic(), lens
    total, done = len(ids) * n_passes, lens.n_prompts * n_passes
    how = {"desc": "Jacobian lens", "unit": "pass", "leave": False, "disable": not progress}
    bar = tqdm(total=total, initial=done, **how)
    try:
        with bar, eval_mode(model):
            for n in range(lens.n_prompts, len(ids)):
                jacobians = _jacobians(model, ids[n], valid[n], names, batch_size, bar)
                lens = _with_prompt(lens, jacobians, ids[n : n + 1])
                if path is not None and time.monotonic() - saved_at > save_every_s:
                    lens.save(path)
                    saved, saved_at = lens, time.monotonic()
    except BaseException as error:
        if path is not None and lens is not saved:
            lens.save(path)
        if not isinstance(error, KeyboardInterrupt) or not lens.n_prompts:
            raise
        return lens
    if path is not None and lens is not saved:
        lens.save(path)
    return lens


def _with_prompt(lens: JacobianLens, jacobians: Mapping[str, Tensor], row: Int[Tensor, "1 ctx"]) -> JacobianLens:
    """The lens with one prompt more, as a new object: an interrupt leaves the one before."""
    n = lens.n_prompts
    matrices = {
        name: torch.lerp(lens.matrices[name], jacobian, 1 / (n + 1)) if n else jacobian
        for name, jacobian in jacobians.items()
    }
    squares = {name: float(jacobian.double().square().sum()) for name, jacobian in jacobians.items()}
    before = {name: lens.mean_squares[name] if n else 0.0 for name in squares}
    means = {name: before[name] + (square - before[name]) / (n + 1) for name, square in squares.items()}
    digests = dict(lens.digests or {})
    digests["tokens"] = rows_digest(row, n, of_rest=digests["tokens"])
    return replace(lens, matrices=matrices, n_prompts=n + 1, mean_squares=means, digests=digests)


def _jacobians(
    model: nn.Module,
    ids: Int[Tensor, " ctx"],
    valid: Bool[Tensor, " ctx"],
    names: Sequence[str],
    batch_size: int,
    bar: Any,
) -> dict[str, Float[Tensor, "d_model d"]]:
    """Jacobian of one prompt at each hook point."""
    d_model, device = model.cfg.d_model, next(model.parameters()).device
    final, leaves = _record(model, ids.to(device).expand(min(batch_size, d_model), -1), names)
    positions = valid.nonzero()[:, 0].to(final.device)
    cotangent, copies = torch.zeros_like(final), torch.arange(len(final), device=final.device)
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for begin in range(0, d_model, len(final)):
        n = min(len(final), d_model - begin)
        cotangent.zero_()
        cotangent[copies[:n, None], positions, begin + copies[:n, None]] = 1
        retain = begin + n < d_model
        grads = torch.autograd.grad(final, list(leaves.values()), cotangent, retain_graph=retain, allow_unused=True)
        for name, grad in zip(names, grads, strict=True):
            if grad is None:
                what = f"the final residual stream does not depend on {name!r}."
                raise ValueError(explain(what, want="a hook point whose activation goes on through the model"))
            part = grad[:n].flatten(2).index_select(1, positions.to(grad.device))
            rows[name].append(part.float().mean(1))
        bar.update(1)
    jacobians = {name: torch.cat(parts).cpu() for name, parts in rows.items()}
    if wrong := [name for name, jacobian in jacobians.items() if not bool(jacobian.isfinite().all())]:
        what = f"gradients at {wrong[0]!r} are not finite, in {final.dtype}."
        raise FloatingPointError(
            explain(what, want="a model in float32 or bfloat16", fix="saewb.load_model(..., dtype=torch.float32)")
        )
    return jacobians


def _record(
    model: nn.Module, ids: Int[Tensor, "batch ctx"], names: Sequence[str]
) -> tuple[Float[Tensor, "batch ctx d_model"], dict[str, Tensor]]:
    """Run the model; the final residual stream, and what is added to each hook point: zeros that have a gradient."""
    leaves: dict[str, Tensor] = {}
    final: list[Tensor] = []

    def add_leaf(name: str) -> hook_points.Edit:
        def edit(activation: Tensor) -> Tensor:
            torch.set_grad_enabled(True)  # from the first of the points on: nothing before it is recorded
            leaves[name] = torch.zeros_like(activation, requires_grad=True)
            return activation + leaves[name]

        return edit

    def read_final(activation: Tensor) -> None:
        final.append(activation)

    n_layers = model.cfg.n_layers
    with (
        torch.no_grad(),
        hook_points.lock(model),
        hook_points.editing(model, {name: add_leaf(name) for name in names}),
        hook_points.editing(model, {f"blocks.{n_layers - 1}.hook_resid_post": read_final}),  # after what is added
    ):
        run_to_layer(model, ids, n_layers)
    for name in names:
        if name not in leaves:
            raise ValueError(explain(f"{name!r} did not fire.", want="a point that this model computes"))
    return final[-1], {name: leaves[name] for name in names}
