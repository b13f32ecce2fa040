"""How moments and masters are kept: bounds, edges, and what dithering is for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lhopt_fused.kernels.formats import (
    BLOCK,
    decode,
    dither_words,
    encode,
    join_master,
    scales_shape,
    split_master,
    takes_blocks,
)

LARGEST = torch.finfo(torch.bfloat16).max
CORRECTIONS = (torch.int8, torch.int16)


@st.composite
def blocks(draw: st.DrawFn, signed: bool) -> torch.Tensor:
    """A block or two of many magnitudes, with zeros."""
    exponents = draw(st.lists(st.integers(-100, 100), min_size=1, max_size=2))
    spread = draw(st.integers(0, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rows = []
    for exponent in exponents:
        x = torch.rand(BLOCK, generator=generator, dtype=torch.float64) * 2 - 1
        x *= 2.0 ** (exponent - spread * torch.rand(BLOCK, generator=generator).double())
        rows.append(x * (torch.rand(BLOCK, generator=generator) > 0.1))
    x = torch.stack(rows).float()
    return x if signed else x.abs()


@given(x=blocks(signed=True), step=st.none() | st.integers(1, 2**31 - 1))
@settings(deadline=None)
def test_first_moments_are_kept_to_a_code(x: torch.Tensor, step: int | None) -> None:
    codes, scales = encode(x, torch.int8, step)
    assert scales is not None
    check_scales(x, scales)
    code = codes.double().abs()
    width = 4 * 127 / (254 - code - 1).clamp(min=127) ** 2  # to the next code outwards
    width = torch.minimum(width, torch.tensor(2 / 127, dtype=torch.float64))
    error = (decode(codes, scales) - x).double().abs()
    assert bool((error <= width * scales.double()[:, None] * (1 + 1e-5)).all())
    assert bool((codes != -128).all())
    assert bool((decode(codes, scales)[x == 0] == 0).all())


@given(x=blocks(signed=False), step=st.none() | st.integers(1, 2**31 - 1))
@settings(deadline=None)
def test_second_moments_are_kept_to_a_code(x: torch.Tensor, step: int | None) -> None:
    codes, scales = encode(x, torch.uint8, step)
    assert scales is not None
    check_scales(x, scales)
    root = scales.double()[:, None].sqrt()
    error = (decode(codes, scales).double().sqrt() - x.double().sqrt()).abs()
    assert bool((error <= root / 255 * (1 + 1e-4)).all())
    assert bool((decode(codes, scales)[x == 0] == 0).all())


def check_scales(x: torch.Tensor, scales: torch.Tensor) -> None:
    """Above the largest of each block, to rounding, and no further than a number of bfloat16."""
    largest = x.abs().amax(1).double()
    assert bool((scales.double() >= largest * (1 - 2.0**-19)).all())
    assert bool((scales.double() <= largest * (1 + 2.0**-7)).all())
    assert bool((scales[largest == 0] == 0).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
def test_storing_again_changes_nothing(dtype: torch.dtype) -> None:
    x = torch.rand(50, BLOCK, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1.0  # a scale as it is
    first = encode(x, dtype, 1)
    x = decode(*first)
    steps = [s for s in range(2, 300) if bool((dither_words(s, BLOCK, x.device) > 0).all())]
    assert len(steps) > 250  # a word of 0 cuts off what has been rounded down on the way
    for step in steps:
        again = encode(x, dtype, step)
        assert torch.equal(again[0], first[0])
        if again[1] is not None and first[1] is not None:
            assert torch.equal(again[1], first[1])
        x = decode(*again)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
def test_edges(dtype: torch.dtype) -> None:
    """The largest and the smallest numbers; nothing becomes infinite or NaN."""
    limits = torch.finfo(torch.float32)
    rows = [
        torch.full((BLOCK,), limits.max),
        torch.linspace(0, limits.max, BLOCK),
        torch.full((BLOCK,), limits.tiny),
        torch.full((BLOCK,), 1e-45),
        torch.zeros(BLOCK),
    ]
    x = torch.stack(rows)
    for step in (None, 1, 2, 3):
        kept = decode(*encode(x, dtype, step))
        assert bool(kept.isfinite().all())
        assert bool((kept[0] >= LARGEST * (1 - 2.0**-6)).all())
        assert bool((kept[3:] <= 1e-40).all())
        assert bool((kept[4] == 0).all())
    if dtype != torch.int8:  # squares of finite gradients may be infinite, their means are not
        infinite = torch.full((BLOCK,), torch.inf)
        assert bool((decode(*encode(infinite, dtype)) == LARGEST).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
def test_dithering_has_no_bias(dtype: torch.dtype) -> None:
    """The mean over steps is within 5 standard deviations; that of the nearest is not."""
    x = torch.rand(BLOCK, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
    x[0] = 1.0
    steps = 4000
    draws = torch.stack([encode(x, dtype, step)[0].double() for step in range(1, steps + 1)])
    exact, spacing = _exact(x, dtype)
    limit = 5 * 0.5 * spacing / steps**0.5
    assert bool(((draws.mean(0) - exact).abs() <= limit).all())
    nearest = encode(x, dtype)[0].double()
    assert float(((nearest - exact).abs() > limit).float().mean()) > 0.8
    assert len({tuple(dither_words(step, BLOCK, x.device).tolist()) for step in range(9)}) == 9


def _exact(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """What codes would be without rounding, under a scale of 1; and how far they are apart."""
    x = x.double()
    if dtype == torch.int8:
        return 254 * x / (1 + x), torch.ones_like(x)
    if dtype == torch.uint8:
        return 255 * x.sqrt(), torch.ones_like(x)
    return x, 2.0 ** (x.log2().floor() - 7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16])
def test_second_moments_come_down(dtype: torch.dtype) -> None:
    """Losing a thousandth in each step; rounded to the nearest, they never would."""
    start = torch.rand(4, BLOCK, generator=torch.Generator().manual_seed(0)) + 0.5
    steps = 2000
    exact = start * 0.999**steps
    kept = {}
    for name in ("dithered", "nearest"):
        x = start
        for step in range(1, steps + 1):
            x = decode(*encode(0.999 * x, dtype, step if name == "dithered" else None))
        kept[name] = float((x / exact).log().mean().exp())
    assert kept["dithered"] == pytest.approx(1.0, abs=0.1)
    assert kept["nearest"] > 5


def test_blocks_lie_in_memory_order() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    codes, scales = encode(x, torch.int8, 3)
    turned, turned_scales = encode(x.t(), torch.int8, 3)
    assert torch.equal(turned, codes.t())
    assert turned.stride() == x.t().stride()
    assert scales is not None
    assert turned_scales is not None
    assert torch.equal(scales, turned_scales)
    assert torch.equal(decode(turned, scales), decode(codes, scales).t())


@pytest.mark.parametrize(
    ("shape", "takes"),
    [
        ((64, 64), True),
        ((1, 4096), True),
        ((63, 64), False),  # 4,032 elements
        ((4096, 65), False),
        ((128, 32), False),
        ((8192,), False),
        ((), False),
        ((16, 4, 4, 16), True),
        ((0, 64), False),
    ],
)
def test_who_takes_blocks(shape: tuple[int, ...], takes: bool) -> None:
    assert takes_blocks(torch.Size(shape)) is takes
    if takes:
        assert math.prod(scales_shape(torch.Size(shape))) * BLOCK == math.prod(shape)


# ---------------------------------------------------------------------- split masters

FLOATS = st.integers(0, 2**32 - 1).map(
    lambda bits: torch.tensor([bits - 2**32 * (bits >> 31)], dtype=torch.int32).view(torch.float32)
)
EDGES = [0.0, -0.0, 1.0, 1.00390625, -3.3895314e38, 3.3961776e38, 3.4028235e38, 1e-45, -1e-40]


@given(master=st.one_of(FLOATS, st.sampled_from(EDGES).map(lambda x: torch.tensor([x]))))
@settings(deadline=None, max_examples=500)
def test_split_masters(master: torch.Tensor) -> None:
    """16 bits: exact. 8: to 2^-8 of the distance of two parameters, and stable from then on."""
    for dtype in CORRECTIONS:
        param, correction = split_master(master, dtype)
        joined = join_master(param, correction)
        if bool(master.isnan()):
            assert bool(param.isnan() & joined.isnan())
            continue
        nearest = master.to(torch.bfloat16)
        away = bits_of(param.float()) - bits_of(nearest.float())
        assert away in (0, 0x10000)  # halves go away from zero
        if dtype == torch.int16:
            assert bits_of(joined) == bits_of(master)
        else:
            assert abs(bits_of(joined) - bits_of(master)) < 2**8
            again = split_master(joined, dtype)
            assert bool((again[0] == param) & (again[1] == correction))


@pytest.mark.parametrize("exponent", [0, 1, 2, 100, 126, 127, 128, 253])
def test_more_bits_of_a_master_are_never_further_from_it(exponent: int) -> None:
    """Every number of 16 lower bits, below the first, middle and last parameter of a binade."""
    lower = torch.arange(2**16)
    heads = (torch.tensor([0, 1, 0x3F, 0x7E, 0x7F]) | exponent << 7) << 16
    positive = (heads[:, None] | lower).flatten()
    masters = torch.stack([positive, positive - 2**31]).to(torch.int32).view(torch.float32)
    errors = {None: distance(masters.to(torch.bfloat16), masters)}
    for dtype in CORRECTIONS:
        errors[dtype] = distance(join_master(*split_master(masters, dtype)), masters)
    none, eight, sixteen = errors[None], errors[torch.int8], errors[torch.int16]
    assert bool((sixteen == 0).all())
    assert bool((eight <= none).all())
    assert bool((eight[none == 0] == 0).all())
    is_far = none > 2**8 * 2.0 ** (max(exponent, 1) - 150)  # units in the last place
    assert bool((eight < none)[is_far].all())
    assert float(none.mean()) > 100 * float(eight.mean()) > 0  # so that a bit less would show


def distance(value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (value.double() - expected.double()).abs()


def bits_of(x: torch.Tensor) -> int:
    return int(x.view(torch.int32).item()) % 2**32


def test_what_is_beyond_the_parameters() -> None:
    """A master that is infinite as a parameter is finite itself, up to its own rounding."""
    beyond = torch.tensor([3.3961776e38, 3.4028235e38, torch.inf])
    param, correction = split_master(beyond, torch.int8)
    assert param.tolist() == [torch.inf] * 3
    joined = join_master(param, correction)
    assert joined[0] == beyond[0]
    assert joined[1:].tolist() == [torch.inf] * 2  # within 2^-9 of a distance of infinity
    param, correction = split_master(beyond, torch.int16)
    assert torch.equal(join_master(param, correction), beyond)


@pytest.mark.parametrize("dtype", CORRECTIONS)
def test_a_parameter_set_to_zero_stays_zero(dtype: torch.dtype) -> None:
    param, correction = split_master(torch.tensor([1.001, -1.001, 1.006, -1.006]), dtype)
    assert set(correction.sign().tolist()) == {-1, 1}
    joined = join_master(torch.zeros_like(param), correction)
    assert bool((joined.abs() < 1e-38).all())
