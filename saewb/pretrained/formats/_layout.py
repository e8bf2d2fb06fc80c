"""Base classes of the layouts of published SAEs: their files, how they are detected and read.

A layout declares its files; most are a `TableLayout`, which also declares a table of its tensors. To read one:

1. open the configuration and the header of the weights,
2. check that the tensors are exactly those of the table, with shapes that fit each other,
3. turn them into the weights of an `SAE` by the table,
4. take activation, hooks and metadata from `fields`, completed by `Provenance`,
5. build the SAE in the requested dtype and on the requested device.

To add a layout, write a subclass and add it to `formats.LAYOUTS`.
"""

from __future__ import annotations

import os
import re
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from glob import escape
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._tensors import TensorFile, read_object
from saewb.sae.cross_layer import CrossLayerConfig, CrossLayerTranscoder
from saewb.sae.sae import SAE, SAEConfig

Kind = TypeVar("Kind")

# Overrides of the site, and those that would change what an SAE computes, which only SAELens files may have.
_SITE_KEYS = {"model_name": "model", "hook_name": "hook", "hook_name_out": "hook_out", "hook_head_index": "head"}
_COMPUTATION_KEYS = frozenset(
    (
        *("architecture", "d_in", "d_sae", "d_out", "k", "activation_fn", "apply_b_dec_to_input"),
        *("normalize_activations", "rescale_acts_by_decoder_norm", "finetuning_scaling_factor"),
    )
)
_FILE_KEYS = ("dtype", "device")
# Axes of SAE's own weights: D is d_in, F is d_sae, O is d_out. A table entry with other axes is transposed.
_TRANSPOSED = {"W_enc": ("FD",), "W_dec": ("DF", "OF"), "W_skip": ("OD",)}


@dataclass(frozen=True)
class Provenance:
    """Information about an SAE beyond its files: its source, and its entry in a catalogue.

    Unknown fields are None. Values in a file take precedence, unless its layout differs.
    """

    repo: str | None = None
    """Repository on the hub, "owner/name"."""
    path: str | None = None
    """Folder or file inside the repository; "" for its root."""
    model: str | None = None
    """Name of the language model."""
    hook: str | None = None
    """Hook point the SAE reads."""
    hook_out: str | None = None
    """Hook point the SAE writes, if another one."""
    layer: int | None = None
    """Layer of the hook point."""
    scaling_factor: float | None = None
    """Factor that multiplied training inputs."""
    overrides: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Corrections of the file's configuration, by the keys of SAELens' cfg.json."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", dict(self.overrides))
        if self.layer is not None and not (type(self.layer) is int and self.layer >= 0):
            raise ValueError(explain(f"Provenance got layer={self.layer!r}.", want="an integer, 0 or more"))

    def address(self, path: Path) -> str:
        """Text that may name model and layer: "owner/name/path", or else the absolute path on disk.

        Example:
            >>> Provenance(repo="google/gemma-scope-2b-pt-res", path="layer_3/width_16k").address(Path("a"))
            'google/gemma-scope-2b-pt-res/layer_3/width_16k'
        """
        if self.repo is None:
            return Path(path).absolute().as_posix()
        return "/".join(part for part in (self.repo, self.path) if part)

    def number(self, pattern: str, path: Path) -> int | None:
        """The last number in the address that the pattern's first group matches, e.g. r"layer_(\\d+)"; or None.

        Example:
            >>> Provenance(repo="a/b", path="layer_3/width_16k").number(r"layer_(\\d+)", Path("c"))
            3
        """
        numbers = re.findall(pattern, self.address(path))
        return int(numbers[-1]) if numbers else None

    def complete(
        self, *, model: str | None, hook: str | None, hook_out: str | None = None, **metadata: Any
    ) -> dict[str, Any]:
        """Complete model, hooks and metadata of a file; return them as fields of a configuration class.

        Args:
            model: from the file or the name of its repository; None if unknown.
            hook: likewise.
            hook_out: likewise; None for an SAE that writes where it reads.
            metadata: further values of the file, by SAELens' keys; None is left out, `overrides` take precedence.

        Raises:
            FormatError: if `overrides` would change what is computed.
        """
        wrong = sorted(_COMPUTATION_KEYS & set(self.overrides))
        if wrong:
            what = f"overrides {wrong} would change what the SAE computes."
            raise FormatError(explain(what, want="a layout that says them in its own files"))
        out = self.hook_out if hook_out is None and hook is None else hook_out
        site = {"model": model or self.model, "hook": hook or self.hook, "hook_out": out}
        site |= {name: self.overrides[key] for key, name in _SITE_KEYS.items() if key in self.overrides}
        if site["hook_out"] == site["hook"]:
            site["hook_out"] = None
        others = {key: value for key, value in self.overrides.items() if key not in (*_SITE_KEYS, *_FILE_KEYS)}
        return {**site, "metadata": {**{k: v for k, v in metadata.items() if v is not None}, **others}}

    def refuse_factor(self, layout: str) -> None:
        """Check that there is no `scaling_factor`, for a layout whose weights are in the model's units.

        Raises:
            FormatError: if there is one.
        """
        if self.scaling_factor is not None:
            what = f"scaling_factor={self.scaling_factor} was given, but {layout} reads the model's own units."
            raise FormatError(explain(what, want="no factor"))


