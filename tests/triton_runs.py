"""Layouts, and runs over them, that the tests of the Triton kernels share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from cases import INTERPRETED
from tolerances import Tolerance, assert_close

from lhopt_fused.kernels import get_backend
from lhopt_fused.kernels.formats import BLOCK, decode, join_master
from lhopt_fused.types import (
    GROUP_STATE,
    SCALARS,
    STATISTICS,
    TENSOR_STATE,
    Clip,
    Denominator,
    StepLayout,
    StepOptions,
    Trust,
    WeightDecay,
)

DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [] if INTERPRETED else [pytest.mark.gpu]
HYPERPARAMETERS = {
    "lr": 1e-2,
    "ombeta1": 0.1,
    "ombeta2": 0.02,
    "epsilon": 1e-3,
    "weight_decay": 0.1,
    "group_clip_grad_norm": 0.8,
    "grad_clip_ombeta": 0.05,
    "lamb_update_norm_ombeta": 0.2,
    "group_clip_grad_z_score": 0.5,
    "lamb_power": 0.7,
    "lamb_min_trust": 1e-3,
    "lamb_max_trust": 3.0,
}


def need_device() -> None:
    """Leave the test module out where the kernels can run neither on a GPU nor interpreted."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip(
            "needs a CUDA device, or TRITON_INTERPRET=1 (its own job: ./dev interpret)",
            allow_module_level=True,
        )
    pytest.importorskip("triton")


OPTIONS = {
    "adamw": StepOptions(),
    "adamw_warmup_maximize": StepOptions(clip=Clip.NORM, radam_warmup=True, maximize=True),
    "lhopt": StepOptions(
        Denominator.MAX, WeightDecay.IN_UPDATE, Clip.ROLLING_MAX, Trust.EXACT, True
    ),
    "lhopt_delayed": StepOptions(
        Denominator.MAX, WeightDecay.IN_UPDATE, Clip.ROLLING_MAX, Trust.DELAYED, True
    ),
    "z_score_decay_in_update": StepOptions(
        Denominator.RMS, WeightDecay.IN_UPDATE, Clip.Z_SCORE, trust=Trust.DELAYED
    ),
    "max_decoupled_lamb": StepOptions(Denominator.MAX, trust=Trust.EXACT),
}
SHAPES: tuple[tuple[int, ...], ...] = ((33, 9), (7,), (0, 3), ())


@pytest.fixture(autouse=True)
def quiet_interpreter() -> Iterator[None]:
    """numpy, which plays the GPU here, would warn of what a GPU does in silence."""
    with np.errstate(all="ignore"):
        yield


