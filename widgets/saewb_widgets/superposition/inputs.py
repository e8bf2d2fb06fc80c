"""Inputs of a SuperpositionPanel: one or several named sets of directions, with an optional feature index of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import saewb
from saewb import errors

SIDES = ("decoder", "encoder")
_FIX = "SuperpositionPanel(sae)  # or a tensor, a list, or {'a': sae_a, 'b': sae_b}"


@final
@dataclass(frozen=True, eq=False)
class Inputs:
    """Validated sets of directions and their feature indexes, by name."""

    directions: Mapping[str, Any]
    """SAEs, or tensors `[n, d]`."""
    index: Mapping[str, Any]
    """Feature indexes, of those SAEs that have one."""
    form: str
    """What the caller passed: `"one"`, `"list"` or `"dict"`."""

    @classmethod
    def from_arguments(cls, directions: Any, index: Any) -> Inputs:
        """Validate the panel's arguments.

        Raises:
            TypeError: if `directions` is neither an SAE nor a tensor nor several of them, or `index` is no index.
            ValueError: for an empty collection, two sets of one name, or an index of another SAE.
        """
        form = "one"
        if isinstance(directions, (Mapping, Sequence)) and not isinstance(directions, str):
            form = "dict" if isinstance(directions, Mapping) else "list"
            if not len(directions):
                raise ValueError(errors.explain(f"SuperpositionPanel got an empty {form}.", want="SAEs", fix=_FIX))
        by_name = _by_name(directions, form)
        for item in by_name.values():
            if not hasattr(item, "W_dec") and not hasattr(item, "ndim"):
                what = f"SuperpositionPanel got a {type(item).__name__}."
                raise TypeError(errors.explain(what, want="an SAE or a tensor [n, d], or several by name", fix=_FIX))
        inputs = cls(by_name, {} if index is None else _indexes(index, form, by_name), form)
        for name in inputs.index:
            inputs._check_index(name)
        return inputs

    @property
    def names(self) -> list[str]:
        """Names in the caller's order; positions for a list."""
        return list(self.directions)

    def is_sae(self, name: str) -> bool:
        """Whether this set is an SAE, which has a decoder and perhaps an encoder, rather than a tensor."""
        return hasattr(self.directions[name], "W_dec")

    def sides(self, name: str) -> list[str]:
        """Weight matrices to choose from; none for a tensor."""
        return [s for s in SIDES if self.is_sae(name) and (s == "decoder" or hasattr(self.directions[name], "W_enc"))]

    def has(self, name: str, side: str) -> bool:
        """Whether this set has directions on that side; a tensor counts as a decoder."""
        return side == "decoder" or side in self.sides(name)

    def matrix(self, name: str, side: str) -> Any:
        """The directions `[n, d]`, one per row.

        Raises:
            ValueError: if there is no encoder.
        """
        item = self.directions[name]
        if self.has(name, side):
            if not self.is_sae(name):
                return item
            return item.W_enc.T if side == "encoder" else item.W_dec
        if not self.is_sae(name):
            fix = "SuperpositionPanel(sae)" if self.form == "one" else "side='decoder'"
            raise ValueError(errors.explain("a tensor has no encoder.", want="an SAE", fix=fix))
        raise ValueError(errors.explain(f"{item!r} has no W_enc.", want="decoder", fix="side='decoder'"))

    def scatters(self, name: str) -> list[str]:
        """Quantities against which the scatter plot can draw the largest |cos|."""
        return ["density", "norm"] if name in self.index else ["norm"]

    def scatter_values(self, name: str, side: str) -> dict[str, Any]:
        """Norm, and with an index density, of each direction: arrays `[n]` by the names of `scatters`."""
        norm = self.matrix(name, side).detach().float().norm(dim=1).cpu().numpy()
        return {"norm": norm, **({"density": self.index[name].density.numpy()} if name in self.index else {})}

    def code(self, name: str, side: str, scatter: str, neighbors: int) -> list[str]:
        """Lines of Python that define `result`, `points`, and with several sets `results` and `compared`."""
        variable = "saes" if all(map(self.is_sae, self.directions)) else "directions"
        item = {"one": "sae" if self.is_sae(name) else "directions", "list": f"{variable}[{name}]"}.get(
            self.form, f"{variable}[{name!r}]"
        )
        attribute = ".W_enc.T" if side == "encoder" else ""
        if self.form == "one":
            lines = [f"# {item}: what the panel was made with"]
            lines += [f"result = saewb.superposition({item}{attribute}, neighbors={neighbors})"]
        else:
            pairs = f"{variable}.items()" if self.form == "dict" else f"enumerate({variable})"
            key = "name" if self.form == "dict" else "str(name)"
            has = "" if all(self.has(n, side) for n in self.directions) else " if hasattr(each, 'W_enc')"
            lines = [f"# {variable}: what the panel was made with"]
            lines += ["results = {", f"    {key}: saewb.superposition(each{attribute}, neighbors={neighbors})"]
            lines += [f"    for name, each in {pairs}{has}", "}"]
            lines += ["compared = pd.DataFrame({name: each.figures() for name, each in results.items()}).T"]
            lines += [f"result = results[{name!r}]"]
        if scatter == "density":
            index = {"one": "index", "list": f"index[{name}]"}.get(self.form, f"index[{name!r}]")
            lines += ["# index: what the panel was made with"]
            value = f"{index}.density.numpy()"
        else:
            rows = item + (attribute or (".W_dec" if self.is_sae(name) else ""))
            value = f"{rows}.detach().float().norm(dim=1).cpu().numpy()"
        return [*lines, f"points = result.to_frame()[['max_abs_cos']].assign({scatter}={value})"]

    def _check_index(self, name: str) -> None:
        """Raise unless the index is of this SAE, or of an SAE with these decoder directions."""
        self.index[name].check_sae(self.directions[name])


