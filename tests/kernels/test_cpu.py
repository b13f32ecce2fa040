"""The C++ backend against the reference: every instruction set, option, dtype and odd size."""

from __future__ import annotations

import copy
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import START
from tolerances import FUSED_FEATURES, FUSED_LOGITS, TRAJECTORY, assert_close, statistics_scale
from tolerances import STATISTICS as STATISTICS_TOLERANCE

from lhopt_fused import _C
from lhopt_fused.features import ACCUMULATED, FeatureAccumulator
from lhopt_fused.kernels.cpu import CpuBackend
from lhopt_fused.kernels.gradients import tabulated
from lhopt_fused.kernels.reference import ReferenceBackend, is_negative_bits
from lhopt_fused.kernels.rounding import random_words, round_stochastically
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

ISAS = _C.available_isas()
SHAPES = ((0,), (1,), (7,), (8,), (9,), (1000,), (17, 241), (257,), ())
LARGE = (*SHAPES, (70, 1000))
LHOPT = StepOptions(Denominator.MAX, WeightDecay.IN_UPDATE, Clip.ROLLING_MAX, Trust.EXACT, True)
CLIPS = itertools.cycle(Clip)
OPTIONS = [
    StepOptions(
        denominator,
        decay,
        next(CLIPS),
        trust,
        trust_ignores_vectors=decay is WeightDecay.IN_UPDATE,
        radam_warmup=denominator is Denominator.RMS,
        maximize=trust is Trust.DELAYED,
    )
    for denominator, decay, trust in itertools.product(Denominator, WeightDecay, Trust)
]
"""Every choice, with every denominator, decay and kind of trust ratio."""

