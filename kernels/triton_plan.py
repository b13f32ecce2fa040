"""Which launches make a step: buckets of tensors, their chunk tables, buffers and bound kernels."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl

from lhopt_fused.kernels import triton_tables as tables
from lhopt_fused.kernels.gradients import DTYPE_CODES
from lhopt_fused.kernels.triton_apply import apply_kernel, param_norm_kernel
from lhopt_fused.kernels.triton_chunks import ChunkRows, chunk_rows, chunk_size
from lhopt_fused.kernels.triton_finalize import finalize_kernel
from lhopt_fused.kernels.triton_grad_norm import grad_norm_kernel, grad_sums_kernel
from lhopt_fused.kernels.triton_launch import Launch
from lhopt_fused.kernels.triton_moments import moments_kernel
from lhopt_fused.kernels.triton_prepare import prepare_kernel
from lhopt_fused.types import Clip, Denominator, StepLayout, Trust, WeightDecay

__all__ = ["DTYPES", "STATE_DTYPES", "DeviceTables", "StepPlan"]

DTYPES: Final = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

STATE_DTYPES: Final = {**DTYPES, torch.int8: tl.int8, torch.int16: tl.int16}
"""Also those of moments, and of what lies beside weights."""

_DTYPE_OF: Final = tuple(DTYPE_CODES)  # by code

NUM_WARPS: Final = 4
_THREADS: Final = 32 * NUM_WARPS

# Elements per thread and tile: enough loads in flight, few enough registers for many programs.
_GRAD_ELEMENTS: Final = 16
_STEP_ELEMENTS: Final = 8
_MEASURED_ELEMENTS: Final = 4  # sixteen sums need registers too
_CHUNKS: Final = object()  # stands for the number of chunks among a kernel's arguments
_WAITING_PROGRAMS: Final = 1024  # of a pass that nearly always has nothing to do
_GROUP_BLOCKS: Final = (16, 256)  # tensors of a group at a time in the preparing kernel
_SUM_ROWS: Final = (16, 512)  # rows of partial sums at a time, for few and for many chunks


def _traits(layout: StepLayout, tensor: int) -> int:
    options = layout.options[layout.group_of[tensor]]
    bits = (
        (tables.USES_TRUST, layout.uses_trust(tensor)),
        (tables.DELAYS_TRUST, options.trust is Trust.DELAYED),
        (tables.WARMS_UP, options.radam_warmup),
        (tables.ROOT_DENOMINATOR, options.denominator is Denominator.RMS),
        (tables.DECOUPLED_DECAY, options.weight_decay is WeightDecay.DECOUPLED),
        (tables.MAXIMIZES, options.maximize),
        (tables.KEEPS_SIGNS, layout.grad_signs is not None),
    )
    return sum(bit.value for bit, is_set in bits if is_set)


def _memberships(
    layout: StepLayout,
) -> tuple[list[int], list[list[int]], list[int], list[int]]:
    """Who belongs to whom: groups to runs, tensors to groups.

    Returns:
        ``members [T]``, ``groups [G, MEMBERSHIP_COLUMNS]``, ``run_groups [G]`` (groups in the order
        of their runs) and ``first_group [R + 1]``, where those of each run begin.
    """
    run_groups = sorted(range(len(layout.options)), key=layout.run_of.__getitem__)
    rank = {group: place for place, group in enumerate(run_groups)}
    members = sorted(range(len(layout.params)), key=lambda tensor: rank[layout.group_of[tensor]])
    ends = np.cumsum(np.bincount(np.array(layout.group_of), minlength=len(rank))[run_groups])
    begins = [0, *ends[:-1].tolist()]
    first_group = np.searchsorted(
        np.array(layout.run_of)[run_groups], np.arange(len(layout.skipped_steps) + 1)
    ).tolist()
    membership = []
    for group, run in enumerate(layout.run_of):
        place, first, last = rank[group], first_group[run], first_group[run + 1] - 1
        leads, clip = int(place == first), layout.options[group].clip.value
        span = begins[place], int(ends[place]), begins[first], int(ends[last])
        membership.append([*span, run, leads, clip, 0])
    return members, membership, run_groups, first_group


def _arrays(layout: StepLayout, tensor: int) -> tuple[torch.Tensor | None, ...]:
    """What a tensor's row of ``DeviceTables.addresses`` points at."""
    signs = layout.grad_signs[tensor] if layout.grad_signs else None
    moments = layout.exp_avgs[tensor], layout.exp_avg_sqs[tensor]
    stepped, beside = _weights(layout, tensor)
    return stepped, *moments, beside, signs, *_scales(layout, tensor), None


