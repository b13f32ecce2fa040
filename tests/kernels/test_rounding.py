"""16-bit parameters: stochastic rounding, float32 master weights, and what a checkpoint keeps."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from cases import device_of, make_params, set_grads, with_triton
from tolerances import TRAJECTORY, assert_close

from lhopt_fused import CIAO, AdamW
from lhopt_fused.kernels.rounding import random_words, round_stochastically

HALVES = (torch.bfloat16, torch.float16)
BACKENDS = ["reference", "cpu", *with_triton()]
WAYS = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic", "rounding_seed": 7},
    "master": {"master_weights": True},
}
SHAPES = ((17, 9), (5,), (3, 40))
EDGES = {
    # between two numbers of the dtype, from its subnormals to its largest
    torch.bfloat16: (1.0, 1.003, -3.14159, 1e-39, 2.0**-126 * 1.7, 0.9999, 65000.0, -3.38e38),
    torch.float16: (1.0, 1.0003, -3.14159, 1e-5, 6.1e-5, -3e-8, 2.0**-25, 0.99999, 65503.0),
}


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of ``dtype`` on either side of ``x``; twice ``x`` itself where it is one."""
    near = torch.tensor(x, dtype=torch.float64).to(dtype)
    value = float(near)
    if value == x:
        return x, x
    bits = near.view(torch.int16)
    away = (bits + 1).view(dtype) if value != 0 else torch.tensor(1, dtype=torch.int16).view(dtype)
    inward = (bits - 1).view(dtype) if value != 0 else near
    other = float(away.copysign(torch.tensor(x)) if abs(value) < abs(x) else inward)
    return min(value, other), max(value, other)


def mix(x: int) -> int:
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


def word(seed: int, tensor: int, step: int, element: int) -> int:
    """The definition once more, in plain integers."""
    keys = []
    for key in (0x9E3779B9, 0x85EBCA6B):
        for part in (seed, seed >> 32, tensor, step, element >> 32):
            key = mix(key ^ part % 2**32)
        keys.append(key)
    return mix(mix((element + keys[0]) % 2**32) ^ keys[1])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 + 5])
def test_words_are_those_of_the_definition(seed: int) -> None:
    elements = [0, 1, 2, 1000, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 3]
    words = random_words(seed, 3, 5, torch.tensor(elements))
    assert words.tolist() == [word(seed, 3, 5, element) for element in elements]
    assert len(set(words.tolist())) == len(elements)


def test_words_look_random() -> None:
    """Every bit is set half the time, and neither neighbours nor the next step's words agree."""
    count = 2**16
    elements = torch.arange(count)
    words = random_words(0, 0, 1, elements)
    others = {
        "neighbour": words.roll(1),
        "step": random_words(0, 0, 2, elements),
        "tensor": random_words(0, 1, 1, elements),
        "seed": random_words(1, 0, 1, elements),
    }
    five_sigma = 5 * 0.5 * count**0.5
    for bit in range(32):
        ones = (words >> bit) & 1
        assert abs(int(ones.sum()) - count / 2) < five_sigma
        for other in others.values():
            equal = ones == (other >> bit) & 1
            assert abs(int(equal.sum()) - count / 2) < five_sigma
    constant = torch.full_like(words, 12345)
    assert abs(int((constant & 1).sum()) - count / 2) > five_sigma


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_has_no_bias(dtype: torch.dtype) -> None:
    """The mean of many is within 5 standard deviations; rounding to the nearest is not."""
    count = 2**16
    words = random_words(3, 0, 1, torch.arange(count))
    biased = []
    for number in EDGES[dtype]:
        x = torch.full((count,), number)
        exact = float(x[0])
        low, high = neighbours(exact, dtype)
        rounded = round_stochastically(x, words, dtype).double()
        assert set(rounded.tolist()) <= {low, high}
        deviation = ((exact - low) * (high - exact) / count) ** 0.5
        assert abs(float(rounded.mean()) - exact) <= 5 * deviation
        biased.append(abs(float(x[0].to(dtype)) - exact) > 5 * deviation)
    assert sum(biased) >= len(EDGES[dtype]) - 1  # all but the number that needs no rounding


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_without_two_neighbours(dtype: torch.dtype) -> None:
    """What the dtype has stays; beyond its largest it is the nearest, and NaN and inf stay too."""
    largest = torch.finfo(dtype).max
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int64).to(torch.int16)
    every = bits.view(dtype)
    ulp = largest - float(torch.tensor(largest, dtype=dtype).view(torch.int16).sub(1).view(dtype))
    beyond = torch.tensor([largest + f * ulp for f in (0.25, 0.49, 0.75)], dtype=torch.float64)
    beyond = beyond[beyond < torch.finfo(torch.float32).max].float()
    for draw in range(3):
        kept = round_stochastically(
            every.float(), random_words(draw, 0, 1, torch.arange(2**16)), dtype
        )
        same = (kept.view(torch.int16) == bits) | (kept.isnan() & every.isnan())
        assert bool(same.all())
        words = random_words(draw, 0, 2, torch.arange(len(beyond)))
        assert torch.equal(round_stochastically(beyond, words, dtype), beyond.to(dtype))
        assert torch.equal(round_stochastically(-beyond, words, dtype), -beyond.to(dtype))


