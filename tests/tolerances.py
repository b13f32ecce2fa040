"""Every tolerance of the test-suite, with its reason, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from lhopt_fused.types import STATISTICS as COLUMNS


@dataclass(frozen=True)
class Tolerance:
    """``|value - expected| <= absolute + relative * scale``; the test says what ``scale`` is."""

    relative: float
    absolute: float = 0.0


GOLDEN_PARAMETERS: Final = {
    # relative to the largest parameter
    torch.float64: Tolerance(1e-12),
    torch.float32: Tolerance(2e-6),
}
GOLDEN_FEATURES: Final = {
    # relative to max(1, |feature|): the record holds the rounding noise of |m_hat - g| on first
    # steps, which is exactly 0 here, and log_noise_scale shows it (3e-8 on a value of 5.2)
    torch.float64: Tolerance(1e-8),
    torch.float32: Tolerance(1e-4),
}
TRAJECTORY: Final = {
    # 50 steps of a fused backend or of torch.optim.AdamW against the reference; relative to the
    # largest parameter. 16-bit parameters may round to the neighbouring number.
    torch.float64: Tolerance(1e-13),
    torch.float32: Tolerance(2e-6),
    torch.bfloat16: Tolerance(2.0**-7),
    torch.float16: Tolerance(2.0**-10),
}
STORED: Final = {
    # one step from the same state, of what is decoded again. Moments relative to the scale of their
    # block, codes of second moments by their roots: two codes where they are widest, because a
    # largest magnitude on the border of two scales moves both scale and codes. bfloat16: one number
    # further.
    torch.int8: Tolerance(4 / 127),
    torch.uint8: Tolerance(2 / 255),
    torch.bfloat16: Tolerance(2.0**-7),
    torch.float32: Tolerance(2e-6),
}
SPLIT8: Final = Tolerance(2.0**-16 + 2e-6)
# masters with 8 bits of correction, relative to the largest parameter: one unit, and TRAJECTORY's
LOW_PRECISION_LOSS: Final = Tolerance(0.02)
# the loss after 120 steps with moments and masters in few bits, relative to that in float32: its
# parameters are bfloat16 in the network itself; without masters it is off by more
OPTIMUM: Final = Tolerance(5e-3)
# linear weights after 300 steps whose rate goes to 0, relative to the norm of the right ones: the
# model's own products in bfloat16 leave 2e-3, rounding at random 3e-3, lost updates 3e-2
DIFFERING_CODES: Final = 0.03
# share of stored numbers that are others than the reference's: those on the border of two, where
# rounding decides, and blocks whose largest magnitude is on that of two scales
STATISTICS: Final = {
    # sums of one step; relative to the largest possible magnitude of the sum (product of norms)
    torch.float64: Tolerance(1e-12),
    torch.float32: Tolerance(2e-6),
    torch.bfloat16: Tolerance(2e-6),
    torch.float16: Tolerance(2e-6),
}
ANOTHER_CODE: Final = {
    # moments in fewer bits, relative to the largest: results that differ in their last bits go to
    # neighbouring codes one time in ten thousand, which shifts a block if it is its scale
    torch.float32: Tolerance(2e-6),
    torch.bfloat16: Tolerance(2.0**-6),
    torch.int8: Tolerance(2 / 63),
}
AFTER_ANOTHER_CODE: Final = Tolerance(5e-3)
# weights and statistics, a few steps after that; relative as in TRAJECTORY and STATISTICS
ROUNDED_OTHERWISE: Final = 0.05
# the share of a run's elements that this may befall
SPLIT: Final = {
    # float32 masters as they are kept, relative to the largest: rounded to 16 or 24 bits
    torch.int8: Tolerance(2.0**-16),
    torch.int16: Tolerance(2e-6),
}
SHARDED: Final = {
    # a run over pieces against the whole, relative to the largest number of a tensor or statistic:
    # sums add up in another order, and the tails of vectors are elsewhere
    "reference": Tolerance(1e-14),
    "cpu": Tolerance(2e-6, absolute=1e-7),
    "triton": Tolerance(4e-6, absolute=1e-7),
}
SHARDED_RUN: Final = Tolerance(1e-5)
# a training run on several ranks against one on another number of them, relative to the largest
# number of a tensor: gradients are means in another order, and decisions carry it on
AUTOCAST_RUN: Final = Tolerance(1e-3)
# a network in bfloat16 products against torch's AdamW, after 20 steps: last bits of weights decide
# which way a few of them are rounded; relative to 1, and to the loss
FUSED_FEATURES: Final = Tolerance(1e-12, absolute=1e-12)
# means of features in float64 in another order; relative to the feature
FUSED_LOGITS: Final = Tolerance(0.0, absolute=1e-7)
# of probabilities of 1e-8 and more, which torch takes from 1 + erf: rounding moves them by 1e-8
THREAD_COUNTS: Final = Tolerance(0.0)  # sums do not depend on the number of threads
PLAIN_ACTIONS: Final = Tolerance(0.0, 1e-12)
# actions in plain numbers against tensors, whose logarithms may round otherwise; logarithms go up
# to 1,500
TASK_LOSS: Final = Tolerance(1e-5)
# an inner task in another place of its batch: matrix products may add in another order; relative
# to the largest loss or gradient, after a few steps in float32

POWER_CURVE: Final = Tolerance(1e-6)
# parameters of a fitted power curve, relative to the size of the losses: a minimum is
# found to the square root of the rounding, and small exponents look like one another
REWARD_AFFINE: Final = Tolerance(0.0, 1e-5)
# rewards after an affine map of the losses: rounding of the losses, through the same minimum
REWARD: Final = Tolerance(0.0, 1e-6)
# rewards against exact power curves: the same
REWARD_SPIKE: Final = Tolerance(0.0, 0.05)
# rewards with one spike in the baseline, in log steps; without reweighting it is off by 0.07 to 3

TEACHER: Final = Tolerance(1e-6)
# weights and learning rates of a teacher worked out by hand, relative to each: shifts are float32

PPO_HAND: Final = Tolerance(1e-7)
# losses and advantages worked out by hand, relative to their size; normalising adds 1e-8 to a
# spread
PPO_GRADIENT: Final = Tolerance(1e-5)
# the slope of PPO's objective in float64 against differences over 2e-8, whose rounding is 1e-8
UNROLL: Final = Tolerance(2e-5)
# episodes at once against step by step, float32: products of 16 numbers add in another order, and
# memory carries it on over 7 steps; relative to the largest logit or value
STACKED_RUN: Final = Tolerance(1e-4, 1e-5)
# observations of a run in a batch against the run alone: matrix products add in another order,
# for 44 inner steps in float32; relative to each number
LEARNED_RUN: Final = Tolerance(1e-4)
# hyperparameters under a learned policy, C++ against torch: logits differ by 1e-6, and training
# carries that on over 8 outer steps; relative to each number
BASELINE: Final = Tolerance(1e-5)
# report losses of AdamW in a batch against torch.optim.AdamW on one task, after up to 40 steps in
# float32: relative to the loss at the start
STACKED_NETWORK: Final = Tolerance(1e-5)
# float32 networks of a few layers beside torch's own; relative to the largest output
DROPPED_SHARE: Final = Tolerance(0.0, 0.025)
# the share of 10,000 draws that are dropped: five standard deviations

FIRST_RATIO: Final = Tolerance(0.0, 1e-8)
# KL before the first gradient step, float32: log-probabilities at once and step by step differ by
# 1e-6, and KL is half the square of that; its own rounding is 1e-8
GRADIENT_NORM: Final = Tolerance(1e-4)
# a clipped gradient's norm, float32: torch divides by the norm plus 1e-6
CLONED_SHIFT: Final = Tolerance(0.0, 0.1)
# mean log multipliers after a short cloning: exploration keeps them a little nearer to 0

SPEEDUP: Final = Tolerance(1e-9, 1e-4)
# budgets found on a curve, relative to the budget: its logarithm and back; the absolute one is for
# losses in other units, whose drops of 1e-6 have lost ten digits
MEAN_OF_PARTS: Final = Tolerance(1e-2)
# bits per byte, by the mean of ratios of 64 windows each against the ratio of all; of a model that
# counts tokens as bytes it is off by half or more
SPREAD_PART: Final = Tolerance(0.1)
# the mean loss of every other of 300 examples, by class, against that of all; of one class alone it
# is off by its size


def assert_close(
    value: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, scale: float | torch.Tensor
) -> None:
    """Element by element; NaN only where NaN is expected."""
    value, expected = value.detach().double().cpu(), expected.detach().double().cpu()
    assert value.shape == expected.shape
    assert torch.equal(value.isnan(), expected.isnan()), "NaN in different places"
    error = (value - expected).abs().nan_to_num(nan=0.0)
    limit = tolerance.absolute + tolerance.relative * torch.as_tensor(scale).double()
    worst = (error - limit).max() if error.numel() else torch.tensor(0.0)
    assert bool((error <= limit).all()), (
        f"off by {error.max():.3e}, over the limit by {worst:.3e} ({tolerance}, scale {scale})"
    )


def assert_mostly_close(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], tight: Tolerance, loose: Tolerance
) -> None:
    """All elements within ``loose``, and all but ``ROUNDED_OTHERWISE`` of them within ``tight``.

    Both are relative to the largest element of each expected tensor, or 1.
    """
    beyond = 0
    for value, expected in pairs:
        value, expected = value.double().cpu(), expected.double().cpu()
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        assert_close(value, expected, loose, scale)
        error = (value - expected).abs()
        beyond += int((error > tight.absolute + tight.relative * scale).sum())
    count = sum(expected.numel() for _, expected in pairs)
    assert beyond <= ROUNDED_OTHERWISE * count, f"{beyond} of {count} elements beyond {tight}"


def statistics_scale(numel: Sequence[int], expected: torch.Tensor) -> torch.Tensor:
    """The magnitude that the rounding errors of the sums ``expected`` are relative to.

    Momentum, update and parameter are differences where signs change, so that their errors are
    relative to the terms: the gradient and the old momentum, and 1 for each element of update and
    parameter.

    Args:
        numel: elements of each tensor.
        expected: float64 ``[len(numel), len(STATISTICS)]``.

    Returns:
        Like ``expected``.
    """
    elements = torch.tensor(numel, dtype=torch.float64)
    scale = expected.nan_to_num().abs().clone()
    s = dict(zip(COLUMNS, scale.unbind(1), strict=True))  # views, in place below
    m_terms = s["m_hat_sq"] + s["grad_sq"] + s["momentum_sq"]
    u_terms = s["update_sq"] + elements
    s["param_sq"].copy_((s["param_sq"] * (s["param_sq"] + elements)).sqrt())
    s["grad_dot_param"].copy_((s["grad_sq"] * s["param_sq"]).sqrt())
    s["grad_dot_momentum"].copy_((s["grad_sq"] * m_terms).sqrt())
    s["grad_dot_m_hat"].copy_((s["grad_sq"] * m_terms).sqrt())
    s["grad_dot_update"].copy_((s["grad_sq"] * u_terms).sqrt())
    s["m_hat_minus_grad_sq"].copy_(m_terms)
    s["m_hat_sq"].copy_((s["m_hat_sq"] * m_terms).sqrt())
    s["momentum_sq"].copy_((s["momentum_sq"] * m_terms).sqrt())
    s["update_sq"].copy_((s["update_sq"] * u_terms).sqrt())
    s["sum_log_abs_update"].add_(100.0 * elements)  # of numbers that may be tiny differences
    return scale
