"""What an evaluation found, and how it shows itself: as a text table, in a notebook, in pandas."""

from __future__ import annotations

import html
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd


def _is(unit: str, meaning: str) -> Any:
    return field(metadata={"unit": unit, "meaning": meaning})


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LatentFigures:
    """What an evaluation found for each latent, `[d_sae]` each; nan where there is no such figure."""

    density: Float[Tensor, " d_sae"]  # fraction of tokens on which it is active
    mean_activation: Float[Tensor, " d_sae"]  # |activation| where active
    max_activation: Float[Tensor, " d_sae"]  # largest |activation|
    # Active tokens per row of text in which it is active at all; 1: single tokens (sae-lens'
    # "consistent activation heuristic")
    consistent_activation: Float[Tensor, " d_sae"]
    encoder_norm: Float[Tensor, " d_sae"]  # ||W_enc[:, i]||
    encoder_bias: Float[Tensor, " d_sae"]  # b_enc[i]
    encoder_decoder_cosine: Float[Tensor, " d_sae"]  # cosine of W_enc[:, i] and W_dec[i]; nan for transcoders
    decoder_norm: Float[Tensor, " d_sae"]  # ||W_dec[i]||

    def to_frame(self) -> pd.DataFrame:
        """A row per latent, a column per figure."""
        import pandas as pd

        columns = {f.name: getattr(self, f.name).numpy() for f in fields(self)}
        return pd.DataFrame(columns, index=pd.RangeIndex(len(self.density), name="latent"))

    def density_histogram(self, bins: int = 50) -> tuple[Float[Tensor, " bins"], Float[Tensor, " edges"]]:
        """How many latents have which density, in bins even in log10(density); latents that never fired are left out.

        Returns:
            Counts, and the bins' edges (log10), one more; both empty if none ever fired.
        """
        rates = self.density[self.density > 0].log10()
        if len(rates) == 0:
            return torch.zeros(0), torch.zeros(0)
        found = torch.histogram(rates, bins)
        return found.hist, found.bin_edges

    def __repr__(self) -> str:
        return f"LatentFigures({len(self.density)} latents: {', '.join(f.name for f in fields(self))})"


@dataclass(frozen=True, repr=False, kw_only=True)
class Evaluation:
    """What `evaluate` found. `print` it for a table; in a notebook it shows itself; `to_frame()` for pandas."""

    ce_clean: float = _is("nats/token", "loss of the model as it is")
    ce_with_sae: float = _is("nats/token", "loss with the SAE's output in place of the activation")
    ce_zero_ablated: float = _is("nats/token", "loss with zeros there")
    ce_mean_ablated: float = _is("nats/token", "loss with the mean activation there")
    ce_recovered_zero: float = _is("fraction", "1: as the model itself, 0: as zeros")
    ce_recovered_mean: float = _is("fraction", "1: as the model itself, 0: as the mean activation")
    kl: float = _is("nats/token", "KL divergence of predictions, model to model with SAE")
    kl_zero_ablated: float = _is("nats/token", "the same, with zeros there")
    kl_mean_ablated: float = _is("nats/token", "the same, with the mean activation there")
    kl_recovered_zero: float = _is("fraction", "1: no divergence, 0: as much as with zeros")
    kl_recovered_mean: float = _is("fraction", "1: no divergence, 0: as much as with the mean activation")
    l0: float = _is("latents/token", "active latents")
    l1: float = _is("units/token", "sum of |activations|")
    mse: float = _is("units²/token", "squared length of the error")
    fvu: float = _is("fraction", "variance unexplained; 0: perfect, 1: as the mean")
    explained_variance: float = _is("fraction", "1 - fvu")
    cosine: float = _is("-1..1", "direction of the reconstruction; 1: right")
    l2_in: float = _is("units", "length of the activation")
    l2_out: float = _is("units", "length of the reconstruction")
    l2_ratio: float = _is("ratio", "length of the reconstruction; 1: right, less: shrinkage")
    relative_reconstruction_bias: float = _is("ratio", "what it should be divided by; 1: unbiased")
    dead_frac: float = _is("fraction", "latents that fire on fewer than `dead_below` of tokens")
    ultra_low_frac: float = _is("fraction", "latents that are not dead and fire on fewer than 1e-5 of tokens")
    dense_frac: float = _is("fraction", "latents that fire on more than `dense_above` of tokens")
    n_tokens: int = _is("tokens", "that the SAE was used on")
    n_predictions: int = _is("tokens", "whose prediction the losses are about")
    dead_below: float = _is("fraction", "of tokens")
    dense_above: float = _is("fraction", "of tokens")
    hook: str = _is("", "where the SAE reads")
    hook_out: str = _is("", "where it writes")
    model: str = _is("", "name of the language model")
    sae: str = _is("", "what was evaluated")
    latents: LatentFigures = field(repr=False, compare=False, metadata={"unit": "", "meaning": "figures per latent"})

    @property
    def alive_frac(self) -> float:
        """Fraction of latents that are not dead."""
        return 1 - self.dead_frac

    def figures(self) -> dict[str, Any]:
        """All fields but `latents`, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latents"}

    def to_frame(self) -> pd.DataFrame:
        """One row, a column for each figure. For many SAEs: `saewb.evaluate_many`."""
        import pandas as pd

        return pd.DataFrame([self.figures()])

    def __repr__(self) -> str:
        losses = ("ce_recovered_zero", "kl") if self.n_predictions else ()
        shown = (*losses, "l0", "fvu", "n_tokens", "hook")
        return f"Evaluation({', '.join(f'{name}={_shown(getattr(self, name))}' for name in shown)}, ...)"

    def __str__(self) -> str:
        rows = self._rows()
        name, value, unit = (max(len(row[i]) for row in rows) for i in range(3))
        lines = [f"{a:<{name}}  {b:>{value}}  {c:<{unit}}  {d}".rstrip() for a, b, c, d in rows]
        return "\n".join([self._title(), *lines])

    def _repr_html_(self) -> str:
        cells = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:{side}">{html.escape(c)}</td>' for c, side in zip(row, _SIDES, strict=True)
            )
            + "</tr>"
            for row in self._rows()
        )
        return f"<div><div>{html.escape(self._title())}</div><table>{cells}</table></div>"

    def _title(self) -> str:
        return f"{self.sae} on {self.model} at {self.hook}" + (
            f" => {self.hook_out}" if self.hook_out != self.hook else ""
        )

    def _rows(self) -> list[tuple[str, str, str, str]]:
        figures = [f for f in fields(self) if f.metadata["unit"]]
        if self.n_predictions == 0:  # the model's predictions were not asked for
            figures = [f for f in figures if not f.name.startswith(("ce_", "kl", "n_predictions"))]
        return [(f.name, _shown(getattr(self, f.name)), f.metadata["unit"], f.metadata["meaning"]) for f in figures]


_SIDES = ("left", "right", "left", "left")


def _shown(value: float | int | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