Grads = list[torch.Tensor | None]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Backends built in the test use this instruction set."""
    monkeypatch.setenv("LHOPT_CPU_ISA", request.param)
    return str(request.param)


def describe(options: StepOptions) -> str:
    names = (options.denominator, options.weight_decay, options.clip, options.trust)
    return "-".join(name.name.lower() for name in names)


def make_layout(
    options: StepOptions,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    dtype: torch.dtype = torch.float32,
    *,
    masks: bool = False,
    signs: bool = True,
    groups: int = 2,
    **scalars: float,
) -> StepLayout:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).mul(0.5).to(dtype) for shape in shapes]
    row = [{**START, **scalars}[name] for name in SCALARS]
    return StepLayout(
        params=params,
        exp_avgs=[torch.zeros(p.shape) for p in params],
        exp_avg_sqs=[torch.zeros(p.shape) for p in params],
        grad_signs=[torch.zeros(-(-p.numel() // 8), dtype=torch.uint8) for p in params]
        if signs
        else None,
        group_of=[index % groups for index in range(len(params))],
        is_vector=[p.dim() <= 1 for p in params],
        options=[options] * groups,
        run_of=[0] * groups,
        scalars=torch.tensor([row] * groups, dtype=torch.float64),
        group_state=torch.zeros(groups, len(GROUP_STATE), dtype=torch.float64),
        tensor_state=torch.zeros(len(params), len(TENSOR_STATE), dtype=torch.float64),
        skipped_steps=torch.zeros(1, dtype=torch.int64),
        masks_nonfinite=masks,
    )


def make_grads(layout: StepLayout, step: int, dtype: torch.dtype = torch.float32) -> Grads:
    """Zeros in places, a spike every seventh step, some tensors and a whole group missing."""
    grads: Grads = []
    for index, param in enumerate(layout.params):
        generator = torch.Generator().manual_seed(1_000 * step + index)
        grad = torch.randn(param.shape, generator=generator) * (30.0 if step % 7 == 6 else 1.0)
        grad *= torch.rand(param.shape, generator=generator) > 0.1
        missing = (step % 5 == 3 and index in (1, 5, 7)) or (step % 11 == 5 and index % 2 == 0)
        grads.append(None if missing else grad.to(dtype))
    return grads


def spoil(grads: Grads, step: int) -> None:
    """NaN and inf in some elements of some steps, in all elements of one tensor in one."""
    if step % 4 == 1:
        for grad in (grads[5], grads[7]):
            if grad is not None:
                grad.view(-1)[::97] = torch.inf
                grad.view(-1)[15:40] = torch.nan
    if step == 9 and grads[8] is not None:
        grads[8].fill_(-torch.inf)


def table(layout: StepLayout) -> torch.Tensor:
    return torch.full((len(layout.params), len(STATISTICS)), torch.inf, dtype=torch.float64)


def check(
    layout: StepLayout,
    steps: int,
    *,
    grad_dtype: torch.dtype = torch.float32,
    change: Callable[[Grads, int], None] | None = None,
    **wrong: float,
) -> None:
    """Step the backend and the reference side by side; compare all they write in every step."""
    expected = copy.deepcopy(layout)
    for name, value in wrong.items():
        layout.scalars[:, SCALARS.index(name)] = value
    backend, reference = CpuBackend(layout), ReferenceBackend(expected)
    dtype = layout.params[0].dtype
    for step in range(steps):
        grads = make_grads(layout, step, grad_dtype)
        if change is not None:
            change(grads, step)
        measured, defined = table(layout), table(layout)
        backend.step(grads, measured)
        reference.step(grads, defined)

        scale = max(p.abs().max() for p in expected.params if p.numel())
        for name in ("params", "exp_avgs", "exp_avg_sqs"):
            for x, y in zip(getattr(layout, name), getattr(expected, name), strict=True):
                largest = y.abs().max() if name != "params" and y.numel() else 0.0
                assert_close(x, y, TRAJECTORY[dtype], max(scale, largest))
        if layout.master_params is not None and expected.master_params is not None:
            for x, y in zip(layout.master_params, expected.master_params, strict=True):
                assert x is not None
                assert y is not None
                assert_close(x, y, TRAJECTORY[torch.float32], scale)
        for name in ("group_state", "tensor_state"):
            y = getattr(expected, name)
            assert_close(getattr(layout, name), y, TRAJECTORY[dtype], y.abs().clamp_min(1e-2))
        tolerance = STATISTICS_TOLERANCE[torch.float32]
        if dtype == torch.float32:
            scales = statistics_scale([p.numel() for p in expected.params], defined)
            for column, name in enumerate(STATISTICS):
                try:
                    assert_close(
                        measured[:, column], defined[:, column], tolerance, scales[:, column]
                    )
                except AssertionError as error:
                    raise AssertionError(f"{name} in step {step}: {error}") from None
        assert torch.equal(layout.skipped_steps, expected.skipped_steps)
        if layout.grad_signs is not None and expected.grad_signs is not None:
            assert all(map(torch.equal, layout.grad_signs, expected.grad_signs))


@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_follows_the_reference(isa: str, options: StepOptions) -> None:
    check(make_layout(options), steps=50)


@pytest.mark.parametrize(
    ("name", "options", "factor"),
    [
        ("lr", StepOptions(), 1.05),
        ("ombeta1", StepOptions(), 1.05),
        ("ombeta2", StepOptions(), 1.05),
        ("epsilon", StepOptions(), 100.0),
        ("weight_decay", StepOptions(), 2.0),
        ("group_clip_grad_norm", LHOPT, 1.05),
        ("grad_clip_ombeta", LHOPT, 1.05),
        ("lamb_update_norm_ombeta", LHOPT, 1.05),
        ("lamb_power", LHOPT, 1.05),
        ("group_clip_grad_z_score", replace(LHOPT, clip=Clip.Z_SCORE), 1.05),
    ],
)
def test_a_wrong_optimizer_does_not(name: str, options: StepOptions, factor: float) -> None:
    with pytest.raises(AssertionError, match="off by"):
        check(make_layout(options), steps=12, **{name: START[name] * factor})


def test_sums_of_many_elements(isa: str) -> None:
    """Where nothing cancels, a sum of 300,000 is good to a few units of float32."""
    layout = make_layout(StepOptions(), shapes=((300_000,),), groups=1)
    generator = torch.Generator().manual_seed(0)
    grad = torch.rand(300_000, generator=generator) + 0.5
    layout.exp_avgs[0].copy_(torch.rand(300_000, generator=generator) * 1e-3)
    layout.exp_avg_sqs[0].copy_(torch.rand(300_000, generator=generator) * 10)
    layout.tensor_state[:, :3] = torch.tensor([5.0, 0.4, 0.05])
    expected = copy.deepcopy(layout)
    measured, defined = table(layout), table(layout)
    CpuBackend(layout).step([grad], measured)
    ReferenceBackend(expected).step([grad], defined)
    torch.testing.assert_close(measured, defined, rtol=1e-6, atol=0, equal_nan=True)
    assert not torch.allclose(measured * (1 + 1e-5), defined, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mixes_dtypes(isa: str, dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    check(make_layout(LHOPT, dtype=dtype), steps=10, grad_dtype=grad_dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    """All finite numbers, and NaN, times 1 - lr weight_decay."""
    layout = make_layout(StepOptions(), shapes=((1,),), dtype=dtype, groups=1, lr=1.0)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = numbers[~numbers.isinf()]
    layout = replace(
        layout,
        params=[numbers.clone()],
        exp_avgs=[torch.zeros(numbers.shape)],
        exp_avg_sqs=[torch.zeros(numbers.shape)],
        grad_signs=None,
    )
    CpuBackend(layout).step([torch.zeros(numbers.shape)])
    decayed = (numbers.float() * torch.tensor(1 - START["weight_decay"])).to(dtype)
    torch.testing.assert_close(layout.params[0], decayed, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("seed", [0, -3, 2**40 + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_at_random_as_defined(isa: str, dtype: torch.dtype, seed: int) -> None:
    """All finite numbers, times 1 - lr weight_decay, in two tensors and two steps."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    numbers = every[~every.isinf()]
    layout = make_layout(StepOptions(), shapes=((3,), numbers.shape), dtype=dtype, groups=1, lr=1.0)
    layout.params[1].copy_(numbers)
    layout = replace(layout, grad_signs=None, rounding="stochastic", rounding_seed=seed)
    backend = CpuBackend(layout)
    positions = torch.arange(len(numbers))
    for step in (1, 2):
        before = layout.params[1].float()
        backend.step([torch.zeros(p.shape) for p in layout.params])
        decayed = before * torch.tensor(1 - START["weight_decay"])
        expected = round_stochastically(decayed, random_words(seed, 1, step, positions), dtype)
        assert torch.equal(layout.params[1].nan_to_num(7.0), expected.nan_to_num(7.0))
        other = round_stochastically(decayed, random_words(seed, 1, step + 1, positions), dtype)
        assert not torch.equal(layout.params[1].nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("way", ["stochastic", "master"])
@pytest.mark.parametrize("options", [OPTIONS[0], LHOPT, OPTIONS[5]], ids=describe)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_follows_the_reference_in_16_bits(
    isa: str, dtype: torch.dtype, options: StepOptions, way: str
) -> None:
    layout = make_layout(options, LARGE, dtype, masks=True)
    if way == "master":
        layout.master_params = [p.float() for p in layout.params]
    else:
        layout = replace(layout, rounding="stochastic", rounding_seed=5)
    check(layout, steps=10, change=spoil)
    if layout.master_params is not None:
        copies = [x.to(dtype) for x in layout.master_params if x is not None]
        assert all(map(torch.equal, layout.params, copies))


@pytest.mark.parametrize("options", [OPTIONS[0], LHOPT, OPTIONS[5]], ids=describe)
@pytest.mark.parametrize("masks", [False, True])
def test_nonfinite_gradients(isa: str, options: StepOptions, masks: bool) -> None:
    layout = make_layout(options, LARGE, masks=masks)
    check(layout, steps=10, change=spoil)
    assert layout.skipped_steps.item() == 3
    assert all(p.isfinite().all() for p in layout.params)


@pytest.mark.parametrize("place", [0, 63, 64, 2_047, 2_048, 65_535, 65_536, 70_208, 70_209])
def test_masks_one_element(isa: str, place: int) -> None:
    """Where blocks, stretches and chunks begin and end, and beyond the last whole vector."""

    def spoil_one(grads: Grads, step: int) -> None:
        assert grads[0] is not None
        grads[0].view(-1)[place] = torch.nan if step else -torch.inf

    check(make_layout(StepOptions(), ((70, 1003),), masks=True), steps=2, change=spoil_one)


def test_a_skipped_step_writes_nothing(isa: str) -> None:
    layout = make_layout(LHOPT)
    before = copy.deepcopy(layout)
    grads = make_grads(layout, 0)
    grads[7].view(-1)[-1] = torch.nan
    measured = table(layout)
    CpuBackend(layout).step(grads, measured)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "grad_signs"):
        assert all(map(torch.equal, getattr(layout, name), getattr(before, name)))
    assert torch.equal(layout.group_state, before.group_state)
    assert torch.equal(layout.tensor_state, before.tensor_state)
    assert layout.skipped_steps.item() == 1
    expected = torch.zeros_like(measured)
    expected[7, STATISTICS.index("grad_nonfinite")] = 1.0
    assert torch.equal(measured, expected)


