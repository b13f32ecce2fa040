"""Small meta-training runs that tests share, and workers that need no process."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import torch

from lhopt_fused.meta.config import MetaConfig, load_config
from lhopt_fused.meta.train import MetaTraining
from lhopt_fused.meta.workers import Workers

CHANGES: Final = (
    "updates=5",
    "checkpoint_minutes=1e-6",
    "tasks.tasks=2",
    "tasks.repeats=2",
    "tasks.outer_steps=[2, 4]",
    "tasks.inner_steps=[2, 4]",
    "tasks.longest=16",
    "policy.hidden=16",
    "cloning.settings=2",
    "cloning.batches=2",
    "cloning.steps=5",
    "validation.settings=2",
    "validation.tasks=2",
    "validation.every=2",
    "validation.outer_steps=[2, 5]",
    "validation.longest=24",
)
"""What makes the shipped ``tiny`` a run of seconds, with a checkpoint after every update."""


def small(*changes: str) -> MetaConfig:
    return load_config("tiny", [*CHANGES, *changes])


class Inline:
    """Workers that run jobs at once, here, and count them by kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def start(self, jobs: Iterable[Callable[[], Any]]) -> Done:
        listed = list(jobs)
        self.counts.update(type(job).__name__ for job in listed)
        return Done([job() for job in listed])

    def close(self) -> None:
        pass


class Done:
    def __init__(self, found: list[Any]) -> None:
        self.found = found

    def results(self, on_result: Callable[[], None] | None = None) -> list[Any]:
        for _ in self.found if on_result is not None else ():
            on_result()
        return self.found


def trained(folder: Path, workers: Workers, *changes: str) -> MetaTraining:
    training = MetaTraining(small(*changes), folder, workers)
    training.run()
    return training


def outcome(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All that a run has left but the time it took: its checkpoint and its log."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for part in (state, *rows):
        del part["seconds"]
    return state, rows


def same(one: Any, other: Any) -> bool:
    """Bit by bit, in nested containers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other) and one.dtype == other.dtype
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
