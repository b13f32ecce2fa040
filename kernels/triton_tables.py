"""Columns of the device tables that the Triton kernels share, as compile-time constants.

The layout's own tables (``scalars``, ``group_state``, ``tensor_state``, ``statistics``) are float64
and get their columns from :mod:`lhopt_fused.types`; the others live inside the backend.
"""

from __future__ import annotations

from typing import Final

import triton.language as tl

from lhopt_fused.types import GROUP_STATE, PARTIAL_SUMS, SCALARS, STATISTICS, TENSOR_STATE, Clip

# Hyperparameters: scalars [G, SCALAR_COLUMNS].
SCALAR_COLUMNS: Final = tl.constexpr(len(SCALARS))
LR: Final = tl.constexpr(SCALARS.index("lr"))
OMBETA1: Final = tl.constexpr(SCALARS.index("ombeta1"))
OMBETA2: Final = tl.constexpr(SCALARS.index("ombeta2"))
EPSILON: Final = tl.constexpr(SCALARS.index("epsilon"))
WEIGHT_DECAY: Final = tl.constexpr(SCALARS.index("weight_decay"))
CLIP_NORM: Final = tl.constexpr(SCALARS.index("group_clip_grad_norm"))
CLIP_OMBETA: Final = tl.constexpr(SCALARS.index("grad_clip_ombeta"))
CLIP_Z_SCORE: Final = tl.constexpr(SCALARS.index("group_clip_grad_z_score"))
LAMB_OMBETA: Final = tl.constexpr(SCALARS.index("lamb_update_norm_ombeta"))
LAMB_POWER: Final = tl.constexpr(SCALARS.index("lamb_power"))
LAMB_MIN_TRUST: Final = tl.constexpr(SCALARS.index("lamb_min_trust"))
LAMB_MAX_TRUST: Final = tl.constexpr(SCALARS.index("lamb_max_trust"))

# What clipping remembers: group_state [G, GROUP_COLUMNS].
GROUP_COLUMNS: Final = tl.constexpr(len(GROUP_STATE))
ROLLING_MAX: Final = tl.constexpr(GROUP_STATE.index("rolling_max"))
LOG_NORM_EMA: Final = tl.constexpr(GROUP_STATE.index("log_norm_ema"))
LOG_NORM_EMVAR: Final = tl.constexpr(GROUP_STATE.index("log_norm_emvar"))
LOG_NORM_CORRECTION: Final = tl.constexpr(GROUP_STATE.index("log_norm_bias_correction"))
CLIPS_NONE: Final = tl.constexpr(Clip.NONE.value)
CLIPS_NORM: Final = tl.constexpr(Clip.NORM.value)
CLIPS_ROLLING_MAX: Final = tl.constexpr(Clip.ROLLING_MAX.value)
CLIPS_Z_SCORE: Final = tl.constexpr(Clip.Z_SCORE.value)

# Which tensors a group has, and of which run it is: groups, int32 [G, MEMBERSHIP_COLUMNS]. Members
# lists the tensors of group after group, run after run.
MEMBERSHIP_COLUMNS: Final = tl.constexpr(8)
G_BEGIN: Final = tl.constexpr(0)  # place of the group's first tensor in members
G_END: Final = tl.constexpr(1)
G_RUN_BEGIN: Final = tl.constexpr(2)  # place of the run's first tensor in members
G_RUN_END: Final = tl.constexpr(3)
G_RUN: Final = tl.constexpr(4)
G_LEADS: Final = tl.constexpr(5)  # 1 in the first group of a run
G_CLIP_MODE: Final = tl.constexpr(6)