@pytest.mark.parametrize("size", [3e18, 1e25, 3e38, 1e-25, 1e-38])
@pytest.mark.parametrize("clip", [Clip.ROLLING_MAX, Clip.NONE])
def test_extreme_but_finite_gradients(isa: str, clip: Clip, size: float) -> None:
    """Their squares leave the range of float32; the step does not, nor do norms, clipped or not."""
    options = replace(LHOPT, trust=Trust.NONE, clip=clip)
    layout = make_layout(options, groups=1, signs=False, masks=clip is Clip.NONE)
    expected = copy.deepcopy(layout)
    torch.manual_seed(0)
    grads: Grads = [torch.randn(p.shape).clamp(-1, 1) * size for p in layout.params]
    measured, defined = table(layout), table(layout)
    CpuBackend(layout).step(grads, measured)
    ReferenceBackend(expected).step(grads, defined)
    assert layout.skipped_steps.item() == 0
    column = STATISTICS.index("grad_sq")
    torch.testing.assert_close(
        measured[:, column], defined[:, column], rtol=1e-5, atol=1e-5 * size**2
    )
    torch.testing.assert_close(layout.group_state, expected.group_state, rtol=1e-6, atol=0)
    for x, y in zip(layout.params, expected.params, strict=True):
        assert_close(x, y, TRAJECTORY[torch.float32], 2.0)


