"""A second device for tests, made of the CPU: its tensors are not on the CPU, and an operation on both is an error.

Importing this module registers the device `second` in PyTorch, for the whole process and for good, so tests use it in
a process of their own (`tests/devices`). What it shows without a GPU: tensors created on the wrong device, arithmetic
that is done on the host, and reads that would make the host wait for a GPU (`transfers`).

    from helpers import second_device
    x = torch.zeros(3, device=second_device.DEVICE)

A tensor of the device is a wrapper without memory around a CPU tensor; the dispatcher calls `_run` for every operation
on one, and for every factory with `device=`. Four things that PyTorch does below the dispatcher are done above it here:
`torch.tensor` and its relatives, indexing by lists, `tolist`, and copies by `copy` and `pickle`.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter

import torch
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
_UNBOUNDED = 2**48  # bytes of the memory that a wrapper does not have, so that it can take any size


class _Backend(_DummyBackendModule):
    @staticmethod
    def get_amp_supported_dtype():
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def get_rng_state(device=None):
        """The CPU's: random numbers of the device are drawn there."""
        return torch.get_rng_state()

    @staticmethod
    def set_rng_state(state, device=None):
        torch.set_rng_state(state)


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)

# Operations that may have operands on both: copies; and indexing, whose indices may be on the CPU.
_COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
_INDEX = {"index", "index_put_", "index_put", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Those that make the host wait for a GPU, beside copies to it: their result is a number of the host, or has a size that
# depends on values. `multinomial` checks its probabilities.
_WAITS = {
    "_local_scalar_dense": "number",
    "is_nonzero": "number",
    "equal": "number",
    "nonzero": "nonzero",
    "argwhere": "nonzero",
    "masked_select": "mask",
    "bincount": "size",
    "_unique2": "size",
    "unique_dim": "size",
    "unique_consecutive": "size",
    "multinomial": "number",
}

has_float64 = True
"""Set to False to be refused float64, as by an Apple GPU."""

_counts: Counter[str] = Counter()
_lock = threading.Lock()
_counting = 0


@contextlib.contextmanager
def transfers():
    """Count what makes the host wait for the device inside the block, in all threads, by kind.

    "number" (`item`, `if tensor:`), "copy" (to the CPU), "upload" (from it, also of an index), "nonzero", "mask"
    (indexing by a bool tensor) and "size" (`bincount`, `unique`, `repeat_interleave`). Copies with `non_blocking=True`
    do not count: whoever makes one waits for it later.
    """
    global _counting
    counts: Counter[str] = Counter()
    with _lock:
        _counting += 1
        before = _counts.copy()
    try:
        yield counts
    finally:
        with _lock:
            _counting -= 1
            counts.update(_counts - before)


def _count(name, args, kwargs):
    kind = _WAITS.get(name)
    if name in _INDEX:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        fills = name != "index" and len(args[1]) == 1 and args[2].numel() == 1  # becomes `masked_fill`
        uploads = [i for i in args[1] if i is not None and i.device.type == "cpu"]
        kind = "mask" if masks and not fills else "upload" if uploads else None
    if name == "repeat_interleave":
        kind = "size" if kwargs.get("output_size") is None else None
    if name in _COPIES:
        source, target = args[0].device, kwargs.get("device")
        if name == "copy_":
            target, source = source, args[1].device
        elif name == "_copy_from":
            target = args[1].device
        target = source if target is None else torch.device(target)
        waits = source.type != target.type and not (kwargs.get("non_blocking") or args[2:] == (True,))
        kind = ("copy" if target.type == "cpu" else "upload") if waits else None
    if kind:
        with _lock:
            _counts[kind] += 1


class SecondTensor(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, raw):
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            layout=raw.layout,
            device=DEVICE,
            requires_grad=False,
            storage_size=_UNBOUNDED,
        )
        wrapper._raw = raw
        return wrapper

    def __init__(self, raw):
        pass

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"SecondTensor({self._raw!r})"

    def __getitem__(self, key):
        return super().__getitem__(_as_index(key))

    def __setitem__(self, key, value):
        return super().__setitem__(_as_index(key), value)

    def __format__(self, spec):
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo):
        copy = self.detach().clone().requires_grad_(self.requires_grad)
        if getattr(self, "_is_param", False):
            copy._is_param = True
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol):
        return _on_device, (self.detach().cpu(), self.requires_grad)

    def tolist(self):
        return self.detach().cpu().tolist()

    def numpy(self, *args, **kwargs):
        message = (
            "can't convert second:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory"
        )
        raise TypeError(message)

    def __array__(self, *args, **kwargs):
        return self.numpy()

    def data_ptr(self):
        return self._raw.data_ptr()

    def untyped_storage(self):
        return self._raw.untyped_storage()

    def storage(self):
        return self._raw.storage()

    def new_tensor(self, data, *, dtype=None, device=None, requires_grad=False):
        device = self.device if device is None else device
        return torch.tensor(data, dtype=dtype or self.dtype, device=device, requires_grad=requires_grad)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        """The setter below Python would change the wrapper and leave the memory."""
        if not isinstance(value, SecondTensor) or (value.shape, value.dtype) != (self.shape, self.dtype):
            raise RuntimeError("`.data` of a tensor of the device takes one of the same device, shape and dtype")
        self._raw = value._raw