def build(way: str, params: list[torch.nn.Parameter], backend: Any, **keywords: Any) -> CIAO:
    return CIAO.lhopt(params, backend=backend, **{**WAYS[way], **keywords})


def train(optimizer: Any, params: list[torch.nn.Parameter], first: int, steps: int) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def equal(first: list[Any], second: list[Any]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_is_the_same_bits(backend: Any, way: str, dtype: torch.dtype) -> None:
    """Also into an optimizer that was built with other settings: the checkpoint brings them."""
    device = device_of(backend)
    params = make_params(dtype, SHAPES, device=device)
    optimizer = build(way, params, backend)
    train(optimizer, params, 0, 3)
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], buffer)
    buffer.seek(0)
    saved, values = torch.load(buffer, weights_only=True)
    train(optimizer, params, 3, 3)

    resumed = make_params(dtype, SHAPES, seed=1, device=device)
    for param, value in zip(resumed, values, strict=True):
        param.data.copy_(value)
    second = build("nearest", resumed, backend)
    second.load_state_dict(saved)
    train(second, resumed, 3, 3)
    assert equal(params, resumed)
    assert str(optimizer.pop_inner_features()) == str(second.pop_inner_features())
    for p, q in zip(params, resumed, strict=True):
        assert optimizer.state[p].keys() == second.state[q].keys()
        assert ("master_param" in optimizer.state[p]) == (way == "master")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("trust", ["exact", "delayed"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_master_weights_are_a_float32_run(backend: Any, trust: str, dtype: torch.dtype) -> None:
    """That of a float32 model, to the order of sums; the parameters are copies of them."""
    device = device_of(backend)
    half = make_params(dtype, SHAPES, device=device)
    full = [torch.nn.Parameter(p.detach().float()) for p in half]
    ours = build("master", half, backend, trust=trust, lr=0.01)
    expected = build("nearest", full, backend, trust=trust, lr=0.01)
    for step in range(4):
        set_grads(half, step)
        for p, q in zip(full, half, strict=True):
            p.grad = None if q.grad is None else q.grad.float()
        ours.step()
        expected.step()
        masters = [ours.state[p]["master_param"] for p in half]
        for master, q in zip(masters, full, strict=True):
            assert_close(master, q, TRAJECTORY[torch.float32], q.abs().max())
        assert equal(half, [master.to(dtype) for master in masters])
    lossy = make_params(dtype, SHAPES, device=device)
    train(build("nearest", lossy, backend, trust=trust, lr=0.01), lossy, 0, 4)
    with pytest.raises(AssertionError, match="off by"):
        assert_close(lossy[0], full[0], TRAJECTORY[torch.float32], full[0].abs().max())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_small_updates_are_not_lost(backend: Any, dtype: torch.dtype) -> None:
    """Steps of a hundredth of what the parameter can show: all lost, or there on average."""
    steps, count = 20, 4000
    step_size = torch.finfo(dtype).eps / 100
    moved = {}
    for way in WAYS:
        param = torch.nn.Parameter(
            torch.full((count,), 1.25, dtype=dtype, device=device_of(backend))
        )
        optimizer = AdamW([param], lr=step_size, weight_decay=0.0, backend=backend, **WAYS[way])  # type: ignore[arg-type]
        for _ in range(steps):
            param.grad = torch.ones_like(param)
            optimizer.step()
        moved[way] = float(1.25 - param.detach().double().mean()) / (steps * step_size)
    assert moved["nearest"] == 0.0
    # each step moves a whole eps with probability 1/100
    five_sigma = 5 * (0.01 * 0.99 / (steps * count)) ** 0.5 / 0.01
    assert moved["stochastic"] == pytest.approx(1.0, abs=five_sigma)
    assert moved["master"] == 0.0  # 20/100 of an eps: still below, but remembered
    assert optimizer.state[param]["master_param"].mean().item() < 1.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_seed_one_run(backend: Any) -> None:
    runs = []
    for seed in (0, 0, 1):
        params = make_params(torch.bfloat16, SHAPES, device=device_of(backend))
        train(build("stochastic", params, backend, rounding_seed=seed), params, 0, 2)
        runs.append([p.detach() for p in params])
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


@pytest.mark.parametrize("way", ["stochastic", "master"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_parameters_are_stepped_as_ever(backend: Any, way: str) -> None:
    """float32 parameters are neither rounded nor kept twice, beside 16-bit ones too."""
    device = device_of(backend)
    params, plain = (
        make_params(shapes=SHAPES, device=device),
        make_params(shapes=SHAPES, device=device),
    )
    half = make_params(torch.bfloat16, ((4, 4),), device=device)
    optimizer = CIAO([{"params": params}, {"params": half}], backend=backend, **WAYS[way])  # type: ignore[arg-type]
    train(optimizer, [*params, *half], 0, 3)
    train(CIAO(plain, backend=backend), plain, 0, 3)
    assert equal(params, plain)
    assert not any("master_param" in optimizer.state[p] for p in params)
    assert ("master_param" in optimizer.state[half[0]]) == (way == "master")


@pytest.mark.parametrize("way", WAYS)
def test_elements_count_in_memory_order(way: str) -> None:
    """A transposed parameter takes the random words, and the master, of the memory under it."""
    plain = make_params(torch.bfloat16, ((6, 8),))
    turned = [torch.nn.Parameter(plain[0].detach().clone().t())]
    optimizers = [build(way, params, "reference") for params in (plain, turned)]
    for step in range(2):
        set_grads(plain, step)
        assert plain[0].grad is not None
        turned[0].grad = plain[0].grad.t()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(plain[0], turned[0].t())


def test_a_master_begins_as_a_parameter_with_gaps() -> None:
    gapped = [torch.nn.Parameter(make_params(torch.bfloat16, ((6, 8),))[0].detach()[:, ::2])]
    plain = [torch.nn.Parameter(gapped[0].detach().contiguous())]
    for params in (gapped, plain):
        train(build("master", params, "reference"), params, 0, 2)
    assert torch.equal(gapped[0], plain[0])


def test_a_checkpoint_without_masters_begins_them_anew() -> None:
    params = make_params(torch.bfloat16, SHAPES)
    plain = build("nearest", params, "reference")
    train(plain, params, 0, 2)
    saved = plain.state_dict()
    del saved["lhopt_fused"]["master_weights"]  # as before there were any
    optimizer = build("master", params, "reference")
    optimizer.load_state_dict(saved)
    before = [p.detach().clone() for p in params]
    set_grads(params, 2)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    assert equal([optimizer.state[p]["master_param"].bfloat16() for p in params], before)


def test_a_stale_master_is_dropped() -> None:
    params = make_params(torch.bfloat16, SHAPES)
    optimizer = build("master", params, "reference")
    train(optimizer, params, 0, 1)
    saved = optimizer.state_dict()
    saved["lhopt_fused"]["master_weights"] = False
    optimizer.load_state_dict(saved)
    train(optimizer, params, 1, 1)
    assert not any("master_param" in optimizer.state[p] for p in params)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"rounding": "up"}, "rounding must be one of"),
        ({"rounding_seed": 1.5}, "rounding_seed must be an integer"),
        ({"master_weights": 1}, "master_weights must be True, False or one of"),
        ({"master_weights": "split4"}, "master_weights must be True, False or one of"),
        ({"moments": "int4"}, "moments must be one of"),
        ({"rounding": "stochastic", "master_weights": "split8"}, "choose one of them"),
        ({"rounding": "stochastic", "master_weights": True}, "choose one of them"),
    ],
)
@pytest.mark.parametrize("kind", [CIAO, AdamW])
def test_bad_settings(kind: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(make_params(torch.bfloat16), **keywords)
