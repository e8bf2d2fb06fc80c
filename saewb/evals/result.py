"""Results of evaluations: as text and HTML tables, in pandas, and stored in a folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saewb._display import Row, html_table, text_table
from saewb._files import absolute, read_json, write_text
from saewb.errors import FormatError, explain
from saewb.fingerprint import sae_digest, values_digest

if TYPE_CHECKING:
    import pandas as pd


def _figure(unit: str, meaning: str) -> Any:
    return field(metadata={"unit": unit, "meaning": meaning})


def _of_nearest(of: str) -> dict[str, str]:
    return {"unit": "-1..1", "meaning": f"mean over latents of the largest cosine with another's, of {of}"}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LatentFigures:
    """Figures per latent, `[d_sae]` each; nan where the architecture does not define one."""

    density: Float[Tensor, " d_sae"]
    """Fraction of tokens on which it is active."""
    mean_activation: Float[Tensor, " d_sae"]
    """Mean |activation| where active."""
    max_activation: Float[Tensor, " d_sae"]
    """Largest |activation|."""
    consistent_activation: Float[Tensor, " d_sae"]
    """Active tokens per row of text with any; 1: single tokens (SAELens' "consistent activation heuristic")."""
    encoder_norm: Float[Tensor, " d_sae"]
    """||W_enc[:, i]||"""
    encoder_bias: Float[Tensor, " d_sae"]
    """b_enc[i]"""
    encoder_decoder_cosine: Float[Tensor, " d_sae"]
    """Cosine of W_enc[:, i] and W_dec[i]; nan for transcoders."""
    decoder_norm: Float[Tensor, " d_sae"]
    """||W_dec[i]||"""
    max_encoder_cosine: Float[Tensor, " d_sae"]
    """Largest cosine of W_enc[:, i] with that of another latent; nan unless evaluated with `core=True`."""
    max_decoder_cosine: Float[Tensor, " d_sae"]
    """Largest cosine of W_dec[i] with that of another latent; likewise."""

    def to_frame(self) -> pd.DataFrame:
        """A row per latent, a column per figure."""
        import pandas as pd

        columns = {f.name: getattr(self, f.name).numpy() for f in fields(self)}
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self.density), name="latent"))

    def density_histogram(self, bins: int = 50) -> tuple[Float[Tensor, " bins"], Float[Tensor, " edges"]]:
        """Number of latents per density, in bins even in log10(density); latents that never fired are left out.

        Returns:
            Counts, and the edges of the bins (log10), one more; both empty if none ever fired.
        """
        log_density = self.density[self.density > 0].log10()
        if len(log_density) == 0:
            return torch.zeros(0), torch.zeros(0)
        counts, edges = torch.histogram(log_density, bins)
        return counts, edges

    def __repr__(self) -> str:
        return f"LatentFigures({len(self.density)} latents: {', '.join(f.name for f in fields(self))})"


