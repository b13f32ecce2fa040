"""The correctness gate: a variant is timed only if its steps are those of its definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch

from benchmarks.capture import CapturedStep
from benchmarks.registry import Build, Run, Settings, Shape, Variant
from lhopt_fused.optimizer import MeasuredOptimizer

__all__ = ["GATE_LR", "GateError", "check", "compare_features"]

GATE_LR: Final = 1e-2
GRADIENT_SCALE: Final = 1e-3
SCALES: Final = (1.0, 3.0, 0.5, 2.0, 1.0, 4.0)
"""Of each step's gradients: they vary, or Adam, being scale-free, would not show the clipping."""
MAX_NORM: Final = 1.5  # of a gradient's expected norm at scale 1: some steps clip, some do not

FEATURE_TOLERANCE: Final = 1e-3  # of max(1, |feature|)


class GateError(AssertionError):
    """A variant's steps are not those of its definition."""


def check(variant: Variant, shapes: Sequence[Shape], device: torch.device, base: Settings) -> None:
    """Compare a few steps of ``variant`` with its float64 definition, element by element.

    Raises:
        GateError: they differ; the message says where and by how much.
        Unavailable: the variant cannot run here.
    """
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    max_norm = MAX_NORM * GRADIENT_SCALE * elements**0.5
    settings = Settings(GATE_LR, max_norm, base.backend, base.captured)
    dtype = variant.dtype
    params = _make_params(shapes, device, dtype)
    run = variant.build(params, settings)
    step = CapturedStep(run.step) if settings.captured else run.step
    _train(params, step, dtype)
    expected, reference = _reference(variant.reference, shapes, settings, dtype)
    _compare_params(params, expected, variant.tolerance)
    if variant.features_reference is not None:
        if variant.features_reference is not variant.reference:
            reference = _reference(variant.features_reference, shapes, settings, dtype)[1]
        compare_features(_features(run), _features(reference))


def _make_params(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype
) -> list[torch.nn.Parameter]:
    """The same numbers on every device, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).mul_(0.02).to(device, dtype))
        for shape in shapes
    ]


def _gradients(params: list[torch.nn.Parameter], dtype: torch.dtype) -> Iterator[None]:
    """Write fresh gradients for each step, in place: a captured step reads them where they are.

    They are rounded to ``dtype``, whatever the parameters hold.
    """
    generator = torch.Generator().manual_seed(1)
    for param in params:
        param.grad = torch.zeros_like(param)
    for scale in SCALES:
        for param in params:
            assert param.grad is not None
            fresh = torch.randn(param.shape, generator=generator).mul_(GRADIENT_SCALE * scale)
            param.grad.copy_(fresh.to(dtype))
        yield


def _train(
    params: list[torch.nn.Parameter], step: Callable[[], object], dtype: torch.dtype
) -> None:
    for _ in _gradients(params, dtype):
        step()


def _reference(
    build: Build, shapes: Sequence[Shape], settings: Settings, dtype: torch.dtype
) -> tuple[list[torch.nn.Parameter], Run]:
    """The definition in float64, from the numbers that a variant of ``dtype`` starts with."""
    start = _make_params(shapes, torch.device("cpu"), dtype)
    params = [torch.nn.Parameter(param.detach().double()) for param in start]
    run = build(params, settings)
    _train(params, run.step, dtype)
    return params, run


def _compare_params(
    params: list[torch.nn.Parameter], expected: list[torch.nn.Parameter], tolerance: float
) -> None:
    for index, (param, target) in enumerate(zip(params, expected, strict=True)):
        value, definition = param.detach().double().cpu(), target.detach()
        error = (value - definition).abs().max().item()
        limit = tolerance * definition.abs().max().item()
        if not error <= limit:  # NaN fails too
            raise GateError(
                f"parameter {index} of shape {tuple(param.shape)} is off by {error:.2e} after "
                f"{len(SCALES)} steps (limit {limit:.2e})"
            )


def compare_features(
    measured: Mapping[str, float], expected: Mapping[str, float], of: str = ""
) -> None:
    """Compare features by name; ``of`` begins the message.

    Raises:
        GateError: one differs.
    """
    for name, target in expected.items():
        value = measured[name]
        both_nan = value != value and target != target
        if not both_nan and not abs(value - target) <= FEATURE_TOLERANCE * max(1, abs(target)):
            raise GateError(f"{of}feature {name} is {value:.6g}, expected {target:.6g}")


def _features(run: Run) -> dict[str, float]:
    assert isinstance(run.optimizer, MeasuredOptimizer)
    return run.optimizer.pop_inner_features(extra=True)
