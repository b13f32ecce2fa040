"""Inner features on the device: what ``lhopt_fused.features`` makes of one step's statistics."""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_chunks import stack4, stack16
from lhopt_fused.kernels.triton_tables import (
    CLIPS_NONE,
    G_BEGIN,
    G_CLIP_MODE,
    G_END,
    MEMBERSHIP_COLUMNS,
    S_CLIP,
    S_COUNT_GT_EPSILON,
    S_DECAY,
    S_GRAD_DOT_M_HAT,
    S_GRAD_DOT_MOMENTUM,
    S_GRAD_DOT_PARAM,
    S_GRAD_DOT_UPDATE,
    S_GRAD_SQ,
    S_M_HAT_MINUS_GRAD_SQ,
    S_M_HAT_SQ,
    S_MOMENTUM_SQ,
    S_PARAM_SQ,
    S_SAME_SIGN_GRAD,
    S_SAME_SIGN_MOMENTUM,
    S_STEP_SIZE,
    S_SUM_LOG_ABS_UPDATE,
    S_TAKEN,
    S_UPDATE_SQ,
    STATISTICS_COLUMNS,
)
from lhopt_fused.types import EXTRA_FEATURES, INNER_FEATURES, STEP_NORMS

__all__ = [
    "FEATURE_COLUMNS",
    "NORM_COLUMNS",
    "SUM_COLUMNS",
    "add_features_kernel",
    "group_features_kernel",
]

FEATURE_COLUMNS = tl.constexpr(len(INNER_FEATURES) + len(EXTRA_FEATURES))
SUM_COLUMNS = tl.constexpr(FEATURE_COLUMNS.value + len(STEP_NORMS))
NORM_COLUMNS = tl.constexpr(4)  # squares of STEP_NORMS, tensors that took part, nothing
LARGEST = tl.constexpr(1.7976931348623157e308)


@triton.jit
def log_of(x):
    return tl.log(x + 1e-8)


@triton.jit
def clamp(x, LEAST: tl.constexpr, MOST: tl.constexpr):
    """float64 ``x`` within bounds; bare bounds would pass through float32 on their way."""
    least, most = tl.full(x.shape, LEAST, tl.float64), tl.full(x.shape, MOST, tl.float64)
    return tl.minimum(tl.maximum(x, least), most)


@triton.jit
def cosine(dot, x_norm, y_norm):
    return dot / clamp(x_norm * y_norm, 1e-8, LARGEST)


@triton.jit
def normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def logit_of(p):
    p = clamp(p, 1e-8, 1.0 - 1e-8)
    return tl.log(p / (1.0 - p))


@triton.jit
def ratio(x, y):
    """``x / y``, NaN where y is 0."""
    return tl.where(y == 0.0, float("nan"), x / tl.where(y == 0.0, 1.0, y))


