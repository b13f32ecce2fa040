"""Before the moments: skip decision, clip coefficients, bias corrections, delayed trust ratios.

One program per group, in float64; it leaves a row of float32 coefficients for each of its tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_chunks import where_set
from lhopt_fused.kernels.triton_tables import (
    C_ACTIVE,
    C_BETA1,
    C_BETA2,
    C_CLIP,
    C_DECAY,
    C_DEFERRED,
    C_EPSILON,
    C_M_SCALE,
    C_MASKED,
    C_OMBETA1,
    C_OMBETA2,
    C_S_SCALE,
    C_STEP_SIZE,
    C_WEIGHT_DECAY,
    CLIP_NORM,
    CLIP_OMBETA,
    CLIP_Z_SCORE,
    CLIPS_NONE,
    CLIPS_ROLLING_MAX,
    CLIPS_Z_SCORE,
    COEFFICIENT_COLUMNS,
    CORRECTION1,
    CORRECTION2,
    DECOUPLED_DECAY,
    DELAYS_TRUST,
    EPSILON,
    G_BEGIN,
    G_CLIP_MODE,
    G_END,
    G_LEADS,
    G_RUN,
    G_RUN_BEGIN,
    G_RUN_END,
    GROUP_COLUMNS,
    LAMB_MAX_TRUST,
    LAMB_MIN_TRUST,
    LAMB_POWER,
    LOG_NORM_CORRECTION,
    LOG_NORM_EMA,
    LOG_NORM_EMVAR,
    LR,
    MAXIMIZES,
    MEMBERSHIP_COLUMNS,
    OMBETA1,
    OMBETA2,
    PARAM_NORM,
    ROLLING_MAX,
    ROOT_DENOMINATOR,
    SCALAR_COLUMNS,
    STATE_COLUMNS,
    STEP,
    UPDATE_NORM_CORRECTION,
    UPDATE_NORM_EMA,
    USES_TRUST,
    W_ACTIVE,
    W_CLIP,
    W_DEFERRED,
    W_FIRST_STEP,
    W_GRAD_SQ,
    W_NONFINITE,
    W_RATE,
    W_TRUST,
    WARMS_UP,
    WEIGHT_DECAY,
    WORK_COLUMNS,
)

__all__ = ["prepare_kernel", "trust_ratio"]


@triton.jit
def trust_ratio(param_norm, update_norm, scalar_ptr):
    """``clip(|p| / U, min_trust, max_trust) ** lamb_power``, 1 where either norm is nothing."""
    power = tl.load(scalar_ptr + LAMB_POWER)
    is_something = (param_norm >= 1e-8) & (update_norm >= 1e-8)
    ratio = param_norm / tl.where(is_something, update_norm, 1.0)
    ratio = tl.maximum(ratio, tl.load(scalar_ptr + LAMB_MIN_TRUST))
    ratio = tl.minimum(ratio, tl.load(scalar_ptr + LAMB_MAX_TRUST))
    powered = tl.exp(power * tl.log(tl.where(ratio > 0.0, ratio, 1.0)))
    powered = tl.where(ratio > 0.0, powered, tl.where(power == 0.0, 1.0, 0.0))
    powered = tl.where(power == 1.0, ratio, powered)
    return tl.where(is_something, powered, 1.0)


@triton.jit
def count_nonfinite(members_ptr, begin, end, work_ptr, BLOCK: tl.constexpr):
    """How many elements of the gradients of a run are NaN or inf."""
    count = tl.zeros([BLOCK], tl.float64)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        tensor = tl.load(members_ptr + place, mask=place < end, other=0).to(tl.int64)
        pointers = work_ptr + tensor * WORK_COLUMNS + W_NONFINITE
        count += tl.load(pointers, mask=place < end, other=0.0)
    return tl.sum(count, axis=0)


@triton.jit
def group_norm(members_ptr, begin, end, grads_ptr, work_ptr, BLOCK: tl.constexpr):
    """``(N, members with a gradient)`` of a group."""
    total = tl.zeros([BLOCK], tl.float64)
    present = tl.zeros([BLOCK], tl.int32)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < end
        tensor = tl.load(members_ptr + place, mask=inside, other=0).to(tl.int64)
        inside = inside & (tl.load(grads_ptr + tensor, mask=inside, other=0) != 0)
        total += tl.load(work_ptr + tensor * WORK_COLUMNS + W_GRAD_SQ, mask=inside, other=0.0)
        present += inside.to(tl.int32)
    return tl.sqrt(tl.sum(total, axis=0)), tl.sum(present, axis=0)


@triton.jit
def clip_coefficient(norm, mode, scalar_ptr, state_ptr):
    """The factor c <= 1 for a group's gradients of norm N; advances the group's state."""
    beta = 1.0 - tl.load(scalar_ptr + CLIP_OMBETA)
    clip = tl.load(scalar_ptr + CLIP_NORM)
    if mode == CLIPS_ROLLING_MAX:
        rolling_max = tl.maximum(norm, beta * tl.load(state_ptr + ROLLING_MAX))
        tl.store(state_ptr + ROLLING_MAX, rolling_max)
        clip *= rolling_max
    if mode == CLIPS_Z_SCORE:
        log_norm = tl.log(norm + 1e-15)
        ema = beta * tl.load(state_ptr + LOG_NORM_EMA) + (1.0 - beta) * log_norm
        correction = beta * tl.load(state_ptr + LOG_NORM_CORRECTION) + (1.0 - beta)
        mean = ema / correction
        squared = (log_norm - mean) * (log_norm - mean)
        emvar = beta * tl.load(state_ptr + LOG_NORM_EMVAR) + (1.0 - beta) * squared
        tl.store(state_ptr + LOG_NORM_EMA, ema)
        tl.store(state_ptr + LOG_NORM_CORRECTION, correction)
        tl.store(state_ptr + LOG_NORM_EMVAR, emvar)
        z_score = tl.load(scalar_ptr + CLIP_Z_SCORE)
        clip = tl.exp(mean + z_score * tl.sqrt(emvar / correction))
    return tl.minimum(clip / (norm + 1e-6), 1.0)


@triton.jit
def prepare_tensors(
    tensor,
    inside,
    active,
    clip,
    traits,
    scalar_ptr,
    tensor_state_ptr,
    work_ptr,
    coefficients_ptr,
    waits_ptr,
):
    """Advance step and bias corrections of the tensors ``[BLOCK]``; write work and coefficients.

    ``waits`` says which need their first trust ratio although it is delayed from then on.
    """
    state_ptr = tensor_state_ptr + tensor * STATE_COLUMNS
    step = tl.load(state_ptr + STEP, mask=active, other=0.0)
    before1 = tl.load(state_ptr + CORRECTION1, mask=active, other=1.0)
    before2 = tl.load(state_ptr + CORRECTION2, mask=active, other=1.0)
    beta1, beta2 = 1.0 - tl.load(scalar_ptr + OMBETA1), 1.0 - tl.load(scalar_ptr + OMBETA2)
    correction1 = beta1 * before1 + (1.0 - beta1)
    correction2 = beta2 * before2 + (1.0 - beta2)
    tl.store(state_ptr + STEP, step + 1.0, mask=active)
    tl.store(state_ptr + CORRECTION1, correction1, mask=active)
    tl.store(state_ptr + CORRECTION2, correction2, mask=active)

    first_step = step == 0.0
    uses_trust = (traits & USES_TRUST) != 0
    delayed = uses_trust & ((traits & DELAYS_TRUST) != 0) & (step > 0.0)
    ema = tl.load(state_ptr + UPDATE_NORM_EMA, mask=active & delayed, other=0.0)
    ema_correction = tl.load(state_ptr + UPDATE_NORM_CORRECTION, mask=active & delayed, other=1.0)
    param_norm = tl.load(state_ptr + PARAM_NORM, mask=active & delayed, other=0.0)
    trust = trust_ratio(param_norm, ema / ema_correction, scalar_ptr)
    trust = tl.where(delayed, trust, 1.0)
    warmup = tl.sqrt(2.0 / (2.0 - correction2) - 1.0)
    rate = tl.load(scalar_ptr + LR) * tl.where((traits & WARMS_UP) != 0, warmup, 1.0)
    delays = (traits & DELAYS_TRUST) != 0
    deferred = uses_trust & ((delays == 0) | first_step)

    row_ptr = work_ptr + tensor * WORK_COLUMNS
    tl.store(row_ptr + W_ACTIVE, active.to(tl.float64), mask=inside)
    tl.store(row_ptr + W_FIRST_STEP, first_step.to(tl.float64), mask=inside)
    tl.store(row_ptr + W_CLIP, clip, mask=inside)
    tl.store(row_ptr + W_RATE, rate, mask=inside)
    tl.store(row_ptr + W_TRUST, trust, mask=inside)
    tl.store(row_ptr + W_DEFERRED, deferred.to(tl.float64), mask=inside)

    row_ptr = coefficients_ptr + tensor * COEFFICIENT_COLUMNS
    weight_decay = tl.load(scalar_ptr + WEIGHT_DECAY)
    decay = tl.where((traits & DECOUPLED_DECAY) != 0, 1.0 - rate * trust * weight_decay, 1.0)
    s_scale = tl.where((traits & ROOT_DENOMINATOR) != 0, 1.0 / tl.sqrt(correction2), 1.0)
    tl.store(row_ptr + C_CLIP, tl.where((traits & MAXIMIZES) != 0, -clip, clip), mask=inside)
    tl.store(row_ptr + C_BETA1, beta1, mask=inside)
    tl.store(row_ptr + C_OMBETA1, 1.0 - beta1, mask=inside)
    tl.store(row_ptr + C_BETA2, beta2, mask=inside)
    tl.store(row_ptr + C_OMBETA2, 1.0 - beta2, mask=inside)
    tl.store(row_ptr + C_M_SCALE, 1.0 / correction1, mask=inside)
    tl.store(row_ptr + C_S_SCALE, s_scale, mask=inside)
    tl.store(row_ptr + C_EPSILON, tl.load(scalar_ptr + EPSILON), mask=inside)
    tl.store(row_ptr + C_WEIGHT_DECAY, weight_decay, mask=inside)
    tl.store(row_ptr + C_STEP_SIZE, rate * trust, mask=inside)
    tl.store(row_ptr + C_DECAY, decay, mask=inside)
    tl.store(row_ptr + C_ACTIVE, active.to(tl.float32), mask=inside)
    tl.store(row_ptr + C_DEFERRED, deferred.to(tl.float32), mask=inside)
    tl.store(row_ptr + C_MASKED, tl.zeros_like(rate), mask=inside)
    waits = active & deferred & delays
    tl.store(waits_ptr + tensor, waits.to(tl.int32), mask=inside)


@triton.jit
def prepare_kernel(
    groups_ptr,  # int32 [G, MEMBERSHIP_COLUMNS]
    members_ptr,  # int32 [T], tensors in the order of their runs and groups
    grads_ptr,  # int64 [T]
    traits_ptr,  # int32 [T]
    scalars_ptr,
    group_state_ptr,
    tensor_state_ptr,
    work_ptr,
    coefficients_ptr,
    waits_ptr,  # int32 [T]
    skipped_steps_ptr,  # int64 [R]
    seen_ptr,  # int32 [R]: whether this step has counted a gradient that is not finite
    SKIPS: tl.constexpr,
    CLIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    scalar_ptr = scalars_ptr + group * SCALAR_COLUMNS
    entry_ptr = groups_ptr + group * MEMBERSHIP_COLUMNS
    begin, end = tl.load(entry_ptr + G_BEGIN), tl.load(entry_ptr + G_END)
    nonfinite = tl.full([], 0.0, tl.float64)
    if SKIPS:
        run_begin, run_end = tl.load(entry_ptr + G_RUN_BEGIN), tl.load(entry_ptr + G_RUN_END)
        nonfinite = count_nonfinite(members_ptr, run_begin, run_end, work_ptr, BLOCK)
    goes_on = (nonfinite == 0.0).to(tl.int32)
    if tl.load(entry_ptr + G_LEADS) != 0:
        run = tl.load(entry_ptr + G_RUN)
        tl.store(seen_ptr + run, 0)
        if nonfinite > 0.0:
            tl.store(skipped_steps_ptr + run, tl.load(skipped_steps_ptr + run) + 1)
    clip = tl.full([], 1.0, tl.float64)
    if CLIPS:
        mode = tl.load(entry_ptr + G_CLIP_MODE)
        norm, present = group_norm(members_ptr, begin, end, grads_ptr, work_ptr, BLOCK)
        if (mode != CLIPS_NONE) & (present > 0) & (goes_on != 0):
            clip = clip_coefficient(norm, mode, scalar_ptr, group_state_ptr + group * GROUP_COLUMNS)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < end
        tensor = tl.load(members_ptr + place, mask=inside, other=0).to(tl.int64)
        has_grad = tl.load(grads_ptr + tensor, mask=inside, other=0) != 0
        active = where_set(inside & has_grad, goes_on)
        traits = tl.load(traits_ptr + tensor, mask=inside, other=0)
        prepare_tensors(
            tensor, inside, active, clip, traits,
            scalar_ptr, tensor_state_ptr, work_ptr, coefficients_ptr, waits_ptr,
        )  # fmt: skip
