"""Gemma Scope 2: `params.safetensors`, mostly with a `config.json`; SAEs and transcoders of Gemma 3.

The weights are those of a JumpReLU SAE as they stand, with `affine_skip_connection` [d_in, d_out] for the affine
transcoders. One layer of a cross-layer transcoder, `params_layer_<i>.safetensors`, writes to every later layer through
`w_dec` [d_sae, layers, d_out]: read alone its rows are summed over the layers, so its latents are right and its output
is the sum of what it writes; reading the whole folder gives the transcoder itself.

- A transcoder reads `blocks.L.mlp.hook_in`, the MLP's input after the norm and its gain. (`hook_mlp_in`, which
  sae-lens says, is the residual stream before the norm.)
- Without config.json, or where it does not say, names do: repository google/gemma-scope-2-{size}-{pt,it}, folders
  {resid_post,attn_out,mlp_out,transcoder,clt}[_all]/layer_L_width_W_l0_L0[_affine].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import torch

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._build import built, reading
from saewb.pretrained.formats._facts import Facts
from saewb.pretrained.formats._tensors import TensorFile
from saewb.pretrained.formats._text import object_of, read_json
from saewb.sae.sae import SAE, SAEConfig

NAME = "Gemma Scope 2"
WEIGHTS, CONFIG = "params.safetensors", "config.json"
MARKS = (WEIGHTS,)

_ONE_LAYER = re.compile(r"params_layer_(\d+)(\.safetensors)?")
_REPO = re.compile(r"gemma-scope-2-(\w+)-(pt|it)")
_SITES = {  # by folder: what it reads in the words of config.json, and what it writes
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}
_HOOKS = {  # in the words of config.json -> here
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_attention_layernorm.output": "hook_attn_out",
    "pre_feedforward_layernorm.input": "hook_resid_mid",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
_TYPES = ("sae", "transcoder", "clt")


def files(path: str) -> list[str]:
    """Patterns of the repository's files that reading `path` needs: a folder, or one layer of a transcoder."""
    folder, _, name = path.rpartition("/")
    if _ONE_LAYER.fullmatch(name):
        prefix = f"{folder}/" if folder else ""
        return [escape(f"{prefix}{name.removesuffix('.safetensors')}.safetensors"), escape(f"{prefix}{CONFIG}")]
    prefix = f"{path}/" if path else ""
    return [escape(f"{prefix}{WEIGHTS}"), escape(f"{prefix}{CONFIG}")]


def matches(place: Path) -> bool:
    """Whether it is a folder with params.safetensors, that file, or a file params_layer_<i>.safetensors."""
    return _weights(Path(place)).is_file()


