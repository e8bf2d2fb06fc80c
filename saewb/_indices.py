"""Arguments that number things (latents, positions, tokens, rows) as Python integers, from whatever library they are.

    an index     int, or a scalar of torch or numpy
    indices      one index; a list, tensor, array, Series or range of them; or a mask, True at the indices meant

A mask is boolean and as long as what it selects from. A Series counts by its values, not by its labels. Booleans are
never read as 0 and 1, and no fraction is rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from saewb.errors import explain

Indices = Any
"""Type of an argument that `indices_of` resolves: it is checked there, with an error that says what to type."""


def index_of(value: object, name: str, n: int | None = None, *, from_end: bool = False, of: object = None) -> int:
    """Resolve one index.

    Args:
        value: an integer of Python, numpy or torch; a float that is whole.
        name: of the argument, for the error message.
        n: how many there are; None does not check the range.
        from_end: take -1 for the last one, and so on.
        of: what it is an index of, for the error message.

    Raises:
        TypeError: for a boolean, a text, or several values.
        ValueError: for a fraction, or an index out of range.

    Example:
        >>> import numpy as np
        >>> index_of(np.int64(3), "latent", 8), index_of(torch.tensor(-1), "position", 8, from_end=True)
        (3, 7)
    """
    index = _whole(value, name)
    if n is not None and not (-n if from_end else 0) <= index < n:
        what = f"no {name} {index}." if of is None else f"{of!r} has no {name} {index}."
        raise ValueError(explain(what, want=f"0 to {n - 1}"))
    return index % n if n is not None and from_end else index


def indices_of(
    values: Any, name: str, n: int | None = None, *, repeats: bool = False, of: object = None
) -> Int[Tensor, " some"]:
    """Resolve one or several indices, or a mask of them.

    Args:
        values: see the module.
        name: of the argument, for the error message.
        n: how many there are to select from; None does not check the range, and takes no mask.
        repeats: whether an index may be there more than once. Without it 0s and 1s that repeat are refused: they are a
            mask of integers, such as an attention mask.
        of: what they are indices of, for the error message.

    Returns:
        int64 on the CPU, in the order of `values`; of a mask ascending.

    Raises:
        TypeError: for texts, mappings, booleans beside numbers, or anything that is no number.
        ValueError: for fractions, indices out of range, a mask of another length, or more than one axis.

    Example:
        >>> indices_of([False, True, True], "latents", 3), indices_of(range(2, 4), "latents", 8)
        (tensor([1, 2]), tensor([2, 3]))
    """
    array = as_tensor(values, name)
    if array.ndim != 1:
        what = f"got {name} of shape {tuple(array.shape)}."
        fix = f"{name}[0]" if array.shape[0] == 1 else f"{name}.flatten()"
        raise ValueError(explain(what, want="one axis: indices, or a mask", fix=fix))
    if array.dtype == torch.bool:
        if n is None or len(array) != n:
            what, want = f"got a mask of {len(array):,} for {name}.", "indices" if n is None else f"a mask of {n:,}"
            raise ValueError(explain(what, want=want, fix=f"{name}=mask.nonzero()[:, 0]"))
        return array.nonzero()[:, 0]
    index = array.long()
    if n is not None and len(index) and not 0 <= int(index.min()) <= int(index.max()) < n:
        outside = index[(index < 0) | (index >= n)][:5].tolist()
        what = f"no {name} {outside}." if of is None else f"no {name} {outside} in {of!r}."
        raise ValueError(explain(what, want=f"0 to {n - 1}"))
    if not repeats and len(index) > 2 and bool((index.clamp(0, 1) == index).all()):
        what = f"got {len(index)} {name} that are all 0 or 1."
        raise ValueError(
            explain(what, want="indices, or a mask of booleans", fix=f"{name}=torch.as_tensor(mask).bool()")
        )
    return index


def index_slice(positions: object, name: str) -> slice:
    """Resolve a slice, whose ends may be integers of any library.

    Raises:
        TypeError: if it is no slice.

    Example:
        >>> index_slice(slice(torch.tensor(1), None), "positions")
        slice(1, None, None)
    """
    if not isinstance(positions, slice):
        raise TypeError(explain(f"got {name}={positions!r}.", want="a slice", fix=f"{name}=slice(1, None)"))
    ends = (positions.start, positions.stop, positions.step)
    return slice(*(None if end is None else index_of(end, name) for end in ends))


def as_tensor(values: Any, name: str) -> Int[Tensor, "*any"] | Bool[Tensor, "*any"]:
    """Indices or a mask of any library and any axes as a tensor on the CPU: bool or int64; one index gets an axis.

    Raises:
        TypeError, ValueError: as `indices_of`, but for shapes and ranges.
    """
    if isinstance(values, (str, bytes, Mapping)) or values is None:
        raise TypeError(explain(f"got {name}={values!r}.", want=_WANT))
    if isinstance(values, Tensor):
        array = values.detach().cpu()
    elif hasattr(values, "__array__"):
        array = _from_numpy(values, name)
    elif isinstance(values, Iterable):
        array = _from_items(list(values), name)
    else:
        array = torch.tensor(_whole(values, name))
    if array.is_complex() or (
        array.is_floating_point() and not bool((array == array.trunc()).logical_and(array.isfinite()).all())
    ):
        raise ValueError(explain(f"got {name} of {array.dtype} that are not whole.", want="whole numbers"))
    if array.ndim == 0 and array.dtype == torch.bool:
        raise TypeError(explain(f"got {name}={array.item()}.", want=_WANT))
    array = array if array.dtype == torch.bool else array.long()
    return array[None] if array.ndim == 0 else array


_WANT = "an index, several of them, or a mask of booleans"


def _from_numpy(values: Any, name: str) -> Tensor:
    """An array, or a Series by its values."""
    import numpy as np

    array = np.asarray(values)
    if array.dtype.kind == "O":  # integers beside missing values, booleans that may be missing
        return _from_items(array.tolist(), name)
    if array.dtype.kind not in "biuf":
        raise TypeError(explain(f"got {name} of {array.dtype}.", want=_WANT))
    return torch.from_numpy(array.astype(np.float64 if array.dtype.kind == "f" else array.dtype.newbyteorder("=")))


def _from_items(items: list[Any], name: str) -> Tensor:
    if any(isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) for item in items):
        rows = [as_tensor(item, name) for item in items]
        if len({(row.shape, row.dtype) for row in rows}) > 1:
            raise ValueError(explain(f"got {name} of rows that differ in length or kind.", want=_WANT))
        return torch.stack(rows)
    are_bool = [_is_bool(item) for item in items]
    if items and all(are_bool):
        return torch.tensor([bool(item) for item in items])
    return torch.tensor([_whole(item, name) for item in items], dtype=torch.int64)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _whole(value: Any, name: str) -> int:
    """One value as an int, if it is a whole number."""
    number = value.item() if getattr(value, "ndim", None) == 0 else value  # of torch or numpy
    if _is_bool(value) or not isinstance(number, (int, float)):
        raise TypeError(explain(f"got {name}={value!r}.", want="an integer"))
    if number != number or number in (float("inf"), float("-inf")) or int(number) != number:
        raise ValueError(explain(f"got {name}={number!r}.", want="a whole number"))
    return int(number)
