"""Meta-validation: a policy file on tasks, lengths and families that its training never saw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from lhopt_fused.meta.config import MetaConfig, config_from_plain
from lhopt_fused.meta.control import HandControl
from lhopt_fused.meta.jobs import References, Weights, ends_below
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.tasks import HELDOUT
from lhopt_fused.meta.validation import Validation
from lhopt_fused.meta.workers import Workers
from lhopt_fused.policy import LearnedPolicy

__all__ = [
    "OPPONENTS",
    "YARDSTICKS",
    "Result",
    "Share",
    "by_family",
    "compared",
    "evaluate",
    "heldout_settings",
    "new_settings",
    "shares",
    "trained_config",
    "write_results",
]

_NEW: Final = 1_000  # a stream of seeds beside those of training
_HELDOUT_LENGTHS: Final = ((64, 8), (256, 16), (768, 48))  # inner steps, outer steps

OPPONENTS: Final = {
    "default": "AdamW at 1e-3, constant",
    "tuned": "the best of 35 configurations of AdamW, found for each task by another run of it",
    "hindsight": "the best of the 35 in hindsight: the lowest of their reported losses",
    "median": "the median of the 35",
    "control": "the hand control: the same inner optimizer under the best fixed schedule",
    "linear": "no decisions: the policy's start, falling linearly to 0",
}
"""What a policy is compared with, by the names in tables."""

YARDSTICKS: Final = ("tuned", "control", "linear")
"""Opponents that are compared with all of them too, as if they were policies: they say how much of
each share is chance, and how much can be had."""


@dataclass(frozen=True)
class Result:
    """How a policy did on the R tasks of one setting.

    Attributes:
        setting: family, lengths and seed.
        reward: log speed-up over the baseline of the reward, float64 ``[R]``.
        won: for each of :data:`OPPONENTS`, 1 where the policy ends lower, 0.5 where equal, ``[R]``.
        yardsticks: for each of :data:`YARDSTICKS`, the same with it in the policy's place.
    """

    setting: Setting
    reward: NDArray[np.float64]
    won: dict[str, NDArray[np.float64]]
    yardsticks: dict[str, Result] = field(default_factory=dict)


@dataclass(frozen=True)
class Share:
    """A share of tasks won, with a bootstrap 95 % interval over settings."""

    value: float
    low: float
    high: float
    tasks: int

    def __str__(self) -> str:
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"


def trained_config(policy: LearnedPolicy) -> tuple[MetaConfig, HandControl]:
    """The configuration and the hand control that a policy was trained with.

    Raises:
        ValueError: the policy does not say; it was not made by meta-training.
    """
    config, control = (policy.trained_on.get(name) for name in ("config", "control"))
    if not isinstance(config, dict) or not isinstance(control, dict):
        raise ValueError(
            f"policy {policy.name!r} does not say what it was trained on; only policies made by "
            "`lhopt meta-train` can be compared with their hand control"
        )
    return config_from_plain(config), HandControl(**control)


def new_settings(config: MetaConfig, count: int, tasks: int) -> list[Setting]:
    """New tasks of the families trained on, with runs of up to twice as many outer steps."""
    distribution = replace(
        config.tasks,
        tasks=tasks,
        repeats=1,
        outer_steps=(config.tasks.outer_steps[0], 2 * config.tasks.outer_steps[1]),
        longest=2 * config.tasks.longest,
    )
    return [
        distribution.draw(int(np.random.SeedSequence([_NEW, index]).generate_state(1)[0]))
        for index in range(count)
    ]


def heldout_settings(tasks: int) -> list[Setting]:
    """The families that no policy is trained on, each at three lengths."""
    return [
        Setting(family, _NEW + index, tasks, 1, total_steps, outer_steps)
        for index, family in enumerate(HELDOUT)
        for total_steps, outer_steps in _HELDOUT_LENGTHS
    ]


def evaluate(
    policy: LearnedPolicy,
    settings: Sequence[Setting],
    workers: Workers,
    folder: Path,
    *,
    trust: Literal["exact", "delayed"] | None = None,
    hidden_eval: float | None = None,
    data_dir: Path | None = None,
) -> list[Result]:
    """Play every setting under a policy and compare with AdamW and the hand control.

    Args:
        policy: made by meta-training.
        settings: what is played.
        workers: who plays.
        folder: where references are kept from one use to the next.
        trust: trust ratios of the inner optimizer, for policy and hand control; None for what the
            policy wants.
        hidden_eval: share of the runs that show no eval loss; None for that of the training.
        data_dir: for families that read files.

    Raises:
        ValueError: the policy does not say what it was trained with.
    """
    config, control = trained_config(policy)
    options = policy.start_options.to_plain()  # not those of its training, if these are others
    if trust is not None:
        options["trust"] = trust
    config = replace(config, policy=replace(config.policy, **options))
    if hidden_eval is not None:
        config = replace(config, tasks=replace(config.tasks, hidden_eval=hidden_eval))
    start = policy.start_hyperparameters
    validation = Validation(config, settings, start, control, workers, folder, data_dir)
    return compared(validation, policy.weights)


def compared(validation: Validation, network: Weights) -> list[Result]:
    """How a network does on each setting of a validation, beside the references there."""
    results = []
    played = zip(
        validation.settings,
        validation.losses(network),
        validation.linear_losses(),
        validation.references,
        strict=True,
    )
    for setting, mine, linear, other in played:
        placed = {"tuned": other.tuned, "control": other.control, "linear": linear}
        yardsticks = {
            name: _compared(setting, losses, linear, other) for name, losses in placed.items()
        }
        results.append(replace(_compared(setting, mine, linear, other), yardsticks=yardsticks))
    return results


def _compared(
    setting: Setting,
    losses: NDArray[np.float64],
    linear: NDArray[np.float64],
    other: References,
) -> Result:
    won = {**other.won(losses), "linear": ends_below(losses, linear)}
    return Result(setting, other.rewards(losses, setting.total_steps), won)


def shares(results: Sequence[Result], draws: int = 2000) -> dict[str, Share]:
    """Share of the tasks won against each opponent; settings are drawn again for the interval."""
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(results), size=(draws, len(results)))
    sizes = np.array([len(result.reward) for result in results])
    table = {}
    for name in OPPONENTS:
        won = np.array([result.won[name].sum() for result in results])
        drawn = won[chosen].sum(1) / sizes[chosen].sum(1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        table[name] = Share(
            float(won.sum() / sizes.sum()), float(low), float(high), int(sizes.sum())
        )
    return table


def by_family(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results of each family, in the order in which families first appear."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.setting.family, []).append(result)
    return groups


def write_results(results: Sequence[Result], path: Path, about: dict[str, Any]) -> None:
    """All results as JSON, with what they are about; a line for each setting."""
    rows = [
        {
            "family": result.setting.family,
            "seed": result.setting.seed,
            "total_steps": result.setting.total_steps,
            "outer_steps": result.setting.outer_steps,
            **_plain(result),
            "yardsticks": {name: _plain(other) for name, other in result.yardsticks.items()},
        }
        for result in results
    ]
    begin = json.dumps({**about, "settings": []}).removesuffix("]}")
    lines = ",\n".join(map(json.dumps, rows))
    path.write_text(f"{begin}\n{lines}\n]}}\n")


def _plain(result: Result) -> dict[str, list[float]]:
    """What a policy, or one in its place, won."""
    won = {f"beats_{name}": values.tolist() for name, values in result.won.items()}
    return {"reward": result.reward.tolist(), **won}
