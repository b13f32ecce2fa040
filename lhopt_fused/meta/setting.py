"""What an episode is about: which tasks, how long, from which start; drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch

from lhopt_fused.actions import Action
from lhopt_fused.meta.tasks import FAMILIES
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["Setting", "StartNoise", "TaskDistribution", "outer_boundaries"]

_AVERAGES: Final = ("ombeta1", "ombeta2", "grad_clip_ombeta", "lamb_update_norm_ombeta")


@dataclass(frozen=True)
class Setting:
    """One batch of episodes: tasks of one architecture, several runs of each.

    Attributes:
        family: of the tasks.
        seed: of the tasks, the start noise and the choices.
        tasks: distinct ones.
        repeats: runs of each task, which differ in their start and their choices.
        total_steps: inner steps of a run.
        outer_steps: outer steps of a run; the policy decides after each but the last.
    """

    family: str
    seed: int
    tasks: int
    repeats: int
    total_steps: int
    outer_steps: int

    @property
    def runs(self) -> int:
        return self.tasks * self.repeats

    @property
    def task_of_run(self) -> torch.Tensor:
        """int64 ``[runs]``: runs of one task stand side by side."""
        return torch.arange(self.tasks).repeat_interleave(self.repeats)


def outer_boundaries(total_steps: int, outer_steps: int) -> list[int]:
    """Inner steps that are done at the end of each outer step, as LHOPT cuts a run."""
    return [-(-index * total_steps // outer_steps) for index in range(1, outer_steps + 1)]


@dataclass(frozen=True)
class StartNoise:
    """How far starts are drawn from where the policy file says that runs start.

    Attributes:
        lr: the learning rate is multiplied by a factor up to this or its inverse, log-uniform.
        scale: likewise epsilon and weight_decay.
        average: likewise the decays of running averages, from ombeta1 to lamb_update_norm_ombeta.
        logit: shift of the logit of group_clip_grad_norm, up to this either way, uniform.
        clean: share of the runs that start without noise.

    Raises:
        ValueError: naming the field that is out of range.
    """

    lr: float = 100.0
    scale: float = 10.0
    average: float = 2.0
    logit: float = 1.0
    clean: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "scale", "average"):
            value = getattr(self, name)
            if not 1 <= value < math.inf:
                raise ValueError(f"noise.{name} is {value}, expected a factor of at least 1")
        if not 0 <= self.logit < math.inf:
            raise ValueError(f"noise.logit is {self.logit}, expected at least 0")
        if not 0 <= self.clean <= 1:
            raise ValueError(f"noise.clean is {self.clean}, expected 0 to 1")

    def draw(
        self, rng: np.random.Generator, runs: int, actions: tuple[Action, ...]
    ) -> torch.Tensor:
        """Shifts of the start, float64 ``[runs, 8]``: log factors, or shifts of the logit."""
        widths = {name: math.log(self.average) for name in _AVERAGES}
        widths |= {name: math.log(self.scale) for name in ("epsilon", "weight_decay")}
        widths |= {"lr": math.log(self.lr), "group_clip_grad_norm": self.logit}
        width = np.array([widths[action.name] for action in actions])
        shifts = rng.uniform(-1.0, 1.0, (runs, len(HYPERPARAMETERS))) * width
        shifts[rng.random(runs) < self.clean] = 0.0
        return torch.from_numpy(shifts)


@dataclass(frozen=True)
class TaskDistribution:
    """What episodes are drawn from.

    Attributes:
        families: weight of each family by its name.
        tasks: distinct tasks in a batch.
        repeats: runs of each.
        outer_steps: smallest and largest number of outer steps, log-uniform between.
        inner_steps: smallest and largest number of inner steps in an outer step, log-uniform.
        longest: most inner steps of a run; longer draws are drawn again.
        hidden_eval: share of the runs that show no eval loss.

    Raises:
        ValueError: naming the field that does not fit.
    """

    families: Mapping[str, float] = field(default_factory=lambda: dict.fromkeys(FAMILIES, 1.0))
    tasks: int = 16
    repeats: int = 8
    outer_steps: tuple[int, int] = (2, 128)
    inner_steps: tuple[int, int] = (4, 64)
    longest: int = 2048
    hidden_eval: float = 0.5

    def __post_init__(self) -> None:
        for name, weight in self.families.items():
            if name not in FAMILIES:
                raise ValueError(
                    f"tasks.families has {name!r}; the families are {', '.join(FAMILIES)}"
                )
            if not 0 <= weight < math.inf:
                raise ValueError(f"tasks.families.{name} is {weight}, expected at least 0")
        if not sum(self.families.values()) > 0:
            raise ValueError("tasks.families gives no family a weight above 0")
        for name in ("tasks", "repeats", "longest"):
            if getattr(self, name) < 1:
                raise ValueError(f"tasks.{name} is {getattr(self, name)}, expected at least 1")
        for name, least in (("outer_steps", 2), ("inner_steps", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ValueError(
                    f"tasks.{name} is [{low}, {high}], expected {least} <= smallest <= largest"
                )
        if self.outer_steps[0] * self.inner_steps[0] > self.longest:
            raise ValueError(
                f"tasks.longest is {self.longest}, but the shortest run has "
                f"{self.outer_steps[0]} x {self.inner_steps[0]} inner steps"
            )
        if not 0 <= self.hidden_eval <= 1:
            raise ValueError(f"tasks.hidden_eval is {self.hidden_eval}, expected 0 to 1")

    def draw(self, seed: int) -> Setting:
        """The setting of a seed."""
        rng = np.random.default_rng(seed)
        names = list(self.families)
        weights = np.array([self.families[name] for name in names])
        family = names[rng.choice(len(names), p=weights / weights.sum())]
        while True:
            outer_steps, inner_steps = (
                _log_uniform(rng, *limits) for limits in (self.outer_steps, self.inner_steps)
            )
            if outer_steps * inner_steps <= self.longest:
                break
        return Setting(
            family=family,
            seed=int(rng.integers(2**62)),
            tasks=self.tasks,
            repeats=self.repeats,
            total_steps=outer_steps * inner_steps,
            outer_steps=outer_steps,
        )


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    """An integer between the limits, log-uniform."""
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))
