"""The inner step in C++: SIMD kernels under a small thread pool (csrc/step.h tells how).

This module checks tensors and hands their addresses over; the extension checks the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from lhopt_fused import _C
from lhopt_fused.kernels.formats import CORRECTIONS, MOMENT_DTYPES, QUANTISED, scales_shape
from lhopt_fused.kernels.gradients import DTYPE_CODES, Grads, check_same_memory_order, tabulated
from lhopt_fused.types import (
    GRADIENT_SUMS,
    GROUP_STATE,
    PARTIAL_SUMS,
    SCALARS,
    STATISTICS,
    TENSOR_STATE,
    Clip,
    StepLayout,
    StepOptions,
)

__all__ = ["CpuBackend"]

_MOMENT_CODES: Final = {dtype: code for code, dtype in enumerate(MOMENT_DTYPES)}
"""How the first moment says how both are kept, as csrc/kernels.h numbers it."""

_STATE_DTYPES: Final = {
    "exp_avgs": tuple(MOMENT_DTYPES),
    "exp_avg_sqs": tuple(MOMENT_DTYPES.values()),
    "master_params": (torch.float32,),
    "master_corrections": tuple(CORRECTIONS.values()),
}
"""Columns of a layout that have the shape of their parameter."""

_SCALES: Final = ("exp_avg_scales", "exp_avg_sq_scales")

_TABLES: Final = (SCALARS, GROUP_STATE, TENSOR_STATE, STATISTICS, GRADIENT_SUMS, PARTIAL_SUMS)
if tuple(map(len, _TABLES)) != _C.TABLE_COLUMNS:
    raise ImportError(
        "lhopt_fused._C was built for other tables than lhopt_fused.types describes; reinstall "
        "the package to rebuild it"
    )


class CpuBackend:
    """Steps all tensors of a layout in one call, with ``torch.get_num_threads()`` threads.

    Parameters and gradients are float32, bfloat16 or float16, moments float32, bfloat16 or codes of
    8 bits, masters float32 or split. Results
    do not depend on the number of threads. The fastest instruction set of the processor is used
    unless the environment variable ``LHOPT_CPU_ISA`` names another one when the backend is built.

    Raises:
        ValueError: a tensor has a dtype, device, size or memory order that cannot be stepped, or
            ``LHOPT_CPU_ISA`` names an instruction set that is not there.
    """

    def __init__(self, layout: StepLayout) -> None:
        _check_layout(layout)
        self.layout = layout
        signs = _addresses(layout.grad_signs, len(layout.params))
        masters = _addresses(layout.master_params, len(layout.params))
        scales = [
            _addresses(column, len(layout.params))
            for column in (layout.exp_avg_scales, layout.exp_avg_sq_scales)
        ]
        self._step = _C.Step(
            tensors=[
                _C.TensorSpec(
                    param=param.data_ptr(),
                    dtype=DTYPE_CODES[param.dtype],
                    master=masters[index],
                    correction=_correction(layout, index),
                    size=param.numel(),
                    moments=_MOMENT_CODES[layout.exp_avgs[index].dtype],
                    exp_avg=layout.exp_avgs[index].data_ptr(),
                    exp_avg_sq=layout.exp_avg_sqs[index].data_ptr(),
                    scales=_both(scales[0][index], scales[1][index]),
                    grad_signs=signs[index],
                    group=layout.group_of[index],
                    is_vector=layout.is_vector[index],
                )
                for index, param in enumerate(layout.params)
            ],
            groups=[_group_options(options) for options in layout.options],
            run_of=layout.run_of,
            num_runs=len(layout.skipped_steps),
            scalars=layout.scalars.data_ptr(),
            group_state=layout.group_state.data_ptr(),
            tensor_state=layout.tensor_state.data_ptr(),
            skipped_steps=layout.skipped_steps.data_ptr(),
            masks_nonfinite=layout.masks_nonfinite,
            rounding_seed=(
                layout.rounding_seed & 0xFFFF_FFFF_FFFF_FFFF
                if layout.rounding == "stochastic"
                else None
            ),
        )
        self._features = _C.InnerFeatures(
            numel=layout.numel,
            group_of=layout.group_of,
            group_clips=[options.clip is not Clip.NONE for options in layout.options],
            run_of=layout.run_of,
            num_runs=len(layout.skipped_steps),
        )

    @property
    def isa(self) -> str:
        """The instruction set in use: ``avx512``, ``avx2``, ``neon`` or ``scalar``."""
        return str(self._step.isa)

    def step(self, grads: Grads, statistics: torch.Tensor | None = None) -> None:
        """See :meth:`~lhopt_fused.kernels.StepBackend.step`.

        Raises:
            ValueError: a gradient or ``statistics`` does not fit the layout; nothing was written.
        """
        if statistics is not None:
            self._check_statistics(statistics)
        self._take_gradients(grads)
        self._step.run(0 if statistics is None else statistics.data_ptr(), torch.get_num_threads())

    def measure_gradients(self, grads: Grads, sums: torch.Tensor) -> None:
        """See :class:`~lhopt_fused.kernels.PhasedBackend`, for this and the other phases."""
        self._check_rows(sums, GRADIENT_SUMS, "sums")
        self._take_gradients(grads)
        self._step.measure_gradients(sums.data_ptr(), torch.get_num_threads())

    def update_moments(self, sums: torch.Tensor, partial: torch.Tensor, measures: bool) -> None:
        self._check_rows(sums, GRADIENT_SUMS, "sums")
        self._check_rows(partial, PARTIAL_SUMS, "partial")
        threads = torch.get_num_threads()
        self._step.update_moments(sums.data_ptr(), partial.data_ptr(), measures, threads)

    def apply(self, partial: torch.Tensor) -> None:
        self._check_rows(partial, PARTIAL_SUMS, "partial")
        self._step.apply(partial.data_ptr(), torch.get_num_threads())

    def _take_gradients(self, grads: Grads) -> None:
        table = tabulated(grads, self.layout.params, "cpu")
        self._step.set_gradients(table.addresses, table.dtypes)

    def accumulate_features(self, statistics: torch.Tensor, sums: torch.Tensor) -> None:
        """Add the mean features of one step to ``sums``.

        Args:
            statistics: float64 ``[T, len(STATISTICS)]`` that :meth:`step` has filled.
            sums: float64 ``[2, R, 18]``, sum and number of measured steps of each feature, then of
                each of ``STEP_NORMS``, in each run.

        Raises:
            ValueError: one of them does not fit the layout; nothing was written.
        """
        self._check_statistics(statistics)
        _check_table(sums, (2, len(self.layout.skipped_steps), _C.NUM_ACCUMULATED), "sums")
        self._features.accumulate(statistics.data_ptr(), sums.data_ptr())

    def _check_statistics(self, statistics: torch.Tensor) -> None:
        self._check_rows(statistics, STATISTICS, "statistics")

    def _check_rows(self, table: torch.Tensor, columns: Sequence[str], name: str) -> None:
        _check_table(table, (len(self.layout.params), len(columns)), name)


def _addresses(tensors: Sequence[torch.Tensor | None] | None, count: int) -> list[int | None]:
    """Where each of ``count`` tensors is, None for each where there are none."""
    if tensors is None:
        return [None] * count
    return [None if x is None else x.data_ptr() for x in tensors]


def _both(first: int | None, second: int | None) -> tuple[int, int] | None:
    return None if first is None or second is None else (first, second)


def _correction(layout: StepLayout, index: int) -> tuple[int, int] | None:
    """Where what a parameter lacks of its master is, and its bits; None where there is none."""
    correction = layout.master_corrections[index] if layout.master_corrections else None
    return None if correction is None else (correction.data_ptr(), 8 * correction.element_size())


def _group_options(options: StepOptions) -> _C.GroupOptions:
    return _C.GroupOptions(
        denominator=options.denominator.value,
        weight_decay=options.weight_decay.value,
        clip=options.clip.value,
        trust=options.trust.value,
        trust_ignores_vectors=options.trust_ignores_vectors,
        radam_warmup=options.radam_warmup,
        maximize=options.maximize,
    )


def _check_layout(layout: StepLayout) -> None:
    tensors, groups = len(layout.params), len(layout.options)
    for name in (*_STATE_DTYPES, *_SCALES, "grad_signs", "group_of", "is_vector"):
        column = getattr(layout, name)
        if column is not None and len(column) != tensors:
            raise ValueError(f"layout.{name} has {len(column)} entries for {tensors} parameters")
    for index, param in enumerate(layout.params):
        _check_param(param, f"parameter {index}")
        for name, dtypes in _STATE_DTYPES.items():
            column = getattr(layout, name)
            if column is not None and column[index] is not None:
                _check_tensor(column[index], dtypes, param.shape, f"{name}[{index}]")
                check_same_memory_order(column[index], param, f"{name}[{index}]")
        _check_moments(layout, index)
        if layout.grad_signs is not None:
            size = (-(-param.numel() // 8),)
            _check_tensor(layout.grad_signs[index], (torch.uint8,), size, f"grad_signs[{index}]")
    runs = layout.skipped_steps.numel()
    if len(layout.run_of) != groups or not all(0 <= run < runs for run in layout.run_of):
        raise ValueError(
            f"layout.run_of must be one of {runs} runs (as skipped_steps has entries) for each of "
            f"{groups} groups, got {layout.run_of}"
        )
    _check_table(layout.scalars, (groups, len(SCALARS)), "scalars")
    _check_table(layout.group_state, (groups, len(GROUP_STATE)), "group_state")
    _check_table(layout.tensor_state, (tensors, len(TENSOR_STATE)), "tensor_state")
    _check_table(layout.skipped_steps, (runs,), "skipped_steps", torch.int64)


def _check_moments(layout: StepLayout, index: int) -> None:
    """Both moments of one tensor are kept alike, with scales where they are codes."""
    exp_avg, exp_avg_sq = layout.exp_avgs[index], layout.exp_avg_sqs[index]
    is_coded = exp_avg.dtype == QUANTISED["exp_avg"]
    if exp_avg_sq.dtype != MOMENT_DTYPES[exp_avg.dtype]:
        raise ValueError(
            f"exp_avgs[{index}] is {exp_avg.dtype} and exp_avg_sqs[{index}] {exp_avg_sq.dtype}; "
            "expected both float32, both bfloat16, or int8 and uint8"
        )
    for name in _SCALES:
        column = getattr(layout, name)
        scales = column[index] if column is not None else None
        if (scales is not None) != is_coded:
            raise ValueError(f"{name}[{index}] must be there for codes, and for nothing else")
        if scales is not None:
            shape = scales_shape(exp_avg.shape)
            _check_table(scales, shape, f"{name}[{index}]", torch.bfloat16)


def _check_param(param: torch.Tensor, name: str) -> None:
    if param.device.type != "cpu":
        raise ValueError(f'{name} is on {param.device}; backend="cpu" steps tensors on the CPU')
    if param.dtype not in DTYPE_CODES:
        raise ValueError(
            f'{name} is {param.dtype}; backend="cpu" steps float32, bfloat16 and float16, use '
            'backend="reference" for float64'
        )


def _check_tensor(
    x: torch.Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], name: str
) -> None:
    if x.device.type != "cpu" or x.dtype not in dtypes or tuple(x.shape) != tuple(shape):
        expected = " or ".join(map(str, dtypes))
        raise ValueError(
            f"{name} must be {expected} {list(shape)} on the CPU, got {x.dtype} {list(x.shape)} on "
            f"{x.device}"
        )


def _check_table(
    x: torch.Tensor, shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.float64
) -> None:
    _check_tensor(x, (dtype,), shape, name)
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")
