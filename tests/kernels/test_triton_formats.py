"""Moments in fewer bits and split masters in the Triton kernels, against the reference.

As ``test_triton``, on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from triton_runs import (
    DEVICE,
    MARKS,
    OPTIONS,
    MakeGrads,
    Run,
    assert_same_run,
    keep_in,
    make_grads,
    make_layout,
    misaligned,
    need_device,
    quiet_interpreter,  # noqa: F401 - a fixture
    run,
    spoiled,
    to_cpu,
    to_device,
)

from lhopt_fused.kernels import formats, get_backend, reference
from lhopt_fused.types import (
    GRADIENT_SUMS,
    PARTIAL_SUMS,
    SCALARS,
    STATISTICS,
    TENSOR_STATE,
    StepLayout,
    StepOptions,
)

need_device()

from triton_kernels import keep_master, keep_moments, read_master  # noqa: E402

from lhopt_fused.kernels.triton_launch import Launch  # noqa: E402

pytestmark = MARKS

SHAPES = ((6, 64), (7,), (3, 128))
"""Two matrices of whole blocks, and a vector, which keeps float32 beside 8 bits."""

STORAGE: dict[str, tuple[torch.dtype, torch.dtype, torch.dtype | None]] = {
    # parameters, moments, corrections
    "bfloat16": (torch.float32, torch.bfloat16, None),
    "int8": (torch.float32, torch.int8, None),
    "int8_split8": (torch.bfloat16, torch.int8, torch.int8),
    "bfloat16_split16": (torch.bfloat16, torch.bfloat16, torch.int16),
}


def layout_of(
    storage: str,
    options: StepOptions,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **changes: Any,
) -> StepLayout:
    """A layout whose beta1 takes no scale to a bfloat16 number.

    Where it does, the last bit of a product decides whether a scale is rounded up to the next one.
    """
    param, moments, correction = STORAGE[storage]
    layout = make_layout(options, shapes, param, ombeta1=0.0937, **changes)
    return keep_in(layout, moments, correction)


@pytest.mark.parametrize("masks", [False, True], ids=["skip", "mask"])
@pytest.mark.parametrize("name", ["adamw", "lhopt", "lhopt_delayed"])
@pytest.mark.parametrize("storage", STORAGE)
def test_trajectory_is_the_reference(storage: str, name: str, masks: bool) -> None:
    """With NaN in step 2: every form, kind of trust ratio and way to go on."""
    layout = layout_of(storage, OPTIONS[name], masks=masks)
    grads = spoiled(layout, float("nan"))
    value = run(layout, "triton", grads, 4)
    assert_same_run(value, run(layout, "reference", grads, 4), layout.params[0].dtype)
    assert_wrong_runs_fail(value, layout, grads)
    assert value.layout.skipped_steps.item() == 1


def assert_wrong_runs_fail(value: Run, layout: StepLayout, grads: MakeGrads) -> None:
    """The same comparison refuses a wrong second moment, and moments to the nearest code."""
    dtype = layout.params[0].dtype
    wrong = replace(layout, scalars=layout.scalars.clone())
    wrong.scalars[:, SCALARS.index("ombeta2")] *= 1.01
    with pytest.raises(AssertionError):
        assert_same_run(value, run(wrong, "reference", grads, 4), dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "encode", lambda x, kind, step: formats.encode(x, kind))
        undithered = run(layout, "reference", grads, 4)
    with pytest.raises(AssertionError):
        assert_same_run(value, undithered, dtype)


@pytest.mark.parametrize(
    ("param", "way"),
    [
        (torch.bfloat16, "stochastic"),
        (torch.bfloat16, "master"),
        (torch.float16, "nearest"),
        (torch.bfloat16, "signs"),
    ],
    ids=str,
)
def test_codes_go_with_every_kind_of_weights(param: torch.dtype, way: str) -> None:
    layout = make_layout(OPTIONS["lhopt"], SHAPES, param, ombeta1=0.0937, signs=way == "signs")
    layout = keep_in(layout, torch.int8)
    if way == "stochastic":
        layout.rounding = "stochastic"
    if way == "master":
        layout.master_params = [p.float() for p in layout.params]
    grads = lambda step: make_grads(layout.params, step)  # noqa: E731
    value = run(layout, "triton", grads, 4)
    assert_same_run(value, run(layout, "reference", grads, 4), param)
    assert_wrong_runs_fail(value, layout, grads)


def test_codes_of_many_chunks_and_of_misaligned_views() -> None:
    """Blocks, tiles and chunks that end in one another; the last codes lie off 16 bytes."""
    shapes = ((1, 64), (17, 64), (65, 64), (10, 64))
    layout = layout_of("int8_split8", OPTIONS["max_decoupled_lamb"], shapes)

    def misalign(layout: StepLayout) -> None:
        layout.exp_avgs[-1] = misaligned(layout.exp_avgs[-1])

    grads = lambda step: make_grads(layout.params, step)  # noqa: E731
    value = run(layout, "triton", grads, 2, misalign)
    expected = run(layout, "reference", grads, 2)
    assert_same_run(value, expected, torch.bfloat16)
    wrong = replace(layout, scalars=layout.scalars * 1.01)
    with pytest.raises(AssertionError):
        assert_same_run(value, run(wrong, "reference", grads, 2), torch.bfloat16)


def test_a_second_phase_that_reads_rounded_moments_back_is_wrong() -> None:
    """What an exact trust ratio defers comes from fresh moments, not from what is stored."""
    layout = layout_of("int8", OPTIONS["lhopt"])
    grads = lambda step: make_grads(layout.params, step)  # noqa: E731
    value = run(layout, "triton", grads, 3)
    apply = reference._TensorStep.apply

    def apply_stored(step: Any, measured: dict[str, float]) -> float:
        m_hat = step.exp_avg.read() / step.state["bias_correction1"]
        v, scalars = step.exp_avg_sq.read(), step.scalars
        p = step.weights.read(torch.float32)
        step.update = m_hat / (v + scalars["epsilon"]) + scalars["weight_decay"] * p
        return apply(step, measured)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference._TensorStep, "apply", apply_stored)
        read_back = run(layout, "reference", grads, 3)
    with pytest.raises(AssertionError):
        assert_same_run(value, read_back)


def test_phases_are_those_of_the_reference() -> None:
    """As pieces of tensors are stepped: what follows from whole sums comes from outside."""
    layout = layout_of("int8_split8", OPTIONS["lhopt"])
    runs = []
    for name, copied in (("triton", to_device), ("reference", copy.deepcopy), ("wrong", None)):
        mine = copied(layout) if copied else copy.deepcopy(layout)
        backend = get_backend("triton" if name == "triton" else "reference", mine)
        for step in range(2):
            grads = make_grads(layout.params, step)  # they are read by every phase
            grads = to_device(grads) if name == "triton" else grads
            sums = mine.tensor_state.new_zeros(len(SHAPES), len(GRADIENT_SUMS))
            partial = mine.tensor_state.new_zeros(len(SHAPES), len(PARTIAL_SUMS))
            backend.measure_gradients(grads, sums)
            backend.update_moments(sums, partial, True)
            uses_trust = torch.tensor([layout.uses_trust(t) for t in range(len(SHAPES))])
            trust = torch.where(uses_trust, 0.7 if name == "wrong" else 0.6, 1.0)
            partial[:, PARTIAL_SUMS.index("step_size")] *= trust.to(partial)
            backend.apply(partial)
        runs.append(Run(to_cpu(mine), [], [to_cpu(mine.params)]))
    value, expected, wrong = runs
    assert_same_run(value, expected, torch.bfloat16)
    with pytest.raises(AssertionError):
        assert_same_run(value, wrong, torch.bfloat16)


def test_launches_do_not_grow_with_the_number_of_tensors() -> None:
    """Quantised matrices and float32 vectors step side by side in two buckets."""

    def made(count: int) -> int:
        before = Launch.made
        layout = layout_of("int8_split8", OPTIONS["lhopt"], ((2, 64), (7,)) * count)
        get_backend("triton", to_device(layout))
        return Launch.made - before

    assert made(30) == made(2)


def test_statistics_change_no_bit_of_a_step() -> None:
    layout = layout_of("int8_split8", OPTIONS["lhopt"])
    runs = []
    for measured in (False, True):
        mine = to_device(layout)
        backend = get_backend("triton", mine)
        table = torch.zeros(len(SHAPES), len(STATISTICS), dtype=torch.float64, device=DEVICE)
        for step in range(2):
            backend.step(to_device(make_grads(layout.params, step)), table if measured else None)
        runs.append(to_cpu(mine))
    for name in ("params", "master_corrections", "exp_avgs", "exp_avg_sqs", "exp_avg_scales"):
        for x, y in zip(*(getattr(of, name) for of in runs), strict=True):
            assert x is y or torch.equal(x, y)


def test_squares_outside_float32_stay_finite() -> None:
    """A second moment that overflows is the largest that a scale can tell; the next is smaller."""
    layout = layout_of("int8", OPTIONS["adamw"])

    def grads(step: int) -> list[torch.Tensor | None]:
        return [None if g is None else g * 1e25 for g in make_grads(layout.params, step)]

    value = run(layout, "triton", grads, 2).layout
    for index in (0, 2):
        v = formats.decode(value.exp_avg_sqs[index], value.exp_avg_sq_scales[index])
        assert bool(v.isfinite().all())
        assert v.max() > 1e38
        assert bool(value.params[index].isfinite().all())


@pytest.mark.parametrize("vector", [8, 4, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_stored_moments_have_the_bits_of_the_definition(dtype: torch.dtype, vector: int) -> None:
    """Blocks of zeros, of subnormal numbers, of numbers near the largest, and of every size."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(640, generator=generator)
    m[64:128] = 0
    m[128:192] *= 1e-42
    m[192:256] = m[192:256].clamp(-1, 1) * torch.finfo(torch.float32).max
    m[256:320] *= torch.logspace(-30, 0, 64)
    v = m.square().clamp(max=torch.finfo(torch.float32).max)
    v[400] = torch.inf
    kinds = (dtype, torch.uint8 if dtype == torch.int8 else dtype)
    for step, is_same in ((9, True), (10, False)):
        state = torch.zeros(3, len(TENSOR_STATE), dtype=torch.float64)
        state[1, TENSOR_STATE.index("step")] = 9
        kept = keep_moments(
            m.to(DEVICE), v.to(DEVICE), dtype, state.to(DEVICE), start=4096, vector=vector
        )
        expected = [formats.encode(x, kind, step) for x, kind in zip((m, v), kinds, strict=True)]
        unequal = sum(int((x != y).sum()) for x, (y, _) in zip(kept[:2], expected, strict=True))
        assert (unequal <= 3) == is_same
        for (codes, scales), mine, read in zip(expected, kept[2:4], kept[4:], strict=True):
            assert scales is None or torch.equal(mine, scales)
            decoded = formats.decode(codes, scales).view(-1, 64)
            one_code = 2.0**-6 * decoded.abs().amax(1, keepdim=True)
            assert not is_same or bool(((read.view(-1, 64) - decoded).abs() <= one_code).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16], ids=str)
