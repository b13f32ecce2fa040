"""Launching a kernel with as little Python as possible: arguments bound and code compiled once."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

__all__ = ["COMPILE_OPTIONS", "INTERPRETED", "Launch"]

INTERPRETED: Final = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
"""Whether this process runs kernels in Triton's interpreter, on CPU tensors."""

COMPILE_OPTIONS: Final = {"enable_fp_fusion": False}
"""For every kernel: one expression gives the same bits wherever it stands, so that parameters do
not depend on whether statistics are taken. Memory is the bottleneck with fused adds or without."""


class Launch:
    """One kernel over one grid, its arguments bound but for what a call adds at the end.

    On a GPU the kernel is compiled and loaded here, for these very arguments: a launch neither
    compiles nor looks anything up, also inside a CUDA graph. What a call adds must be marked
    ``do_not_specialize`` in the kernel, since its address may differ from that of the ``example``.
    """

    made: ClassVar[int] = 0  # launches so far, in this process

    def __init__(
        self,
        kernel: Any,
        programs: int,
        args: tuple[Any, ...],
        constants: Mapping[str, Any],
        *,
        example: tuple[Any, ...] = (),
        num_warps: int = 4,
    ) -> None:
        Launch.made += 1
        self._args, self._constants = args, tuple(constants.values())
        grid = (programs, 1, 1)
        if INTERPRETED:
            self._run: Callable[..., Any] = kernel[grid]
            return
        # A compiled kernel takes every parameter by position, its constants included.
        names = kernel.arg_names[len(args) + len(example) :]
        if names != list(constants):
            raise TypeError(f"{kernel.__name__} ends with {names}, got {list(constants)}")
        options = {"num_warps": num_warps, **COMPILE_OPTIONS}
        compiled = kernel.warmup(*args, *example, **constants, grid=grid, **options)
        self._run = compiled[grid]

    def __call__(self, *last: Any) -> None:
        self._run(*self._args, *last, *self._constants)
