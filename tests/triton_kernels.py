"""Kernels around device functions, so that tests can call these by themselves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lhopt_fused.kernels.triton_plan import DTYPES, DeviceTables
from lhopt_fused.kernels.triton_rounding import chunk_keys, round_at_random
from lhopt_fused.types import StepLayout


@triton.jit
def _round_kernel(
    x_ptr, rounded_ptr, place_ptr, seed_ptr, state_ptr, DTYPE: tl.constexpr, COUNT: tl.constexpr
):
    tensor, start = tl.load(place_ptr), tl.load(place_ptr + 1)
    first_key, second_key = chunk_keys(seed_ptr, state_ptr, tensor, start)
    indices = tl.arange(0, COUNT)
    x = tl.load(x_ptr + indices)
    tl.store(rounded_ptr + indices, round_at_random(x, indices, first_key, second_key, DTYPE))


def round_kernel(
    x: torch.Tensor, dtype: torch.dtype, layout: StepLayout, *, tensor: int, start: int
) -> torch.Tensor:
    """``x`` (float32, a power of two of them) as the elements of a tensor from ``start`` on."""
    rounded = torch.empty_like(x, dtype=dtype)
    place = torch.tensor([tensor, start], dtype=torch.int64).to(x.device)
    seed = DeviceTables(layout).rounding_seed
    _round_kernel[(1,)](
        x, rounded, place, seed, layout.tensor_state, DTYPE=DTYPES[dtype], COUNT=len(x)
    )
    return rounded.cpu()
