"""The words that every other module shares: hyperparameters, statistics, features, options.

Nothing here computes; this module imports only torch and the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal

import torch

__all__ = [
    "EXTRA_FEATURES",
    "GRADIENT_SUMS",
    "GROUP_STATE",
    "HYPERPARAMETERS",
    "INNER_FEATURES",
    "PARTIAL_SUMS",
    "SCALARS",
    "STATISTICS",
    "STEP_NORMS",
    "TENSOR_STATE",
    "BackendUnavailableError",
    "Clip",
    "Denominator",
    "MasterWeights",
    "Moments",
    "NonFinite",
    "NonFiniteGradientError",
    "RanksDisagreeError",
    "Rounding",
    "StepLayout",
    "StepOptions",
    "Trust",
    "WeightDecay",
]

HYPERPARAMETERS: Final = (
    "lr",
    "ombeta1",
    "ombeta2",
    "epsilon",
    "weight_decay",
    "group_clip_grad_norm",
    "grad_clip_ombeta",
    "lamb_update_norm_ombeta",
)
"""The eight numbers that a policy moves (``ombeta`` is one minus beta)."""

SCALARS: Final = (
    *HYPERPARAMETERS,
    "group_clip_grad_z_score",
    "lamb_power",
    "lamb_min_trust",
    "lamb_max_trust",
)
"""Columns of :attr:`StepLayout.scalars`: everything about a group that may change between steps."""

GROUP_STATE: Final = (
    "rolling_max",
    "log_norm_ema",
    "log_norm_emvar",
    "log_norm_bias_correction",
)
"""Columns of :attr:`StepLayout.group_state`: what gradient clipping remembers about a group."""

TENSOR_STATE: Final = (
    "step",
    "bias_correction1",
    "bias_correction2",
    "update_norm_ema",
    "update_norm_bias_correction",
    "param_norm",
)
"""Columns of :attr:`StepLayout.tensor_state`: what the step remembers about a tensor.

