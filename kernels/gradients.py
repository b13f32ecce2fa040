"""The gradients of a step as the fused backends take them: addresses and dtype codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

__all__ = [
    "DTYPE_CODES",
    "MISSING",
    "GradTable",
    "Grads",
    "check_same_memory_order",
    "tabulated",
]

DTYPE_CODES: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""What the fused backends read and write, as csrc/kernels.h numbers it."""

MISSING: Final = -1
"""In place of the code of a gradient that is not there."""


@dataclass(frozen=True)
class GradTable:
    """Where the T gradients of a step are. The arrays may be filled anew for another step.

    Every gradient is dense, in the memory order of its parameter, and on its device: whoever makes
    a table has seen to that.
    """

    tensors: list[torch.Tensor | None]  # [T], None where a gradient is missing
    addresses: npt.NDArray[np.int64]  # [T], 0 where a gradient is missing or empty
    dtypes: npt.NDArray[np.int8]  # [T], codes


Grads = Sequence[torch.Tensor | None] | GradTable
"""T gradients in the layout's order, None for a missing one; or a table of them."""


def tabulated(grads: Grads, params: Sequence[torch.Tensor], backend: str) -> GradTable:
    """A table of gradients, which is checked if it has to be made.

    Raises:
        ValueError: a gradient does not fit its parameter; the message names ``backend``.
    """
    if isinstance(grads, GradTable):
        return grads
    if len(grads) != len(params):
        raise ValueError(f"expected {len(params)} gradients, got {len(grads)}")
    pairs = zip(grads, params, strict=True)
    codes = [
        MISSING if grad is None else _checked_code(index, grad, param, backend)
        for index, (grad, param) in enumerate(pairs)
    ]
    addresses = (0 if grad is None else grad.data_ptr() for grad in grads)
    return GradTable(
        list(grads), np.fromiter(addresses, np.int64, len(params)), np.array(codes, dtype=np.int8)
    )


def _checked_code(index: int, grad: torch.Tensor, param: torch.Tensor, backend: str) -> int:
    name = f"gradient {index}"
    if grad.device != param.device:
        raise ValueError(f"{name} is on {grad.device}, its parameter on {param.device}")
    code = DTYPE_CODES.get(grad.dtype)
    if code is None:
        raise ValueError(
            f"{name} is {grad.dtype}; backend {backend!r} reads float32, bfloat16 and float16: "
            "cast it, or choose backend='reference'"
        )
    if grad.shape != param.shape:
        raise ValueError(f"{name} has shape {tuple(grad.shape)}, expected {tuple(param.shape)}")
    check_same_memory_order(grad, param, name)
    return code


def check_same_memory_order(x: torch.Tensor, param: torch.Tensor, name: str) -> None:
    """Refuse a tensor ``x`` of a parameter's shape whose elements lie in another order.

    Raises:
        ValueError: it does; the message calls it ``name``.
    """
    strides = zip(param.shape, x.stride(), param.stride(), strict=True)
    if x.numel() > 1 and any(size > 1 and s != t for size, s, t in strides):
        raise ValueError(
            f"{name} has strides {x.stride()}, expected its parameter's, {param.stride()}"
        )
