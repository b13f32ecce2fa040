"""Inner features: the unitless numbers made of a step's raw sums (LHOPT, appendix on features).

One definition over leading batch dimensions, in float64: the optimizer and meta-training use it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from lhopt_fused.types import (
    EXTRA_FEATURES,
    INNER_FEATURES,
    STATISTICS,
    STEP_NORMS,
    Clip,
    StepLayout,
)

__all__ = ["ACCUMULATED", "FeatureAccumulator", "mean_features", "step_norms", "tensor_features"]

_FEATURES: Final = (*INNER_FEATURES, *EXTRA_FEATURES)

ACCUMULATED: Final = (*_FEATURES, *STEP_NORMS)
"""What a :class:`FeatureAccumulator` takes means of, in the order of its sums."""


def _log(x: torch.Tensor) -> torch.Tensor:
    return (x + 1e-8).log()


def _cosine(dot: torch.Tensor, x_norm: torch.Tensor, y_norm: torch.Tensor) -> torch.Tensor:
    return dot / (x_norm * y_norm).clamp_min(1e-8)


def _logit(p: torch.Tensor) -> torch.Tensor:
    return p.clamp(1e-8, 1 - 1e-8).logit()


def tensor_features(
    statistics: torch.Tensor, numel: torch.Tensor, clips: torch.Tensor
) -> torch.Tensor:
    """Features of each tensor in each inner step.

    Args:
        statistics: float64 ``[..., T, len(STATISTICS)]``.
        numel: float64 ``[T]``, elements per tensor.
        clips: bool ``[T]``, whether the tensor's group clips its gradients.

    Returns:
        float64 ``[..., T, 16]``: :data:`INNER_FEATURES`, then :data:`EXTRA_FEATURES`; NaN where a
        feature was not measured.
    """
    s = dict(zip(STATISTICS, statistics.unbind(-1), strict=True))
    nan = torch.full_like(s["taken"], torch.nan)
    grad, param, update = s["grad_sq"].sqrt(), s["param_sq"].sqrt(), s["update_sq"].sqrt()
    m_hat, momentum = s["m_hat_sq"].sqrt(), s["momentum_sq"].sqrt()
    # p_new = a p - lr T u, so that g.p_new needs no second look at the tensor
    grad_dot_new_param = (
        s["decay_factor"] * s["grad_dot_param"] - s["step_size"] * s["grad_dot_update"]
    )
    cosine_momentum = _cosine(s["grad_dot_m_hat"], grad, m_hat)
    cosine_param = _cosine(grad_dot_new_param, grad, param)
    cosine_update = _cosine(s["grad_dot_update"], grad, update)
    root = numel.sqrt()
    has_momentum = s["momentum_sq"] > 0
    features = {
        "did_grad_clip": torch.where(clips, (s["clip_coefficient"] < 1).to(nan.dtype), nan),
        "sqrt_v_hat_gt_epsilon": s["count_gt_epsilon"] / numel,
        "mean_log_abs_adam_pre_lr_update": s["sum_log_abs_update"] / numel,
        "log_two_regimes_scale": _log(m_hat) - _log(grad),
        "log_adam_update_norm_over_param_norm": _log(s["step_size"] * update) - _log(param),
        "log_noise_scale": _log(m_hat) - _log(s["m_hat_minus_grad_sq"].sqrt()),
        "cosine_similarity_grad_momentum": cosine_momentum,
        "cosine_similarity_grad_param": cosine_param,
        "log_lamb": _log(param) - _log(update),
        "cosine_similarity_grad_update": cosine_update,
        "logit_cdf_cosine_similarity_grad_momentum": _logit(
            torch.special.ndtr(cosine_momentum * root)
        ),
        "logit_cdf_cosine_similarity_grad_update": _logit(torch.special.ndtr(cosine_update * root)),
        "cdf_cosine_similarity_grad_param": torch.special.ndtr(cosine_param * root),
        "cosine_similarity_grad_previous_momentum": torch.where(
            has_momentum, _cosine(s["grad_dot_momentum"], grad, momentum), nan
        ),
        "sign_agreement_grad_previous_momentum": torch.where(
            has_momentum, s["count_same_sign_momentum"] / numel, nan
        ),
        "sign_agreement_consecutive_grads": s["count_same_sign_grad"] / numel,
    }
    stacked = torch.stack([features[name] for name in _FEATURES], dim=-1)
    measured = (s["taken"] > 0) & (numel > 0)
    return torch.where(measured[..., None], stacked, nan[..., None])


def mean_features(
    features: torch.Tensor, group_of: torch.Tensor, run_of: torch.Tensor, runs: int
) -> torch.Tensor:
    """Mean over the tensors of each group, then over the groups of each run, of what was measured.

    Args:
        features: float64 ``[..., T, F]``, NaN where not measured.
        group_of: int64 ``[T]``, group of each tensor.
        run_of: int64 ``[G]``, run of each group, below ``runs``.

    Returns:
        float64 ``[..., runs, F]``, NaN where no tensor measured the feature.
    """
    return _mean_by(_mean_by(features, group_of, len(run_of)), run_of, runs)


def _mean_by(x: torch.Tensor, index: torch.Tensor, size: int) -> torch.Tensor:
    """Means ``[..., size, F]`` of the rows of ``x``, ``[..., N, F]``, that share an index."""
    measured = ~x.isnan()
    zeros = x.new_zeros(*x.shape[:-2], size, x.shape[-1])
    totals = zeros.index_add(-2, index, x.nan_to_num(nan=0.0))
    return totals / zeros.index_add(-2, index, measured.to(x.dtype))


def step_norms(statistics: torch.Tensor, run_of: torch.Tensor, runs: int) -> torch.Tensor:
    """Norms over all tensors of each run in each inner step, see :data:`STEP_NORMS`.

    Args:
        statistics: float64 ``[..., T, len(STATISTICS)]``.
        run_of: int64 ``[T]``, run of each tensor, below ``runs``.

    Returns:
        float64 ``[..., runs, 2]``, NaN where no tensor took part.
    """
    s = dict(zip(STATISTICS, statistics.unbind(-1), strict=True))
    taken = (s["taken"] > 0).to(statistics.dtype)
    squares = torch.stack([s["step_size"].square() * s["update_sq"], s["param_sq"], taken], dim=-1)
    squares = torch.where(taken[..., None] > 0, squares, 0.0)
    zeros = squares.new_zeros(*squares.shape[:-2], runs, squares.shape[-1])
    totals = zeros.index_add(-2, run_of, squares)
    return torch.where(totals[..., 2:] > 0, totals[..., :2].sqrt(), torch.nan)


class FeatureAccumulator:
    """Means of the features of each run over the inner steps since the last :meth:`pop`.

    Steps leave their statistics in a small ring; it is folded into sums when it is full or asked
    for, so that finishing the features costs next to nothing per step and memory stays constant.
    A backend that finishes features itself passes ``accumulate``, which adds one step's features
    to the sums; the ring has one place then.

    Attributes:
        sums: float64 ``[2, R, 18]``: sum and number of measured steps of each of
            :data:`ACCUMULATED` in each run, once folded.
    """

    def __init__(
        self,
        layout: StepLayout,
        accumulate: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        device = layout.device
        self._accumulate = accumulate
        tensors = len(layout.params)
        # folded at once: enough to spread the cost of small operations, too few to be worth threads
        capacity = 1 if accumulate is not None else min(16, max(1, 2048 // tensors))
        runs = len(layout.skipped_steps)
        self.sums = torch.zeros(2, runs, len(ACCUMULATED), dtype=torch.float64, device=device)
        self._ring = torch.zeros(
            capacity, tensors, len(STATISTICS), dtype=torch.float64, device=device
        )
        self._rows = self._ring.unbind(0)
        self._used = 0
        self._numel = torch.tensor(layout.numel, dtype=torch.float64, device=device)
        self._group_of = torch.tensor(layout.group_of, device=device)
        self._run_of = torch.tensor(layout.run_of, device=device)
        group_clips = torch.tensor([o.clip is not Clip.NONE for o in layout.options], device=device)
        self._clips = group_clips[self._group_of]

    def next_statistics(self) -> torch.Tensor:
        """The ``[T, len(STATISTICS)]`` table that the coming step is to fill."""
        if self._used == len(self._ring):
            self._fold()
        return self._rows[self._used]

    def recorded(self) -> None:
        """The table that :meth:`next_statistics` gave has been filled."""
        if self._accumulate is not None:
            self._accumulate(self._rows[0], self.sums)
        else:
            self._used += 1

    def folded_sums(self) -> torch.Tensor:
        """:attr:`sums`, brought up to date."""
        if self._used:
            self._fold()
        return self.sums

    def _fold(self) -> None:
        statistics = self._ring[: self._used]
        features = tensor_features(statistics, self._numel, self._clips)
        runs = self.sums.shape[1]
        means = mean_features(features, self._group_of, self._run_of, runs)
        norms = step_norms(statistics, self._run_of[self._group_of], runs)
        steps = torch.cat([means, norms], dim=-1)
        # one step after the other, so that the sum does not depend on when the ring is folded
        for value, measured in zip(steps.nan_to_num(nan=0.0), ~steps.isnan(), strict=True):
            self.sums[0] += value
            self.sums[1] += measured
        self._used = 0

    def pop(self) -> torch.Tensor:
        """Means of :data:`ACCUMULATED` since the last call, and start anew.

        Returns:
            float64 ``[R, 18]`` on the layout's device, NaN where not measured.
        """
        sums = self.folded_sums()
        means = sums[0] / sums[1]
        sums.zero_()
        return means
