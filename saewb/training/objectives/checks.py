"""What the fields of every objective must be."""

from __future__ import annotations

from collections.abc import Callable

from saewb.sae.config import checker

Check = Callable[[bool, str, object, str], None]


def checked(owner: object, d_sae: int, rows: str, init_norm: float) -> Check:
    """Raises for wrong values of the fields that all objectives have; returns the checker for the others."""
    check = checker(type(owner).__name__)
    check(type(d_sae) is int and d_sae > 0, "d_sae", d_sae, "a positive integer")
    check(rows in ("unit", "free"), "rows", rows, "'unit' or 'free'")
    check(init_norm > 0, "init_norm", init_norm, "a positive length")
    check(rows == "free" or init_norm == 1, "init_norm", init_norm, "1 with rows='unit'; or rows='free'")
    return check


def check_aux(check: Check, aux: float, k_aux: int | None) -> None:
    """Raises for wrong values of an auxiliary loss's fields."""
    check(aux >= 0, "aux", aux, "a weight, 0 or more")
    check(k_aux is None or (type(k_aux) is int and k_aux > 0), "k_aux", k_aux, "a positive integer, or None")


def check_coefficient(check: Check, name: str, value: float, warmup_tokens: int, target_l0: float | None) -> None:
    """Raises for wrong values of a coefficient, its warm-up and the L0 it is to be steered to."""
    check(value > 0, name, value, "a positive weight")
    check(warmup_tokens >= 0, "warmup_tokens", warmup_tokens, "a number of tokens, 0 or more")
    check(target_l0 is None or target_l0 > 0, "target_l0", target_l0, "latents per token, more than 0; or None")