# What the step remembers: tensor_state [T, STATE_COLUMNS].
STATE_COLUMNS: Final = tl.constexpr(len(TENSOR_STATE))
STEP: Final = tl.constexpr(TENSOR_STATE.index("step"))
CORRECTION1: Final = tl.constexpr(TENSOR_STATE.index("bias_correction1"))
CORRECTION2: Final = tl.constexpr(TENSOR_STATE.index("bias_correction2"))
UPDATE_NORM_EMA: Final = tl.constexpr(TENSOR_STATE.index("update_norm_ema"))
UPDATE_NORM_CORRECTION: Final = tl.constexpr(TENSOR_STATE.index("update_norm_bias_correction"))
PARAM_NORM: Final = tl.constexpr(TENSOR_STATE.index("param_norm"))

# What is fixed about a tensor: bits of traits [T].
USES_TRUST: Final = tl.constexpr(1)
DELAYS_TRUST: Final = tl.constexpr(2)
WARMS_UP: Final = tl.constexpr(4)
ROOT_DENOMINATOR: Final = tl.constexpr(8)
DECOUPLED_DECAY: Final = tl.constexpr(16)
MAXIMIZES: Final = tl.constexpr(32)
KEEPS_SIGNS: Final = tl.constexpr(64)

# Where the data lies: addresses, int64 [T, ADDRESS_COLUMNS], 0 for what a tensor has not; chunks,
# int64 [C, CHUNK_COLUMNS]: tensor, first element, number of elements and row of partial sums.
ADDRESS_COLUMNS: Final = tl.constexpr(8)
A_PARAM: Final = tl.constexpr(0)  # what is stepped: the parameter, or its float32 master
A_M: Final = tl.constexpr(1)
A_V: Final = tl.constexpr(2)
A_BESIDE: Final = tl.constexpr(3)  # the copy of a master, or the corrections of a split one
A_SIGNS: Final = tl.constexpr(4)
A_M_SCALE: Final = tl.constexpr(5)  # of 8-bit moments
A_V_SCALE: Final = tl.constexpr(6)
CHUNK_COLUMNS: Final = tl.constexpr(4)

# Partial sums of a gradient pass: grad_partials [rows, GRAD_COLUMNS].
GRAD_COLUMNS: Final = tl.constexpr(4)
BIG_SQ: Final = tl.constexpr(0)
MIDDLE_SQ: Final = tl.constexpr(1)
SMALL_SQ: Final = tl.constexpr(2)
NONFINITE: Final = tl.constexpr(3)

# Partial sums of a step: partials [rows, 4 or 16]; the first four are what the step itself needs.
PARAM_SQ: Final = tl.constexpr(0)
UPDATE_SQ: Final = tl.constexpr(1)
NEW_PARAM_SQ: Final = tl.constexpr(2)
MASKED: Final = tl.constexpr(3)  # number of elements left out as not finite
GRAD_SQ: Final = tl.constexpr(4)
M_HAT_SQ: Final = tl.constexpr(5)
M_HAT_MINUS_GRAD_SQ: Final = tl.constexpr(6)
GRAD_DOT_PARAM: Final = tl.constexpr(7)
GRAD_DOT_M_HAT: Final = tl.constexpr(8)
GRAD_DOT_UPDATE: Final = tl.constexpr(9)
COUNT_GT_EPSILON: Final = tl.constexpr(10)
SUM_LOG_ABS_UPDATE: Final = tl.constexpr(11)
GRAD_DOT_MOMENTUM: Final = tl.constexpr(12)
MOMENTUM_SQ: Final = tl.constexpr(13)
SAME_SIGN_MOMENTUM: Final = tl.constexpr(14)
SAME_SIGN_GRAD: Final = tl.constexpr(15)

# What the finalising kernels hand on inside a step: work, float64 [T, WORK_COLUMNS].
WORK_COLUMNS: Final = tl.constexpr(8)
W_ACTIVE: Final = tl.constexpr(0)  # 1 where the tensor takes part in this step
W_FIRST_STEP: Final = tl.constexpr(1)
W_CLIP: Final = tl.constexpr(2)  # c
W_RATE: Final = tl.constexpr(3)  # lr, with the warm-up where there is one
W_TRUST: Final = tl.constexpr(4)  # T, where it is known before the moments
W_DEFERRED: Final = tl.constexpr(5)  # 1 where it is not, so that a second pass applies the update
W_GRAD_SQ: Final = tl.constexpr(6)  # |g|^2 before clipping
W_NONFINITE: Final = tl.constexpr(7)  # elements of the gradient that are not finite