@dataclass(frozen=True)
class OpenFiles:
    """The files of one SAE while it is read."""

    path: Path
    """Folder or file of the SAE."""
    weights: TensorFile
    """Tensors."""
    config: Mapping[str, Any]
    """Configuration; empty if there is none."""
    provenance: Provenance
    """Information beyond the files."""
    dtype: torch.dtype | None = None
    """dtype of the parameters of the SAE; None means as stored."""

    @cached_property
    def address(self) -> str:
        """Text that may name model and layer, see `Provenance.address`."""
        return self.provenance.address(self.path)


class Layout(ABC):
    """Abstract base of the layouts in which SAEs are published.

    Subclasses declare paths as templates: "{path}/cfg.json" is a file in the folder of the SAE, "{path}" the file of
    the SAE, "{parent}/config.json" a file in the same folder.
    """

    name: ClassVar[str]
    """Name of the layout, for messages."""
    aliases: ClassVar[tuple[str, ...]] = ()
    """Names of this layout in the catalogue's `format` column."""
    weights: ClassVar[str] = "{path}"
    """Template of the file that holds the tensors."""
    config: ClassVar[str | None] = None
    """Template of the configuration, JSON or YAML."""
    needs_config: ClassVar[bool] = True
    """Whether the configuration is required."""
    extra_files: ClassVar[tuple[str, ...]] = ()
    """Templates of further, optional files."""
    file_name: ClassVar[re.Pattern[str] | None] = None
    """Pattern of the file's name, for layouts of a single file."""
    marks: ClassVar[tuple[str, ...]]
    """Files by which the layout is detected, for messages."""
    has_tensors: ClassVar[frozenset[str]] = frozenset()
    """Tensors by which it is detected, where file names are not enough."""
    folds_factor: ClassVar[bool] = False
    """Whether training inputs may have been scaled by a constant factor."""

    def __init_subclass__(cls) -> None:
        if "marks" not in cls.__dict__:
            cls.marks = tuple(t.removeprefix("{path}/") for t in (cls.config, cls.weights) if t)

    @property
    def description(self) -> str:
        """Name and files, for messages."""
        return f"{self.name} ({' + '.join(self.marks)})"

    def patterns(self, path: str) -> list[str]:
        """Patterns of the repository's files needed to read `path`; empty if it cannot be of this layout."""
        pure = PurePosixPath(path)
        if self.file_name is not None and not self.file_name.fullmatch(pure.name):
            return []
        files = [self.config_path(pure), self.weights_path(pure), *(locate(t, pure) for t in self.extra_files)]
        return [escape(str(file)) for file in files if file is not None]

    def detect(self, path: Path) -> bool:
        """Whether a folder or file is in this layout, by names of files and tensors, without reading weights."""
        if self.file_name is not None and not self.file_name.fullmatch(path.name):
            return False
        weights = self.weights_path(path)
        if not os.path.isfile(weights):
            return False
        config = self.config_path(path) if self.needs_config else None
        if config is not None and not os.path.isfile(config):
            return False
        if not self.has_tensors:
            return True
        try:
            return self.has_tensors <= set(TensorFile(Path(weights)).names)
        except FormatError:
            return False

    def read(
        self,
        path: Path,
        provenance: Provenance | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Any:
        """Read the SAE in a folder or file of this layout; tensors are memory-mapped unless folded or transposed.

        Args:
            path: the folder or file.
            provenance: information beyond the files.
            dtype: of the parameters; None means as stored.
            device: of the parameters; None means the CPU.

        Raises:
            FormatError: if anything is unknown, missing, unexpected or inconsistent.
        """
        path, provenance = Path(path).absolute(), provenance or Provenance()
        try:
            if not self.folds_factor:
                provenance.refuse_factor(self.name)
            return self._read(path, provenance, dtype, device)
        except ValueError as error:
            raise FormatError(f"cannot read {path}: {error}") from error

    def weights_path(self, path: PurePath) -> PurePath:
        """Path of the file that holds the tensors of the SAE at `path`."""
        return locate(self.weights, path)

    def config_path(self, path: PurePath) -> PurePath | None:
        """Path of the configuration of the SAE at `path`; None if the layout has none."""
        return locate(self.config, path) if self.config else None

    def read_config(self, path: Path) -> dict[str, Any]:
        """Read the configuration of the SAE at `path`; empty if it is optional and missing."""
        config = self.config_path(path)
        if config is None or not (self.needs_config or Path(config).is_file()):
            return {}
        return read_object(Path(config))

    def open_weights(self, path: Path) -> TensorFile:
        """Open the tensors of the SAE at `path`."""
        return TensorFile(Path(self.weights_path(path)))

    @abstractmethod
    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> Any:
        """Read the SAE at `path`; a ValueError becomes a FormatError that names the path."""


class TableLayout(Layout):
    """Layout whose tensors are those of one `SAE` under other names.

    A subclass defines `table` and `fields`, and overrides methods that depend on the file.
    """

    table: ClassVar[Mapping[str, str]] = {}
    """For each weight of `SAE`, the name of the stored tensor and its axes: {"W_enc": "encoder.weight FD"}.

    D is d_in, F d_sae, O d_out; a question mark before the name marks an optional tensor.
    """
    used_overrides: ClassVar[tuple[str, ...]] = ()
    """Keys of `Provenance.overrides` that `fields` handles."""

    def side_tensors(self, files: OpenFiles) -> Mapping[str, str | None]:
        """Axes of optional tensors, of any dtype, that are not weights; None for any shape."""
        return {}

    def tensor_table(self, files: OpenFiles) -> Mapping[str, str]:
        """The table of this file; by default `table`."""
        return self.table

    def widths(self, files: OpenFiles) -> dict[str, int]:
        """Sizes of axes by the configuration; those of other axes come from the tensors."""
        return {}

    def tensors(self, files: OpenFiles, table: Mapping[str, tuple[str, str]]) -> dict[str, Tensor]:
        """Read the weights by the names of `SAE`, transposed where the table's axes say so."""
        weights = {}
        for name, (stored, axes) in table.items():
            tensor = files.weights.tensor(stored)
            if axes in _TRANSPOSED.get(name, ()):  # contiguous decoder rows, since few of them are read at a time
                tensor = tensor.T if name == "W_enc" else tensor.T.contiguous()
            weights[name] = tensor
        return weights

    @abstractmethod
    def fields(self, files: OpenFiles) -> dict[str, Any]:
        """Fields of `SAEConfig` except the widths; `model`, `hook`, `hook_out` are None if not in the files."""

    def _read(
        self, path: Path, provenance: Provenance, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> Any:
        config = self.read_config(path)
        files = OpenFiles(path, self.open_weights(path), config, provenance, dtype)
        table = check_table(files.weights, self.tensor_table(files), self.side_tensors(files), **self.widths(files))
        fields = self.fields(files)
        others = {key: value for key, value in provenance.overrides.items() if key not in self.used_overrides}
        provenance = replace(provenance, overrides=others)
        return build_sae(self.tensors(files, table), fields, provenance, dtype, device)


def locate(template: str, path: PurePath) -> PurePath:
    """Resolve a template such as "{path}/cfg.json", "{path}" or "{parent}/config.json"."""
    base, _, name = template.partition("/")
    return (path.parent if base == "{parent}" else path) / name


def check_table(
    file: TensorFile, table: Mapping[str, str], side: Mapping[str, str | None] | None = None, **widths: int
) -> dict[str, tuple[str, str]]:
    """Check that a file has the tensors of a table, with axes of the same name equally long.

    Args:
        file: of tensors.
        table: stored name and axes of each weight.
        side: axes of optional tensors that are not weights.
        widths: known lengths of axes.

    Returns:
        Stored name and axes of the tensors in the file, by the names of `SAE`.

    Raises:
        FormatError: naming each tensor that is missing, unexpected, of another shape or of integers.
    """
    entries = {}
    for name, text in table.items():
        stored, axes = text.split(" ")
        if not stored.startswith("?") or stored[1:] in file:
            entries[name] = stored.removeprefix("?"), axes
    side = {name: axes for name, axes in (side or {}).items() if name in file}
    shapes: dict[str, tuple[int, ...]] = {}
    for stored, axes in (*entries.values(), *side.items()):
        shape = file.shape(stored) if stored in file else ()
        if axes is None:
            shapes[stored] = shape
            continue
        for axis, width in zip(axes, shape, strict=False):
            if len(shape) == len(axes):
                widths.setdefault(axis, width)
        shapes[stored] = tuple(widths.get(axis, 0) for axis in axes)
    file.check(shapes, any_dtype=side)
    return entries


def build_sae(
    weights: Mapping[str, Tensor],
    fields: Mapping[str, Any],
    provenance: Provenance,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> SAE:
    """Build an SAE from weights; those already in the dtype and on the device are not copied.

    Args:
        weights: by the names of `SAE`.
        fields: of SAEConfig, without widths; `model`, `hook`, `hook_out`, `metadata` as in the file.
        provenance: completes these four.
        dtype: of the parameters; None means that of W_dec.
        device: of the parameters; None means the CPU.
    """
    fields = dict(fields)
    metadata = fields.pop("metadata", {})
    site = {name: fields.pop(name, None) for name in ("model", "hook", "hook_out")}
    (d_in, d_sae), d_out = weights["W_enc"].shape, weights["W_dec"].shape[1]
    completed = provenance.complete(**site, **metadata)
    cfg = SAEConfig(d_in=d_in, d_sae=d_sae, d_out=d_out, **completed, **fields)
    dtype = dtype or weights["W_dec"].dtype
    return SAE.from_tensors(cfg, {name: tensor.to(device or "cpu", dtype) for name, tensor in weights.items()})


def build_cross_layer(
    layers: Sequence[Mapping[str, Tensor]], dtype: torch.dtype | None, device: torch.device | str | None, **fields: Any
) -> CrossLayerTranscoder:
    """Build a cross-layer transcoder; its matrices stay as stored, and memory-mapped on the CPU.

    Args:
        layers: tensors of each layer by the names of CrossLayerTranscoder.
        dtype: of the computation; None means as stored.
        device: of the parameters; None means the CPU.
        fields: of CrossLayerConfig.

    Raises:
        FormatError: if there are no layers, or their tensors or widths differ.
    """
    names = [sorted(layer) for layer in layers]
    if not layers or any(of != names[0] for of in names):
        differences = "; ".join(f"layer {i}: {', '.join(of)}" for i, of in enumerate(names) if of != names[0])
        what = f"its {len(layers)} layers differ in what they have: {differences}."
        raise FormatError(explain(what, want="the same in each"))
    cfg = CrossLayerConfig(
        d_in=layers[0]["W_enc"].shape[0],
        d_sae=tuple(layer["W_enc"].shape[1] for layer in layers),
        d_out=layers[0]["W_dec"].shape[2],
        activation="jumprelu" if "threshold" in layers[0] else "relu",
        skip="W_skip" in layers[0],
        **fields,
    )
    dtype = dtype or layers[0]["b_dec"].dtype
    dtypes = {name: dtype if name in ("b_enc", "b_dec", "threshold") else None for name in names[0]}
    tensors = {name: [layer[name].to(device or "cpu", to) for layer in layers] for name, to in dtypes.items()}
    return CrossLayerTranscoder.from_tensors(cfg, tensors)


def sum_over_targets(W_dec: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Sum [d_sae, layers, d_out] over the layers written to, in float32; `dtype` of the result, None as stored."""
    rows = max(1, (1 << 24) // max(1, W_dec[0].numel()))  # in parts, or the tensor would be in memory twice
    return torch.cat([part.float().sum(1).to(dtype or W_dec.dtype) for part in W_dec.split(rows)])


def get_typed(config: object, name: str, kind: type[Kind], where: str, default: Kind | None = None) -> Kind:
    """Get a value of a configuration, which must be exactly of this type; null counts as missing.

    Raises:
        FormatError: if it is of another type, or missing and there is no default.
    """
    if not isinstance(config, Mapping):
        raise FormatError(explain(f"{where} holds a {type(config).__name__}.", want=f"a mapping with {name!r}"))
    value = default if config.get(name) is None else config[name]
    if type(value) is not kind:
        got = f"{name}={reprlib.repr(value)}" if name in config else f"no {name!r}"
        raise FormatError(explain(f"{where} has {got}.", want=f"{name} as {kind.__name__}"))
    return value