def read(
    place: Path,
    facts: Facts | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> SAE:
    """The SAE, the transcoder or the one layer of a cross-layer transcoder in this layout; weights are memory-mapped.

    Args:
        place: the folder, or a file of weights (".safetensors" may be left out).
        facts: `repo` and `path` say what config.json does not; `model`, `hook`, `hook_out`, `layer` count after those.
        dtype: of the parameters; None means as stored.
        device: of the parameters; None means the CPU.

    Raises:
        FormatError: if config.json says another architecture than "jump_relu", or the tensors are not those it says.
    """
    facts, path = facts or Facts(), _weights(Path(place))
    with reading(path):
        facts.no_factor(NAME)
        config = _config(path, facts)
        file = TensorFile(path)
        d_in, d_sae, d_out, targets = _widths(file, config)
        weights = {ours: file.tensor(name) for name, ours in _names(file).items()}
        if targets:
            weights["W_dec"] = _summed(weights["W_dec"])
        cfg = SAEConfig(
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_out,
            activation="jumprelu",
            skip="W_skip" in weights,
            **facts.placed(
                model=_model(config, facts, path),
                hook=_hook(config.get("hf_hook_point_in")),
                hook_out=_hook(config.get("hf_hook_point_out")),
                prepend_bos=True,
                context_size=1024,
                dataset_path="monology/pile-uncopyrighted",
                l0=config.get("l0"),
                hf_hook_name=config.get("hf_hook_point_in"),
                hf_hook_name_out=config.get("hf_hook_point_out"),
                summed_over_layers=targets,
            ),
        )
        return built(cfg, weights, file.dtype("w_dec"), dtype, device)


def _weights(place: Path) -> Path:
    if _ONE_LAYER.fullmatch(place.name) and not place.is_dir():
        return place.with_name(f"{place.name.removesuffix('.safetensors')}.safetensors")
    return place if place.name == WEIGHTS and not place.is_dir() else place / WEIGHTS


def _config(path: Path, facts: Facts) -> dict[str, Any]:
    """What config.json says, and what the names say where it does not; hooks in its words."""
    beside = path.with_name(CONFIG)
    said = object_of(read_json(beside), beside) if beside.is_file() else {}
    said = {name: value for name, value in said.items() if value is not None}
    if said.get("architecture", "jump_relu") != "jump_relu":
        raise FormatError(explain(f"{CONFIG} has architecture {said['architecture']!r}.", want="'jump_relu'"))
    for name in ("hf_hook_point_in", "hf_hook_point_out", "model_name"):
        if not isinstance(said.get(name, ""), str):
            raise FormatError(explain(f"{CONFIG} has {name}={said[name]!r}.", want="text"))
    kind = _type(said, facts, path)
    if kind == "clt":  # one configuration for all layers, with a placeholder for the number
        said = {name: value for name, value in said.items() if not name.startswith("hf_hook")}
    inferred = _inferred(facts, path)
    config = {**inferred, **said, "type": kind}
    for name in ("hf_hook_point_in", "hf_hook_point_out"):
        if name in config and _hook(config[name]) is None:
            if name not in inferred:
                want = ", ".join(f"model.layers.<n>.{point}" for point in _HOOKS)
                raise FormatError(explain(f"{CONFIG} has {name}={config[name]!r}.", want=want))
            config[name] = inferred[name]
    if kind == "sae":  # it writes where it reads, and its file may say so
        config.pop("hf_hook_point_out", None)
    return config


def _type(said: Mapping[str, Any], facts: Facts, path: Path) -> str:
    by_name = "transcoder" if _site(facts, path) == "transcoder" else "sae"
    kind = said.get("type", "clt" if path.name != WEIGHTS else by_name)
    if "crosscoder" in _inside(facts, path):
        kind = "crosscoder"
    if kind not in _TYPES:
        want = "for a crosscoder, the whole folder; else one of " + ", ".join(_TYPES)
        raise FormatError(explain(f"{path.name} is of type {kind!r}.", want=want))
    return kind


def _inferred(facts: Facts, path: Path) -> dict[str, str]:
    layer, points = _layer(facts, path), _SITES.get(_site(facts, path), (None, None))
    names = zip(("hf_hook_point_in", "hf_hook_point_out"), points, strict=True)
    return {name: f"model.layers.{layer}.{point}" for name, point in names if point and layer is not None}


def _names(file: TensorFile) -> dict[str, str]:
    ours = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    return {name: ours.get(name, name) for name in file.names}


def _widths(file: TensorFile, config: Mapping[str, Any]) -> tuple[int, int, int, int | None]:
    """d_in, d_sae, d_out, and for one layer of a cross-layer transcoder the number of layers it writes to."""
    enc, dec = (file.shape(name) for name in ("w_enc", "w_dec"))
    want = 3 if config["type"] == "clt" else 2
    if len(enc) != 2 or len(dec) != want:
        what = f"{file.path.name} has w_enc of shape {enc}, w_dec of shape {dec}."
        raise FormatError(explain(what, want=f"2 and {want} axes for type {config['type']!r}"))
    (d_in, d_sae), d_out = enc, dec[-1]
    if config["type"] == "sae" and d_in != d_out:
        raise FormatError(explain(f"an SAE that reads {d_in} numbers and writes {d_out}.", want="type 'transcoder'"))
    shapes = {
        **{"w_enc": (d_in, d_sae), "w_dec": (d_sae, *dec[1:])},
        **{"b_enc": (d_sae,), "b_dec": (d_out,), "threshold": (d_sae,)},
    }
    if config.get("affine_connection", "affine_skip_connection" in file):
        shapes["affine_skip_connection"] = (d_in, d_out)
    file.fit(shapes)
    return d_in, d_sae, d_out, dec[1] if want == 3 else None


def _summed(w_dec: torch.Tensor) -> torch.Tensor:
    """Over the layers written to, some latents at a time: a sum of all at once would hold the tensor twice."""
    kind = w_dec.dtype
    return torch.cat([part.float().sum(1).to(kind) for part in w_dec.split(max(1, (1 << 24) // w_dec[0].numel()))])


def _inside(facts: Facts, path: Path) -> str:
    """The folders inside the repository: "owner" and "name" may hold any words."""
    if facts.path is not None:
        return facts.path
    where = facts.where(path)
    found = list(_REPO.finditer(where))
    return where[found[-1].end() :] if found else "/".join(Path(where).parts[-4:])


def _site(facts: Facts, path: Path) -> str:
    found = re.findall(r"(?:^|/)(resid_post|attn_out|mlp_out|transcoder|clt)(?:_all)?(?=/|$)", _inside(facts, path))
    return found[-1] if found else ""


def _layer(facts: Facts, path: Path) -> int | None:
    """Of a file params_layer_<i>, of the folder's name, or of `facts`."""
    in_file, in_path = re.search(r"layer_(\d+)", path.name), re.findall(r"layer_(\d+)", _inside(facts, path))
    if in_file:
        return int(in_file[1])
    return int(in_path[-1]) if in_path else facts.layer


def _model(config: Mapping[str, Any], facts: Facts, path: Path) -> str | None:
    name = config.get("model_name")
    if name is None:
        found = _REPO.findall(facts.where(path))
        name = f"gemma-3-{found[-1][0]}-{found[-1][1]}" if found else None
    if name is None:
        return None
    name = name.replace("-v3", "-3")
    name = name if "google" in name else f"google/{name}"
    return name.removesuffix("-pt") if "270m" in name else name  # the smallest has no suffix on the hub


def _hook(said: str | None) -> str | None:
    found = re.fullmatch(r"(?:model\.)?(?:language_model\.)?layers\.(\d+)\.(.+)", said or "")
    return f"blocks.{found[1]}.{_HOOKS[found[2]]}" if found and found[2] in _HOOKS else None