# What a chunk reads about its tensor: coefficients, float32 [T, COEFFICIENT_COLUMNS].
COEFFICIENT_COLUMNS: Final = tl.constexpr(16)
C_CLIP: Final = tl.constexpr(0)  # c, or -c where the objective is maximized
C_BETA1: Final = tl.constexpr(1)
C_OMBETA1: Final = tl.constexpr(2)
C_BETA2: Final = tl.constexpr(3)
C_OMBETA2: Final = tl.constexpr(4)
C_M_SCALE: Final = tl.constexpr(5)  # 1 / bc1
C_S_SCALE: Final = tl.constexpr(6)  # 1 / sqrt(bc2)
C_EPSILON: Final = tl.constexpr(7)
C_WEIGHT_DECAY: Final = tl.constexpr(8)
C_STEP_SIZE: Final = tl.constexpr(9)  # lr T
C_DECAY: Final = tl.constexpr(10)  # a
C_ACTIVE: Final = tl.constexpr(11)
C_DEFERRED: Final = tl.constexpr(12)
C_MASKED: Final = tl.constexpr(13)  # 1 where some elements of the gradient are left out

# Columns of statistics [T, STATISTICS_COLUMNS].
STATISTICS_COLUMNS: Final = tl.constexpr(len(STATISTICS))
S_TAKEN: Final = tl.constexpr(STATISTICS.index("taken"))
S_GRAD_NONFINITE: Final = tl.constexpr(STATISTICS.index("grad_nonfinite"))
S_CLIP: Final = tl.constexpr(STATISTICS.index("clip_coefficient"))
S_STEP_SIZE: Final = tl.constexpr(STATISTICS.index("step_size"))
S_DECAY: Final = tl.constexpr(STATISTICS.index("decay_factor"))
S_GRAD_SQ: Final = tl.constexpr(STATISTICS.index("grad_sq"))
S_PARAM_SQ: Final = tl.constexpr(STATISTICS.index("param_sq"))
S_UPDATE_SQ: Final = tl.constexpr(STATISTICS.index("update_sq"))
S_M_HAT_SQ: Final = tl.constexpr(STATISTICS.index("m_hat_sq"))
S_M_HAT_MINUS_GRAD_SQ: Final = tl.constexpr(STATISTICS.index("m_hat_minus_grad_sq"))
S_GRAD_DOT_PARAM: Final = tl.constexpr(STATISTICS.index("grad_dot_param"))
S_GRAD_DOT_M_HAT: Final = tl.constexpr(STATISTICS.index("grad_dot_m_hat"))
S_GRAD_DOT_UPDATE: Final = tl.constexpr(STATISTICS.index("grad_dot_update"))
S_COUNT_GT_EPSILON: Final = tl.constexpr(STATISTICS.index("count_gt_epsilon"))
S_SUM_LOG_ABS_UPDATE: Final = tl.constexpr(STATISTICS.index("sum_log_abs_update"))
S_GRAD_DOT_MOMENTUM: Final = tl.constexpr(STATISTICS.index("grad_dot_momentum"))
S_MOMENTUM_SQ: Final = tl.constexpr(STATISTICS.index("momentum_sq"))
S_SAME_SIGN_MOMENTUM: Final = tl.constexpr(STATISTICS.index("count_same_sign_momentum"))
S_SAME_SIGN_GRAD: Final = tl.constexpr(STATISTICS.index("count_same_sign_grad"))

# What pieces add to their statistics: partial [T, PARTIAL_COLUMNS], statistics and one more.
PARTIAL_COLUMNS: Final = tl.constexpr(len(PARTIAL_SUMS))
P_NEW_PARAM_SQ: Final = tl.constexpr(PARTIAL_SUMS.index("new_param_sq"))