def make_layout(
    options: StepOptions | Sequence[StepOptions],
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float32,
    *,
    group_of: Sequence[int] | None = None,
    signs: bool = False,
    masks: bool = False,
    **changes: float,
) -> StepLayout:
    """A layout on the CPU with reproducible parameters and all state zero."""
    generator = torch.Generator().manual_seed(0)
    groups = [options] if isinstance(options, StepOptions) else list(options)
    params = [torch.randn(s, generator=generator).mul(0.5).to(dtype) for s in shapes]
    row = [{**HYPERPARAMETERS, **changes}[name] for name in SCALARS]

    def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    return StepLayout(
        params=params,
        exp_avgs=[torch.zeros_like(p, dtype=torch.float32) for p in params],
        exp_avg_sqs=[torch.zeros_like(p, dtype=torch.float32) for p in params],
        grad_signs=[zeros(-(-p.numel() // 8), dtype=torch.uint8) for p in params]
        if signs
        else None,
        group_of=list(group_of) if group_of else [0] * len(params),
        is_vector=[p.dim() <= 1 for p in params],
        options=groups,
        run_of=[0] * len(groups),
        scalars=torch.tensor([row] * len(groups), dtype=torch.float64),
        group_state=zeros(len(groups), len(GROUP_STATE)),
        tensor_state=zeros(len(params), len(TENSOR_STATE)),
        skipped_steps=zeros(1, dtype=torch.int64),
        masks_nonfinite=masks,
    )


def keep_in(
    layout: StepLayout, moments: torch.dtype, correction: torch.dtype | None = None
) -> StepLayout:
    """``layout`` with its moments, all zero, in ``moments``; and split masters of bfloat16.

    Matrices of whole blocks are quantised, whatever their size.
    """
    params = layout.params
    kinds = [
        torch.float32 if moments == torch.int8 and (p.dim() < 2 or p.numel() % BLOCK) else moments
        for p in params
    ]
    pairs = list(zip(params, kinds, strict=True))

    def scales() -> list[torch.Tensor | None] | None:
        if moments != torch.int8:
            return None
        return [
            torch.zeros(p.numel() // BLOCK, dtype=torch.bfloat16) if kind == torch.int8 else None
            for p, kind in pairs
        ]

    return replace(
        layout,
        exp_avgs=[torch.zeros_like(p, dtype=kind) for p, kind in pairs],
        exp_avg_sqs=[
            torch.zeros_like(p, dtype=torch.uint8 if kind == torch.int8 else kind)
            for p, kind in pairs
        ],
        exp_avg_scales=scales(),
        exp_avg_sq_scales=scales(),
        master_corrections=[
            torch.zeros_like(p, dtype=correction) if p.dtype == torch.bfloat16 else None
            for p in params
        ]
        if correction
        else None,
    )


def make_grads(
    params: Sequence[torch.Tensor], step: int, dtype: torch.dtype | None = None
) -> list[torch.Tensor | None]:
    """Gradients with zeros; a spike in step 2, one missing in step 3."""
    grads: list[torch.Tensor | None] = []
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + index)
        grad = torch.randn(param.shape, generator=generator)
        grad *= (torch.rand(param.shape, generator=generator) > 0.1) * (30.0 if step == 2 else 1.0)
        missing = step == 3 and index == 1
        grads.append(None if missing else grad.to(dtype or param.dtype))
    return grads


def to_device(value: Any) -> Any:
    """A copy of a layout, tensor or list on the device under test."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE, copy=True)
    if isinstance(value, list):
        return [to_device(entry) for entry in value]
    if isinstance(value, StepLayout):
        return replace(value, **{name: to_device(entry) for name, entry in vars(value).items()})
    return value


@dataclass
class Run:
    """What a trajectory left behind, on the CPU."""

    layout: StepLayout
    statistics: list[torch.Tensor]
    params: list[list[torch.Tensor]]


MakeGrads = Callable[[int], list[torch.Tensor | None]]


def run(
    layout: StepLayout,
    backend: str,
    grads: MakeGrads,
    steps: int,
    prepare: Callable[[StepLayout], None] = lambda layout: None,
) -> Run:
    """``steps`` steps on a copy of ``layout``, with statistics except in every third.

    ``prepare`` may change the copy before the first.
    """
    on = to_device if backend == "triton" else copy.deepcopy
    layout = on(layout)
    prepare(layout)
    stepper = get_backend(backend, layout)
    trajectory, statistics = [], []
    for step in range(steps):
        table = torch.full_like(layout.tensor_state[:, :1], torch.nan).repeat(1, len(STATISTICS))
        stepper.step(on(grads(step)), None if step % 3 == 1 else table)
        statistics.append(table.cpu())
        trajectory.append([p.detach().to("cpu", copy=True) for p in layout.params])
    return Run(to_cpu(layout), statistics, trajectory)


def to_cpu(value: Any) -> Any:
    """A layout, tensor or list on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, StepLayout):
        return replace(value, **{name: to_cpu(entry) for name, entry in vars(value).items()})
    return [to_cpu(entry) for entry in value] if isinstance(value, list) else value


def misaligned(x: torch.Tensor) -> torch.Tensor:
    """A copy whose first element lies one element after a 16-byte boundary."""
    base = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return base[1:].view(x.shape).copy_(x)


def statistics_scale(expected: torch.Tensor, params: Sequence[torch.Tensor]) -> torch.Tensor:
    """``[T, len(STATISTICS)]``: the largest magnitude that each sum could have."""
    column = {name: expected[:, i] for i, name in enumerate(STATISTICS)}
    norm = {name: column[f"{name}_sq"].sqrt() for name in ("grad", "param", "update", "m_hat")}
    numel = torch.tensor([float(p.numel()) for p in params])
    scale = expected.abs().nan_to_num()
    for name, bound in {
        "grad_dot_param": norm["grad"] * norm["param"],
        "grad_dot_m_hat": norm["grad"] * norm["m_hat"],
        "grad_dot_update": norm["grad"] * norm["update"],
        "grad_dot_momentum": norm["grad"] * column["momentum_sq"].sqrt(),
        "m_hat_minus_grad_sq": column["grad_sq"] + column["m_hat_sq"],
        "sum_log_abs_update": 20 * numel,  # |log 1e-8| and a little
    }.items():
        scale[:, STATISTICS.index(name)] = bound.nan_to_num()
    return scale


def assert_same_run(value: Run, expected: Run, dtype: torch.dtype = torch.float32) -> None:
    """Parameters, moments, state and statistics of two runs, element by element.

    ``dtype`` is that of the parameters; of moments and masters in fewer bits, a few may have been
    rounded otherwise.
    """
    trajectory, sums = tolerances.TRAJECTORY[dtype], tolerances.STATISTICS[dtype]
    loose = Tolerance(max(sums.relative, trajectory.relative))
    if not _has_codes(expected.layout):
        for got, wanted in zip(value.params, expected.params, strict=True):
            for p, q in zip(got, wanted, strict=True):
                assert_close(p, q, trajectory, q.double().abs().max() if q.numel() else 0.0)
    else:
        loose = tolerances.AFTER_ANOTHER_CODE
        coarse = Tolerance(max(loose.relative, trajectory.relative))
        for got, wanted in zip(value.params, expected.params, strict=True):
            tolerances.assert_mostly_close(list(zip(got, wanted, strict=True)), trajectory, coarse)
    _assert_same_moments(value.layout, expected.layout)
    _assert_same_masters(value.layout, expected.layout)
    remembered = slice(0, -1)  # param_norm is kept only where trust is delayed
    x, y = value.layout.tensor_state, expected.layout.tensor_state
    assert_close(
        x[:, remembered],
        y[:, remembered],
        Tolerance(max(trajectory.relative, loose.relative)),
        y[:, remembered].abs(),
    )
    x, y = value.layout.group_state, expected.layout.group_state
    assert_close(x, y, sums, y.abs().clamp_min(1e-3))
    assert torch.equal(value.layout.skipped_steps, expected.layout.skipped_steps)
    for got, wanted in zip(value.statistics, expected.statistics, strict=True):
        assert_close(got, wanted, loose, statistics_scale(wanted, expected.layout.params))
    signs = value.layout.grad_signs or [], expected.layout.grad_signs or []
    for got, wanted in zip(*signs, strict=True):
        assert torch.equal(got, wanted)


def _has_codes(layout: StepLayout) -> bool:
    """Whether anything is kept in fewer bits than it has been computed in."""
    fewer = any(m.dtype in (torch.bfloat16, torch.int8) for m in layout.exp_avgs)
    return fewer or layout.master_corrections is not None


def _assert_same_moments(value: StepLayout, expected: StepLayout) -> None:
    for kind in ("exp_avg", "exp_avg_sq"):
        by_dtype: dict[torch.dtype, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        layouts = value, expected
        for index, of in enumerate(expected.exp_avgs):
            stored = [getattr(layout, f"{kind}s")[index] for layout in layouts]
            assert stored[0].dtype == stored[1].dtype
            scales = [getattr(layout, f"{kind}_scales") for layout in layouts]
            pair = [
                decode(x, None if column is None else column[index])
                for x, column in zip(stored, scales, strict=True)
            ]
            by_dtype.setdefault(of.dtype, []).append((pair[0], pair[1]))
        for dtype, pairs in by_dtype.items():
            tight = tolerances.TRAJECTORY[torch.float32]
            tolerances.assert_mostly_close(pairs, tight, tolerances.ANOTHER_CODE[dtype])


def _assert_same_masters(value: StepLayout, expected: StepLayout) -> None:
    pairs = []
    for index, param in enumerate(expected.params):
        correction = (expected.master_corrections or [None] * len(expected.params))[index]
        if correction is not None and value.master_corrections is not None:
            mine = value.master_corrections[index]
            assert mine is not None
            assert mine.dtype == correction.dtype
            joined = join_master(value.params[index], mine), join_master(param, correction)
            pairs.append(joined)
            tight = tolerances.SPLIT[correction.dtype]
    if pairs:
        tolerances.assert_mostly_close(pairs, tight, tolerances.AFTER_ANOTHER_CODE)


def largest(x: torch.Tensor) -> float:
    """Magnitude of the largest element, 0 where there is none."""
    return float(x.abs().max()) if x.numel() else 0.0


def assert_wrong_run_fails(value: Run, layout: StepLayout, grads: MakeGrads, steps: int) -> None:
    """The same comparison refuses an optimizer whose ``ombeta2`` is off by a tenth of a percent."""
    wrong = copy.deepcopy(layout)
    wrong.scalars[:, SCALARS.index("ombeta2")] *= 1.001
    with pytest.raises(AssertionError):
        assert_same_run(value, run(wrong, "reference", grads, steps))


def spoiled(layout: StepLayout, bad: float, at: int = 2) -> MakeGrads:
    """Gradients with ``bad`` in two elements of tensor 0 in step ``at``."""

    def grads(step: int) -> list[torch.Tensor | None]:
        made = make_grads(layout.params, step)
        if step == at and made[0] is not None:
            made[0].view(-1)[[3, -1]] = bad
        return made

    return grads