def _on_device(raw, requires_grad):
    return raw.to(DEVICE).requires_grad_(requires_grad)


def _as_index(key):
    """Lists and arrays become tensors: indexing by them makes tensors below the dispatcher."""
    if isinstance(key, tuple):
        return tuple(map(_as_index, key))
    if isinstance(key, (list, range)) or type(key).__module__ == "numpy":
        return _as_tensor(key).to(DEVICE)
    return key


def _run(func, args, kwargs):
    name = func._schema.name.removeprefix("aten::")
    tensors = list(_tensors((*args, *kwargs.values())))
    ours = [t for t in tensors if isinstance(t, SecondTensor)]
    others = [t for t in tensors if not isinstance(t, SecondTensor)]
    if ours and name not in _COPIES:
        _check_devices(func, name, args, others)
    if _counting and ours:
        _count(name, args, kwargs)
    target = kwargs.get("device")
    on_device = ours or _is_ours(target)
    generators = [a for a in (*args, *kwargs.values()) if isinstance(a, torch._C.Generator)]
    if on_device and any(g._cdata not in _generators for g in generators):
        raise RuntimeError(f"Expected a '{NAME}' device type for generator but found 'cpu' ({name})")
    raw_args, raw_kwargs = _map(_to_raw, args), {key: _map(_to_raw, value) for key, value in kwargs.items()}
    if name == "_to_copy" and kwargs.get("pin_memory"):
        raw_kwargs["pin_memory"] = None
    out = func(*raw_args, **raw_kwargs)
    if on_device and not has_float64:
        _refuse_float64(out, name, target)
    if func._schema.is_mutable:
        for tensor in ours:
            _resize_like_raw(tensor)
    if name == "_to_copy" and target is not None and torch.device(target).type == "cpu":
        return out
    arguments = {id(t._raw): t for t in ours} | {id(t): t for t in others}  # in-place operations return one of them
    return _wrap(out, arguments)


def _refuse_float64(out, name, target):
    stays = target is None or _is_ours(target)
    if stays and any(t.dtype == torch.float64 for t in _tensors([out])):
        raise TypeError(f"Cannot convert a {NAME} Tensor to float64 dtype, which it doesn't support ({name})")


def _wrap(out, arguments):
    def wrapped(o):
        if not isinstance(o, torch.Tensor):
            return o
        return arguments[id(o)] if id(o) in arguments else SecondTensor(o)

    return _map(wrapped, out)


def _map(function, value):
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, v) for v in value])
    return function(value)


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


_below_python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python).add(torch._C.DispatchKey.PythonTLSSnapshot)


def _resize_like_raw(tensor):
    """Give the wrapper the sizes of its memory, which `out=`, `resize_`, `squeeze_` and others change."""
    raw = tensor._raw
    if tensor.shape != raw.shape or tensor.stride() != raw.stride() or tensor.storage_offset() != raw.storage_offset():
        with torch._C._ExcludeDispatchKeyGuard(_below_python):
            torch.ops.aten.as_strided_.default(tensor, raw.shape, raw.stride(), raw.storage_offset())


def _to_raw(value):
    if isinstance(value, SecondTensor):
        return value._raw
    return torch.device("cpu") if isinstance(value, torch.device) and value.type == NAME else value


