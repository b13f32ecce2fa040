"""Runs with moments and masters in few bits, shared by the backends' tests."""

from __future__ import annotations

import copy
from collections.abc import Callable

import cases
import torch
from tolerances import DIFFERING_CODES, SPLIT8, STORED, TRAJECTORY, assert_close
from tolerances import STATISTICS as STATISTICS_TOLERANCE

from lhopt_fused.kernels import StepBackend
from lhopt_fused.kernels.formats import BLOCK, decode, in_memory_order, join_master
from lhopt_fused.kernels.reference import ReferenceBackend
from lhopt_fused.layout import bind_layout
from lhopt_fused.types import (
    SCALARS,
    STATISTICS,
    MasterWeights,
    Moments,
    StepLayout,
    StepOptions,
)

SHAPES = ((64, 128), (7,), (3, 5, 11), (0, 64), (48, 3, 64), (1001,), (33, 320))
"""Three that take blocks; the others are too small or have no whole blocks in a row."""

START = {**cases.START, "lr": 1e-2}

Grads = list[torch.Tensor | None]
Stored = tuple[torch.Tensor, torch.Tensor | None]


def make_layout(
    options: StepOptions,
    moments: Moments,
    masters: MasterWeights = False,
    dtype: torch.dtype = torch.bfloat16,
    *,
    masks: bool = False,
    device: str = "cpu",
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
) -> StepLayout:
    """Two groups of parameters of ``dtype``, at their start."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(shape, generator=generator).mul(0.5).to(device, dtype) for shape in shapes
    ]
    layout = bind_layout(
        params,
        params,
        [{} for _ in params],
        [index % 2 for index in range(len(params))],
        [{}, {}],
        [options] * 2,
        keep_grad_signs=False,
        masks_nonfinite=masks,
        rounding="nearest",
        rounding_seed=0,
        master_weights=masters,
        moments=moments,
    )
    layout.scalars.copy_(torch.tensor([[START[name] for name in SCALARS]] * 2))
    return layout


def make_grads(layout: StepLayout, step: int, spoils: bool = False) -> Grads:
    """Of widths that differ by column, with zeros; a spike every seventh step, some missing."""
    grads: Grads = []
    for index, param in enumerate(layout.params):
        generator = torch.Generator().manual_seed(1_000 * step + index)
        grad = torch.randn(param.shape, generator=generator)
        if param.dim() > 1:
            grad *= torch.logspace(-3, 0, param.shape[-1])
        grad *= (torch.rand(param.shape, generator=generator) > 0.1) * (30 if step % 7 == 6 else 1)
        if spoils and step % 3 == 1 and index in (0, 5, 6):  # the last from its middle on
            grad.view(-1)[grad.numel() // 2 if index == 6 else 0 :: 37] = torch.nan
            grad.view(-1)[-90:-70] = torch.inf
        missing = step % 5 == 3 and index in (1, 4)
        grads.append(None if missing else grad.to(param.device, param.dtype))
    return grads


def check(
    layout: StepLayout,
    build: Callable[[StepLayout], StepBackend],
    steps: int,
    *,
    spoils: bool = False,
    change: Callable[[StepLayout], None] | None = None,
) -> None:
    """Steps of a backend from the reference's state: all that each of them writes.

    ``change`` makes the reference's layout a wrong one, after each step of it.
    """
    expected = copy.deepcopy(layout)
    backend, reference = build(layout), ReferenceBackend(expected)
    for step in range(steps):
        grads = make_grads(layout, step, spoils)
        measured = torch.full(
            (len(layout.params), len(STATISTICS)),
            torch.inf,
            dtype=torch.float64,
            device=layout.device,
        )
        defined = torch.zeros_like(measured)
        backend.step(grads, measured)
        reference.step(grads, defined)
        if change is not None:
            change(expected)
        compare(layout, expected)
        _compare_statistics(measured, defined)
        take_over(layout, expected)


def compare(layout: StepLayout, expected: StepLayout) -> None:
    """Parameters, masters, what is stored of the moments, and the tables of two layouts."""
    for index, param in enumerate(expected.params):
        if param.numel() == 0:
            continue
        scale = param.abs().max().float()
        corrections = expected.master_corrections
        if corrections is not None and corrections[index] is not None:
            bits = corrections[index]
            tolerance = SPLIT8 if bits.dtype == torch.int8 else TRAJECTORY[torch.float32]
        else:
            tolerance = TRAJECTORY[param.dtype]
        assert_close(_master(layout, index), _master(expected, index), tolerance, scale)
        for name in ("exp_avg", "exp_avg_sq"):
            assert_same_moment(_stored(layout, name, index), _stored(expected, name, index))
    for name in ("group_state", "tensor_state"):
        y = getattr(expected, name)
        assert_close(getattr(layout, name), y, TRAJECTORY[torch.float32], y.abs().clamp_min(1e-2))
    assert torch.equal(layout.skipped_steps, expected.skipped_steps)


def assert_same_moment(value: Stored, expected: Stored, *, is_aligned: bool = True) -> None:
    """What is decoded, in units of its block's scale; roots of the second moment.

    Args:
        value, expected: stored, and its scales.
        is_aligned: both begin at the same place of their tensor modulo a block, so that they are
            dithered alike, and all but a few of the stored numbers are equal.
    """
    (x, _), (y, scale) = decoded(*value), decoded(*expected)
    stored = expected[0]
    if stored.dtype == torch.uint8:
        x, y, scale = x.sqrt(), y.sqrt(), scale.sqrt()
    assert_close(x, y, STORED[stored.dtype], scale)
    if stored.dtype != torch.float32 and stored.numel() and is_aligned:
        differing = float((stored != value[0]).float().mean())
        limit = max(DIFFERING_CODES, 2 / stored.numel())
        assert differing <= limit, f"{differing:.2%} of the stored numbers differ"


def _compare_statistics(measured: torch.Tensor, defined: torch.Tensor) -> None:
    """Sums that nothing cancels in."""
    for name in (
        "taken",
        "grad_nonfinite",
        "clip_coefficient",
        "grad_sq",
        "param_sq",
        "momentum_sq",
    ):
        column = STATISTICS.index(name)
        x, y = measured[:, column], defined[:, column]
        assert_close(x, y, STATISTICS_TOLERANCE[torch.float32], y.abs())


def _stored(layout: StepLayout, name: str, index: int) -> Stored:
    scales = getattr(layout, f"{name}_scales")
    return getattr(layout, f"{name}s")[index], None if scales is None else scales[index]


def decoded(stored: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A moment, and what its rounding is relative to, element by element."""
    values = decode(stored, scales)
    if scales is not None:
        by_block = scales.float().reshape(-1, 1).expand(-1, BLOCK)
        return values, in_memory_order(by_block.flatten(), values)
    largest = values.abs().max().expand(values.shape) if values.numel() else values
    is_rounded = stored.dtype == torch.bfloat16
    return values, values.abs() + 1e-5 * largest if is_rounded else largest


def _master(layout: StepLayout, index: int) -> torch.Tensor:
    """What is stepped of a parameter, float32."""
    param = layout.params[index]
    corrections = layout.master_corrections
    correction = corrections[index] if corrections is not None else None
    return param.float() if correction is None else join_master(param, correction)


def take_over(layout: StepLayout, other: StepLayout) -> None:
    """The other layout's numbers, in place."""
    names = ("params", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales")
    for name in (*names, "master_params", "master_corrections"):
        pairs = zip(getattr(layout, name) or [], getattr(other, name) or [], strict=True)
        for mine, theirs in pairs:
            if mine is not None:
                mine.copy_(theirs)
    layout.tensor_state.copy_(other.tensor_state)
    layout.group_state.copy_(other.group_state)
