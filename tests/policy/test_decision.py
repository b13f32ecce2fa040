"""Decisions: the modes, and a generator whose draws are uniform and depend on nothing but keys."""

from __future__ import annotations

import pytest
import torch
from policy.samples import SPACE

from lhopt_fused import _C
from lhopt_fused.policy.decision import _ADD, LARGEST_SEED, _mix, check_seed, decide, uniform


def keys(n: int, value: int = 0) -> torch.Tensor:
    return torch.full((n,), value, dtype=torch.int64)


def logits(seed: int = 0, n: int = 5) -> torch.Tensor:
    return torch.randn(n, sum(SPACE.head_sizes), generator=torch.Generator().manual_seed(seed))


def unbounded_uniform(seed: int, step: int, head: int) -> float:
    """The definition, in Python's unbounded integers."""
    mask, add = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    z = 0
    for part in (seed, step, head):
        z = mix((z + part + add) & mask)
    return (z >> 11) * 2.0**-53


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**53 + 1, LARGEST_SEED])
def test_three_generators_are_one(seed: int) -> None:
    for step in (0, 1, 1000):
        for head in range(9):
            expected = unbounded_uniform(seed, step, head)
            assert _C.counter_uniform(seed, step, head) == expected
            assert uniform(*(torch.tensor(k) for k in (seed, step, head))).item() == expected


def test_the_finaliser_is_splitmix64s() -> None:
    """Seeded with 0, SplitMix64 first gives E220A8397B1DCDAF."""
    first = _mix(torch.tensor(_ADD)).item() % 2**64
    assert first == 0xE220A8397B1DCDAF


def test_draws_are_uniform_and_uncorrelated_across_keys() -> None:
    n = 20_000
    index = torch.arange(n)
    along = {
        "seed": uniform(index, keys(n), keys(n)),
        "step": uniform(keys(n), index, keys(n)),
        "head": uniform(keys(n), keys(n), index),
    }
    for u in along.values():
        assert bool(((u >= 0) & (u < 1)).all())
        ranks = torch.linspace(0, 1, n, dtype=torch.float64)
        assert (u.sort().values - ranks).abs().max() < 1.63 / n**0.5  # Kolmogorov, 1 %
        assert torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1].abs() < 4 / n**0.5
    rows = torch.stack(list(along.values()))[:, 1:]
    assert (torch.corrcoef(rows) - torch.eye(3)).abs().max() < 4 / n**0.5


def test_modes() -> None:
    values = logits()
    mean, argmax = (
        decide(values, SPACE, m, seed=keys(5), step=keys(5)) for m in ("mean", "argmax")
    )
    p = values[:, :7].double().softmax(-1)
    scales = torch.tensor([0.5, 0.707, 0.9, 1, 1.1, 1.414, 2], dtype=torch.float64)
    assert torch.allclose(mean.shifts[:, 0], (p * scales.log()).sum(-1))
    assert torch.equal(argmax.shifts[:, 0], scales.log()[p.argmax(-1)])
    assert torch.equal(mean.register, values[:, -10:].argmax(-1))
    assert torch.equal(mean.register, argmax.register)
    assert torch.allclose(mean.probabilities.sum(-1), torch.full((5,), 9.0, dtype=torch.float64))
    shuffled = (p * scales.log().flip(0)).sum(-1)
    assert not torch.allclose(mean.shifts[:, 0], shuffled)


def test_samples_follow_the_probabilities() -> None:
    n = 20_000
    values = logits(1, 1).expand(n, -1)
    drawn = decide(values, SPACE, "sample", seed=torch.arange(n), step=keys(n, 3))
    for head, (p, choice) in enumerate(
        zip(drawn.probabilities[0].split(list(SPACE.head_sizes)), drawn.choices.T, strict=True)
    ):
        share = torch.bincount(choice, minlength=len(p)) / n
        assert (share - p).abs().max() < 0.015, head
    again = decide(values, SPACE, "sample", seed=torch.arange(n), step=keys(n, 3))
    other = decide(values, SPACE, "sample", seed=torch.arange(n), step=keys(n, 4))
    assert torch.equal(drawn.choices, again.choices)
    assert not torch.equal(drawn.choices, other.choices)


def test_certain_heads_are_certain_and_unknown_modes_refused() -> None:
    values = torch.full((1, sum(SPACE.head_sizes)), -1e4)
    offsets = torch.tensor([0, *SPACE.head_sizes[:-1]]).cumsum(0)
    values[:, offsets + torch.tensor(SPACE.head_sizes) - 1] = 0.0  # the last choice of each
    for mode in ("mean", "sample", "argmax"):
        decision = decide(values, SPACE, mode, seed=keys(1), step=keys(1))
        assert decision.choices[0].tolist() == [size - 1 for size in SPACE.head_sizes]
    with pytest.raises(ValueError, match="mode is 'best', expected one of mean, sample, argmax"):
        decide(values, SPACE, "best", seed=keys(1), step=keys(1))
    with pytest.raises(ValueError, match="seed is -1"):
        check_seed(-1)
