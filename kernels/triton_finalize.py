"""After the moments: sums of each tensor, exact trust ratios, running norms, statistics.

One program per tensor, in float64. In phases, where tensors are pieces of larger ones, trust ratios
and running norms are left to whoever knows the whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_prepare import trust_ratio
from lhopt_fused.kernels.triton_tables import (
    C_DECAY,
    C_MASKED,
    C_STEP_SIZE,
    COEFFICIENT_COLUMNS,
    DECOUPLED_DECAY,
    DELAYS_TRUST,
    G_RUN,
    GRAD_SQ,
    KEEPS_SIGNS,
    LAMB_OMBETA,
    M_HAT_MINUS_GRAD_SQ,
    M_HAT_SQ,
    MASKED,
    MEMBERSHIP_COLUMNS,
    NEW_PARAM_SQ,
    P_NEW_PARAM_SQ,
    PARAM_NORM,
    PARAM_SQ,
    PARTIAL_COLUMNS,
    S_CLIP,
    S_DECAY,
    S_GRAD_NONFINITE,
    S_GRAD_SQ,
    S_M_HAT_SQ,
    S_PARAM_SQ,
    S_STEP_SIZE,
    S_TAKEN,
    S_UPDATE_SQ,
    SAME_SIGN_GRAD,
    SCALAR_COLUMNS,
    STATE_COLUMNS,
    STATISTICS_COLUMNS,
    UPDATE_NORM_CORRECTION,
    UPDATE_NORM_EMA,
    UPDATE_SQ,
    USES_TRUST,
    W_ACTIVE,
    W_CLIP,
    W_DEFERRED,
    W_FIRST_STEP,
    W_GRAD_SQ,
    W_NONFINITE,
    W_RATE,
    W_TRUST,
    WEIGHT_DECAY,
    WORK_COLUMNS,
)

__all__ = ["finalize_kernel"]


@triton.jit
def tensor_sums(partials_ptr, begin, end, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Add up rows ``begin`` to ``end`` in a fixed order -> float64 ``[COLUMNS]``."""
    columns = tl.arange(0, COLUMNS)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(begin, end, ROWS):
        rows = first + tl.arange(0, ROWS)[:, None]
        pointers = partials_ptr + rows * COLUMNS + columns
        sums += tl.load(pointers, mask=rows < end, other=0.0).to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def pick(sums, COLUMN: tl.constexpr):
    """One entry of ``sums`` as a scalar."""
    columns = tl.arange(0, sums.shape[0])
    return tl.sum(tl.where(columns == COLUMN, sums, 0.0), axis=0)


@triton.jit
def advance_trust(sums, traits, scalar_ptr, state_ptr, deferred):
    """Take |u| into its running mean; the trust ratio that includes it."""
    ombeta = tl.load(scalar_ptr + LAMB_OMBETA)
    norm = tl.sqrt(pick(sums, UPDATE_SQ))
    ema = (1.0 - ombeta) * tl.load(state_ptr + UPDATE_NORM_EMA) + ombeta * norm
    correction = (1.0 - ombeta) * tl.load(state_ptr + UPDATE_NORM_CORRECTION) + ombeta
    tl.store(state_ptr + UPDATE_NORM_EMA, ema)
    tl.store(state_ptr + UPDATE_NORM_CORRECTION, correction)
    if ((traits & DELAYS_TRUST) != 0) & (deferred == 0.0):
        tl.store(state_ptr + PARAM_NORM, tl.sqrt(pick(sums, NEW_PARAM_SQ)))
    return trust_ratio(tl.sqrt(pick(sums, PARAM_SQ)), ema / correction, scalar_ptr)


@triton.jit
def store_sums(statistics_ptr, sums, traits, is_active, first_step, grad_sq):
    """Write the raw sums of a tensor, 0 where it took no part.

    On a tensor's first step ``m_hat`` equals ``g`` in exact arithmetic; and there are no signs of
    a gradient before it.
    """
    columns = tl.arange(0, sums.shape[0])
    noise = tl.where(first_step, 0.0, sums)
    values = tl.where(columns == M_HAT_MINUS_GRAD_SQ, noise, sums)
    same_sign = tl.where(first_step | ((traits & KEEPS_SIGNS) == 0), float("nan"), sums)
    values = tl.where(columns == SAME_SIGN_GRAD, same_sign, values)
    values = tl.where(is_active, values, 0.0)
    # Columns from M_HAT_SQ on have the order of the statistics.
    shift: tl.constexpr = S_M_HAT_SQ - M_HAT_SQ
    tl.store(statistics_ptr + columns + shift, values, mask=columns >= M_HAT_SQ)
    tl.store(statistics_ptr + S_GRAD_SQ, grad_sq)
    tl.store(statistics_ptr + S_PARAM_SQ, pick(values, PARAM_SQ))
    tl.store(statistics_ptr + S_UPDATE_SQ, pick(values, UPDATE_SQ))


