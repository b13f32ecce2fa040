"""The main pass: moments, all statistics, and the update itself where its trust ratio is known."""

from __future__ import annotations

import triton
import triton.language as tl

from lhopt_fused.kernels.triton_chunks import (
    data_pointer,
    load_chunk,
    stack4,
    stack16,
    tile,
    where_set,
)
from lhopt_fused.kernels.triton_formats import dither_key
from lhopt_fused.kernels.triton_rounding import rounding_keys
from lhopt_fused.kernels.triton_state import (
    load_moments,
    load_weights,
    moment_pointers,
    store_moments,
    store_weights,
    weight_pointers,
)
from lhopt_fused.kernels.triton_tables import (
    A_SIGNS,
    ADDRESS_COLUMNS,
    C_ACTIVE,
    C_CLIP,
    C_DECAY,
    C_DEFERRED,
    C_STEP_SIZE,
    COEFFICIENT_COLUMNS,
)
from lhopt_fused.kernels.triton_update import (
    load_betas,
    load_direction,
    next_moments,
    update_direction,
)

__all__ = ["moments_kernel"]


@triton.jit
def exchange_signs(signs_ptr, offset, length, g, ROWS: tl.constexpr, VECTOR: tl.constexpr):
    """Keep one bit ``g < 0`` per element, a byte per row; returns whether it is as it was."""
    tl.static_assert(VECTOR == 8)
    rows = tl.arange(0, ROWS)
    byte_ptr = signs_ptr + offset // VECTOR + rows
    inside = offset + rows * VECTOR < length
    bits = tl.arange(0, VECTOR)[None, :]
    before = tl.load(byte_ptr, mask=inside, other=0).to(tl.int32)
    is_negative = (g < 0.0).to(tl.int32)
    after = tl.sum(is_negative << bits, axis=1)
    tl.store(byte_ptr, after.to(tl.uint8), mask=inside)
    return ((before[:, None] >> bits) & 1) == is_negative


@triton.jit
def halves_product(x, HALF: tl.constexpr):
    """``[ROWS, 2 * HALF]`` -> ``[ROWS, HALF]``: products of neighbours."""
    first, second = tl.split(tl.reshape(x, [x.shape[0], HALF, 2]))
    return first * second


