"""The HTML page of features: one file that needs neither network nor kernel.

1. Each latent is its `to_dict()`; tokens and activations of all contexts go into two binary tables, base64: 500 latents
   of 40 contexts take under 5 MB.
2. `page/page.html` is the template; it includes `page.js`, `page.css` and `latent.js`, which panels use too.
3. Its content policy forbids the page to load anything. Text reaches it as JSON and `textContent` only.
"""

from __future__ import annotations

import base64
import json
import sys
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from saewb._files import write_text
from saewb.errors import explain
from saewb.features.latent import Latent, round_floats

MAX_LATENTS = 500  # latents on a page by default
_DIGITS = 4  # significant digits, enough for display
_FULL = 32767  # int16 level of a latent's largest activation
_PAGE = Path(__file__).parent / "page"


def write_page(latents: Iterable[Latent], path: Path, *, title: str, about: str, special: Sequence[int] = ()) -> Path:
    """Write the HTML page of these latents.

    Args:
        latents: in the order of the page.
        path: of the file.
        title: of the page.
        about: one line under the title.
        special: ids of tokens to show as a mark.

    Returns:
        The absolute path.

    Raises:
        ValueError: for no latents.
        IsADirectoryError: if `path` is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(explain(f"{str(path)!r} is a folder.", fix=f"save_html({str(path / 'index.html')!r})"))
    page = render_page(latents, title=title, about=about, special=special)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
    return path.resolve()


def render_page(latents: Iterable[Latent], *, title: str, about: str, special: Sequence[int] = ()) -> str:
    """Render the page as a string; see `write_page`."""
    from jinja2 import Environment, FileSystemLoader

    contexts = _ContextTable()
    pages = [round_floats(contexts.pack(latent.to_dict()), _DIGITS) for latent in latents]
    if not pages:
        raise ValueError(explain("save_html got no latents.", want="at least one", fix="latents=[0]"))
    data = contexts.to_dict() | {"special": list(special), "latents": pages}
    # Without "<", so that no text can end the script element.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    template = Environment(loader=FileSystemLoader(_PAGE), autoescape=True).get_template("page.html")
    return template.render(title=title, about=about, data=text)


class _ContextTable:
    """Table of distinct tokens, and the concatenated token indices and activations of all contexts."""

    def __init__(self) -> None:
        self.tokens: dict[tuple[str, int], int] = defaultdict(count().__next__)
        self.indices: list[int] = []
        self.acts = array("h")

    def pack(self, page: dict[str, Any]) -> dict[str, Any]:
        """Move the tokens and activations of a latent's contexts into the table."""
        acts: list[float] = []
        for context in (*page["top"], *(c for group in page["groups"] for c in group)):
            context["length"] = len(context["tokens"])
            tokens = zip(context.pop("tokens"), context.pop("ids"), strict=True)
            self.indices.extend(map(self.tokens.__getitem__, tokens))
            acts += context.pop("acts")
        self.acts.frombytes(_levels(np.array(acts) / page["scale"]).tobytes())
        return page

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values."""
        wide = len(self.tokens) > 2**16
        return {
            "words": [text for text, _ in self.tokens],
            "ids": [i for _, i in self.tokens],
            "wide": wide,
            "tokens": _base64(array("I" if wide else "H", self.indices)),
            "acts": _base64(self.acts),
        }


def _base64(values: array) -> str:
    if sys.byteorder == "big":
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode()


def _levels(share: np.ndarray) -> np.ndarray:
    """Activations as fractions of the largest, as int16; a weak one is not rounded to 0."""
    level = np.rint(share * _FULL).clip(-_FULL, _FULL)
    return np.where(level == 0, np.sign(share), level).astype(np.int16)