@pytest.mark.parametrize("options", [OPTIONS[0], LHOPT, replace(LHOPT, trust=Trust.DELAYED)])
@pytest.mark.parametrize("masks", [False, True])
def test_thread_counts_and_statistics_change_no_bit(options: StepOptions, masks: bool) -> None:
    threads = torch.get_num_threads()
    shapes = (*LARGE, (50,), (129, 513))
    runs = []
    try:
        for count, wants_statistics in ((1, True), (2, True), (3, True), (3, False), (2, True)):
            torch.set_num_threads(count)
            layout = make_layout(options, shapes, masks=masks)
            backend = CpuBackend(layout)
            measured = table(layout) if wants_statistics else None
            for step in range(4):
                backend.step(make_grads(layout, step), measured)
            runs.append((layout, measured))
    finally:
        torch.set_num_threads(threads)
    first, first_statistics = runs[0]
    for layout, measured in runs[1:]:
        assert all(map(torch.equal, layout.params, first.params))
        assert all(map(torch.equal, layout.exp_avg_sqs, first.exp_avg_sqs))
        assert torch.equal(layout.tensor_state, first.tensor_state)
        if measured is not None:
            torch.testing.assert_close(measured, first_statistics, rtol=0, atol=0, equal_nan=True)


def test_a_run_sums_alike_in_company() -> None:
    """What is beside it is of no matter to a run, down to the order of its sums."""
    shapes = ((700_000,), (11, 40_000))
    alone = make_layout(LHOPT, shapes, groups=1)
    company = make_layout(LHOPT, (*shapes, (400_000,)), groups=1)
    company = replace(
        company,
        group_of=[0, 0, 1],
        options=[LHOPT, LHOPT],
        scalars=company.scalars.repeat(2, 1),
        group_state=company.group_state.repeat(2, 1),
        skipped_steps=torch.zeros(2, dtype=torch.int64),
    )
    merged = copy.deepcopy(company)

    def sums(layout: StepLayout, run_of: list[int]) -> torch.Tensor:
        measured = table(layout)
        CpuBackend(replace(layout, run_of=run_of)).step(make_grads(layout, 0), measured)
        return measured[:2].nan_to_num(nan=-1.0)

    expected = sums(alone, [0])
    assert torch.equal(sums(company, [0, 1]), expected)
    assert not torch.equal(sums(merged, [0, 0]), expected)


