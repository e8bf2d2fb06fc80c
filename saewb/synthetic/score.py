"""A table of SAEs on planted data: what each recovers, between a random SAE and the true dictionary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Union

import torch

from saewb.errors import explain
from saewb.sae.base import SparseCoder
from saewb.sae.config import SAEConfig
from saewb.sae.random_sae import random_sae
from saewb.sae.sae import SAE
from saewb.stats.intervals import mean_and_error
from saewb.synthetic.absorption import absorption
from saewb.synthetic.data import SyntheticData
from saewb.synthetic.dictionary import matched_sae
from saewb.synthetic.recovery import Recovery, recovery

if TYPE_CHECKING:
    import pandas as pd

RANDOM, TRUE = "random", "true dictionary"


@torch.no_grad()
def score(
    data: SyntheticData,
    saes: Union[SparseCoder, Sequence[SparseCoder], Mapping[str, SparseCoder]],
    n_samples: int = 100_000,
    *,
    batch_size: int = 2048,
    seed: int = 0,
) -> pd.DataFrame:
    """Score SAEs by SynthSAEBench's protocol on the same samples, with two controls in the same table.

    The controls: "random", a TopK SAE of random directions with the latents and the mean L0 of the SAEs; and "true
    dictionary", the true directions, read by themselves with thresholds of half the mean magnitudes. Its MCC is 1; its
    other figures are no bound where features lie in superposition, as a trained encoder may tell them apart better.

    Args:
        data: planted features: `load_synthetic(...)` (the models of SynthSAEBench), or one's own.
        saes: one SAE, several, or several by name.
        n_samples: fresh samples.
        batch_size: samples at a time, as for `recovery`.
        seed: of the samples.

    Returns:
        A row per SAE. The columns are those of `Recovery` (mcc by Hungarian matching, uniqueness, l0, dead_frac,
        explained_variance, precision, recall, f1 of each latent and its feature, ...), n_latents, the standard errors
        over latents precision_se, recall_se and f1_se, and, where the data have a hierarchy, absorption_rate,
        absorption_rate_se and n_pairs. MCC and uniqueness are of the weights alone and have no error.

    Raises:
        ValueError: as `recovery`; for a name that is one of the controls', or no SAE.

    References:
        The protocol of SAELens' SynthSAEBench: `eval_sae_on_synthetic_data`.

    Example:
        >>> from saewb.synthetic import SyntheticData, constant, random_dictionary
        >>> data = SyntheticData(random_dictionary(32, 32), constant(32, 0.1))
        >>> table = score(data, {"mine": SAE(SAEConfig(32, 32, activation="topk", k=3))}, 2000)
        >>> table.mcc.round(2).lt(1.0).to_dict()
        {'mine': True, 'random': True, 'true dictionary': False}
    """
    import pandas as pd

    if isinstance(saes, Mapping):
        named = dict(saes)
    else:
        several = list(saes) if isinstance(saes, (list, tuple)) else [saes]
        named = {f"{i}: {sae!r}": sae for i, sae in enumerate(several)}
    if not named or {RANDOM, TRUE} & set(named):
        what = f"score got SAEs named {list(named)}."
        raise ValueError(explain(what, want=f"one or more, none of them {RANDOM!r} or {TRUE!r}"))
    options = {"batch_size": batch_size, "seed": seed}
    results = {name: recovery(sae, data, n_samples, **options) for name, sae in named.items()}
    l0, first = sum(result.l0 for result in results.values()) / len(results), next(iter(named.values()))
    sample = data.sample(min(batch_size, n_samples), torch.Generator(data.probability.device).manual_seed(seed))
    named[RANDOM] = random_sae(first, l0, sample.activations.mean(0).to(first.device), seed=seed)
    n, d = data.dictionary.n_features, data.dictionary.d
    like = SAE(SAEConfig(d, n, activation="jumprelu", pre_bias="tied"), device=data.probability.device)
    like.threshold.copy_(torch.as_tensor(data.magnitudes.mean).to(like.threshold).expand(n) / 2)
    named[TRUE] = matched_sae(like, data.dictionary)
    results |= {name: recovery(named[name], data, n_samples, **options) for name in (RANDOM, TRUE)}
    rows = {name: _row(result) for name, result in results.items()}
    if data.hierarchy is not None and data.hierarchy.pairs:
        for name, sae in named.items():
            summary = absorption(data, sae, n_samples, **options).summary().loc["sae"]
            rows[name] |= {"absorption_rate": summary["rate"], "absorption_rate_se": summary["rate_se"]}
            rows[name] |= {"n_pairs": int(summary["n_pairs"])}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sae")


def _row(result: Recovery) -> dict[str, float]:
    row = result.to_frame().iloc[0].to_dict()
    row |= {"n_samples": result.n_samples, "n_latents": len(result.feature)}
    for name in ("precision", "recall", "f1"):
        row[f"{name}_se"] = mean_and_error(getattr(result, f"latent_{name}").numpy())[1]
    return row
