"""What a SuperpositionPanel is made with: sets of directions by name, their indexes, and the lines that name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import saewb
from saewb import errors

SIDES = ("decoder", "encoder")
_LOOKED_AT = 8  # latents whose neighbors say whether an index is of an SAE
_ROUNDED = 0.05  # what a cosine may be off by, of an SAE in another precision
_FIX = "SuperpositionPanel(sae)  # or a tensor, a list, or {'a': sae_a, 'b': sae_b}"


@final
@dataclass(frozen=True, eq=False)
class Given:
    """One set of directions or several, checked."""

    of: Mapping[str, Any]  # SAEs or tensors
    index: Mapping[str, Any]  # of those that have one
    form: str  # one, list or dict: how they were given

    @classmethod
    def read(cls, directions: Any, index: Any) -> Given:
        """From the panel's arguments.

        Raises:
            TypeError: for what is no set of directions, or no index.
            ValueError: for none, two of one name, or an index of another SAE.
        """
        form = "one"
        if isinstance(directions, (Mapping, Sequence)) and not isinstance(directions, str):
            form = "dict" if isinstance(directions, Mapping) else "list"
            if not len(directions):
                raise ValueError(errors.explain(f"SuperpositionPanel got an empty {form}.", want="SAEs", fix=_FIX))
        of = _named(directions, form)
        for one in of.values():
            if not hasattr(one, "W_dec") and not hasattr(one, "ndim"):
                what = f"SuperpositionPanel got a {type(one).__name__}."
                raise TypeError(errors.explain(what, want="an SAE or a tensor [n, d], or several by name", fix=_FIX))
        made = cls(of, {} if index is None else _indexes(index, form, of), form)
        for name in made.index:
            made._fits(name)
        return made

    @property
    def names(self) -> list[str]:
        """As given; of a list the places."""
        return list(self.of)

    def is_sae(self, name: str) -> bool:
        """Whether it has a decoder and perhaps an encoder."""
        return hasattr(self.of[name], "W_dec")

    def sides(self, name: str) -> list[str]:
        """That can be chosen between: none of a tensor."""
        return [s for s in SIDES if self.is_sae(name) and (s == "decoder" or hasattr(self.of[name], "W_enc"))]

    def has(self, name: str, side: str) -> bool:
        """Whether it has directions on that side."""
        return side == "decoder" or side in self.sides(name)

    def matrix(self, name: str, side: str) -> Any:
        """The directions, one per row."""
        one = self.of[name]
        if self.has(name, side):
            if not self.is_sae(name):
                return one
            return one.W_enc.T if side == "encoder" else one.W_dec
        if not self.is_sae(name):
            fix = "SuperpositionPanel(sae)" if self.form == "one" else "side='decoder'"
            raise ValueError(errors.explain("a tensor has no encoder.", want="an SAE", fix=fix))
        raise ValueError(errors.explain(f"{one!r} has no W_enc.", want="decoder", fix="side='decoder'"))

    def scatters(self, name: str) -> list[str]:
        """What the largest |cos| can be drawn against."""
        return ["density", "norm"] if name in self.index else ["norm"]

    def across(self, name: str, side: str) -> dict[str, Any]:
        """By the names of `scatters`, the length and the density of each direction, arrays `[n]`."""
        norm = self.matrix(name, side).detach().float().norm(dim=1).cpu().numpy()
        return {"norm": norm, **({"density": self.index[name].density.numpy()} if name in self.index else {})}

    def code(self, name: str, side: str, scatter: str, neighbors: int) -> list[str]:
        """Lines that make `found`, `points`, and of several `compared`."""
        are = "saes" if all(map(self.is_sae, self.of)) else "directions"
        one = {"one": "sae" if self.is_sae(name) else "directions", "list": f"{are}[{name}]"}.get(
            self.form, f"{are}[{name!r}]"
        )
        taken, given = (".W_enc.T", "each.W_enc.T") if side == "encoder" else ("", "each")
        if self.form == "one":
            lines = [f"# {one}: what the panel was made with"]
            lines += [f"found = saewb.superposition({one}{taken}, neighbors={neighbors})"]
        else:
            pairs = f"{are}.items()" if self.form == "dict" else f"enumerate({are})"
            key = "name" if self.form == "dict" else "str(name)"
            has = "" if all(self.has(n, side) for n in self.of) else " if hasattr(each, 'W_enc')"
            lines = [f"# {are}: what the panel was made with"]
            lines += ["every = {", f"    {key}: saewb.superposition({given}, neighbors={neighbors})"]
            lines += [f"    for name, each in {pairs}{has}", "}"]
            lines += ["compared = pd.DataFrame({name: each.figures() for name, each in every.items()}).T"]
            lines += [f"found = every[{name!r}]"]
        if scatter == "density":
            where = {"one": "index", "list": f"index[{name}]"}.get(self.form, f"index[{name!r}]")
            lines += ["# index: likewise"]
            value = f"{where}.density.numpy()"
        else:
            rows = one + (taken or (".W_dec" if self.is_sae(name) else ""))
            value = f"{rows}.detach().float().norm(dim=1).cpu().numpy()"
        return [*lines, f"points = found.to_frame()[['max_abs_cos']].assign({scatter}={value})"]

    def _fits(self, name: str) -> None:
        """Raise unless the index is of this SAE: as many latents, and the same nearest ones."""
        index, rows = self.index[name], self.matrix(name, "decoder").detach()
        of = f" of {name!r}" if self.form != "one" else ""
        fix = "saewb.build_index(model, sae, texts)"
        if len(index) != len(rows):
            what = f"the index{of} has {len(index):,} latents, the directions are {len(rows):,}."
            raise ValueError(errors.explain(what, want="the index of this SAE", fix=fix))
        for i in range(0, len(index), -(-len(index) // _LOOKED_AT)):
            for near in index.latent(i).nearest_by_decoder[:1]:
                a, b = rows[i].double(), rows[near.latent].double()
                cos = float(a @ b / (a.norm() * b.norm()).clamp(min=1e-30))
                if abs(cos - near.cosine) > _ROUNDED:
                    what = f"the index{of} is of another SAE: latents {i} and {near.latent} have cosine "
                    what += f"{near.cosine:.2f} there and {cos:.2f} here."
                    raise ValueError(errors.explain(what, want="the index of this SAE", fix=fix))


def _named(directions: Any, form: str) -> dict[str, Any]:
    if form == "one":
        return {"": directions}
    pairs = list(directions.items() if form == "dict" else enumerate(directions))
    names = [str(name) for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        what = f"SuperpositionPanel got {names.count(twice[0])} of the name {twice[0]!r}."
        raise ValueError(errors.explain(what, want="a name for each", fix="{'a': sae_a, 'b': sae_b}"))
    return dict(zip(names, (one for _, one in pairs), strict=True))


def _indexes(index: Any, form: str, of: Mapping[str, Any]) -> dict[str, Any]:
    """By name; those that are None have none."""
    fix = {"one": "index=index", "list": "index=[index, None]", "dict": "index={'a': index}"}[form]
    is_many = isinstance(index, Mapping) if form == "dict" else isinstance(index, (list, tuple))
    if form != "one" and not is_many:
        what = f"SuperpositionPanel got several SAEs and a {type(index).__name__} as index."
        raise TypeError(errors.explain(what, want=f"a {form}, as the SAEs", fix=fix))
    if form == "list" and len(index) != len(of):
        what = f"SuperpositionPanel got {len(index)} indexes of {len(of)} SAEs."
        raise ValueError(errors.explain(what, want="one for each, or None", fix=fix))
    made = {"": index} if form == "one" else _named(index, form)
    if unknown := [name for name in made if name not in of]:
        near = errors.near(unknown[0], of) or list(of)[:3]
        raise ValueError(errors.explain(f"index has {unknown[0]!r}, which is none of the SAEs.", near=near))
    for one in made.values():
        if one is not None and not isinstance(one, saewb.FeatureIndex):
            what = f"SuperpositionPanel got a {type(one).__name__} as index."
            raise TypeError(errors.explain(what, want="a FeatureIndex", fix=fix))
    return {name: one for name, one in made.items() if one is not None}