@dataclass(frozen=True, repr=False, kw_only=True)
class Evaluation:
    """Result of `evaluate`: prints and displays as a table; `to_frame()` converts it to pandas."""

    ce_clean: float = _figure("nats/token", "loss of the clean model")
    ce_with_sae: float = _figure("nats/token", "loss with the SAE's output in place of the activation")
    ce_zero_ablated: float = _figure("nats/token", "loss with zeros there")
    ce_mean_ablated: float = _figure("nats/token", "loss with the mean activation there")
    ce_recovered_zero: float = _figure("fraction", "1: as the clean model, 0: as zeros")
    ce_recovered_mean: float = _figure("fraction", "1: as the clean model, 0: as the mean activation")
    kl: float = _figure("nats/token", "KL divergence of predictions, model to model with SAE")
    kl_zero_ablated: float = _figure("nats/token", "the same, with zeros there")
    kl_mean_ablated: float = _figure("nats/token", "the same, with the mean activation there")
    kl_recovered_zero: float = _figure("fraction", "1: no divergence, 0: as much as with zeros")
    kl_recovered_mean: float = _figure("fraction", "1: no divergence, 0: as much as with the mean activation")
    l0: float = _figure("latents/token", "active latents")
    l1: float = _figure("units/token", "sum of |activations|")
    mse: float = _figure("units²/token", "squared length of the error")
    fvu: float = _figure("fraction", "variance unexplained; 0: perfect, 1: as the mean")
    explained_variance: float = _figure("fraction", "1 - fvu")
    cosine: float = _figure("-1..1", "direction of the reconstruction; 1: right")
    l2_in: float = _figure("units", "length of the activation")
    l2_out: float = _figure("units", "length of the reconstruction")
    l2_ratio: float = _figure("ratio", "length of the reconstruction; 1: right, less: shrinkage")
    relative_reconstruction_bias: float = _figure("ratio", "what it should be divided by; 1: unbiased")
    dead_frac: float = _figure("fraction", "latents that fire on fewer than `dead_below` of tokens")
    ultra_low_frac: float = _figure("fraction", "latents that are not dead and fire on fewer than 1e-5 of tokens")
    dense_frac: float = _figure("fraction", "latents that fire on more than `dense_above` of tokens")
    over_1_percent_frac: float = _figure("fraction", "latents that fire on more than 1 % of tokens")
    over_10_percent_frac: float = _figure("fraction", "latents that fire on more than 10 % of tokens")
    over_1_percent_share: float = _figure("fraction", "of all firings, those of latents that fire on more than 1 %")
    over_10_percent_share: float = _figure("fraction", "of all firings, those of latents that fire on more than 10 %")
    n_tokens: int = _figure("tokens", "that the SAE was used on")
    n_predictions: int = _figure("tokens", "whose prediction the losses are about")
    dead_below: float = _figure("fraction", "of tokens")
    dense_above: float = _figure("fraction", "of tokens")
    hook: str = _figure("", "where the SAE reads")
    hook_out: str = _figure("", "where it writes")
    model: str = _figure("", "name of the language model")
    sae: str = _figure("", "what was evaluated")
    mean_max_encoder_cosine: float | None = field(default=None, metadata=_of_nearest("encoder columns"))
    mean_max_decoder_cosine: float | None = field(default=None, metadata=_of_nearest("decoder rows"))
    latents: LatentFigures = field(repr=False, compare=False, metadata={"unit": "", "meaning": "figures per latent"})

    @property
    def alive_frac(self) -> float:
        """Fraction of latents that are not dead."""
        return 1 - self.dead_frac

    def figures(self) -> dict[str, Any]:
        """All fields but `latents`, by name; those that only `core=True` measures, where it did."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latents"}
        return {name: value for name, value in values.items() if value is not None}

    def to_frame(self) -> pd.DataFrame:
        """One row, a column for each figure. For many SAEs: `saewb.evaluate_many`."""
        import pandas as pd

        return pd.DataFrame([self.figures()])

    def __repr__(self) -> str:
        losses = ("ce_recovered_zero", "kl") if self.n_predictions else ()
        shown = (*losses, "l0", "fvu", "n_tokens", "hook")
        return f"Evaluation({', '.join(f'{name}={_format(getattr(self, name))}' for name in shown)}, ...)"

    def __str__(self) -> str:
        return text_table(self._title(), self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._rows())

    def _title(self) -> str:
        hook_out = f" => {self.hook_out}" if self.hook_out != self.hook else ""
        return f"{self.sae} on {self.model} at {self.hook}{hook_out}"

    def _rows(self) -> list[Row]:
        figures = [f for f in fields(self) if f.metadata["unit"]]
        if self.n_predictions == 0:  # evaluated without losses
            figures = [f for f in figures if not f.name.startswith(("ce_", "kl", "n_predictions"))]
        figures = [f for f in figures if getattr(self, f.name) is not None]
        return [(f.name, _format(getattr(self, f.name)), f.metadata["unit"], f.metadata["meaning"]) for f in figures]


def _format(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


class EvaluationStore:
    """Figures of many SAEs in a folder, a file each; without a folder it stores nothing.

    Args:
        folder: folder to write to, created if it does not exist; None to store nothing.
        options: everything else the figures depend on; a file with other options counts as missing.
    """

    def __init__(self, folder: str | Path | None, options: dict[str, Any]) -> None:
        self._folder, self._options = None if folder is None else absolute(folder), options
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, sae: Any) -> dict[str, Any] | None:
        """Read the figures of an SAE; None if missing, or of other weights or options, by content.

        Raises:
            FormatError: if the file is damaged.
        """
        if self._folder is None or not (path := self._path(name)).exists():
            return None
        stored = read_json(path)
        figures = stored.get("figures") if isinstance(stored, dict) else None
        values = figures.values() if isinstance(figures, dict) else [()]
        if not all(isinstance(value, (int, float, str, type(None))) for value in values):
            what = f"{path} is damaged: it has no figures."
            raise FormatError(explain(what, want="the file as it was written", fix=f"rm {str(path)!r}    # in a shell"))
        if stored.get("of") != self._key(sae):
            return None
        numbers = {f.name for f in fields(Evaluation) if f.type == "float"}
        try:
            return {name: _number(value) if name in numbers else value for name, value in figures.items()}
        except (ValueError, OverflowError) as error:
            raise FormatError(
                explain(f"{path} is damaged: {error}.", fix=f"rm {str(path)!r}    # in a shell")
            ) from error

    def write(self, name: str, sae: Any, figures: dict[str, Any]) -> None:
        """Write the figures of an SAE under a name."""
        if self._folder is not None:
            strict = {k: _strict(v) for k, v in figures.items()}
            stored = {"name": name, "of": self._key(sae), "figures": strict}
            write_text(self._path(name), json.dumps(stored, indent=1, allow_nan=False))

    def write_table(self, table: pd.DataFrame) -> None:
        """Write the table of all SAEs as `evaluations.csv`."""
        if self._folder is not None:
            write_text(self._folder / "evaluations.csv", table.to_csv())

    def _path(self, name: str) -> Path:
        readable = re.sub(r"[^\w.-]+", "_", name)[:80]
        return self._folder / f"{readable}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.json"

    def _key(self, sae: Any) -> str:
        return values_digest([sae_digest(sae) if isinstance(sae, nn.Module) else source_name(sae), self._options])


def _strict(value: Any) -> Any:
    """A figure for JSON, which has no nan and no infinity: None, "inf" or "-inf"."""
    if not isinstance(value, float) or math.isfinite(value):
        return value
    return None if math.isnan(value) else str(value)


def _number(value: float | str | None) -> float:
    """The inverse of `_strict`."""
    return math.nan if value is None else float(value)


def source_name(source: Any) -> str:
    """Name of a source that `load_sae` takes."""
    return "/".join(map(str, source)) if isinstance(source, tuple) else str(source)


def named_saes(saes: Any, fix: str) -> dict[str, Any]:
    """SAEs by name: one, several or a mapping of them; of sources for `load_sae` likewise.

    Args:
        saes: an SAE or source, a sequence of them, or a mapping.
        fix: a call with two SAEs by name, for the error message.

    Raises:
        ValueError: if two have one name, or there is none.
    """
    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        named = {}
        for i, sae in enumerate([saes] if isinstance(saes, (str, nn.Module)) else saes):
            name = f"{i}: {sae!r}" if isinstance(sae, nn.Module) else source_name(sae)
            if name in named:
                raise ValueError(explain(f"got {name!r} twice.", want="SAEs of different names", fix=fix))
            named[name] = sae
    if not named:
        raise ValueError(explain("got no SAE.", want="one or more", fix=fix))
    return named
