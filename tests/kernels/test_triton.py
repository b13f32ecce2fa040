"""The Triton kernels against the reference: on a GPU, or on the CPU in Triton's interpreter.

``TRITON_INTERPRET=1 pytest tests/kernels/test_triton.py`` runs the latter, ``-m gpu`` the former.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tolerances
import torch
from cases import INTERPRETED
from tolerances import Tolerance, assert_close
from triton_runs import (
    DEVICE,
    MARKS,
    OPTIONS,
    SHAPES,
    assert_same_run,
    assert_wrong_run_fails,
    largest,
    make_grads,
    make_layout,
    misaligned,
    need_device,
    quiet_interpreter,  # noqa: F401 - a fixture
    run,
    spoiled,
    to_device,
)

from lhopt_fused import CIAO
from lhopt_fused.features import ACCUMULATED, mean_features, step_norms, tensor_features
from lhopt_fused.kernels import get_backend
from lhopt_fused.kernels.rounding import random_words, round_stochastically
from lhopt_fused.types import (
    SCALARS,
    STATISTICS,
    TENSOR_STATE,
    Clip,
    Denominator,
    StepOptions,
    Trust,
)

need_device()

pytestmark = MARKS


@pytest.mark.parametrize("signs", [False, True], ids=["", "signs"])
@pytest.mark.parametrize("name", OPTIONS)
def test_trajectory_is_the_reference(name: str, signs: bool) -> None:
    layout = make_layout(OPTIONS[name], signs=signs)
    grads = lambda step: make_grads(layout.params, step)  # noqa: E731
    value = run(layout, "triton", grads, 5)
    assert_same_run(value, run(layout, "reference", grads, 5))
    assert_wrong_run_fails(value, layout, grads, 5)
    if OPTIONS[name].trust is Trust.DELAYED:
        norms = torch.stack([p.double().norm() for p in value.params[-1]])
        uses = norms.clone()
        uses[[OPTIONS[name].trust_ignores_vectors and v for v in layout.is_vector]] = 0.0
        column = value.layout.tensor_state[:, TENSOR_STATE.index("param_norm")]
        assert_close(column, uses, tolerances.STATISTICS[torch.float32], norms)


@pytest.mark.parametrize(
    ("param", "grad"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(param: torch.dtype, grad: torch.dtype) -> None:
    layout = make_layout(OPTIONS["lhopt_delayed"], ((33, 8), (7,)), param)
    grads = lambda step: make_grads(layout.params, step, grad)  # noqa: E731
    value = run(layout, "triton", grads, 4)
    assert_same_run(value, run(layout, "reference", grads, 4), param)
    assert_wrong_run_fails(value, layout, grads, 4)


def test_dtypes_mix_in_one_model() -> None:
    """In one group: a step of each, of parameters and of gradients, beside the others."""
    layout = make_layout(OPTIONS["max_decoupled_lamb"], ((9, 8), (7,), (5, 5), (16,)))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32)
    layout.params = [p.to(dtype) for p, dtype in zip(layout.params, dtypes, strict=True)]

    def grads(step: int) -> list[torch.Tensor | None]:
        made = make_grads(layout.params, step)
        return [g.bfloat16() if i == 3 and g is not None else g for i, g in enumerate(made)]

    value = run(layout, "triton", grads, 4)
    assert_same_run(value, run(layout, "reference", grads, 4), torch.bfloat16)
    assert_wrong_run_fails(value, layout, grads, 4)


def test_launches_are_as_many_for_many_tensors_and_groups_as_for_two() -> None:
    """Groups share launches by their options, not by which they are."""
    from lhopt_fused.kernels.triton_launch import Launch

    def made(options: list[StepOptions]) -> int:
        shapes, before = ((5, 4),) * len(options), Launch.made
        layout = make_layout(options, shapes, group_of=range(len(options)))
        get_backend("triton", to_device(layout))
        return Launch.made - before

    lhopt, adamw = OPTIONS["lhopt"], OPTIONS["adamw"]
    assert made([lhopt] * 40) == made([lhopt] * 2)
    assert made([lhopt, adamw] * 20) == made([lhopt, adamw]) > made([lhopt] * 2)


def test_bfloat16_rounds_to_nearest_even() -> None:
    """A step of exactly half a unit in the last place goes to the even neighbour, up and down."""
    ulp = 2.0**-7
    start = torch.tensor([1.0, 1.0 + ulp, 1.0 + 2 * ulp, -1.0 - ulp, 2.0 - ulp])
    options = StepOptions(Denominator.MAX)  # without a square root that a GPU approximates
    layout = make_layout(
        options, ((5,),), torch.bfloat16, lr=0.5 * ulp, weight_decay=0.0, epsilon=0.0
    )
    layout.params[0].copy_(start)
    sign = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0])
    layout = to_device(layout)
    get_backend("triton", layout).step([sign.to(DEVICE)])  # u is the sign on the first step
    expected = (start - 0.5 * ulp * sign).bfloat16()
    assert torch.equal(layout.params[0].cpu(), expected)
    assert not torch.equal(expected, (start - 0.6 * ulp * sign).bfloat16())


@pytest.mark.parametrize("start", [0, 2**32 - 4096, 2**32, 3 * 2**40], ids=hex)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_has_the_bits_of_the_definition(dtype: torch.dtype, start: int) -> None:
    """Over float32 numbers of every size, NaN and inf, and elements beyond 2^32."""
    from triton_kernels import round_kernel

    bits = torch.randint(
        -(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(1), dtype=torch.int64
    )
    x = bits.to(torch.int32).view(torch.float32)
    x[:1024] = torch.randn(1024, generator=torch.Generator().manual_seed(2)) * 2.0**-14
    x[1024:1030] = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 65519.0])
    layout = replace(make_layout(StepOptions(), ((1,),) * 3), rounding_seed=2**63 + 12345)
    layout.tensor_state[:, TENSOR_STATE.index("step")] = 9.0
    rounded = round_kernel(x.to(DEVICE), dtype, to_device(layout), tensor=2, start=start)
    elements = start + torch.arange(4096)
    for step, is_same in ((9, True), (10, False)):
        words = random_words(layout.rounding_seed, 2, step, elements)
        expected = round_stochastically(x, words, dtype)
        nan = rounded.isnan() & expected.isnan()
        same = (rounded.view(torch.int16) == expected.view(torch.int16)) | nan
        assert bool(same.all()) == is_same


@pytest.mark.parametrize("way", ["stochastic", "master"])
@pytest.mark.parametrize(("name", "masks"), [("lhopt", False), ("lhopt_delayed", True)])
def test_other_ways_to_16_bits_are_the_reference(name: str, masks: bool, way: str) -> None:
    """Whole and ragged chunks, deferred updates and not; NaN among the gradients."""
    layout = make_layout(OPTIONS[name], ((33, 8), (7,), (9, 41)), torch.bfloat16, masks=masks)
    if way == "stochastic":
        layout.rounding = "stochastic"
    else:
        layout.master_params = [p.float() for p in layout.params]
    grads = spoiled(layout, float("nan"))
    value, expected = (run(layout, backend, grads, 4) for backend in ("triton", "reference"))
    assert_same_run(value, expected, torch.bfloat16)
    if way == "master":
        masters = zip(value.layout.master_params, expected.layout.master_params, strict=True)
        for p, q in masters:
            assert_close(p, q, tolerances.TRAJECTORY[torch.float32], largest(q))
        pairs = list(zip(value.layout.params, value.layout.master_params, strict=True))
        assert all(torch.equal(p, master.bfloat16()) for p, master in pairs)
    else:  # results that differ in their last bit round alike but for one in thousands
        pairs = list(zip(value.params[-1], expected.params[-1], strict=True))
        unequal = sum(int((p != q).sum()) for p, q in pairs)
        assert unequal <= 3
        other = run(replace(layout, rounding_seed=1), "triton", grads, 4)
        pairs = list(zip(other.params[-1], expected.params[-1], strict=True))
        assert sum(int((p != q).sum()) for p, q in pairs) > 50


@pytest.mark.parametrize("signs", [False, True], ids=["", "signs"])
def test_sizes(signs: bool) -> None:
    """Around vectors, tiles and chunks: whole ones, one element more, one less, none at all."""
    sizes = (0, 1, 3, 4, 7, 8, 1000, 1024, 1025, 4095, 4097, 9000)
    layout = make_layout(OPTIONS["lhopt"], tuple((n, 1) for n in sizes), signs=signs)
    grads = lambda step: make_grads(layout.params, step)  # noqa: E731
    value = run(layout, "triton", grads, 2)
    assert_same_run(value, run(layout, "reference", grads, 2))
    assert_wrong_run_fails(value, layout, grads, 2)


@pytest.mark.parametrize("what", ["params", "exp_avgs", "exp_avg_sqs", "grads"])
def test_misaligned_views(what: str) -> None:
    options, shapes = OPTIONS["max_decoupled_lamb"], ((33, 9), (7,))
    plain = make_layout(options, shapes)
    layout = to_device(plain)
    if what != "grads":
        getattr(layout, what)[0] = misaligned(getattr(layout, what)[0])
    backend = get_backend("triton", layout)
    for step in range(2):
        grads = to_device(make_grads(plain.params, step))
        if what == "grads" and step == 1:  # what the backend expects changes on the way
            grads[0] = misaligned(grads[0])
        backend.step(grads)
    expected = run(plain, "reference", lambda step: make_grads(plain.params, step), 2)
    for p, q in zip(layout.params, expected.layout.params, strict=True):
        assert_close(p, q, tolerances.TRAJECTORY[torch.float32], largest(q))


def test_groups_differ_in_options_scalars_and_gradients() -> None:
    """Three groups over interleaved tensors; one of them without a gradient in step 1."""
    options = [OPTIONS["lhopt"], OPTIONS["adamw_warmup_maximize"], OPTIONS["lhopt"]]
    layout = make_layout(options, ((5, 4), (6,), (3, 3), (9, 2)), group_of=(0, 1, 2, 0))
    layout.scalars[2, SCALARS.index("lr")] = 3e-2

    def grads(step: int) -> list[torch.Tensor | None]:
        made = make_grads(layout.params, step)
        return [None if step == 1 and i == 2 else g for i, g in enumerate(made)]

    value = run(layout, "triton", grads, 4)
    assert_same_run(value, run(layout, "reference", grads, 4))
    assert_wrong_run_fails(value, layout, grads, 4)


def test_runs_of_interleaved_groups_skip_apart() -> None:
    """Groups 0 and 2 are run 1, groups 1 and 3 run 0, and one of these has no tensors."""
    options = [OPTIONS["lhopt"], OPTIONS["adamw"], OPTIONS["lhopt_delayed"], OPTIONS["adamw"]]
    layout = make_layout(options, ((5, 4), (6,), (3, 3), (9, 2)), group_of=(0, 1, 2, 1))
    layout = replace(layout, run_of=[1, 0, 1, 0], skipped_steps=torch.zeros(2, dtype=torch.int64))
    for masks in (False, True):
        layout.masks_nonfinite = masks
        grads = spoiled(layout, float("nan"))
        value = run(layout, "triton", grads, 4)
        assert_same_run(value, run(layout, "reference", grads, 4))
        assert value.layout.skipped_steps.tolist() == [0, 1]
        with pytest.raises(AssertionError):
            assert_same_run(value, run(replace(layout, run_of=[0, 1, 0, 1]), "reference", grads, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["adamw", "lhopt"])
def test_nonfinite_skips_the_step(name: str, bad: float) -> None:
    layout = make_layout(OPTIONS[name], ((33, 3), (7,)))
    value = run(layout, "triton", spoiled(layout, bad), 4)
    assert_same_run(value, run(layout, "reference", spoiled(layout, bad), 4))
    assert value.layout.skipped_steps.item() == 1
    marks = value.statistics[2][:, STATISTICS.index("grad_nonfinite")]
    assert marks.tolist() == [1.0, 0.0]
    assert torch.equal(value.params[2][0], value.params[1][0])


@pytest.mark.parametrize("signs", [False, True], ids=["", "signs"])
@pytest.mark.parametrize("name", OPTIONS)
def test_nonfinite_elements_are_masked(name: str, signs: bool) -> None:
    layout = make_layout(OPTIONS[name], ((33, 3), (7,)), signs=signs, masks=True)
    grads = spoiled(layout, float("inf"))
    value = run(layout, "triton", grads, 4)
    assert_same_run(value, run(layout, "reference", grads, 4))
    assert value.layout.skipped_steps.item() == 1
    assert torch.equal(value.params[2][0].view(-1)[[3, -1]], value.params[1][0].view(-1)[[3, -1]])
    assert_wrong_run_fails(value, layout, spoiled(layout, 0.0), 4)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_outside_float32_are_finite(scale: float) -> None:
    """Gradients whose squares overflow or vanish are clipped like any other."""
    layout = make_layout(StepOptions(Denominator.MAX, clip=Clip.NORM), ((5, 5), (7,)))
    layout.scalars[:, SCALARS.index("group_clip_grad_norm")] = 0.5 * scale

    def grads(step: int) -> list[torch.Tensor | None]:
        return [g if g is None else g * scale for g in make_grads(layout.params, step)]

    value, expected = run(layout, "triton", grads, 2), run(layout, "reference", grads, 2)
    assert value.layout.skipped_steps.item() == 0
    column = STATISTICS.index("clip_coefficient")
    got, wanted = value.statistics[0][:, column], expected.statistics[0][:, column]
    assert_close(got, wanted, tolerances.STATISTICS[torch.float32], wanted)
    for p, q in zip(value.params[-1], expected.params[-1], strict=True):
        assert_close(p, q, tolerances.TRAJECTORY[torch.float32], largest(q))


def test_statistics_do_not_change_the_step() -> None:
    """Bit for bit: the kernels with and without statistics compute the same expressions."""
    layout = make_layout(OPTIONS["lhopt"])
    runs = []
    for measured in (False, True):
        mine = to_device(layout)
        backend = get_backend("triton", mine)
        table = torch.zeros(len(SHAPES), len(STATISTICS), dtype=torch.float64, device=DEVICE)
        for step in range(2):
            backend.step(to_device(make_grads(layout.params, step)), table if measured else None)
        runs.append(mine)
    for p, q in zip(runs[0].params, runs[1].params, strict=True):
        assert torch.equal(p, q)


def test_two_runs_are_bit_identical() -> None:
    layout = make_layout(OPTIONS["lhopt"], ((70, 80), (7,)), signs=True)
    grads = lambda step: make_grads(layout.params, step)  # noqa: E731
    first, second = (run(layout, "triton", grads, 3) for _ in range(2))
    for x, y in zip(first.statistics, second.statistics, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
    for x, y in zip(first.params[-1], second.params[-1], strict=True):
        assert torch.equal(x, y)
    assert torch.equal(first.layout.tensor_state, second.layout.tensor_state)
    other = run(layout, "triton", lambda step: make_grads(layout.params, step + 1), 3)
    assert not torch.equal(other.layout.tensor_state, first.layout.tensor_state)


def test_features_are_accumulated_on_the_device() -> None:
    """The same as ``features.py`` makes of the same statistics, over steps with gaps."""
    options = [OPTIONS["lhopt"], OPTIONS["adamw"]]
    layout = to_device(make_layout(options, ((33, 9), (7,), (0, 3), (5, 5)), group_of=(0, 1, 0, 0)))
    backend = get_backend("triton", layout)
    sums = torch.zeros(2, 1, len(ACCUMULATED), dtype=torch.float64, device=DEVICE)
    expected = torch.zeros(2, 1, len(ACCUMULATED), dtype=torch.float64)
    numel = torch.tensor([float(p.numel()) for p in layout.params], dtype=torch.float64)
    group_of, run_of = torch.tensor(layout.group_of), torch.tensor(layout.run_of)
    clips = torch.tensor([layout.options[g].clip is not Clip.NONE for g in layout.group_of])
    table = torch.zeros(4, len(STATISTICS), dtype=torch.float64, device=DEVICE)
    for step in range(5):
        grads = [None if step == 4 else g for g in make_grads(layout.params, step)]
        backend.step(to_device(grads), table)
        backend.accumulate_features(table, sums)
        features = tensor_features(table.cpu(), numel, clips)
        means = mean_features(features, group_of, run_of, 1)
        norms = step_norms(table.cpu(), torch.zeros(4, dtype=torch.int64), 1)
        means = torch.cat([means, norms], dim=-1)
        expected[0] += means.nan_to_num(nan=0.0)
        expected[1] += ~means.isnan()
    assert torch.equal(sums[1].cpu(), expected[1])
    assert expected[1, 0].tolist()[:2] == [4.0, 4.0]
    # Phi takes erf here, not erfc: 1e-16 in a probability of 1e-8 is 1e-8 in its logit
    tolerance = Tolerance(1e-8, 1e-8)
    assert_close(sums[0], expected[0], tolerance, expected[0].abs())
    with pytest.raises(AssertionError):
        assert_close(sums[0], expected[0] * (1 + 1e-6), tolerance, expected[0].abs())


def test_large_tensors_have_64_bit_offsets() -> None:
    from lhopt_fused.kernels.triton_chunks import chunk_rows, chunk_size

    numel = 2**32 + 5
    size = chunk_size(numel)
    chunks = chunk_rows([numel], [4], [True], [0], size)
    starts, lengths = chunks.aligned[0][:, 1], chunks.aligned[0][:, 2]
    assert starts.dtype == np.int64
    assert int(starts[-1] + lengths[-1]) == 2**32 + 4
    assert chunks.ragged[0].tolist() == [[0, 2**32 + 4, 1, len(starts)]]
    assert np.array_equal(starts[1:], starts[:-1] + lengths[:-1])
    assert lengths.max() == size <= 2**15


def test_compiling_is_timed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="lhopt_fused.kernels.triton_backend")
    layout = to_device(make_layout(StepOptions(), ((4,),)))
    backend = get_backend("triton", layout)
    first, messages = backend.compile_seconds, len(caplog.messages)
    assert first > 0
    assert [m.split(" ready")[0] for m in caplog.messages] == [
        "2 kernels of features",
        "6 kernels of a step",
    ]
    backend.step([torch.ones(4, device=DEVICE)])
    assert (backend.compile_seconds, len(caplog.messages)) == (first, messages)
    backend.step([torch.ones(4, device=DEVICE, dtype=torch.bfloat16)])
    assert backend.compile_seconds > first


def test_few_programs_share_the_chunks_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of delayed trust ratios; all others find nothing to do."""
    from lhopt_fused.kernels import triton_plan

    monkeypatch.setattr(triton_plan, "_WAITING_PROGRAMS", 2)
    layout = make_layout(OPTIONS["lhopt_delayed"], ((5000, 3), (7,)))
    grads = lambda step: make_grads(layout.params, step)  # noqa: E731
    value = run(layout, "triton", grads, 2)
    assert_same_run(value, run(layout, "reference", grads, 2))
    assert_wrong_run_fails(value, layout, grads, 2)