RUNS_OF_GROUPS = ([0, 0], [0, 1], [1, 0])


def measured_features(layout: StepLayout, *, fused: bool, scale: float = 1.0) -> torch.Tensor:
    """Mean features of ten steps with missing gradients, NaN and inf, over scaled statistics."""
    backend = CpuBackend(layout)
    features = FeatureAccumulator(layout, backend.accumulate_features if fused else None)
    for step in range(10):
        grads = make_grads(layout, step)
        spoil(grads, step)
        statistics = features.next_statistics()
        backend.step(grads, statistics)
        statistics[:, STATISTICS.index("update_sq")] *= scale
        features.recorded()
    return features.pop()


def check_features(value: torch.Tensor, expected: torch.Tensor) -> None:
    logits = torch.tensor([name.startswith("logit") for name in ACCUMULATED])
    scale = expected.nan_to_num().abs()
    for columns, tolerance in ((logits, FUSED_LOGITS), (~logits, FUSED_FEATURES)):
        assert_close(value[:, columns], expected[:, columns], tolerance, scale[:, columns])


@pytest.mark.parametrize("run_of", RUNS_OF_GROUPS)
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("options", [StepOptions(), LHOPT], ids=describe)
def test_finishes_features_as_defined(options: StepOptions, masks: bool, run_of: list[int]) -> None:
    runs = max(run_of) + 1
    layout = replace(
        make_layout(options, masks=masks),
        run_of=run_of,
        skipped_steps=torch.zeros(runs, dtype=torch.int64),
    )
    layouts = [copy.deepcopy(layout) for _ in range(3)]
    defined = measured_features(layouts[0], fused=False)
    assert defined.isfinite().any(1).all()
    check_features(measured_features(layouts[1], fused=True), defined)
    with pytest.raises(AssertionError, match="off by"):
        check_features(measured_features(layouts[2], fused=True, scale=1 + 1e-9), defined)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 0.0, 1e-300, 1e300])
def test_features_of_numbers_at_the_edge(number: float) -> None:
    """What is no number is left out, infinities count as the largest ones."""
    layout = make_layout(LHOPT, shapes=((5,), (4, 4), (3,)), groups=1)
    backend = CpuBackend(layout)
    measured = table(layout)
    backend.step(make_grads(layout, 0), measured)
    for column in range(len(STATISTICS)):
        plain = FeatureAccumulator(layout)
        statistics = plain.next_statistics()
        statistics.copy_(measured)
        statistics[1, column] = number
        plain.recorded()
        sums = torch.zeros_like(plain.sums)
        backend.accumulate_features(statistics, sums)
        expected = plain.folded_sums()
        assert torch.equal(sums[1], expected[1])
        assert torch.allclose(sums[0], expected[0], rtol=1e-12, atol=1e-7), STATISTICS[column]