def _check_devices(func, name, args, others):
    """A CPU tensor may be an operand if it is a number (0-d) that is not written to, or an index."""
    on_cpu = [t for t in others if t.dim() > 0 and t.device.type != "meta"]
    if name in _INDEX:
        on_cpu = [t for t in on_cpu if t is args[0] or (len(args) > 2 and t is args[2])]
        if args[0].device.type == "cpu":  # indices may be on the CPU, but a CPU tensor has no others
            on_cpu = [args[0]]
    if func._schema.is_mutable and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu":
        on_cpu = [args[0]]
    if on_cpu:
        shapes = [tuple(t.shape) for t in on_cpu]
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! ({name}, on the CPU: {shapes})"
        )


# -- factories: without a tensor among the arguments the dispatcher chooses by `device` --------------------------------

_fallback_library = torch.library.Library("_", "IMPL")
_fallback_library.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
_factories = torch.library.Library("aten", "IMPL")


def _register_factories():
    """Factories of a known size would else fill an empty tensor with `out=`, which resizes it below the wrapper."""
    for schema in torch._C._jit_get_all_schemas():
        arguments = {a.name: str(a.type) for a in schema.arguments}
        if not schema.name.startswith("aten::") or "Device" not in arguments.get("device", ""):
            continue
        if any("Tensor" in kind for kind in arguments.values()) or not any(
            "Tensor" in str(r.type) for r in schema.returns
        ):
            continue
        packet = getattr(torch.ops.aten, schema.name.removeprefix("aten::"))
        op = getattr(packet, schema.overload_name or "default")
        if not torch._C._dispatch_has_kernel(op.name()):  # of TorchScript alone
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeExplicitAutograd"):
            continue
        _factories.impl(op.name().removeprefix("aten::"), _factory(op), "PrivateUse1")


def _factory(op):
    return lambda *args, **kwargs: _run(op, args, kwargs)


_register_factories()

# Autocast rounds the factors of products, as on a GPU; everything else passes through.
_passes_autocast = torch.library.Library("_", "IMPL")
_passes_autocast.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_autocast_key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def _rounded(op):
    def call(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_autocast_key):
            dtype = torch.get_autocast_dtype(NAME)
            return op(*(a.to(dtype) if _is_tensor(a) and a.dtype == torch.float32 else a for a in args), **kwargs)

    return call


for _name in ("mm", "addmm", "bmm", "baddbmm"):
    _factories.impl(_name, _rounded(getattr(torch.ops.aten, _name).default), "AutocastPrivateUse1")

_tensor, _as_tensor = torch.tensor, torch.as_tensor
# `with torch.device("meta"):` knows the factories by identity. Listed after `torch.tensor` is replaced, they would lack
# it, and transformers, which creates models so, would leave rotary frequencies as uninitialized memory.
_device_constructors()


def _is_tensor(value):
    return isinstance(value, torch.Tensor)


def _default():
    """The device of `with torch.device(...)`, if any."""
    return torch.empty(0).device


def _is_ours(device):
    return device is not None and torch.device(device).type == NAME


def tensor(data, *, dtype=None, device=None, requires_grad=False, pin_memory=False):
    """`torch.tensor`, which makes its result below the dispatcher: here it is made on the CPU and moved."""
    if isinstance(data, SecondTensor) or (isinstance(data, (list, tuple)) and any(map(_is_tensor, data))):
        data = _map(lambda value: value.tolist() if _is_tensor(value) else value, data)
    if _is_ours(_default() if device is None else device):
        return _tensor(data, dtype=dtype, device="cpu").to(DEVICE).requires_grad_(requires_grad)
    return _tensor(data, dtype=dtype, device=device, requires_grad=requires_grad, pin_memory=pin_memory)


def as_tensor(data, dtype=None, device=None):
    """`torch.as_tensor`, likewise."""
    if isinstance(data, torch.Tensor):
        return data.to(data.device if device is None else device, data.dtype if dtype is None else dtype)
    if _is_ours(_default() if device is None else device):
        return _as_tensor(data, dtype=dtype, device="cpu").to(DEVICE)
    return _as_tensor(data, dtype=dtype, device=device)


_generators: dict[int, torch._C.Generator] = {}  # of the device, by address; held, so that none is used again


class Generator(torch._C.Generator):
    """`torch.Generator`, which draws on the CPU, but says that it is of the device."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu" if _is_ours(device) else device)
        if _is_ours(device):
            _generators[generator._cdata] = generator
        return generator

    @property
    def device(self):
        return DEVICE if self._cdata in _generators else super().device


torch.tensor, torch.as_tensor, torch.Generator = tensor, as_tensor, Generator