``param_norm`` is the norm that the last step left behind, for delayed trust ratios; tensors
without a trust ratio have none.
"""

STATISTICS: Final = (
    "taken",  # 1 where the tensor took part in the step, else 0 and all sums are 0
    "grad_nonfinite",  # 1 where the gradient holds NaN or inf, else 0
    "clip_coefficient",  # c
    "step_size",  # lr T, with the warm-up where there is one
    "decay_factor",  # a: 1, or 1 - lr T weight_decay for decoupled decay
    "grad_sq",  # |g|^2 of the clipped gradient
    "param_sq",  # |p|^2 before the step
    "update_sq",  # |u|^2
    "m_hat_sq",  # |m_hat|^2
    "m_hat_minus_grad_sq",  # |m_hat - g|^2, exactly 0 on a tensor's first step
    "grad_dot_param",  # g.p before the step
    "grad_dot_m_hat",  # g.m_hat
    "grad_dot_update",  # g.u
    "count_gt_epsilon",  # #(s > epsilon)
    "sum_log_abs_update",  # sum of log(|u| + 1e-8)
    "grad_dot_momentum",  # g.m before the step
    "momentum_sq",  # |m|^2 before the step
    "count_same_sign_momentum",  # #(sign g = sign m before the step)
    "count_same_sign_grad",  # #(sign g_t = sign g_{t-1}); NaN unless gradient signs are kept
)
"""Columns of :attr:`StepLayout.statistics`: raw sums of one tensor in one inner step."""

GRADIENT_SUMS: Final = (
    "present",  # 1 where the tensor has a gradient
    "nonfinite",  # more than 0 where it holds NaN or inf
    "sum_sq",  # |g|^2 of its finite elements, before clipping
)
"""What a step sums over ranks before it changes anything."""

PARTIAL_SUMS: Final = (
    *STATISTICS,
    "new_param_sq",  # |p|^2 after the step, of tensors with a trust ratio
)
"""What a piece of a tensor adds to its statistics. From ``grad_sq`` on, these are sums over the
elements of the piece; the columns before it say the same on every rank."""

INNER_FEATURES: Final = (
    "did_grad_clip",
    "sqrt_v_hat_gt_epsilon",
    "mean_log_abs_adam_pre_lr_update",
    "log_two_regimes_scale",
    "log_adam_update_norm_over_param_norm",
    "log_noise_scale",
    "cosine_similarity_grad_momentum",
    "cosine_similarity_grad_param",
    "log_lamb",
    "cosine_similarity_grad_update",
    "logit_cdf_cosine_similarity_grad_momentum",
    "logit_cdf_cosine_similarity_grad_update",
    "cdf_cosine_similarity_grad_param",
)
"""The 13 inner features of LHOPT (arXiv 2106.00958, appendix), under their published names."""

EXTRA_FEATURES: Final = (
    "cosine_similarity_grad_previous_momentum",
    "sign_agreement_grad_previous_momentum",
    "sign_agreement_consecutive_grads",
)
"""Features beyond the paper, all about agreement from one step to the next."""

STEP_NORMS: Final = ("update_norm", "param_norm")
"""Norms over all tensors of an inner step: of lr T u, and of the parameters before it."""


class Denominator(Enum):
    """How the second moment v becomes the denominator s."""

    RMS = 0  # v = b2 v + (1 - b2) g^2, s = sqrt(v / bc2): Adam
    MAX = 1  # v = max(b2 v, |g|),      s = v:             AdaMax, LHOPT's choice


class WeightDecay(Enum):
    """Where the weight decay acts."""

    DECOUPLED = 0  # p <- p (1 - lr T weight_decay): AdamW
    IN_UPDATE = 1  # u <- u + weight_decay p:        LHOPT's choice


class Clip(Enum):
    """What a group's gradient norm is clipped to."""

    NONE = 0
    NORM = 1  # an absolute norm
    ROLLING_MAX = 2  # a share of the decaying maximum of the norms: LHOPT's choice
    Z_SCORE = 3  # a z-score of the log norm under its running mean and variance


class Trust(Enum):
    """Whether and when the LAMB trust ratio sees the norm of the update."""

    NONE = 0
    EXACT = 1  # includes the current update: needs the whole tensor's norm before it is applied
    DELAYED = 2  # the running norm of the updates before this one: a single pass


@dataclass(frozen=True)
class StepOptions:
    """The static side of a param group: what selects code rather than numbers.

    Groups with equal options share kernels; everything that may change from step to step is a
    column of :data:`SCALARS` instead.
    """

    denominator: Denominator = Denominator.RMS
    weight_decay: WeightDecay = WeightDecay.DECOUPLED
    clip: Clip = Clip.NONE
    trust: Trust = Trust.NONE
    trust_ignores_vectors: bool = False
    radam_warmup: bool = False
    maximize: bool = False


Rounding = Literal["nearest", "stochastic"]
"""How float32 results become 16-bit parameters.

``nearest`` goes to the nearest number, ties to even, and loses updates that are smaller than half
the distance between two numbers; ``stochastic`` goes up or down at random, so that the mean over
steps loses nothing.
"""

Moments = Literal["float32", "bfloat16", "int8"]
"""How exp_avg and exp_avg_sq are kept between steps, which compute in float32.

``int8`` keeps a code and a share of a scale for each element: those of large matrices, see
:mod:`lhopt_fused.kernels.formats`; other tensors keep float32. float64 parameters keep float64.
"""

MasterWeights = bool | Literal["split8", "split16"]
"""What 16-bit parameters keep beside themselves: nothing, a float32 master, or, for bfloat16, the 8
or 16 bits that they lack of one."""