@triton.jit
def sum_of_logs(x, VECTOR: tl.constexpr):
    """Along each row of finite numbers > 0: exponents are added, the rest multiplied, for one log.

    A logarithm of each would be a fifth of all instructions of a step.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.sum((bits >> 23) - 127, axis=1)
    product = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    if VECTOR >= 8:
        product = halves_product(product, 4)
    if VECTOR >= 4:
        product = halves_product(product, 2)
    if VECTOR >= 2:
        product = halves_product(product, 1)
    log = tl.log(tl.max(product, axis=1))
    return exponent.to(tl.float32) * 0.6931471805599453 + log


@triton.jit
def count(condition):
    """How many hold along each row, in float32."""
    return tl.sum(tl.where(condition, 1.0, 0.0), axis=1)


@triton.jit
def all_sums(
    param_sq,
    update_sq,
    new_param_sq,
    masked,
    p,
    g,
    m,
    m_hat,
    u,
    is_gt_epsilon,
    taken,
    same_sign_grad,
):
    """``[ROWS, 16]``: every sum along the rows of a tile, with ``m`` from before the step.

    ``same_sign_grad`` has been counted.
    """
    noise = m_hat - g
    logs = sum_of_logs(tl.where(taken, tl.abs(u) + 1e-8, 1.0), u.shape[1])
    return stack16(
        param_sq,
        update_sq,
        new_param_sq,
        masked,
        tl.sum(g * g, axis=1),
        tl.sum(m_hat * m_hat, axis=1),
        tl.sum(noise * noise, axis=1),
        tl.sum(g * p, axis=1),
        tl.sum(g * m_hat, axis=1),
        tl.sum(g * u, axis=1),
        count(is_gt_epsilon),
        tl.where(update_sq < float("inf"), logs, update_sq),
        tl.sum(g * m, axis=1),
        tl.sum(m * m, axis=1),
        count(taken & ((g < 0.0) == (m < 0.0))),
        same_sign_grad,
    )


@triton.jit
def moments_kernel(
    chunks_ptr,
    grads_ptr,  # int64 [T]
    addresses_ptr,  # int64 [T, ADDRESS_COLUMNS]
    coefficients_ptr,  # float32 [T, COEFFICIENT_COLUMNS]
    tensor_state_ptr,
    seed_ptr,  # int32 [2]
    partials_ptr,  # float32 [rows, COLUMNS]
    PARAM_DTYPE: tl.constexpr,  # this, and the next two: see triton_state
    BESIDE_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ROOT_DENOMINATOR: tl.constexpr,
    DECAY_IN_UPDATE: tl.constexpr,
    MASKS: tl.constexpr,
    SIGNS: tl.constexpr,
    COLUMNS: tl.constexpr,  # 0: no sums, 4: what the step needs, 16: all statistics
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """16 bytes an element read; 12 written for float32, or 8 where the update is deferred.

    Chunks go from the last to the first, and in the gradient pass before and the pass that applies
    deferred updates from the first to the last: each begins with what is still in the cache.
    """
    tensor, start, length, row = load_chunk(chunks_ptr, tl.num_programs(0) - 1 - tl.program_id(0))
    row_ptr = coefficients_ptr + tensor * COEFFICIENT_COLUMNS
    if tl.load(row_ptr + C_ACTIVE) == 0.0:
        return
    address_ptr = addresses_ptr + tensor * ADDRESS_COLUMNS
    param_ptr, beside_ptr = weight_pointers(address_ptr, start, PARAM_DTYPE, BESIDE_DTYPE, ALIGNED)
    m_ptr, v_ptr, m_scale_ptr, v_scale_ptr = moment_pointers(
        address_ptr, start, MOMENT_DTYPE, ALIGNED
    )
    grad_ptr = data_pointer(tl.load(grads_ptr + tensor), start, GRAD_DTYPE, ALIGNED)
    signs_ptr = (tl.load(address_ptr + A_SIGNS) + start // 8).to(tl.pointer_type(tl.uint8))
    first_key, second_key = rounding_keys(seed_ptr, tensor_state_ptr, tensor, start, STOCHASTIC)
    dither = dither_key(tensor_state_ptr, tensor)
    applies = 1.0 - tl.load(row_ptr + C_DEFERRED)
    beta1, ombeta1, beta2, ombeta2 = load_betas(row_ptr)
    clip = tl.load(row_ptr + C_CLIP)
    m_scale, s_scale, epsilon, weight_decay = load_direction(row_ptr)
    step_size, decay = tl.load(row_ptr + C_STEP_SIZE), tl.load(row_ptr + C_DECAY)
    if COLUMNS > 0:
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    for offset in range(0, length, ROWS * VECTOR):
        indices, inside = tile(offset, length, ROWS, VECTOR, ALIGNED)
        g = tl.load(grad_ptr + indices, mask=inside, other=0.0).to(tl.float32)
        p = load_weights(param_ptr, beside_ptr, indices, inside, BESIDE_DTYPE)
        m, v = load_moments(
            m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, indices, inside, offset, length,
            MOMENT_DTYPE, ROWS, VECTOR,
        )  # fmt: skip
        taken = inside
        if MASKS:
            taken = inside & (tl.abs(g) < float("inf"))
            g = tl.where(taken, g, 0.0)
        g *= clip

        new_m, new_v = next_moments(g, m, v, beta1, ombeta1, beta2, ombeta2, ROOT_DENOMINATOR)
        u, m_hat, s = update_direction(
            p, new_m, new_v, m_scale, s_scale, epsilon, weight_decay,
            ROOT_DENOMINATOR, DECAY_IN_UPDATE,
        )  # fmt: skip
        new_p = p * decay - step_size * u
        if MASKS:
            new_m, new_v = tl.where(taken, new_m, m), tl.where(taken, new_v, v)
            new_p = tl.where(taken, new_p, p)
            # What is left out adds nothing to any sum but |p|^2.
            u, m_hat = tl.where(taken, u, 0.0), tl.where(taken, m_hat, 0.0)
            m = tl.where(taken, m, 0.0)
        if COLUMNS > 0:
            param_sq, update_sq = tl.sum(p * p, axis=1), tl.sum(u * u, axis=1)
        if MOMENT_DTYPE == tl.float32:  # noqa: SIM300
            store_moments(
                new_m, new_v, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, indices, inside, offset,
                length, start, dither, MOMENT_DTYPE, ROWS, VECTOR,
            )  # fmt: skip
        kept = store_weights(
            new_p, param_ptr, beside_ptr, indices, where_set(inside, applies), first_key,
            second_key, PARAM_DTYPE, BESIDE_DTYPE, STOCHASTIC,
        )  # fmt: skip

        same_sign_grad = tl.zeros([ROWS], tl.float32)
        if SIGNS:
            same = taken & exchange_signs(signs_ptr, offset, length, g, ROWS, VECTOR)
            same_sign_grad = count(same)
        if COLUMNS > 0:
            new_param_sq, masked = tl.sum(kept * kept, axis=1), tl.zeros([ROWS], tl.float32)
            if MASKS:
                masked = count(inside != taken)
        if COLUMNS == 4:
            sums += stack4(param_sq, update_sq, new_param_sq, masked)
        if COLUMNS == 16:
            sums += all_sums(
                param_sq, update_sq, new_param_sq, masked,
                p, g, m, m_hat, u, taken & (s > epsilon), taken, same_sign_grad,
            )  # fmt: skip
        if MOMENT_DTYPE != tl.float32:  # noqa: SIM102, SIM300 - as in triton_finalize
            # What storing rounds waits for its update, which is computed from it again; and for
            # the sums above, which need the registers.
            if applies != 0.0:
                store_moments(
                    new_m, new_v, m_ptr, v_ptr, m_scale_ptr, v_scale_ptr, indices, inside, offset,
                    length, start, dither, MOMENT_DTYPE, ROWS, VECTOR,
                )  # fmt: skip
    if COLUMNS > 0:
        columns = tl.arange(0, COLUMNS)
        tl.store(partials_ptr + row * COLUMNS + columns, tl.sum(sums, axis=0))
