"""Moments and masters in few bits: every instruction set of C++ against the reference."""

from __future__ import annotations

import pytest
import torch
from stored import check, make_layout

from lhopt_fused import _C
from lhopt_fused.kernels import formats
from lhopt_fused.kernels.cpu import CpuBackend
from lhopt_fused.types import (
    Clip,
    Denominator,
    MasterWeights,
    Moments,
    StepLayout,
    StepOptions,
    Trust,
    WeightDecay,
)

LHOPT = StepOptions(Denominator.MAX, WeightDecay.IN_UPDATE, Clip.ROLLING_MAX, Trust.EXACT, True)
OPTIONS = {
    "adamw": StepOptions(),
    "lhopt": LHOPT,
    "delayed": StepOptions(Denominator.RMS, WeightDecay.DECOUPLED, Clip.NONE, Trust.DELAYED),
    "max_delayed": StepOptions(Denominator.MAX, WeightDecay.DECOUPLED, Clip.NORM, Trust.DELAYED),
}
KEPT: list[tuple[Moments, MasterWeights]] = [
    ("bfloat16", False),
    ("int8", False),
    ("int8", True),
    ("int8", "split8"),
    ("bfloat16", "split16"),
    ("float32", "split8"),
]


@pytest.fixture(params=_C.available_isas())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backends built in the test use this instruction set."""
    monkeypatch.setenv("LHOPT_CPU_ISA", request.param)
    return str(request.param)


@pytest.mark.parametrize(("moments", "masters"), KEPT)
def test_follows_the_reference(isa: str, moments: Moments, masters: MasterWeights) -> None:
    check(make_layout(LHOPT, moments, masters), CpuBackend, steps=8)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_follows_it_with_every_kind_of_step(isa: str, options: StepOptions) -> None:
    check(make_layout(options, "int8", "split8"), CpuBackend, steps=8)


@pytest.mark.parametrize(("moments", "masters"), [("int8", "split8"), ("bfloat16", "split16")])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("options", ["lhopt", "delayed"])
def test_nonfinite_gradients(
    isa: str, options: str, masks: bool, moments: Moments, masters: MasterWeights
) -> None:
    layout = make_layout(OPTIONS[options], moments, masters, masks=masks)
    check(layout, CpuBackend, steps=3, spoils=True)
    assert layout.skipped_steps.item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_parameters(isa: str, dtype: torch.dtype) -> None:
    check(make_layout(LHOPT, "int8", dtype=dtype), CpuBackend, steps=3)


def steps_too_far(layout: StepLayout) -> None:
    layout.params[0].mul_(1.02)


def has_another_scale(layout: StepLayout) -> None:
    assert layout.exp_avg_sq_scales is not None
    scales = layout.exp_avg_sq_scales[0]
    assert scales is not None
    scales.mul_(1.1)


def corrects_too_much(layout: StepLayout) -> None:
    assert layout.master_corrections is not None
    correction = layout.master_corrections[0]
    assert correction is not None
    correction.copy_(correction.int().add(8).clamp(-128, 127))


@pytest.mark.parametrize(
    "wrong",
    [steps_too_far, has_another_scale, corrects_too_much],
)
def test_a_wrong_optimizer_does_not(wrong: object) -> None:
    with pytest.raises(AssertionError, match=r"off by|stored numbers differ"):
        check(make_layout(LHOPT, "int8", "split8"), CpuBackend, steps=1, change=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("moments", ["bfloat16", "int8"])
@pytest.mark.parametrize("wrong", ["nearest", "next"])
def test_another_dither_does_not(
    monkeypatch: pytest.MonkeyPatch, wrong: str, moments: Moments
) -> None:
    words = formats.dither_words

    def others(step: int, count: int, device: torch.device) -> torch.Tensor:
        return words(step + 1, count, device) * (wrong == "next") + 0x8000 * (wrong == "nearest")

    monkeypatch.setattr(formats, "dither_words", others)
    with pytest.raises(AssertionError, match="stored numbers differ"):
        check(make_layout(LHOPT, moments), CpuBackend, steps=1)