def _by_name(items: Any, form: str) -> dict[str, Any]:
    if form == "one":
        return {"": items}
    pairs = list(items.items() if form == "dict" else enumerate(items))
    names = [str(name) for name, _ in pairs]
    if duplicates := [name for name in names if names.count(name) > 1]:
        what = f"SuperpositionPanel got {names.count(duplicates[0])} of the name {duplicates[0]!r}."
        raise ValueError(errors.explain(what, want="a name for each", fix="{'a': sae_a, 'b': sae_b}"))
    return dict(zip(names, (item for _, item in pairs), strict=True))


def _indexes(index: Any, form: str, directions: Mapping[str, Any]) -> dict[str, Any]:
    """Feature indexes by name, without the SAEs that have none."""
    fix = {"one": "index=index", "list": "index=[index, None]", "dict": "index={'a': index}"}[form]
    is_many = isinstance(index, Mapping) if form == "dict" else isinstance(index, (list, tuple))
    if form != "one" and not is_many:
        what = f"SuperpositionPanel got several SAEs and a {type(index).__name__} as index."
        raise TypeError(errors.explain(what, want=f"a {form}, as the SAEs", fix=fix))
    if form == "list" and len(index) != len(directions):
        what = f"SuperpositionPanel got {len(index)} indexes of {len(directions)} SAEs."
        raise ValueError(errors.explain(what, want="one for each, or None", fix=fix))
    by_name = _by_name(index, form)
    if unknown := [name for name in by_name if name not in directions]:
        near = errors.near(unknown[0], directions) or list(directions)[:3]
        raise ValueError(errors.explain(f"index has {unknown[0]!r}, which is none of the SAEs.", near=near))
    by_name = {name: item for name, item in by_name.items() if item is not None}
    for item in by_name.values():
        if not isinstance(item, saewb.FeatureIndex):
            what = f"SuperpositionPanel got a {type(item).__name__} as index."
            raise TypeError(errors.explain(what, want="a FeatureIndex", fix=fix))
    return by_name