def test_nothing_to_finish_features_of() -> None:
    layout = make_layout(LHOPT)
    sums = torch.zeros(2, 1, len(ACCUMULATED), dtype=torch.float64)
    backend = CpuBackend(layout)
    backend.accumulate_features(table(layout).zero_(), sums)
    assert not sums.any()
    for statistics, where in ((table(layout)[1:], sums), (table(layout), sums[:, 0])):
        with pytest.raises(ValueError, match=r"(statistics|sums) must be torch\.float64"):
            backend.accumulate_features(statistics, where)


def test_takes_tables_of_gradients() -> None:
    """As lists, and with whatever the arrays say when the step begins."""
    layout = make_layout(LHOPT)
    expected = copy.deepcopy(layout)
    backend, by_lists = CpuBackend(layout), CpuBackend(expected)
    first = tabulated(make_grads(layout, 0), layout.params, "cpu")
    assert tabulated(first, layout.params, "cpu") is first
    table_of_all = replace(first, addresses=first.addresses.copy(), dtypes=first.dtypes.copy())
    for step in range(4):  # the last one leaves tensors out
        grads = make_grads(layout, step)
        found = tabulated(grads, layout.params, "cpu")
        table_of_all.addresses[:], table_of_all.dtypes[:] = found.addresses, found.dtypes
        backend.step(table_of_all)
        by_lists.step(grads)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        pairs = zip(getattr(layout, name), getattr(expected, name), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs)
    by_lists.step(make_grads(layout, 4))
    assert not torch.equal(layout.params[-3], expected.params[-3])


def test_keeps_gradient_signs_without_statistics(isa: str) -> None:
    layout = make_layout(StepOptions(maximize=True))
    grads = [torch.randn(p.shape) for p in layout.params]
    CpuBackend(layout).step(grads)
    assert layout.grad_signs is not None
    for signs, grad in zip(layout.grad_signs, grads, strict=True):
        assert torch.equal(signs, is_negative_bits(-grad))


def test_steps_channels_last(isa: str) -> None:
    layout = make_layout(StepOptions(), shapes=((3, 5, 7, 2),), groups=1, signs=False)
    expected = copy.deepcopy(layout)
    channels_last = torch.channels_last
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        setattr(layout, name, [x.to(memory_format=channels_last) for x in getattr(layout, name)])
    grad = torch.randn(3, 5, 7, 2)
    CpuBackend(layout).step([grad.to(memory_format=channels_last)])
    CpuBackend(expected).step([grad])
    torch.testing.assert_close(layout.params[0], expected.params[0], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="gradient 0 has strides"):
        CpuBackend(layout).step([grad])


