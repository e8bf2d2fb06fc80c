"""Whether what a caller hands to an SAE is what it takes; and if it is a text or an array, what to type instead."""

from __future__ import annotations

import reprlib

from torch import Tensor, nn

from saewb.errors import explain


def check_fit(sae: nn.Module, given: object, width: int, role: str = "x") -> None:
    """That these are activations, `[..., d_in]`, or latents, `[..., d_sae]`.

    Args:
        sae: what they are given to.
        given: by the caller.
        width: of the last axis.
        role: "x" for activations; "latents".

    Raises:
        TypeError: if it is no tensor.
        ValueError: if it is of another width.
    """
    if isinstance(given, Tensor) and given.shape[-1:] == (width,):
        return
    want = f"[..., d_in={width}]" if role == "x" else f"[..., d_sae={width}]"
    if not isinstance(given, Tensor):
        raise not_a_tensor(sae, given, role, want)
    fix = ""
    if role == "latents" and given.shape[-1:] == (sae.cfg.d_in,):
        fix = "sae.decode(sae.encode(x), x)"
    elif role == "x" and not given.is_floating_point() and given.ndim < 3:  # token ids, it seems
        want, fix = f"activations of a model, {want}", "saewb.read_prompt(model, tokens, sae)"
    raise ValueError(explain(f"{sae!r} got {role} of shape {tuple(given.shape)}.", want=want, fix=fix))


def fitting(sae: nn.Module, given: Tensor, width: int, role: str = "x") -> Tensor:
    """The same in the SAE's dtype, if it fits; errors as `check_fit`."""
    check_fit(sae, given, width, role)
    return given.to(sae.dtype)


def not_a_tensor(sae: nn.Module, given: object, role: str, want: str) -> TypeError:
    """The error for whatever else was handed over.

    Args:
        sae: what it was given to.
        given: by the caller.
        role: "x" for activations; "latents".
        want: the shape, for the message.
    """
    verb = "encode" if role == "x" else "decode"
    got, fix = f"a {type(given).__name__} for {role}", ""
    if isinstance(given, str) or (isinstance(given, (list, tuple)) and given and isinstance(given[0], str)):
        text = given if isinstance(given, str) else given[0]
        got = f"the text {reprlib.repr(text)}"
        fix = f"saewb.read_prompt(model, {text!r}, sae)" if len(text) <= 40 else "saewb.read_prompt(model, text, sae)"
    elif isinstance(given, (list, tuple)):
        made = "stack" if given and isinstance(given[0], Tensor) else "tensor"
        fix = f"sae.{verb}(torch.{made}({role}))"
    elif type(given).__module__ == "numpy":
        fix = f"sae.{verb}(torch.from_numpy({role}))"
    what = "activations of a model" if role == "x" else "latents, as sae.encode(x) gives them"
    return TypeError(explain(f"{sae!r} got {got}.", want=f"{what}: a torch.Tensor {want}", fix=fix))
