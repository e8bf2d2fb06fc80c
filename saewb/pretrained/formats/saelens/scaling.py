"""What a SAELens training run did to all its inputs alike, from the files beside the weights."""

from __future__ import annotations

from pathlib import Path

from saewb.errors import FormatError, explain
from saewb.pretrained.formats._tensors import TensorFile, fit
from saewb.pretrained.formats._text import object_of, positive, read_json
from saewb.pretrained.formats.saelens.config import Described
from saewb.pretrained.formats.saelens.fold import Whitening

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"


def input_scaling(folder: Path, described: Described, factor: float | None) -> float | Whitening | None:
    """The factor or whitening that training inputs went through; None if there was none, or it is done per token.

    Raises:
        FormatError: if it is needed and not known, or given and not needed.
    """
    if described.normalize != "expected_average_only_in" and factor is not None:
        raise FormatError(
            explain(
                f"scaling_factor={factor} was given, but normalize_activations is {described.normalize!r}.",
                want="a factor only for 'expected_average_only_in'",
                fix=f"saewb.load_sae({str(folder)!r})",
            )
        )
    path = folder / SCALER
    scaler = object_of(read_json(path), path) if path.is_file() else {}
    if described.normalize == "expected_average_only_in":
        factor = scaler.get("scaling_factor") if factor is None else factor
        if factor is None:
            raise FormatError(
                explain(
                    "it was trained on activations scaled to norm sqrt(d_in), and the factor is not in the folder.",
                    want="sqrt(d_in) / (mean norm of the model's activations), as its authors measured it",
                    fix=f"saewb.load_sae({str(folder)!r}, scaling_factor=...)",
                )
            )
        return positive(factor, "scaling_factor")
    if described.normalize == "covariance_whitening":
        if described.architecture in ("matching_pursuit", "temporal"):
            raise FormatError(explain(f"a whitening cannot be folded into {described.architecture!r}."))
        return _whitening(folder / WHITENING, described.d_in)
    return None


def _whitening(path: Path, d_in: int) -> Whitening:
    if not path.is_file():
        raise FormatError(
            explain(
                f"it was trained on whitened activations, and {path.name} is not in the folder.",
                want="the checkpoint folder with that file, or the run's final export",
            )
        )
    tensors = TensorFile(path).tensors()
    fit(
        {name: tuple(t.shape) for name, t in tensors.items()},
        {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)},
    )
    return Whitening(tensors["mean"], tensors["matrix"], tensors["inverse_matrix"])