def test_split_masters_have_the_bits_of_the_definition(dtype: torch.dtype) -> None:
    """Numbers of every size, NaN, inf, zeros, and what rounds to infinity in the parameter."""
    bits = torch.randint(
        -(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(1), dtype=torch.int64
    )
    master = bits.to(torch.int32).view(torch.float32)
    largest = torch.finfo(torch.float32).max
    infinities = [torch.inf, -torch.inf, torch.nan]
    master[:8] = torch.tensor([*infinities, 0.0, -0.0, largest, -largest, 1e-45])
    p, correction, joined = keep_master(master.to(DEVICE), dtype)
    expected_p, expected_correction = formats.split_master(master, dtype)
    expected_joined = formats.join_master(expected_p, expected_correction)
    for x, y in ((p, expected_p), (correction, expected_correction), (joined, expected_joined)):
        assert bool(((x == y) | ((x != x) & (y != y))).all())
    assert p[5] == torch.inf
    assert (joined[5] == largest) == (dtype == torch.int16)
    assert torch.equal(joined.isnan(), master.isnan())
    assert not torch.equal(p, (master * (1 + 2.0**-9)).bfloat16())


def test_a_parameter_set_to_zero_stays_zero() -> None:
    """Whatever the correction that it had: below zero there is no magnitude."""
    zeros = torch.tensor([0.0, -0.0] * 2, dtype=torch.bfloat16, device=DEVICE)
    correction = torch.tensor([-5, -5, 5, 5], dtype=torch.int8, device=DEVICE)
    joined = read_master(zeros, correction)
    assert torch.equal(joined, formats.join_master(zeros.cpu(), correction.cpu()))
    assert joined.abs().max() < 1e-37


def test_bad_input() -> None:
    layout = to_device(layout_of("int8_split8", OPTIONS["adamw"]))
    half = replace(layout, params=[p.half() for p in layout.params])
    with pytest.raises(ValueError, match=r"parameter 0 is torch\.float16 with a correction"):
        get_backend("triton", half)
    with pytest.raises(ValueError, match=r"384 in number, need a scale in bfloat16.*got none"):
        get_backend("triton", replace(layout, exp_avg_scales=None))
    short = [None if s is None else s[:2] for s in layout.exp_avg_sq_scales or []]
    with pytest.raises(ValueError, match=r"got 2 in torch\.bfloat16"):
        get_backend("triton", replace(layout, exp_avg_sq_scales=short))
    mixed = replace(layout, exp_avg_sqs=[v.float() for v in layout.exp_avg_sqs])
    with pytest.raises(ValueError, match=r"moments in torch\.int8 and torch\.float32"):
        get_backend("triton", mixed)