@dataclass
class StepLayout:
    """All tensors of one optimizer, flat over its groups, as a backend steps them.

    T tensors in G groups of R training runs, on one device. An optimizer is one run; meta-training
    steps many side by side, which share nothing: a gradient that is not finite skips the step of
    its own run. Parameters, moments and gradients are dense, share the memory order of their
    parameter, and never overlap; the small tables are float64, contiguous and on the same device.
    A backend reads ``scalars`` and gradients and writes everything else.

    Moments are float32 (float64 for float64 parameters), or in fewer bits, which their dtypes tell:
    bfloat16, or codes of 8 bits with a scale for each block. A step is taken with what has been
    decoded and is rounded for storage at its end, as :mod:`lhopt_fused.kernels.formats` defines;
    nothing of it, norms and statistics included, sees what the rounding has changed. Statistics
    like ``momentum_sq`` are of the decoded moments before the step.

    A 16-bit parameter may have a float32 master: the step and its statistics are then those of the
    master, and the parameter becomes its copy, rounded to the nearest. Instead, a bfloat16
    parameter may have a correction, and both make a master. Without either, results are rounded to
    the parameter as ``rounding`` says, with the random bits that
    :mod:`lhopt_fused.kernels.rounding` defines.
    """

    params: list[torch.Tensor]
    exp_avgs: list[torch.Tensor]  # m: float32, bfloat16 or int8 codes; float64 for float64
    exp_avg_sqs: list[torch.Tensor]  # v: like exp_avgs, but uint8 codes
    grad_signs: list[torch.Tensor] | None  # uint8 [ceil(numel / 8)], one bit per element, or None
    group_of: list[int]  # [T]
    is_vector: list[bool]  # [T] parameter with dim() <= 1
    options: list[StepOptions]  # [G]
    run_of: list[int]  # [G] 0 to R - 1
    scalars: torch.Tensor  # [G, len(SCALARS)]
    group_state: torch.Tensor  # [G, len(GROUP_STATE)]
    tensor_state: torch.Tensor  # [T, len(TENSOR_STATE)]
    skipped_steps: torch.Tensor  # [R] int64: steps in which a gradient was not finite
    masks_nonfinite: bool = False  # step around non-finite elements instead of skipping the step
    master_params: list[torch.Tensor | None] | None = None  # None for each float32 parameter
    rounding: Rounding = "nearest"  # of 16-bit parameters that have no master
    rounding_seed: int = 0  # of stochastic rounding
    master_corrections: list[torch.Tensor | None] | None = None  # int8 or int16, of its shape
    exp_avg_scales: list[torch.Tensor | None] | None = None  # bfloat16 [numel / 64], of codes
    exp_avg_sq_scales: list[torch.Tensor | None] | None = None
    whole_numel: list[int] | None = None  # [T] where params are pieces of tensors; else None

    @property
    def device(self) -> torch.device:
        return self.scalars.device

    @property
    def numel(self) -> list[int]:
        """Elements of the whole tensors ``[T]``."""
        return self.whole_numel or [p.numel() for p in self.params]

    def uses_trust(self, tensor: int) -> bool:
        """Whether the step of a tensor is scaled by a trust ratio."""
        options = self.options[self.group_of[tensor]]
        ignored = options.trust_ignores_vectors and self.is_vector[tensor]
        return options.trust is not Trust.NONE and not ignored


NonFinite = Literal["skip", "mask", "raise"]
"""What a step does about NaN or inf in a gradient; they never reach parameters or state.

``skip`` leaves the whole step out, which takes a look at every gradient before anything is
written; ``mask`` leaves out the elements that are not finite, at no cost; ``raise`` is ``skip`` and
an error.
"""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for cannot run here; the message says why and what to do."""


class RanksDisagreeError(RuntimeError):
    """Ranks that step one model together do not say the same; raised on each of them."""


class NonFiniteGradientError(FloatingPointError):
    """A gradient holds NaN or inf and ``nonfinite="raise"`` is set; nothing was written."""