@triton.jit
def tensor_features(row_ptr, inside, numel, clips):
    """Features ``[BLOCK, 16]`` of the tensors whose statistics begin at ``row_ptr`` ``[BLOCK]``."""
    grad = tl.sqrt(tl.load(row_ptr + S_GRAD_SQ, mask=inside, other=0.0))
    param = tl.sqrt(tl.load(row_ptr + S_PARAM_SQ, mask=inside, other=0.0))
    update = tl.sqrt(tl.load(row_ptr + S_UPDATE_SQ, mask=inside, other=0.0))
    m_hat = tl.sqrt(tl.load(row_ptr + S_M_HAT_SQ, mask=inside, other=0.0))
    momentum = tl.sqrt(tl.load(row_ptr + S_MOMENTUM_SQ, mask=inside, other=0.0))
    noise = tl.sqrt(tl.load(row_ptr + S_M_HAT_MINUS_GRAD_SQ, mask=inside, other=0.0))
    grad_dot_param = tl.load(row_ptr + S_GRAD_DOT_PARAM, mask=inside, other=0.0)
    grad_dot_m_hat = tl.load(row_ptr + S_GRAD_DOT_M_HAT, mask=inside, other=0.0)
    grad_dot_update = tl.load(row_ptr + S_GRAD_DOT_UPDATE, mask=inside, other=0.0)
    grad_dot_momentum = tl.load(row_ptr + S_GRAD_DOT_MOMENTUM, mask=inside, other=0.0)
    step_size = tl.load(row_ptr + S_STEP_SIZE, mask=inside, other=0.0)
    decay = tl.load(row_ptr + S_DECAY, mask=inside, other=0.0)
    clip = tl.load(row_ptr + S_CLIP, mask=inside, other=0.0)
    clipped = (clip < 1.0).to(tl.float64)
    count_gt_epsilon = tl.load(row_ptr + S_COUNT_GT_EPSILON, mask=inside, other=0.0)
    sum_log = tl.load(row_ptr + S_SUM_LOG_ABS_UPDATE, mask=inside, other=0.0)
    same_sign_momentum = tl.load(row_ptr + S_SAME_SIGN_MOMENTUM, mask=inside, other=0.0)
    same_sign_grad = tl.load(row_ptr + S_SAME_SIGN_GRAD, mask=inside, other=0.0)

    cosine_momentum = cosine(grad_dot_m_hat, grad, m_hat)
    cosine_param = cosine(decay * grad_dot_param - step_size * grad_dot_update, grad, param)
    cosine_update = cosine(grad_dot_update, grad, update)
    root = tl.sqrt(numel)
    nan = tl.full(grad.shape, float("nan"), tl.float64)
    return stack16(
        tl.where(clips, clipped, nan),
        ratio(count_gt_epsilon, numel),
        ratio(sum_log, numel),
        log_of(m_hat) - log_of(grad),
        log_of(step_size * update) - log_of(param),
        log_of(m_hat) - log_of(noise),
        cosine_momentum,
        cosine_param,
        log_of(param) - log_of(update),
        cosine_update,
        logit_of(normal_cdf(cosine_momentum * root)),
        logit_of(normal_cdf(cosine_update * root)),
        normal_cdf(cosine_param * root),
        tl.where(momentum > 0.0, cosine(grad_dot_momentum, grad, momentum), nan),
        tl.where(momentum > 0.0, ratio(same_sign_momentum, numel), nan),
        ratio(same_sign_grad, numel),
    )


@triton.jit
def step_squares(row_ptr, inside):
    """``[BLOCK, NORM_COLUMNS]``: squares of each tensor's step and parameter; 1 if it took part."""
    taken = (tl.load(row_ptr + S_TAKEN, mask=inside, other=0.0) > 0.0).to(tl.float64)
    step_size = tl.load(row_ptr + S_STEP_SIZE, mask=inside, other=0.0)
    update_sq = tl.load(row_ptr + S_UPDATE_SQ, mask=inside, other=0.0)
    param_sq = tl.load(row_ptr + S_PARAM_SQ, mask=inside, other=0.0)
    return stack4(step_size * step_size * update_sq, param_sq, taken, tl.zeros_like(taken))


@triton.jit(do_not_specialize=["statistics_ptr"])
def group_features_kernel(
    groups_ptr,  # int32 [G, MEMBERSHIP_COLUMNS]
    members_ptr,  # int32 [T], tensors in the order of their runs and groups
    numel_ptr,  # int64 [T]
    means_ptr,  # float64 [G, FEATURE_COLUMNS]
    squares_ptr,  # float64 [G, NORM_COLUMNS]
    statistics_ptr,  # float64 [T, STATISTICS_COLUMNS]
    BLOCK: tl.constexpr,
):
    """Means over the tensors of one group of what was measured, NaN where nothing was."""
    group = tl.program_id(0).to(tl.int64)
    entry_ptr = groups_ptr + group * MEMBERSHIP_COLUMNS
    clips = tl.load(entry_ptr + G_CLIP_MODE) != CLIPS_NONE
    begin, end = tl.load(entry_ptr + G_BEGIN), tl.load(entry_ptr + G_END)
    totals = tl.zeros([FEATURE_COLUMNS], tl.float64)
    counts = tl.zeros([FEATURE_COLUMNS], tl.float64)
    squares = tl.zeros([NORM_COLUMNS], tl.float64)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < end
        tensor = tl.load(members_ptr + place, mask=inside, other=0).to(tl.int64)
        row_ptr = statistics_ptr + tensor * STATISTICS_COLUMNS
        numel = tl.load(numel_ptr + tensor, mask=inside, other=0).to(tl.float64)
        taken = (numel > 0.0) & (tl.load(row_ptr + S_TAKEN, mask=inside, other=0.0) > 0.0)
        features = tensor_features(row_ptr, inside, numel, clips)
        measured = taken[:, None] & (features == features)
        finite = clamp(features, -LARGEST, LARGEST)
        totals += tl.sum(tl.where(measured, finite, 0.0), axis=0)
        counts += tl.sum(measured.to(tl.float64), axis=0)
        squares += tl.sum(step_squares(row_ptr, inside), axis=0)
    columns = tl.arange(0, FEATURE_COLUMNS)
    tl.store(squares_ptr + group * NORM_COLUMNS + tl.arange(0, NORM_COLUMNS), squares)
    tl.store(means_ptr + group * FEATURE_COLUMNS + columns, ratio(totals, counts))


