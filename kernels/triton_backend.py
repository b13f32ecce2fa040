"""The GPU backend: the whole inner step in a handful of launches, without a word to the host.

A step is: gradient norms (where something clips or skips), a preparing kernel, then moments,
statistics and most updates in one pass, a finalising kernel, and the updates that had to wait for
a norm. Launches are one per kernel and bucket of tensors with equal dtypes and static options,
whatever their number and groups; every scalar stays on the device.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from lhopt_fused.types import (
    GRADIENT_SUMS,
    PARTIAL_SUMS,
    BackendUnavailableError,
    StepLayout,
)

try:
    import triton  # noqa: F401
except ImportError as error:
    raise BackendUnavailableError(
        f"backend 'triton' needs the package triton, which cannot be imported ({error}); "
        "install lhopt-fused[triton], or choose backend='cpu' or 'reference'"
    ) from error

from lhopt_fused.kernels import triton_launch
from lhopt_fused.kernels.formats import BLOCK, CORRECTIONS, MOMENT_DTYPES
from lhopt_fused.kernels.gradients import DTYPE_CODES, MISSING, Grads, GradTable, tabulated
from lhopt_fused.kernels.triton_features import (
    FEATURE_COLUMNS,
    NORM_COLUMNS,
    SUM_COLUMNS,
    add_features_kernel,
    group_features_kernel,
)
from lhopt_fused.kernels.triton_launch import INTERPRETED, Launch
from lhopt_fused.kernels.triton_plan import DTYPES, DeviceTables, StepPlan
from lhopt_fused.kernels.triton_tables import (
    A_SIGNS,
    C_DECAY,
    C_STEP_SIZE,
    W_GRAD_SQ,
    W_NONFINITE,
)

__all__ = ["TritonBackend", "check_layout"]

_LOG = logging.getLogger(__name__)
_ALIGNMENT: Final = 16  # bytes of the widest access
_WHOLE: Final = [GRADIENT_SUMS.index(name) for name in ("nonfinite", "sum_sq")]
_OF_GRADIENT: Final = [W_NONFINITE.value, W_GRAD_SQ.value]
_FEATURE_BLOCK: Final = 64  # tensors, or groups, at a time


class TritonBackend:
    """Steps all tensors of a layout on one CUDA device; the contract is ``StepBackend``'s.

    ``step`` neither synchronises nor allocates once it has seen gradients of the same dtypes and
    alignment, so that it can be captured in a CUDA graph after a step outside of one.

    Attributes:
        compile_seconds: what compiling kernels has taken so far, or reading them from Triton's
            cache: nearly all of it in the first step, and logged.
    """

    def __init__(self, layout: StepLayout) -> None:
        """Compile the kernels of this layout and upload its tables.

        Raises:
            BackendUnavailableError: there is no CUDA device, and Triton's interpreter is off.
            ValueError: a tensor is of a device or dtype that this backend does not step.
        """
        check_layout(layout)
        self.layout = layout
        self.compile_seconds = 0.0
        is_cuda = layout.device.type == "cuda"
        self._on_device: contextlib.AbstractContextManager[Any] = (
            torch.cuda.device(layout.device) if is_cuda else contextlib.nullcontext()
        )
        with self._on_device:
            self._tables = DeviceTables(layout)
            self._pointers = _GradPointers(self._tables.grads)
            with self._compiling("features"):
                self._features = self._feature_launches()
            arrays = self._tables.addresses[:, : A_SIGNS.value]  # what comes then is read as it is
            self._state_aligned = _is_aligned(arrays.cpu().numpy())
            self._plans: dict[tuple[bytes, bool], StepPlan] = {}
            codes = np.array([DTYPE_CODES[param.dtype] for param in layout.params], dtype=np.int8)
            self._plan = self._plan_of(codes, self._state_aligned, in_phases=False)

    @torch.no_grad()
    def step(self, grads: Grads, statistics: torch.Tensor | None = None) -> None:
        with self._on_device:
            self._take_gradients(grads, in_phases=False)
            measured = statistics is not None
            for launch in (*self._plan.norms, *self._plan.before[measured]):
                launch()
            finalize = self._plan.finalize[measured]
            if finalize is not None:
                finalize(self._tables.unused_statistics if statistics is None else statistics)
            for launch in self._plan.after:
                launch()

    @torch.no_grad()
    def measure_gradients(self, grads: Grads, sums: torch.Tensor) -> None:
        """See :class:`~lhopt_fused.kernels.PhasedBackend`, for this and the other phases."""
        with self._on_device:
            self._take_gradients(grads, in_phases=True)
            for launch in self._plan.norms:
                launch()
            sums[:, GRADIENT_SUMS.index("present")] = self._tables.grads != 0
            sums[:, _WHOLE] = self._tables.work[:, _OF_GRADIENT]

    @torch.no_grad()
    def update_moments(self, sums: torch.Tensor, partial: torch.Tensor, measures: bool) -> None:
        with self._on_device:
            local = self._tables.work[:, W_GRAD_SQ.value].clone()
            self._tables.work[:, _OF_GRADIENT] = sums[:, _WHOLE]
            for launch in self._plan.before[measures]:
                launch()
            finalize = self._plan.finalize[measures]
            assert finalize is not None
            finalize(self._tables.partial)
            partial.copy_(self._tables.partial)
            # the gradient pass knows it without overflow
            clip = partial[:, PARTIAL_SUMS.index("clip_coefficient")]
            partial[:, PARTIAL_SUMS.index("grad_sq")] = clip * clip * local

    @torch.no_grad()
    def apply(self, partial: torch.Tensor) -> None:
        with self._on_device:
            for column, name in ((C_STEP_SIZE, "step_size"), (C_DECAY, "decay_factor")):
                self._tables.coefficients[:, column.value] = partial[:, PARTIAL_SUMS.index(name)]
            for launch in self._plan.after:
                launch()
            column = PARTIAL_SUMS.index("new_param_sq")
            partial[:, column] = self._tables.partial[:, column]

    def _take_gradients(self, grads: Grads, *, in_phases: bool) -> None:
        """Choose the plan for these gradients, and bring their addresses to the device."""
        table = tabulated(grads, self.layout.params, "triton")
        if self._pointers.see(table) or self._plan.in_phases != in_phases:
            self._plan = self._plan_for(table, in_phases)
        self._pointers.upload()

    def accumulate_features(self, statistics: torch.Tensor, sums: torch.Tensor) -> None:
        """Add the mean features of one step to ``sums``, on the device.

        Args:
            statistics: float64 ``[T, len(STATISTICS)]`` that :meth:`step` has filled.
            sums: float64 ``[2, R, 18]``, sum and number of measured steps of each feature, then of
                each of ``STEP_NORMS``, in each run.
        """
        per_group, total = self._features
        with self._on_device:
            per_group(statistics)
            total(sums)

    @contextlib.contextmanager
    def _compiling(self, what: str) -> Iterator[None]:
        """Say how long it takes to make the launches of ``what``."""
        start, before = time.perf_counter(), triton_launch.Launch.made
        yield
        seconds = time.perf_counter() - start
        self.compile_seconds += seconds
        made = triton_launch.Launch.made - before
        _LOG.info("%d kernels of %s ready after %.2f s", made, what, seconds)

    def _feature_launches(self) -> tuple[Launch, Launch]:
        device, groups = self._tables, len(self.layout.options)
        runs = len(self.layout.skipped_steps)
        means = device.unused_statistics.new_zeros(groups, FEATURE_COLUMNS.value)
        squares = device.unused_statistics.new_zeros(groups, NORM_COLUMNS.value)
        sums = device.unused_statistics.new_zeros(2, runs, SUM_COLUMNS.value)
        per_group = device.groups, device.members, device.numel, means, squares
        per_run = device.first_group, device.run_groups, means, squares
        constants = {"BLOCK": _FEATURE_BLOCK}
        return (
            Launch(
                group_features_kernel,
                groups,
                per_group,
                constants,
                example=(device.unused_statistics,),
            ),
            Launch(add_features_kernel, runs, per_run, constants, example=(sums,)),
        )

    def _plan_for(self, table: GradTable, in_phases: bool) -> StepPlan:
        """The launches for these gradients; compiles where they are of a new kind.

        A missing gradient is taken to be as the one before it.
        """
        before, is_missing = self._plan, table.dtypes == MISSING
        dtypes = np.where(is_missing, before.dtypes, table.dtypes)
        aligned = self._state_aligned & _is_aligned(table.addresses)
        is_aligned = np.where(is_missing, before.is_aligned, aligned)
        return self._plan_of(dtypes, is_aligned, in_phases)

    def _plan_of(
        self, dtypes: npt.NDArray[np.int8], is_aligned: npt.NDArray[np.bool_], in_phases: bool
    ) -> StepPlan:
        key = dtypes.tobytes() + is_aligned.tobytes(), in_phases
        if key not in self._plans:
            with self._compiling("a step"):
                self._plans[key] = StepPlan(
                    self.layout, self._tables, dtypes, is_aligned, in_phases
                )
        return self._plans[key]


class _GradPointers:
    """The device table of gradient addresses, uploaded only when an address has changed.

    A CUDA graph uploads the addresses it was captured with at every replay, so that it does not
    depend on the steps around it; from the first capture on, steps outside of graphs do so too.
    """

    def __init__(self, table: torch.Tensor) -> None:
        """``table`` is int64 ``[T]`` and zero; 0 stands for a missing gradient."""
        self._table = table
        self._seen: tuple[bytes, bytes] | None = None
        self._host: npt.NDArray[np.int64] = np.zeros(len(table), dtype=np.int64)
        self._is_uploaded = True
        # Pinned memory for as long as a graph may read it; a capture itself must not allocate.
        self._captured: dict[bytes, torch.Tensor] = {}
        self._spare: torch.Tensor | None = self._pinned(np.zeros_like(self._host))

    def see(self, table: GradTable) -> bool:
        """Take in where the gradients are, to be uploaded next; whether anything is new."""
        seen = table.addresses.tobytes(), table.dtypes.tobytes()
        if seen == self._seen:
            return False
        # an empty gradient lies nowhere, but is there
        is_empty = (table.addresses == 0) & (table.dtypes != MISSING)
        pointers = table.addresses + _ALIGNMENT * is_empty
        self._is_uploaded = self._is_uploaded and np.array_equal(pointers, self._host)
        self._seen, self._host = seen, pointers
        return True

    def upload(self) -> None:
        """Bring the table up to date."""
        if self._table.is_cuda and torch.cuda.is_current_stream_capturing():
            self._table.copy_(self._pinned_for_ever(), non_blocking=True)
        elif self._captured or not self._is_uploaded:
            # torch reuses pinned memory only when the copy out of it is done
            self._table.copy_(self._pinned(self._host), non_blocking=True)
            if self._spare is None:
                self._spare = self._pinned(self._host)
        self._is_uploaded = True

    def _pinned(self, pointers: npt.NDArray[np.int64]) -> torch.Tensor:
        staged = torch.from_numpy(pointers)
        return staged.pin_memory() if self._table.is_cuda else staged

    def _pinned_for_ever(self) -> torch.Tensor:
        key = self._host.tobytes()
        if key not in self._captured:
            if self._spare is None:
                raise RuntimeError(
                    "the gradients moved twice without a step outside of CUDA graph captures; "
                    "call step() once between the captures"
                )
            self._captured[key], self._spare = self._spare, None
            self._captured[key].numpy()[:] = self._host
        return self._captured[key]


def _is_aligned(pointers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Whether every pointer of a row is a multiple of 16 bytes."""
    aligned: npt.NDArray[np.bool_] = (pointers % _ALIGNMENT == 0).reshape(len(pointers), -1).all(1)
    return aligned


