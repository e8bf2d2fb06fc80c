"""The JumpReLU SAE: a learned threshold per latent, trained through a straight-through estimator.

A step has no gradient almost everywhere; that of a ramp of width w replaces it (`jump`, `step`):

    d/d theta  1[z > theta]    ->  -(1 / w) rect((z - theta) / w)
    d/d theta  z 1[z > theta]  ->  -(theta / w) rect((z - theta) / w)          rect = 1 within (-1/2, 1/2), else 0

The gradient of the jump by z is exact, 1[z > theta]; `to_input` adds the negative of the estimate by theta to it, as
for a function of z - theta.

References:
    Rajamanoharan et al. 2024, arXiv:2407.14435, eqs. 11 and 12; Conerly et al. 2025 (to the input).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor

from saewb._config import NonNegativeFloat, NonNegativeInt, PositiveFloat, config, require
from saewb.training.objectives.base import Objective
from saewb.training.objectives.losses import Losses, ObjectiveState, pre_activation_loss, squared_error, with_metrics
from saewb.training.objectives.params import Params, safe_norms
from saewb.training.objectives.sparsity_coefficient import Coefficient

_INITIAL_L0 = 3  # as a multiple of the target: L0 falls to about a third while the first directions are learned
_PRE_ACTS_AT_ONCE = 2**25  # pre-activations held when thresholds are fitted to data


@final
@config
class JumpReLU(Objective):
    """A threshold per latent, which the sparsity loss raises and the reconstruction lowers.

        z = (x - b_pre) @ W_enc + b_enc;   a = z 1[z > theta];   recons = a @ W_dec + b_dec (+ x @ W_skip)
        mse + l0 * sparsity + pre_act * mean sum_{i dead} max(theta_i - z_i, 0) |W_dec[i]|

        sparsity  "step"       mean L0,  L0 = sum_i 1[z_i > theta_i]
                  "tanh"       mean sum_i tanh(tanh_scale a_i |W_dec[i]|)
                  "quadratic"  mean (2 / target_l0) (L0 - target_l0)^2      (per token: it also evens L0 out)

    The step's gradient by theta is that of a ramp of width `bandwidth`. Where no z lies within half of it around theta
    there is none, and `StepMetrics.warnings` has a warning. `threshold="direct"` trains theta itself, projected to
    theta >= 0; "log" trains log theta, of which Adam moves a small one by a fraction lr per step and L0 hardly at all.

    Adam moves a theta by about lr per step, so in a run of a few hundred steps L0 ends near where it starts. With a
    target (or `init_l0`), and no `init_threshold`, thresholds are fitted to the first N tokens, those of the estimates:
    each latent is active equally often, and init_l0 are active per token,

        theta_i = half way between the n_i-th largest z_i and the next;   sum_i n_i = N init_l0, all n_i equal or one
        apart;   theta_i >= 0, so that init_l0 above about d_sae / 2 is not reached

    None starts at three times the target, since L0 falls to about a third while the first directions are learned. On
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
        >>> params, x = objective.init_params(8), torch.ones(5, 8)
        >>> sorted(objective.losses(params, x, x, objective.initial_state()).terms)
        ['l0', 'mse']
    """

    l0: PositiveFloat = 0.01
    """Weight of the sparsity loss, in squared units of the activations per latent."""
    sparsity: Literal["step", "tanh", "quadratic"] = "step"
    """Sparsity loss, see above."""
    target_l0: PositiveFloat | None = None
    """Latents per token: inside the loss (quadratic), else steered to by changing `l0`."""
    warmup_tokens: NonNegativeInt = 0
    """Tokens over which `l0` rises from 0."""
    bandwidth: PositiveFloat = 0.05
    """Width of the straight-through window, in units of the pre-activations."""
    init_threshold: NonNegativeFloat | None = None
    """Initial threshold of all latents, in units of the pre-activations; None: see init_l0."""
    init_l0: float | None = None
    """Initial latents per token, by thresholds fitted to data; None: 3 target_l0, or thresholds of 0.01."""
    threshold: Literal["direct", "log"] = "direct"
    """Whether theta or log theta is trained."""
    to_input: bool = False
    """Whether the estimator's gradient also reaches the pre-activations."""
    tanh_scale: PositiveFloat = 4.0
    """Scale of the tanh loss, per unit of length written."""
    pre_act: NonNegativeFloat = 0.0
    """Weight of the pre-activation loss; Anthropic: 3e-6."""
    pre_act_on: Literal["dead", "all"] = "dead"
    """Latents the pre-activation loss is taken over."""

    activation: ClassVar[str] = "jumprelu"
    trainable: ClassVar[tuple[str, ...]] = ("jumprelu",)

    def __post_init__(self) -> None:
        super().__post_init__()
        least, d_sae, target = self.init_threshold, self.d_sae, self.target_l0
        positive = self.threshold == "direct" or least is None or least > 0
        require(self, positive, "init_threshold", "0 or more; more than 0 with threshold='log'")
        alone = self.init_l0 is None or (least is None and 0 < self.init_l0 < d_sae)
        require(self, alone, "init_l0", f"0 to d_sae={d_sae} latents per token, and no init_threshold")
        aims = self.sparsity != "quadratic" or target is not None
        require(self, aims, "target_l0", "latents per token, for sparsity='quadratic'")
        require(self, target is None or target <= d_sae, "target_l0", f"up to d_sae={d_sae}")

    @property
    def revives_dead(self) -> bool:
        """Whether there is a pre-activation loss of dead latents."""
        return self.pre_act > 0 and self.pre_act_on == "dead"

    def coefficients(self) -> dict[str, Coefficient]:
        """The weight of the sparsity loss; controlled only where the loss does not contain the target."""
        target = None if self.sparsity == "quadratic" else self.target_l0
        return {"l0": Coefficient(self.l0, self.warmup_tokens, target)}

    @property
    def start_l0(self) -> float | None:
        """Latents per token that `fit_thresholds` makes active on the first tokens; None if it has nothing to do."""
        if self.init_l0 is not None or self.init_threshold is not None or self.target_l0 is None:
            return self.init_l0
        return min(_INITIAL_L0 * self.target_l0, self.d_sae / 2)

    @torch.no_grad()
    def fit_thresholds(self, params: Params, batches: Sequence[Float[Tensor, "_ d_in"]]) -> None:
        """Set thresholds in place so that `start_l0` latents are active per token of these batches; see above."""
        n = sum(map(len, batches))
        each, rest = divmod(round(n * self.start_l0), self.d_sae)
        directions, x = params.W_enc.T, [params.center(batch).T for batch in batches]
        for first in range(0, self.d_sae, width := max(1, _PRE_ACTS_AT_ONCE // n)):
            part = slice(first, first + width)
            z = torch.cat([directions[part] @ batch for batch in x], 1) + params.b_enc[part, None]
            top = z.topk(min(n, each + 2), dim=1).values
            one_more = torch.arange(first, first + len(z), device=z.device) < rest
            n_active = (each + one_more.long())[:, None]
            middle = (top.gather(1, (n_active - 1).clamp_min(0)) + top.gather(1, n_active.clamp_max(n - 1))) / 2
            theta = torch.where(n_active > 0, middle, 1.5 * top[:, :1] - 0.5 * top[:, 1:2])[:, 0]
            if self.threshold == "log":
                params.log_threshold[part] = theta.clamp_min(1e-8).log()
            else:
                params.threshold[part] = theta.clamp_min(0)

    def losses(
        self,
        params: Params,
        x: Float[Tensor, "tokens d_in"],
        y: Float[Tensor, "tokens d_out"],
        state: ObjectiveState,
    ) -> Losses:
        """The losses of one batch, differentiable in every parameter by the straight-through estimator.

        `extra["in_band"]` is the number of pre-activations per token in the straight-through window.
        """
        pre_acts, theta = params.pre_acts(x), self.theta(params)
        acts = jump(pre_acts, theta, self.bandwidth, self.to_input)
        recons = params.decode(acts, x)
        sparsity = self._sparsity(params, pre_acts, theta, acts)
        terms = {"mse": squared_error(recons, y), "l0": state.coefficients["l0"] * sparsity}
        if self.pre_act:
            terms["pre_act"] = self.auxiliary_loss(params, pre_acts, state)
        in_band = ((pre_acts.detach() - theta.detach()).abs() < self.bandwidth / 2).sum() / len(y)
        return with_metrics(terms, y, recons, acts, in_band=in_band)

    def auxiliary_loss(
        self, params: Params, pre_acts: Float[Tensor, "tokens d_sae"], state: ObjectiveState
    ) -> Float[Tensor, ""]:
        """The pre-activation loss with its weight."""
        return self.pre_act * pre_activation_loss(pre_acts, self.theta(params), params.norms(), state, self.pre_act_on)

    def _sparsity(self, params: Params, pre_acts: Tensor, theta: Tensor, acts: Tensor) -> Tensor:
        if self.sparsity == "tanh":
            return torch.tanh(self.tanh_scale * acts * params.norms()).sum() / len(pre_acts)
        l0 = step(pre_acts, theta, self.bandwidth, self.to_input).sum(1)
        if self.sparsity == "step":
            return l0.mean()
        return (2 / self.target_l0 * (l0 - self.target_l0).square()).mean()

    def theta(self, params: Params) -> Float[Tensor, " d_sae"]:
        """The thresholds, from either parametrization, in units of the pre-activations."""
        return params.log_threshold.exp() if self.threshold == "log" else params.threshold

    def latents(
        self, params: Params, x: Float[Tensor, "tokens d_in"], state: ObjectiveState
    ) -> Float[Tensor, "tokens d_sae"]:
        """The same activations as in training."""
        pre_acts = params.pre_acts(x)
        return torch.relu(pre_acts) * (pre_acts > self.theta(params))

    def _initial_values(self) -> Mapping[str, float]:
        theta = torch.tensor(0.01 if self.init_threshold is None else self.init_threshold)
        if self.threshold == "log":
            return {"b_enc": 0.0, "log_threshold": theta.log().item()}
        return {"b_enc": 0.0, "threshold": theta.item()}

    def _trained_tensors(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Convert thresholds to their logarithm for "log", at least 1e-8."""
        if self.threshold == "log":
            tensors["log_threshold"] = tensors.pop("threshold").clamp_min(1e-8).log()
        return tensors

    def _sae_tensors(self, params: Params, state: ObjectiveState) -> dict[str, Tensor]:
        """Thresholds in units of the lengths written."""
        return {"threshold": self.theta(params) * safe_norms(params)}


def jump(
    pre_acts: Float[Tensor, "tokens d_sae"], theta: Float[Tensor, " d_sae"], width: float, to_input: bool
) -> Float[Tensor, "tokens d_sae"]:
    """`pre_acts * (pre_acts > theta)`, with the estimated gradient by theta."""
    return _Jump.apply(pre_acts, theta, width, to_input)


def step(
    pre_acts: Float[Tensor, "tokens d_sae"], theta: Float[Tensor, " d_sae"], width: float, to_input: bool
) -> Float[Tensor, "tokens d_sae"]:
    """`1[pre_acts > theta]`, with the estimated gradient by theta."""
    return _Step.apply(pre_acts, theta, width, to_input)


def _window(pre_acts: Tensor, theta: Tensor, width: float) -> Tensor:
    return (pre_acts - theta).abs() < width / 2


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width, ctx.to_input = width, to_input
        return pre * (pre > theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre, theta = ctx.saved_tensors
        jump = grad * _window(pre, theta, ctx.width) * (theta / ctx.width)
        to_pre = grad * (pre > theta)
        to_pre = to_pre + jump if ctx.to_input else to_pre
        return to_pre.to(pre.dtype), -jump.sum(0).to(theta.dtype), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, width: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.width, ctx.to_input = width, to_input
        return (pre > theta).to(theta.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre, theta = ctx.saved_tensors
        jump = grad * _window(pre, theta, ctx.width) / ctx.width
        return jump.to(pre.dtype) if ctx.to_input else None, -jump.sum(0).to(theta.dtype), None, None