def test_bad_input() -> None:
    layout = to_device(make_layout(StepOptions(), ((4,),)))
    meta = replace(layout, params=[layout.params[0].to("meta")])
    with pytest.raises(ValueError, match="got a tensor on meta"):
        get_backend("triton", meta)
    double = replace(layout, params=[layout.params[0].double()])
    with pytest.raises(ValueError, match=r"parameter 0 is torch\.float64"):
        get_backend("triton", double)
    backend, before = get_backend("triton", layout), layout.params[0].clone()
    wrong = torch.ones(4, dtype=torch.float64, device=DEVICE)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"gradient 0 is torch\.float64"):
            backend.step([wrong])
    assert torch.equal(layout.params[0], before)
    backend.step([torch.ones(4, device=DEVICE)])
    assert not torch.equal(layout.params[0], before)


if not INTERPRETED:

    def test_cuda_graph_replays_with_changed_hyperparameters() -> None:
        """A captured step equals the uncaptured one bit for bit, also after a change of lr."""
        plain = make_layout(OPTIONS["lhopt"])
        eager, captured = to_device(plain), to_device(plain)
        grads = to_device(make_grads(plain.params, 0))
        backends = get_backend("triton", eager), get_backend("triton", captured)
        for backend in backends:
            backend.step(grads)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            backends[1].step(grads)
        for step in range(1, 4):
            for layout in (eager, captured):
                layout.scalars[:, SCALARS.index("lr")] *= 0.5
            for grad, new in zip(grads, make_grads(plain.params, step), strict=True):
                if grad is not None and new is not None:
                    grad.copy_(new)
            backends[0].step(grads)
            graph.replay()
        for p, q in zip(eager.params, captured.params, strict=True):
            assert torch.equal(p, q)

    def test_a_step_does_not_synchronise() -> None:
        layout = to_device(make_layout(OPTIONS["lhopt"]))
        backend = get_backend("triton", layout)
        grads = to_device(make_grads(layout.params, 0))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(100):
                backend.step(grads)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("trust", ["exact", "delayed"])
    def test_an_optimizer_does_not_synchronise(trust: str) -> None:
        """Statistics, features and a learning rate that moves at every step included."""
        params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in SHAPES]
        optimizer = CIAO.lhopt(params, trust=trust, inner_feature_frequency=1)
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(100):
                optimizer.param_groups[0]["lr"] = 1e-3 / (1 + step)
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_tensors_on_the_cpu_are_refused() -> None:
        with pytest.raises(ValueError, match="CUDA device"):
            get_backend("triton", make_layout(StepOptions(), ((4,),)))

    def test_a_tensor_of_more_than_2_31_elements() -> None:
        numel = 2**31 + 9
        if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
            pytest.skip("needs 40 GiB of GPU memory")
        layout = to_device(make_layout(StepOptions(), ((1,),), torch.bfloat16))
        layout.params = [torch.ones(numel, dtype=torch.bfloat16, device=DEVICE)]
        layout.exp_avgs = [torch.zeros(numel, device=DEVICE)]
        layout.exp_avg_sqs = [torch.zeros(numel, device=DEVICE)]
        get_backend("triton", layout).step([torch.ones_like(layout.params[0])])
        values = layout.params[0]
        assert bool((values == values[0]).all())
        assert values[0] != 1