def check_layout(layout: StepLayout) -> None:
    """Refuse what this backend cannot step, before anything is compiled or written."""
    if not INTERPRETED and not torch.cuda.is_available():
        raise BackendUnavailableError(
            "backend 'triton' needs a CUDA device, and torch finds none here; choose "
            "backend='cpu' or 'reference', or set TRITON_INTERPRET=1 to run it on the CPU for tests"
        )
    wanted = "cpu" if INTERPRETED else "cuda"
    for tensor in _tensors(layout):
        if tensor.device.type != wanted or tensor.device != layout.device:
            raise ValueError(
                f"backend 'triton' steps tensors of one {wanted.upper()} device, here "
                f"{layout.device}; got a tensor on {tensor.device}: move it, or use one optimizer "
                "per device"
            )
    for index, param in enumerate(layout.params):
        m, v = layout.exp_avgs[index], layout.exp_avg_sqs[index]
        if param.dtype not in DTYPES or (m.dtype, v.dtype) not in MOMENT_DTYPES.items():
            raise ValueError(
                "backend 'triton' steps float32, bfloat16 and float16 parameters with moments in "
                "float32, bfloat16, or codes in int8 and uint8; parameter "
                f"{index} is {param.dtype} with moments in {m.dtype} and {v.dtype}: choose "
                "backend='reference' for float64"
            )
        if m.dtype == torch.int8:
            _check_scales(index, m.numel(), layout.exp_avg_scales)
            _check_scales(index, m.numel(), layout.exp_avg_sq_scales)
        corrections = layout.master_corrections
        correction = None if corrections is None else corrections[index]
        if correction is not None and (
            param.dtype != torch.bfloat16 or correction.dtype not in CORRECTIONS.values()
        ):
            raise ValueError(
                "backend 'triton' makes masters of bfloat16 parameters and corrections in int8 or "
                f"int16; parameter {index} is {param.dtype} with a correction in "
                f"{correction.dtype}"
            )


def _tensors(layout: StepLayout) -> Iterator[torch.Tensor]:
    """All that a step reads or writes of the tensors, but for their gradients."""
    columns: tuple[Sequence[torch.Tensor | None] | None, ...] = (
        layout.params,
        layout.exp_avgs,
        layout.exp_avg_sqs,
        layout.exp_avg_scales,
        layout.exp_avg_sq_scales,
        layout.master_params,
        layout.master_corrections,
        layout.grad_signs,
    )
    for column in columns:
        yield from (tensor for tensor in column or () if tensor is not None)


def _check_scales(index: int, numel: int, column: Sequence[torch.Tensor | None] | None) -> None:
    """Refuse codes that are not whole blocks with a scale for each."""
    scales = None if column is None else column[index]
    is_whole = scales is not None and scales.numel() * BLOCK == numel and scales.is_contiguous()
    if scales is None or not is_whole or scales.dtype != torch.bfloat16:
        got = "none" if scales is None else f"{scales.numel()} in {scales.dtype}"
        raise ValueError(
            f"the codes of parameter {index}, {numel} in number, need a scale in bfloat16 for "
            f"each {BLOCK} of them; got {got}"
        )
