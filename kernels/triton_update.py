"""The arithmetic of one element, for every pass that computes it: moments and direction."""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_tables import (
    C_BETA1,
    C_BETA2,
    C_EPSILON,
    C_M_SCALE,
    C_OMBETA1,
    C_OMBETA2,
    C_S_SCALE,
    C_WEIGHT_DECAY,
)

__all__ = ["load_betas", "load_direction", "next_moments", "update_direction"]


@triton.jit
def load_betas(row_ptr):
    """``(beta1, 1 - beta1, beta2, 1 - beta2)`` of a tensor."""
    beta1, ombeta1 = tl.load(row_ptr + C_BETA1), tl.load(row_ptr + C_OMBETA1)
    return beta1, ombeta1, tl.load(row_ptr + C_BETA2), tl.load(row_ptr + C_OMBETA2)


@triton.jit
def next_moments(g, m, v, beta1, ombeta1, beta2, ombeta2, ROOT_DENOMINATOR: tl.constexpr):
    """``(m, v)`` after the step."""
    new_m = beta1 * m + ombeta1 * g
    if ROOT_DENOMINATOR:
        return new_m, beta2 * v + ombeta2 * (g * g)
    return new_m, tl.maximum(beta2 * v, tl.abs(g))


@triton.jit
def load_direction(row_ptr):
    """``(1 / bc1, 1 / sqrt(bc2), epsilon, weight_decay)`` of a tensor."""
    m_scale, s_scale = tl.load(row_ptr + C_M_SCALE), tl.load(row_ptr + C_S_SCALE)
    return m_scale, s_scale, tl.load(row_ptr + C_EPSILON), tl.load(row_ptr + C_WEIGHT_DECAY)


@triton.jit
def update_direction(
    p,
    m,
    v,
    m_scale,
    s_scale,
    epsilon,
    weight_decay,
    ROOT_DENOMINATOR: tl.constexpr,
    DECAY_IN_UPDATE: tl.constexpr,
):
    """``(u, m_hat, s)`` from the parameter before the step and the moments after it."""
    m_hat = m * m_scale
    s = v
    if ROOT_DENOMINATOR:
        s = tl.sqrt(v) * s_scale
    u = m_hat / (s + epsilon)
    if DECAY_IN_UPDATE:
        u += weight_decay * p
    return u, m_hat, s