@triton.jit(do_not_specialize=["statistics_ptr"])
def finalize_kernel(
    first_row_ptr,  # int64 [T + 1]
    groups_ptr,  # int32 [G, MEMBERSHIP_COLUMNS]
    group_of_ptr,  # int32 [T]
    traits_ptr,  # int32 [T]
    scalars_ptr,
    tensor_state_ptr,
    work_ptr,
    coefficients_ptr,
    partials_ptr,  # float32 [rows, COLUMNS]
    skipped_steps_ptr,  # int64 [R]
    seen_ptr,  # int32 [R]
    statistics_ptr,  # float64 [T, STATISTICS_COLUMNS], untouched where COLUMNS is 4; or, in
    # phases, [T, PARTIAL_COLUMNS]
    SKIPS: tl.constexpr,
    PHASES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    tensor = tl.program_id(0).to(tl.int64)
    work_row_ptr = work_ptr + tensor * WORK_COLUMNS
    traits = tl.load(traits_ptr + tensor)
    is_active = tl.load(work_row_ptr + W_ACTIVE) != 0.0
    deferred = tl.load(work_row_ptr + W_DEFERRED)
    group = tl.load(group_of_ptr + tensor)
    scalar_ptr = scalars_ptr + group * SCALAR_COLUMNS
    begin, end = tl.load(first_row_ptr + tensor), tl.load(first_row_ptr + tensor + 1)
    end = tl.where(is_active, end, begin)
    sums = tensor_sums(partials_ptr, begin, end, COLUMNS, ROWS)
    nonfinite = pick(sums, MASKED)
    if SKIPS | PHASES:
        nonfinite = tl.load(work_row_ptr + W_NONFINITE)
    if not SKIPS:  # noqa: SIM102 - no constant joins a tensor in the interpreter of triton 3.3
        if nonfinite > 0.0:
            # The first tensor of a run that arrives here counts the step.
            tl.store(coefficients_ptr + tensor * COEFFICIENT_COLUMNS + C_MASKED, 1.0)
            run = tl.load(groups_ptr + group * MEMBERSHIP_COLUMNS + G_RUN)
            if tl.atomic_xchg(seen_ptr + run, 1) == 0:
                tl.store(skipped_steps_ptr + run, tl.load(skipped_steps_ptr + run) + 1)

    trust = tl.load(work_row_ptr + W_TRUST)
    if not PHASES:  # noqa: SIM102 - likewise
        if is_active & ((traits & USES_TRUST) != 0):
            state_ptr = tensor_state_ptr + tensor * STATE_COLUMNS
            exact = advance_trust(sums, traits, scalar_ptr, state_ptr, deferred)
            trust = tl.where(deferred != 0.0, exact, trust)
    step_size = tl.load(work_row_ptr + W_RATE) * trust
    is_decoupled = (traits & DECOUPLED_DECAY) != 0
    decay = tl.where(is_decoupled, 1.0 - step_size * tl.load(scalar_ptr + WEIGHT_DECAY), 1.0)
    if deferred != 0.0:
        row_ptr = coefficients_ptr + tensor * COEFFICIENT_COLUMNS
        tl.store(row_ptr + C_STEP_SIZE, step_size.to(tl.float32))
        tl.store(row_ptr + C_DECAY, decay.to(tl.float32))

    if PHASES | (COLUMNS == 16):
        columns: tl.constexpr = PARTIAL_COLUMNS if PHASES else STATISTICS_COLUMNS
        statistics_row_ptr = statistics_ptr + tensor * columns
        clip = tl.load(work_row_ptr + W_CLIP)
        first_step = tl.load(work_row_ptr + W_FIRST_STEP) != 0.0
        tl.store(statistics_row_ptr + S_TAKEN, is_active.to(tl.float64))
        tl.store(statistics_row_ptr + S_GRAD_NONFINITE, (nonfinite > 0.0).to(tl.float64))
        tl.store(statistics_row_ptr + S_CLIP, tl.where(is_active, clip, 0.0))
        tl.store(statistics_row_ptr + S_STEP_SIZE, tl.where(is_active, step_size, 0.0))
        tl.store(statistics_row_ptr + S_DECAY, tl.where(is_active, decay, 0.0))
        grad_sq = pick(sums, GRAD_SQ)
        if PHASES:
            tl.store(statistics_row_ptr + P_NEW_PARAM_SQ, pick(sums, NEW_PARAM_SQ))
        elif SKIPS:  # the gradient pass knows it without overflow
            grad_sq = tl.where(is_active, clip * clip * tl.load(work_row_ptr + W_GRAD_SQ), 0.0)
        store_sums(statistics_row_ptr, sums, traits, is_active, first_step, grad_sq)
