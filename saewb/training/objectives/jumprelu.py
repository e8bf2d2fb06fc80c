"""The JumpReLU SAE: a learned threshold per latent, trained through a straight-through estimator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saewb.sae.sae import SAE
from saewb.training.objectives.checks import check_coefficient, checked
from saewb.training.objectives.dead import pre_activation
from saewb.training.objectives.losses import Losses, State, fresh_state, measured, squared_error
from saewb.training.objectives.params import Params, Rows, exported, from_sae, safe_norms, started
from saewb.training.objectives.sparsity_coefficient import Coefficient
from saewb.training.objectives.straight_through import gate, step

_ABOVE = 3  # times the target, at the start: it falls to about a third while the first directions are learnt
_AT_ONCE = 2**25  # pre-activations that thresholds are taken from at a time


@dataclass(frozen=True)
class JumpReLU:
    """A threshold per latent, which the sparsity loss raises and the reconstruction lowers.

        z = (x - b_pre) @ W_enc + b_enc;   a = z 1[z > theta];   recon = a @ W_dec + b_dec (+ x @ W_skip)
        mse + l0 * sparsity + pre_act * mean sum_{i dead} max(theta_i - z_i, 0) |W_dec[i]|

        sparsity  "step"       mean L0,  L0 = sum_i 1[z_i > theta_i]
                  "tanh"       mean sum_i tanh(tanh_scale a_i |W_dec[i]|)
                  "quadratic"  mean (2 / target_l0) (L0 - target_l0)^2      (per token: it also evens L0 out)

    The step's gradient by theta is that of a ramp of width `bandwidth`. Where no z lies within half of it around theta
    there is none: the record's warning says so. `threshold="direct"` trains theta itself, kept >= 0; "log" trains
    log theta, in which Adam moves a small theta by a fraction lr per step and L0 hardly at all.

    Adam moves a theta by about lr per step: in a run of some hundred steps L0 ends near where it starts. With a target
    (or `init_l0`), and no `init_threshold`, thresholds start from the N first tokens, on which estimates are made: each
    latent is on equally often, and init_l0 are on per token,

        theta_i = half way between the n_i-th largest z_i and the next;   sum_i n_i = N init_l0, all n_i equal or one
        apart;   theta_i >= 0, so that init_l0 above about d_sae / 2 is not reached

    None starts at three times the target, since L0 falls to about a third while the first directions are learnt. On
    SmolLM2-135M, layer 15, 4,608 latents, 131,072 tokens, target 32, l0=0.3, bandwidth=1 (held-out L0, FVU):

                     init_threshold=1.4 (L0 330)    init_l0=96      init_l0=32
        step         34, 0.72                       20, 0.35        14, 0.38
        quadratic    40, 0.29                       22, 0.35        14, 0.38

    From far above the target the controller makes `l0` so large that the step's loss spoils the reconstruction.
    The step's loss only ever lowers L0, however small the controller makes it; "quadratic" pulls from both sides.

    References:
        Rajamanoharan et al. 2024, arXiv:2407.14435, eqs. 9, 11, 12 (loss, estimators; an appendix has a target L0);
        Conerly et al. 2025, Transformer Circuits, January 2025 (tanh, estimator also to the input, pre-activation
        loss; biases from data by which each latent is on on the same share of tokens, here thresholds). The quadratic
        loss is scaled as SAELens scales it.

    Example:
        >>> objective = JumpReLU(d_sae=32, l0=0.1, sparsity="quadratic", target_l0=4)
        >>> params, x = objective.start(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.state()).terms)
        ['l0', 'mse']
    """

    d_sae: int  # latents
    l0: float = 0.01  # weight of the sparsity loss, in squared units of the activations per latent
    sparsity: Literal["step", "tanh", "quadratic"] = "step"  # which loss counts the active latents, see above
    target_l0: float | None = None  # latents per token: inside the loss (quadratic), else steered to by changing `l0`
    warmup_tokens: int = 0  # tokens over which `l0` rises from 0
    bandwidth: float = 0.05  # width of the straight-through window, in units of the pre-activations
    init_threshold: float | None = None  # of all latents, in units of the pre-activations; None: see init_l0
    init_l0: float | None = None  # latents per token at the start, by data; None: 3 target_l0, or thresholds of 0.01
    threshold: Literal["direct", "log"] = "direct"  # what is trained
    to_input: bool = False  # whether the estimator's gradient also reaches the pre-activations
    tanh_scale: float = 4.0  # per unit of length written
    pre_act: float = 0.0  # weight of the pre-activation loss; Anthropic: 3e-6
    pre_act_on: Literal["dead", "all"] = "dead"  # latents it is taken over
    rows: Rows = "unit"  # decoder rows: kept at length 1, or free
    init_norm: float = 1.0  # length of the rows at the start; 1 for unit rows
    skip: bool = False  # adds x @ W_skip to the output

    def __post_init__(self) -> None:
        check = checked(self, self.d_sae, self.rows, self.init_norm)
        modes = ("step", "tanh", "quadratic")
        check(self.sparsity in modes, "sparsity", self.sparsity, "one of " + ", ".join(map(repr, modes)))
        check(self.threshold in ("direct", "log"), "threshold", self.threshold, "'direct' or 'log'")
        check(self.pre_act_on in ("dead", "all"), "pre_act_on", self.pre_act_on, "'dead' or 'all'")
        for name in ("bandwidth", "tanh_scale"):
            check(getattr(self, name) > 0, name, getattr(self, name), "a positive number")
        least, low = self.init_threshold, 0 if self.threshold == "direct" else 1e-30
        check(least is None or least >= low, "init_threshold", least, "0 or more; more than 0 with threshold='log'")
        alone = self.init_l0 is None or (least is None and 0 < self.init_l0 < self.d_sae)
        check(alone, "init_l0", self.init_l0, f"0 to d_sae={self.d_sae} latents per token, and no init_threshold")
        check(self.pre_act >= 0, "pre_act", self.pre_act, "a weight, 0 or more")
        check_coefficient(check, "l0", self.l0, self.warmup_tokens, self.target_l0)
        needs = self.sparsity != "quadratic" or self.target_l0 is not None
        check(needs, "target_l0", self.target_l0, "latents per token, for sparsity='quadratic'")
        within = self.target_l0 is None or self.target_l0 <= self.d_sae
        check(within, "target_l0", self.target_l0, f"up to d_sae={self.d_sae}")

    def coefficients(self) -> dict[str, Coefficient]:
        """The weight of the sparsity loss; steered only where the loss does not aim at the target by itself."""
        steered = None if self.sparsity == "quadratic" else self.target_l0
        return {"l0": Coefficient(self.l0, self.warmup_tokens, steered)}

    @property
    def start_l0(self) -> float | None:
        """Latents per token that `fit` makes the first tokens have on; None if it has nothing to do."""
        if self.init_l0 is not None or self.init_threshold is not None or self.target_l0 is None:
            return self.init_l0
        return min(_ABOVE * self.target_l0, self.d_sae / 2)

    def state(self, device: torch.device | str = "cpu") -> State:
        """For a first step at full weight: nothing is dead."""
        return fresh_state(self.d_sae, self.coefficients(), device)

    def start(
        self,
        d_in: int,
        d_out: int | None = None,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Params:
        """Weights to begin with; `d_out` makes it a transcoder, whose input is not centered by b_dec."""
        theta = torch.tensor(0.01 if self.init_threshold is None else self.init_threshold)
        own = {"log_threshold": theta.log().item()} if self.threshold == "log" else {"threshold": theta.item()}
        norm, skip, extra = self.init_norm, self.skip, {"b_enc": 0.0, **own}
        return started(
            d_in, self.d_sae, d_out, seed=seed, norm=norm, skip=skip, dtype=dtype, device=device, extra=extra
        )

    def resume(self, sae: SAE, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Params:
        """Weights to go on with, from a trained JumpReLU SAE; with "log", thresholds are at least 1e-8."""
        params = from_sae(sae, ("jumprelu",), None, dtype=dtype, device=device)
        if self.threshold == "direct":
            return params
        tensors = dict(params.named_parameters())
        tensors["log_threshold"] = tensors.pop("threshold").detach().clamp_min(1e-8).log()
        return Params(tensors, params.pre_bias)

    @torch.no_grad()
    def fit(self, params: Params, batches: Sequence[Float[Tensor, "tokens d_in"]]) -> None:
        """Thresholds by which `start_l0` of the latents are on per token of these batches, in place; see above."""
        n = sum(map(len, batches))
        each, more = divmod(round(n * self.start_l0), self.d_sae)
        directions, x = params.W_enc.T, [params.centered(batch).T for batch in batches]
        for first in range(0, self.d_sae, width := max(1, _AT_ONCE // n)):
            some = slice(first, first + width)
            z = torch.cat([directions[some] @ batch for batch in x], 1) + params.b_enc[some, None]
            top = z.topk(min(n, each + 2), dim=1).values
            once_more = torch.arange(first, first + len(z), device=z.device) < more
            on = (each + once_more.long())[:, None]
            ends = (top.gather(1, (on - 1).clamp_min(0)) + top.gather(1, on.clamp_max(n - 1))) / 2
            theta = torch.where(on > 0, ends, 1.5 * top[:, :1] - 0.5 * top[:, 1:2])[:, 0]
            if self.threshold == "log":
                params.log_threshold[some] = theta.clamp_min(1e-8).log()
            else:
                params.threshold[some] = theta.clamp_min(0)

    def losses(
        self, params: Params, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens d_out"], state: State
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter by the straight-through estimator.

        `extra["in_band"]` is the number of pre-activations per token in the straight-through window.
        """
        pre, theta = params.pre(x), self.theta(params)
        latents = gate(pre, theta, self.bandwidth, self.to_input)
        recon = params.decoded(latents, x)
        sparsity = self._sparsity(params, pre, theta, latents)
        terms = {"mse": squared_error(recon, y), "l0": state.coefficients["l0"] * sparsity}
        if self.pre_act:
            terms["pre_act"] = self.pre_act * pre_activation(pre, theta, params.norms(), state, self.pre_act_on)
        in_band = ((pre.detach() - theta.detach()).abs() < self.bandwidth / 2).sum() / len(y)
        return measured(terms, y, recon, latents, in_band=in_band)

    def _sparsity(self, params: Params, pre: Tensor, theta: Tensor, latents: Tensor) -> Tensor:
        if self.sparsity == "tanh":
            return torch.tanh(self.tanh_scale * latents * params.norms()).sum() / len(pre)
        l0 = step(pre, theta, self.bandwidth, self.to_input).sum(1)
        if self.sparsity == "step":
            return l0.mean()
        return (2 / self.target_l0 * (l0 - self.target_l0).square()).mean()

    def theta(self, params: Params) -> Float[Tensor, " d_sae"]:
        """The thresholds, whichever way they are trained, in units of the pre-activations."""
        return params.log_threshold.exp() if self.threshold == "log" else params.threshold

    def latents(self, params: Params, x: Float[Tensor, "tokens d_in"], state: State) -> Float[Tensor, "tokens d_sae"]:
        """Activations as the exported SAE has them, but in units of the training's own decoder rows."""
        pre = params.pre(x)
        return torch.relu(pre) * (pre > self.theta(params))

    @torch.no_grad()
    def export(self, params: Params, state: State) -> SAE:
        """The SAE so far, in training units, with unit rows and thresholds in units of the lengths written."""
        return exported(params, "jumprelu", threshold=self.theta(params) * safe_norms(params))