def _weights(layout: StepLayout, tensor: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is stepped, and what lies beside it: a master's copy, or corrections, or nothing."""
    param = layout.params[tensor]
    master = layout.master_params[tensor] if layout.master_params else None
    if master is not None:
        return master, param
    return param, layout.master_corrections[tensor] if layout.master_corrections else None


def _scales(layout: StepLayout, tensor: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Scales of 8-bit moments, or nothing."""
    scales = layout.exp_avg_scales, layout.exp_avg_sq_scales
    m, v = (None if of is None else of[tensor] for of in scales)
    return m, v


class DeviceTables:
    """The small tables of a layout on its device: what is fixed, and what a step hands on."""

    def __init__(self, layout: StepLayout) -> None:
        device, count = layout.device, len(layout.params)

        def integers(values: Any, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype).to(device)

        self.addresses = integers(
            [
                [0 if x is None else x.data_ptr() for x in _arrays(layout, tensor)]
                for tensor in range(count)
            ],
            torch.int64,
        )
        seed = [layout.rounding_seed, layout.rounding_seed >> 32]
        self.rounding_seed = integers([(word + 2**31) % 2**32 - 2**31 for word in seed])
        self.numel = integers(layout.numel, torch.int64)
        self.traits = integers([_traits(layout, tensor) for tensor in range(count)])
        self.group_of = integers(layout.group_of)
        members, membership, run_groups, first_group = _memberships(layout)
        self.members, self.groups = integers(members), integers(membership)
        self.run_groups, self.first_group = integers(run_groups), integers(first_group)

        self.grads = torch.zeros(count, dtype=torch.int64, device=device)
        self.work = torch.zeros(count, tables.WORK_COLUMNS.value, dtype=torch.float64).to(device)
        self.coefficients = torch.zeros(count, tables.COEFFICIENT_COLUMNS.value).to(device)
        self.waits = torch.zeros(count, dtype=torch.int32, device=device)
        self.seen = torch.zeros(len(layout.skipped_steps), dtype=torch.int32, device=device)
        self.partial = self.work.new_zeros(count, tables.PARTIAL_COLUMNS.value)
        shape = count, tables.STATISTICS_COLUMNS.value
        self.unused_statistics = torch.zeros(shape, dtype=torch.float64, device=device)


class _Bucket(NamedTuple):
    """What selects the code of the passes over elements."""

    param: torch.dtype  # of what is stepped
    beside: torch.dtype | None  # of a master's copy, or of correction bits
    moments: torch.dtype
    stochastic: bool
    grad: torch.dtype
    root_denominator: bool
    decay_in_update: bool

    def constants(self) -> dict[str, Any]:
        return {
            "PARAM_DTYPE": DTYPES[self.param],
            "BESIDE_DTYPE": None if self.beside is None else STATE_DTYPES[self.beside],
            "MOMENT_DTYPE": STATE_DTYPES[self.moments],
            "STOCHASTIC": self.stochastic,
            "GRAD_DTYPE": DTYPES[self.grad],
            "ROOT_DENOMINATOR": self.root_denominator,
            "DECAY_IN_UPDATE": self.decay_in_update,
        }


def _tile(vector: int, elements: int, is_aligned: bool, keeps_signs: bool) -> dict[str, Any]:
    """The tile of a pass: about ``elements`` per thread, as far as registers suffice."""
    if keeps_signs:  # bytes of signs and vectors of floats do not share a layout
        elements = min(elements, 4)
    elif is_aligned:  # a thread owns whole rows
        elements = max(elements, vector)
    if not is_aligned:
        elements, vector = max(2, elements // 4), 8 if keeps_signs else 1
    return {"ALIGNED": is_aligned, "ROWS": _THREADS * elements // vector, "VECTOR": vector}


def _sums(chunks: ChunkRows) -> tuple[dict[str, Any], int]:
    """Constants and warps of a kernel that adds up the rows of one tensor per program."""
    most = int(np.diff(chunks.first_row).max(initial=0))
    few, many = _SUM_ROWS
    return ({"ROWS": few}, NUM_WARPS) if most <= few else ({"ROWS": many}, 2 * NUM_WARPS)


class StepPlan:
    """The launches of a step, in order, for gradients of one kind.

    In phases, where tensors are pieces of larger ones, ``finalize`` leaves ``DeviceTables.partial``
    and the launches before it are of two kinds.

    Attributes:
        dtypes: int8 ``[T]``, codes of the gradients' dtypes.
        is_aligned: bool ``[T]``, whether every pointer of the tensor is a multiple of 16 bytes.
        in_phases: see above.
        norms: launches of the gradient pass.
        before: launches from there up to the moments, by whether statistics are taken.
        finalize: sums, trust ratios and statistics, likewise; called with the statistics table.
        after: launches that apply deferred updates.
    """

    def __init__(
        self,
        layout: StepLayout,
        device: DeviceTables,
        dtypes: npt.NDArray[np.int8],
        is_aligned: npt.NDArray[np.bool_],
        in_phases: bool,
    ) -> None:
        self.dtypes, self.is_aligned, self.in_phases = dtypes, is_aligned, in_phases
        self._grad_dtypes = [_DTYPE_OF[code] for code in dtypes.tolist()]
        self._layout, self._tables = layout, device
        self._tensors = range(len(layout.params))
        self._aligned = is_aligned.tolist()
        self._vectors = [self._vector(tensor) for tensor in self._tensors]
        self._size = chunk_size(sum(p.numel() for p in layout.params))
        self._chunks = self._cut(self._tensors)
        rows = max(1, self._chunks.rows)
        self._partials = torch.zeros(rows, 16, dtype=torch.float32, device=layout.device)
        self._buckets = self._group_tensors()
        self._pass_args = (
            device.grads,
            device.addresses,
            device.coefficients,
            layout.tensor_state,
            device.rounding_seed,
            self._partials,
        )

        self.norms, prepare = self._norm_launches(), self._prepare_launch()
        self.before = {
            measured: [prepare, *self._moments_launches(measured)] for measured in (False, True)
        }
        self.finalize = {measured: self._finalize_launch(measured) for measured in (False, True)}
        self.after = self._apply_launches()

    def _vector(self, tensor: int) -> int:
        """Elements of the widest access: 16 bytes of 16-bit numbers, or a byte of signs.

        Of codes these are 8 bytes: with 16 elements a row registers would not suffice.
        """
        layout = self._layout
        dtypes = {x.dtype for x in (layout.params[tensor], layout.exp_avgs[tensor])}
        is_wide = dtypes | {self._grad_dtypes[tensor]} == {torch.float32}
        is_wide = is_wide and layout.grad_signs is None
        return 4 if is_wide else 8

    def _cut(self, include: Sequence[int]) -> ChunkRows:
        numels = [p.numel() for p in self._layout.params]
        return chunk_rows(numels, self._vectors, self._aligned, include, self._size)

    def _group_tensors(self) -> dict[_Bucket, list[int]]:
        buckets: dict[_Bucket, list[int]] = {}
        for tensor in self._tensors:
            layout = self._layout
            options = layout.options[layout.group_of[tensor]]
            stepped, beside = _weights(layout, tensor)
            bucket = _Bucket(
                stepped.dtype,
                None if beside is None else beside.dtype,
                layout.exp_avgs[tensor].dtype,
                layout.rounding == "stochastic" and stepped.dtype != torch.float32,
                self._grad_dtypes[tensor],
                options.denominator is Denominator.RMS,
                options.weight_decay is WeightDecay.IN_UPDATE,
            )
            buckets.setdefault(bucket, []).append(tensor)
        return buckets

    def _chunk_launches(
        self,
        kernel: Any,
        chunks: ChunkRows,
        tensors: Sequence[int],
        args: tuple[Any, ...],
        constants: dict[str, Any],
        elements: int,
        programs: int = sys.maxsize,
    ) -> list[Launch]:
        """One launch for whole vectors and one for the rest, where there are such chunks.

        At most so many programs: those of a kernel that shares out more chunks than that.
        """
        launches = []
        for vector in sorted({self._vectors[tensor] for tensor in tensors}):
            for is_aligned, table in ((True, chunks.aligned), (False, chunks.ragged)):
                found = [table[t] for t in tensors if t in table and self._vectors[t] == vector]
                if found:
                    rows = torch.from_numpy(np.concatenate(found)).to(self._layout.device)
                    keeps_signs = self._layout.grad_signs is not None
                    tile = _tile(vector, elements, is_aligned, keeps_signs)
                    launches.append(
                        Launch(
                            kernel,
                            min(len(rows), programs),
                            (rows, *(len(rows) if arg is _CHUNKS else arg for arg in args)),
                            {**constants, **tile},
                            num_warps=NUM_WARPS,
                        )
                    )
        return launches

    def _norm_launches(self) -> list[Launch]:
        """The gradient pass: all tensors where a step may be skipped, else those that are clipped.

        Groups that neither clip nor skip cost nothing here.
        """
        layout = self._layout
        include = [
            tensor
            for tensor in self._tensors
            if self.in_phases
            or not layout.masks_nonfinite
            or layout.options[layout.group_of[tensor]].clip is not Clip.NONE
        ]
        if not include:
            return []
        chunks = self._cut(include)
        partials = torch.zeros(max(1, chunks.rows), tables.GRAD_COLUMNS.value).to(layout.device)
        by_dtype: dict[torch.dtype, list[int]] = {}
        for tensor in include:
            by_dtype.setdefault(self._grad_dtypes[tensor], []).append(tensor)
        launches = []
        for dtype, tensors in by_dtype.items():
            launches += self._chunk_launches(
                grad_norm_kernel,
                chunks,
                tensors,
                (self._tables.grads, partials),
                {"GRAD_DTYPE": DTYPES[dtype]},
                _GRAD_ELEMENTS,
            )
        first_row = torch.from_numpy(chunks.first_row).to(layout.device)
        args = first_row, self._tables.grads, partials, self._tables.work
        constants, warps = _sums(chunks)
        total = Launch(grad_sums_kernel, len(self._tensors), args, constants, num_warps=warps)
        return [*launches, total]

    def _prepare_launch(self) -> Launch:
        layout, device = self._layout, self._tables
        args = (
            device.groups,
            device.members,
            device.grads,
            device.traits,
            layout.scalars,
            layout.group_state,
            layout.tensor_state,
            device.work,
            device.coefficients,
            device.waits,
            layout.skipped_steps,
            device.seen,
        )
        constants = {
            "SKIPS": not layout.masks_nonfinite,
            "CLIPS": any(options.clip is not Clip.NONE for options in layout.options),
            "BLOCK": _GROUP_BLOCKS[len(self._tensors) > _GROUP_BLOCKS[0]],
        }
        return Launch(prepare_kernel, len(layout.options), args, constants)

    def _needs_sums(self, tensors: Sequence[int]) -> bool:
        """Whether a step without statistics needs sums all the same."""
        always = self.in_phases or self._layout.masks_nonfinite
        return always or any(self._layout.uses_trust(t) for t in tensors)

    def _moments_launches(self, measured: bool) -> list[Launch]:
        layout = self._layout
        launches = []
        for bucket, tensors in self._buckets.items():
            constants = {
                **bucket.constants(),
                "MASKS": layout.masks_nonfinite,
                "SIGNS": layout.grad_signs is not None,
                "COLUMNS": 16 if measured else 4 if self._needs_sums(tensors) else 0,
            }
            launches += self._chunk_launches(
                moments_kernel,
                self._chunks,
                tensors,
                self._pass_args,
                constants,
                _MEASURED_ELEMENTS if measured else _STEP_ELEMENTS,
            )
        return launches

    def _finalize_launch(self, measured: bool) -> Launch | None:
        layout, device = self._layout, self._tables
        if not measured and not self._needs_sums(self._tensors):
            return None
        args = (
            torch.from_numpy(self._chunks.first_row).to(layout.device),
            device.groups,
            device.group_of,
            device.traits,
            layout.scalars,
            layout.tensor_state,
            device.work,
            device.coefficients,
            self._partials,
            layout.skipped_steps,
            device.seen,
        )
        rows, warps = _sums(self._chunks)
        constants = {
            "SKIPS": not layout.masks_nonfinite,
            "PHASES": self.in_phases,
            "COLUMNS": 16 if measured else 4,
            **rows,
        }
        return Launch(
            finalize_kernel,
            len(self._tensors),
            args,
            constants,
            example=(device.partial if self.in_phases else device.unused_statistics,),
            num_warps=warps,
        )

    def _apply_launches(self) -> list[Launch]:
        """The pass over tensors whose trust ratio may need their whole update first."""
        layout, device = self._layout, self._tables
        launches: list[Launch] = []
        for bucket, members in self._buckets.items():
            for kind, programs in ((Trust.EXACT, sys.maxsize), (Trust.DELAYED, _WAITING_PROGRAMS)):
                launches += self._chunk_launches(
                    apply_kernel,
                    self._chunks,
                    [t for t in members if layout.uses_trust(t) and self._trust(t) is kind],
                    (_CHUNKS, device.waits, len(self._tensors), *self._pass_args),
                    {
                        **bucket.constants(),
                        "MASKS": layout.masks_nonfinite,
                        "DELAYED": kind is Trust.DELAYED,
                        "KEEPS_NORM": self.in_phases or kind is Trust.DELAYED,
                    },
                    _STEP_ELEMENTS,
                    programs,
                )
        delays = any(options.trust is Trust.DELAYED for options in layout.options)
        if delays or (launches and self.in_phases):
            first_row = torch.from_numpy(self._chunks.first_row).to(layout.device)
            state = device.work, layout.tensor_state, device.partial
            inputs = first_row, device.traits, self._partials, *state
            rows, warps = _sums(self._chunks)
            constants = {"PHASES": self.in_phases, **rows}
            launches.append(
                Launch(param_norm_kernel, len(self._tensors), inputs, constants, num_warps=warps)
            )
        return launches

    def _trust(self, tensor: int) -> Trust:
        return self._layout.options[self._layout.group_of[tensor]].trust