def test_nothing_to_step() -> None:
    layout = make_layout(LHOPT)
    CpuBackend(layout).step([None] * len(layout.params), table(layout))
    assert not layout.tensor_state.any()
    assert not layout.group_state.any()
    CpuBackend(make_layout(LHOPT, shapes=())).step([])


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        ({"dtype": torch.float64}, 'parameter 0 is torch.float64.*backend="reference"'),
        ({"dtype": torch.int32}, "parameter 0 is torch.int32"),
    ],
)
def test_refuses_dtypes(spoiled: dict[str, torch.dtype], message: str) -> None:
    layout = make_layout(StepOptions(), shapes=((3,),), groups=1)
    layout.params[0] = layout.params[0].to(**spoiled)
    with pytest.raises(ValueError, match=message):
        CpuBackend(layout)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "exp_avgs",
            [torch.zeros(3, dtype=torch.bfloat16)],
            r"exp_avgs\[0\] is torch.bfloat16 and exp_avg_sqs\[0\] torch.float32; expected both",
        ),
        ("exp_avg_sqs", [torch.zeros(4)], r"exp_avg_sqs\[0\] must be .* \[3\] on the CPU"),
        ("exp_avg_sqs", [], "layout.exp_avg_sqs has 0 entries for 1 parameters"),
        ("grad_signs", [torch.zeros(3, dtype=torch.uint8)], r"grad_signs\[0\] must be"),
        ("master_params", [torch.zeros(4)], r"master_params\[0\] must be torch.float32 \[3\]"),
        ("master_params", [torch.zeros(3)], "a float32 parameter needs no master"),
        ("master_params", [], "layout.master_params has 0 entries for 1 parameters"),
        ("scalars", torch.zeros(1, 3, dtype=torch.float64), "scalars must be torch.float64"),
        ("skipped_steps", torch.zeros(1), "skipped_steps must be torch.int64"),
        ("skipped_steps", torch.zeros(1, 1, dtype=torch.int64), r"skipped_steps must be .* \[1\]"),
        ("run_of", [1], "run_of must be one of 1 runs"),
        ("run_of", [0, 0], "for each of 1 groups"),
        ("group_of", [1], r"tensors\[0\].group is 1, but there are 1 groups"),
    ],
)
def test_refuses_layouts(name: str, value: object, message: str) -> None:
    layout = make_layout(StepOptions(), shapes=((3,),), groups=1)
    setattr(layout, name, value)
    with pytest.raises(ValueError, match=message):
        CpuBackend(layout)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.zeros(3, dtype=torch.float64)], "gradient 0 is torch.float64"),
        ([torch.zeros(4)], r"gradient 0 has shape \(4,\), expected \(3,\)"),
        ([torch.zeros(6)[::2]], r"gradient 0 has strides \(2,\)"),
        ([torch.zeros(3, device="meta")], "gradient 0 is on meta, its parameter on cpu"),
        ([], "expected 1 gradients, got 0"),
    ],
)
def test_refuses_gradients(grads: Grads, message: str) -> None:
    layout = make_layout(StepOptions(), shapes=((3,),), groups=1)
    with pytest.raises(ValueError, match=message):
        CpuBackend(layout).step(grads)
    assert not layout.tensor_state.any()


def test_refuses_statistics() -> None:
    layout = make_layout(StepOptions(), shapes=((3,),), groups=1)
    with pytest.raises(ValueError, match=r"statistics must be torch\.float64"):
        CpuBackend(layout).step([torch.zeros(3)], torch.zeros(1, len(STATISTICS)))


