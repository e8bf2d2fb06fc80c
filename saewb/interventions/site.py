"""Where SAEs belong in a model: from what a caller says and what the SAEs say themselves to points of the model."""

from __future__ import annotations

from torch import nn

from saewb.errors import explain
from saewb.interventions.cross_layer import layers_in_one_pass
from saewb.interventions.splice import Splice
from saewb.models import hook_points
from saewb.sae.cross_layer import CrossLayerTranscoder


def splices(model: nn.Module, saes: object, hook: object, hook_out: object, error_term: bool) -> list[Splice]:
    """One for each SAE, and for each layer of a cross-layer transcoder, from what `attach` was given; none is on yet.

    Raises:
        ValueError, TypeError: as `saewb.attach`.
    """
    several = list(saes) if isinstance(saes, (list, tuple)) else [saes]
    if not several:
        raise ValueError(explain("attach got no SAE.", fix="saewb.attach(model, sae)"))
    reads, writes = _one_each(hook, len(several), "hook"), _one_each(hook_out, len(several), "hook_out")
    made: list[Splice] = []
    for sae, read, write in zip(several, reads, writes, strict=True):
        if not (isinstance(sae, nn.Module) and hasattr(sae, "encode") and hasattr(sae, "cfg")):
            fix = f"sae = saewb.load_sae({sae!r})" if isinstance(sae, str) else "sae = saewb.load_sae(...)"
            raise TypeError(explain(f"attach got {type(sae).__name__} as an SAE.", want="one, or a list", fix=fix))
        if isinstance(sae, CrossLayerTranscoder):
            _check_not_moved(sae, read, write)
            made += [_splice(model, layer, None, None, error_term) for layer in layers_in_one_pass(sae)]
        else:
            made.append(_splice(model, sae, read, write, error_term))
    _check_distinct(made)
    return made


def _splice(model: nn.Module, sae: nn.Module, hook: str | None, hook_out: str | None, error_term: bool) -> Splice:
    if getattr(sae.cfg, "metadata", {}).get("summed_over_layers"):
        what = f"{sae!r} is one layer of a cross-layer transcoder, which reconstructs nothing by itself."
        raise ValueError(explain(what, want="the whole", fix="saewb.attach(model, saewb.load_sae(<its folder>))"))
    source, target = places(sae, hook, hook_out)
    place = source if source == target else f"{source} => {target}"
    return Splice(model, sae, *points(model, source, target), place, error_term)


def _check_not_moved(clt: CrossLayerTranscoder, hook: str | None, hook_out: str | None) -> None:
    if hook is not None or hook_out is not None:
        what = f"attach got hook={hook!r}, hook_out={hook_out!r} for {clt!r}, which has points for every layer."
        fix = "CrossLayerTranscoder.from_tensors(dataclasses.replace(clt.cfg, hooks=...), ...)"
        raise ValueError(explain(what, want="None: it reads cfg.hooks and writes cfg.hooks_out", fix=fix))


def places(sae: nn.Module, hook: str | None, hook_out: str | None) -> tuple[str, str]:
    """The names of the points an SAE reads and writes, given what a caller says instead of its configuration.

    Raises:
        ValueError: if that leaves one of them open.
        TypeError: for a cross-layer transcoder, which has many.
    """
    if isinstance(sae, CrossLayerTranscoder):
        what = f"{sae!r} reads and writes at every layer; this works on SAEs and transcoders with one point each."
        raise TypeError(explain(what, fix="saewb.attach(model, clt), and hooks on its inner points"))
    source = hook or sae.cfg.hook
    if source is None:
        what = f"{sae!r} does not say where it belongs."
        raise ValueError(explain(what, fix='saewb.attach(model, sae, hook="blocks.4.hook_resid_post")'))
    # An SAE that is moved to another point reads and writes there; a transcoder keeps the point it writes to.
    kept = sae.cfg.hook_out if sae.cfg.hook_out != sae.cfg.hook else None
    target = hook_out or kept or source
    if sae.cfg.is_transcoder and target == source:
        what = f"{sae!r} is a transcoder and does not say where it writes."
        raise ValueError(explain(what, fix='saewb.attach(model, sae, hook_out="blocks.4.hook_mlp_out")'))
    return source, target


def points(model: nn.Module, source: str, target: str) -> tuple[hook_points.Point, hook_points.Point]:
    """Of these names, where an SAE reads and writes; one point if they are one name.

    Raises:
        ValueError: as `hook_points.resolve` and `hook_points.resolve_writable`.
    """
    read = None if source == target else hook_points.resolve(model, source)
    write = hook_points.resolve_writable(model, target)
    return read or write, write


def _one_each(names: object, n: int, argument: str) -> list[str | None]:
    if names is None or (isinstance(names, str) and n == 1):
        return [names] * n
    if isinstance(names, (list, tuple)) and len(names) == n:
        return list(names)
    want = "a name, e.g. 'blocks.2.hook_resid_post'" if n == 1 else f"{n} names, in a list"
    raise ValueError(explain(f"attach got {argument}={names!r} for {n} SAE{'s' * (n > 1)}.", want=want))


def _check_distinct(splices: list[Splice]) -> None:
    seen: dict[nn.Module, Splice] = {}
    for splice in splices:
        if (other := seen.setdefault(splice.write.module, splice)) is not splice:
            what = f"{other.sae!r} and {splice.sae!r} both write to {splice.write.name!r}."
            raise ValueError(explain(what, want="one SAE for each point; nest a second `attach` to override the first"))