@triton.jit
def add_measured(sums_ptr, counts_ptr, columns, values, measured, selected):
    """Add what was measured to the sums and 1 for it to the counts."""
    before = tl.load(sums_ptr + columns, mask=selected, other=0.0)
    tl.store(sums_ptr + columns, before + tl.where(measured, values, 0.0), mask=selected)
    counts = tl.load(counts_ptr + columns, mask=selected, other=0.0)
    tl.store(counts_ptr + columns, counts + measured.to(tl.float64), mask=selected)


@triton.jit(do_not_specialize=["sums_ptr"])
def add_features_kernel(
    first_group_ptr,  # int32 [R + 1]
    run_groups_ptr,  # int32 [G], groups in the order of their runs
    means_ptr,  # float64 [G, FEATURE_COLUMNS]
    squares_ptr,  # float64 [G, NORM_COLUMNS]
    sums_ptr,  # float64 [2, R, SUM_COLUMNS]
    BLOCK: tl.constexpr,
):
    """Add one run's means over groups and norms over tensors in one step to its sums."""
    run = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(first_group_ptr + run), tl.load(first_group_ptr + run + 1)
    columns = tl.arange(0, FEATURE_COLUMNS)
    norms = tl.arange(0, NORM_COLUMNS)
    totals = tl.zeros([FEATURE_COLUMNS], tl.float64)
    counts = tl.zeros([FEATURE_COLUMNS], tl.float64)
    squares = tl.zeros([NORM_COLUMNS], tl.float64)
    for first in range(begin, end, BLOCK):
        place = first + tl.arange(0, BLOCK)[:, None]
        inside = place < end
        group = tl.load(run_groups_ptr + place, mask=inside, other=0).to(tl.int64)
        pointers = means_ptr + group * FEATURE_COLUMNS + columns[None, :]
        means = tl.load(pointers, mask=inside, other=float("nan"))
        measured = means == means
        totals += tl.sum(tl.where(measured, means, 0.0), axis=0)
        counts += tl.sum(measured.to(tl.float64), axis=0)
        pointers = squares_ptr + group * NORM_COLUMNS + norms[None, :]
        squares += tl.sum(tl.load(pointers, mask=inside, other=0.0), axis=0)
    run_sums_ptr = sums_ptr + run * SUM_COLUMNS
    counts_ptr = run_sums_ptr + tl.num_programs(0) * SUM_COLUMNS
    means, measured = ratio(totals, counts), counts > 0.0
    add_measured(run_sums_ptr, counts_ptr, columns, means, measured, columns < FEATURE_COLUMNS)
    taken = tl.sum(tl.where(norms == 2, squares, 0.0), axis=0)
    any_taken = tl.zeros([NORM_COLUMNS], tl.float64) + taken > 0.0
    selected = norms < SUM_COLUMNS - FEATURE_COLUMNS
    norm_columns = FEATURE_COLUMNS + norms
    add_measured(run_sums_ptr, counts_ptr, norm_columns, tl.sqrt(squares), any_taken, selected)