def test_the_extension_checks_what_it_is_given() -> None:
    group = {
        "denominator": 0,
        "weight_decay": 0,
        "clip": 0,
        "trust": 0,
        "trust_ignores_vectors": False,
        "radam_warmup": False,
        "maximize": False,
    }
    tensor = {
        "param": 64,
        "dtype": 0,
        "master": None,
        "correction": None,
        "size": 1,
        "moments": 0,
        "exp_avg": 64,
        "exp_avg_sq": 64,
        "scales": None,
        "grad_signs": None,
        "group": 0,
        "is_vector": True,
    }
    with pytest.raises(ValueError, match="clip is 4, expected 0 to 3"):
        _C.GroupOptions(**{**group, "clip": 4})
    for wrong, message in (
        ({"dtype": 3}, "dtype is 3, expected 0 to 2"),
        ({"size": -1}, "size is negative"),
        ({"param": 0}, "is a null pointer"),
        ({"exp_avg": 66}, "exp_avg is not aligned"),
        ({"grad_signs": 0}, "grad_signs is a null pointer"),
        ({"master": 0, "dtype": 1}, "master is a null pointer"),
        ({"master": 66, "dtype": 1}, "master is not aligned"),
        ({"moments": 3}, "moments is 3, expected 0 to 2"),
        ({"moments": 2}, "codes and nothing else has scales"),
        ({"scales": (64, 64)}, "codes and nothing else has scales"),
        ({"moments": 2, "scales": (64, 64)}, "codes come in whole blocks of 64"),
        ({"moments": 2, "scales": (64, 0), "size": 64}, "a scale is a null pointer"),
        ({"correction": (64, 4), "dtype": 1}, "a correction has 8 or 16 bits"),
        ({"correction": (64, 8)}, "that of a bfloat16 parameter without a master"),
        ({"correction": (0, 8), "dtype": 1}, "correction is a null pointer"),
        ({"correction": (65, 16), "dtype": 1}, "correction is not aligned"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.TensorSpec(**{**tensor, **wrong})
    addresses = {"scalars": 64, "group_state": 64, "tensor_state": 64, "skipped_steps": 64}
    parts = {
        "tensors": [_C.TensorSpec(**tensor)],
        "groups": [_C.GroupOptions(**group)],
        "run_of": [0],
        "num_runs": 1,
    }
    for wrong, message in (
        ({"scalars": 0}, "scalars is a null pointer"),
        ({"run_of": []}, "run_of has 0 entries for 1 groups"),
        ({"run_of": [-1]}, r"run_of\[0\] is -1, but there are 1 runs"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.Step(**{**parts, **addresses, **wrong}, masks_nonfinite=False, rounding_seed=None)
    step = _C.Step(**parts, **addresses, masks_nonfinite=False, rounding_seed=None)
    with pytest.raises(ValueError, match="num_threads must be at least 1"):
        step.run(0, 0)
    for addresses, codes, message in (
        ([], [], "expected 1 addresses and dtypes of gradients, got 0 and 0"),
        ([65], [7], r"dtypes\[0\] is 7"),
        ([64], [-2], r"dtypes\[0\] is -2"),
        ([0], [0], r"addresses\[0\] is null"),
        ([65], [1], r"addresses\[0\] is not aligned"),
    ):
        with pytest.raises(ValueError, match=message):
            step.set_gradients(np.array(addresses, np.int64), np.array(codes, np.int8))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        step.set_gradients(np.array([64], np.int32), np.array([0], np.int8))
    layout = {"numel": [1], "group_of": [0], "group_clips": [True], "run_of": [0], "num_runs": 1}
    for wrong, message in (
        ({"numel": [-1]}, r"numel\[0\] is negative"),
        ({"numel": []}, "numel has 0 entries for 1 tensors"),
        ({"group_of": [1]}, r"group_of\[0\] is 1, but there are 1 groups"),
        ({"num_runs": 0}, r"run_of\[0\] is 0, but there are 0 runs"),
    ):
        with pytest.raises(ValueError, match=message):
            _C.InnerFeatures(**{**layout, **wrong})
    with pytest.raises(ValueError, match="sums is a null pointer"):
        _C.InnerFeatures(**layout).accumulate(64, 0)


def test_instruction_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scalar" in ISAS
    monkeypatch.delenv("LHOPT_CPU_ISA", raising=False)
    assert _C.active_isa() == ISAS[0]
    for name in ISAS:
        monkeypatch.setenv("LHOPT_CPU_ISA", name)
        assert CpuBackend(make_layout(StepOptions())).isa == name
    monkeypatch.setenv("LHOPT_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match='LHOPT_CPU_ISA is "mmx", but this processor offers: '):
        CpuBackend(make_layout(StepOptions()))


FORK = """
import os, sys, torch
sys.path[:0] = {path!r}
from test_cpu import LHOPT, CpuBackend, make_grads, make_layout

torch.set_num_threads(3)
layout = make_layout(LHOPT, ((300, 1000),))
backend = CpuBackend(layout)
grads = make_grads(layout, 0)
backend.step(grads)
child = os.fork()  # from here on only what does not need torch's own threads
backend.step(grads)
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_steps_after_a_fork() -> None:
    script = FORK.format(path=[str(Path(__file__).parent), *filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
