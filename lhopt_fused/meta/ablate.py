"""Ablations: the same meta-training without one thing at a time, judged on the same new tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lhopt_fused.meta.config import MetaConfig
from lhopt_fused.meta.evaluate import Result, compared, new_settings
from lhopt_fused.meta.setting import StartNoise
from lhopt_fused.meta.train import MetaTraining
from lhopt_fused.meta.validation import Validation
from lhopt_fused.meta.workers import Workers
from lhopt_fused.policy import FEATURES
from lhopt_fused.types import HYPERPARAMETERS, INNER_FEATURES

__all__ = ["ABLATIONS", "WHOLE", "Ablation", "Interval", "ablate"]

WHOLE: Final = "everything"
"""The one that leaves nothing out."""

_ALWAYS: Final = ("progress", "outer_step_length")
"""What every ablation sees: how far the run is, and how long an outer step is."""


def _hides(*patterns: str) -> Callable[[MetaConfig], MetaConfig]:
    return lambda config: replace(config, policy=replace(config.policy, hide=patterns))


def _without_memory(config: MetaConfig) -> MetaConfig:
    return replace(config, policy=replace(config.policy, memory=False))


def _without_noise(config: MetaConfig) -> MetaConfig:
    return replace(config, noise=StartNoise(lr=1, scale=1, average=1, logit=0, clean=1))


def _untuned(config: MetaConfig) -> MetaConfig:
    return replace(config, baseline="adamw")


def _moving_all(config: MetaConfig) -> MetaConfig:
    return replace(config, policy=replace(config.policy, moves=HYPERPARAMETERS))


def _with_registers(config: MetaConfig) -> MetaConfig:
    return replace(config, policy=replace(config.policy, registers=True))


def _trusting_vectors(config: MetaConfig) -> MetaConfig:
    return replace(config, policy=replace(config.policy, lamb_ignore_vectors=False))


def _from_scratch(config: MetaConfig) -> MetaConfig:
    return replace(config, cloning=replace(config.cloning, batches=0))


ABLATIONS: Final[Mapping[str, Callable[[MetaConfig], MetaConfig]]] = {
    WHOLE: lambda config: config,
    "no CDF features": _hides("*_cdf_*"),
    "no inner features": _hides(*(f"{name}*" for name in INNER_FEATURES)),
    "no losses": _hides("log_loss_*", "log_train_loss_*", "log_eval_loss_*", "register_*_loss*"),
    "no norms": _hides("log_path_ratio_*", "log_norm_ratio_*"),
    "no hyperparameters": _hides("*_relative_to_start", "previous_*"),
    "progress only": _hides(*(name for name in FEATURES if name not in _ALWAYS)),
    "moves all": _moving_all,
    "restart registers": _with_registers,
    "trust ratios for vectors": _trusting_vectors,
    "no memory": _without_memory,
    "no start noise": _without_noise,
    "untuned baseline": _untuned,
    "no imitation": _from_scratch,
}
"""What is changed, by name; each maps the whole configuration to the one with the change."""


class Interval(NamedTuple):
    """A mean, with a bootstrap 95 % interval over settings."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Ablation:
    """How a meta-training without something did.

    Attributes:
        name: one of :data:`ABLATIONS`.
        results: on the new tasks.
        episodes: that it was trained on.
        folder: of its run.
    """

    name: str
    results: list[Result]
    episodes: int
    folder: Path

    def reward(self) -> Interval:
        """Mean log speed-up over the tasks."""
        return _mean(self._rewards)

    def change(self, whole: Ablation) -> Interval:
        """Mean over the tasks of the log speed-up beyond that of another one on the same task."""
        return _mean(self._rewards - whole._rewards)

    @property
    def _rewards(self) -> NDArray[np.float64]:
        """Mean of each setting, ``[S]``."""
        return np.array([result.reward.mean() for result in self.results])


def _mean(values: NDArray[np.float64], draws: int = 2000) -> Interval:
    rng = np.random.default_rng(0)
    drawn = values[rng.integers(len(values), size=(draws, len(values)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def ablate(
    config: MetaConfig,
    names: list[str],
    folder: Path,
    workers: Workers,
    *,
    settings: int = 40,
    tasks: int = 6,
    data_dir: Path | None = None,
) -> Iterator[Ablation]:
    """Train each ablation for as long as the configuration says, and judge it.

    Args:
        config: of the whole; its updates are those of each ablation.
        names: some of :data:`ABLATIONS`.
        folder: one folder of runs in it for each; runs that are there go on. What several of them
            need lies in ``folder/kept``.
        workers: who runs episodes.
        settings, tasks: of the new tasks.
        data_dir: for families that read files.

    Raises:
        ValueError: there is no such ablation.
    """
    unknown = [name for name in names if name not in ABLATIONS]
    if unknown:
        raise ValueError(f"there is no ablation {unknown[0]!r}; there are {', '.join(ABLATIONS)}")
    chosen = new_settings(config, settings, tasks)
    kept_in = folder / "kept"
    for name in names:
        own = ABLATIONS[name](config)
        place = folder / name.replace(" ", "-")
        training = MetaTraining(own, place, workers, data_dir=data_dir, kept_in=kept_in)
        training.run()
        policy = training.policy()
        # judged by one yardstick, whatever it was trained by
        judged = replace(own, baseline=config.baseline)
        start, control = policy.start_hyperparameters, training.control
        validation = Validation(judged, chosen, start, control, workers, kept_in, data_dir)
        results = compared(validation, policy.weights)
        yield Ablation(name, results, training.episodes, place)
