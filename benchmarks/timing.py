"""Timing, interleaved in one process, so that a drift of the machine hits all variants alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from benchmarks.registry import Run

__all__ = [
    "Contestant",
    "Sample",
    "Series",
    "interleave",
    "quartiles",
    "ratios",
    "rotated",
    "sample_cpu",
    "sample_cuda",
    "wait",
]


@dataclass(frozen=True)
class Sample:
    """Mean milliseconds of a step: until it was done, and until ``step()`` came back."""

    ms: float
    host_ms: float


Item = TypeVar("Item")
SampleStep = Callable[[Callable[[], object], int], Sample]


def sample_cpu(step: Callable[[], object], steps: int) -> Sample:
    """Time ``steps`` steps by the wall clock."""
    start = time.perf_counter_ns()
    for _ in range(steps):
        step()
    ms = (time.perf_counter_ns() - start) / 1e6 / steps
    return Sample(ms, ms)


def sample_cuda(step: Callable[[], object], steps: int) -> Sample:
    """Time ``steps`` steps by device events, on a device that is idle at first."""
    before, after = _events()
    torch.cuda.synchronize()
    start = time.perf_counter_ns()
    before.record()
    for _ in range(steps):
        step()
    after.record()
    host_ms = (time.perf_counter_ns() - start) / 1e6 / steps
    torch.cuda.synchronize()
    return Sample(before.elapsed_time(after) / steps, host_ms)


def wait() -> None:
    """Until the GPU is done, where one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    def event() -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    return event(), event()


@dataclass
class Contestant:
    """Something to be timed.

    Attributes:
        make: builds it; called once, or anew in every round if it is not to stay in memory.
        steps: steps that make one sample.
    """

    name: str
    make: Callable[[], Run]
    steps: int = 1


@dataclass
class Series:
    """What was measured of one contestant, one sample a round, until it failed if it did."""

    samples: list[Sample] = field(default_factory=list)
    state_bytes: int = 0
    failure: str | None = None


def rotated(items: Sequence[Item], round_index: int) -> list[Item]:
    """The items in an order that begins with another one in each round."""
    first = round_index % len(items) if items else 0
    return [*items[first:], *items[:first]]


def interleave(
    contestants: Sequence[Contestant],
    rounds: int,
    sample: SampleStep,
    *,
    stays: bool = True,
    warm_up: int = 4,
    lead: int = 0,
) -> dict[str, Series]:
    """Take one sample of every contestant in each of ``rounds`` rounds.

    Args:
        stays: whether all contestants stay in memory together; else each is built for its sample.
        warm_up: untimed steps of a contestant that was just built.
        lead: untimed steps before the samples after that.
    """
    series = {c.name: Series() for c in contestants}
    built: dict[str, Run] = {}
    for round_index in range(rounds):
        for c in rotated(contestants, round_index):
            if series[c.name].failure is None:
                _visit(c, series[c.name], built, sample, warm_up, lead)
                if not stays:
                    built.clear()
                    _free()
    return series


def _visit(
    contestant: Contestant,
    series: Series,
    built: dict[str, Run],
    sample: SampleStep,
    warm_up: int,
    lead: int,
) -> None:
    """One round of one contestant; a failure (out of memory, say) ends its series."""
    try:
        is_new = contestant.name not in built
        if is_new:
            built[contestant.name] = contestant.make()
        run = built[contestant.name]
        for _ in range(warm_up if is_new else lead):
            run.step()
        series.samples.append(sample(run.step, contestant.steps))
        series.state_bytes = state_bytes(run.optimizer)
    except Exception as error:  # one contestant must not end the run of the others
        series.failure = f"{type(error).__name__}: {error}"
        built.pop(contestant.name, None)
    if series.failure is not None:
        _free()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def state_bytes(optimizer: torch.optim.Optimizer | None) -> int:
    """Bytes of all tensors in the optimizer's state."""
    if optimizer is None:
        return 0
    tensors: dict[int, torch.Tensor] = {}
    pending: list[object] = list(optimizer.state.values())
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            tensors[id(item)] = item
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
    return sum(t.numel() * t.element_size() for t in tensors.values())


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile, interpolated; of one value, itself."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ratios(values: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Round by round, so that what slows a whole round down cancels."""
    return [value / other for value, other in zip(values, peer, strict=True)]
