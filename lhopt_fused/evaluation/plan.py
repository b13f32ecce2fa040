"""Which runs an evaluation consists of, and which configuration of an optimizer is its best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from lhopt_fused.evaluation.optimizers import CONTENDERS, Configuration
from lhopt_fused.evaluation.rows import Row
from lhopt_fused.evaluation.run import RunSpec
from lhopt_fused.evaluation.task import Size

__all__ = ["BASELINE", "BUDGETS", "Plan", "by_configuration", "ranked"]

BASELINE: Final = "adamw"
BUDGETS: Final = (0.5, 0.71, 1.0, 1.41, 2.0, 2.83, 4.0)
_QUICK_BUDGETS: Final = (0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Plan:
    """The runs of an evaluation, in two stages: the second depends on results of the first.

    Attributes:
        tasks: by name.
        size: of them.
        optimizers: by name.
        policies: configurations of ``lhopt``.
        seeds: how many.
        quick: few budgets, the baseline under a linear schedule, and of the others their defaults.
    """

    tasks: Sequence[str]
    size: Size
    optimizers: Sequence[str]
    policies: Sequence[Configuration]
    seeds: int
    quick: bool = False

    @property
    def budgets(self) -> tuple[float, ...]:
        """Of the baseline, with 1 among them."""
        return _QUICK_BUDGETS if self.quick else BUDGETS

    @property
    def best(self) -> int:
        """How many configurations of the baseline are run at budgets other than 1."""
        return 1 if self.quick else 5

    def first_stage(self) -> list[RunSpec]:
        """Every configuration at budget 1."""
        return [
            RunSpec(task, self.size, optimizer, configuration, seed)
            for task in self.tasks
            for optimizer in self.optimizers
            for configuration in self._configurations(optimizer)
            for seed in range(self.seeds)
        ]

    def second_stage(self, rows: Iterable[Row]) -> list[RunSpec]:
        """The default and the best few configurations of the baseline at all other budgets.

        Args:
            rows: results of the first stage.
        """
        if BASELINE not in self.optimizers:
            return []
        found = list(rows)
        specs = []
        for task in self.tasks:
            chosen = self._chosen([row for row in found if row.spec.task == task])
            specs += [
                RunSpec(task, self.size, BASELINE, configuration, seed, budget)
                for budget in self.budgets
                if budget != 1
                for configuration in chosen
                for seed in range(self.seeds)
            ]
        return specs

    def _chosen(self, rows: Iterable[Row]) -> list[Configuration]:
        default = CONTENDERS[BASELINE].default
        tried = by_configuration(r for r in rows if is_at_one(r) and r.spec.optimizer == BASELINE)
        best = [tried[name][0].spec.configuration for name in ranked(tried)[: self.best]]
        return best if default is None or default in best else [*best, default]

    def _configurations(self, optimizer: str) -> Sequence[Configuration]:
        contender = CONTENDERS[optimizer]
        if optimizer == "lhopt":
            return self.policies
        if not self.quick:
            return contender.grid
        return [
            configuration
            for configuration in contender.grid
            if configuration == contender.default
            or (optimizer == BASELINE and configuration["schedule"] == "linear")
        ]


def is_at_one(row: Row) -> bool:
    """Whether a run was as long as the task's standard."""
    return row.spec.budget == 1


def by_configuration(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by their hyperparameters, in the order of seeds."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.spec.seed):
        found.setdefault(row.spec.hyperparameters, []).append(row)
    return found


def ranked(tried: Mapping[str, Sequence[Row]]) -> list[str]:
    """Configurations, best first, by the mean loss on the split that policies see.

    Those with fewer seeds than others come last.
    """

    def order(name: str) -> tuple[int, float, str]:
        losses = [row.result.eval_loss for row in tried[name]]
        return -len(losses), math.fsum(losses) / len(losses), name

    return sorted(tried, key=order)
