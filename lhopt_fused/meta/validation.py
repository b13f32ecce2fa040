"""How good a policy is on tasks that it was not trained on, beside AdamW and the hand control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lhopt_fused.meta.config import MetaConfig
from lhopt_fused.meta.control import HandControl
from lhopt_fused.meta.jobs import FallLinearly, FindReferences, Play, References, Weights
from lhopt_fused.meta.kept import kept
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.workers import Workers

__all__ = ["Report", "Validation"]


@dataclass(frozen=True)
class Report:
    """How a policy did; each is a mean over all tasks of all settings.

    Attributes:
        reward: log speed-up over the baseline of the reward.
        control_reward: that of the hand control.
        beats_default: share of the tasks that end below AdamW at 1e-3.
        beats_tuned: likewise, below AdamW in the best of 35 configurations, as another run of the
            same task chose it.
        beats_control: likewise, below the hand control.
        tasks: how many.
    """

    reward: float
    control_reward: float
    beats_default: float
    beats_tuned: float
    beats_control: float
    tasks: int

    def to_plain(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


class Validation:
    """The same tasks for every policy; what they are compared with is found once and kept.

    Args:
        config: of the meta-training.
        settings: what is played.
        start: hyperparameters that runs start with.
        control: the hand control.
        workers: who plays.
        folder: where references are kept from one use to the next.
        data_dir: for families that read files.
    """

    def __init__(
        self,
        config: MetaConfig,
        settings: Sequence[Setting],
        start: Mapping[str, float],
        control: HandControl,
        workers: Workers,
        folder: Path,
        data_dir: Path | None = None,
    ) -> None:
        self.settings = list(settings)
        self._config, self._workers, self._data_dir = config, workers, data_dir
        self._start, self._control = dict(start), control
        self._folder = folder
        self._references: list[References] | None = None

    @property
    def references(self) -> list[References]:
        """What policies are compared with, per setting."""
        if self._references is None:
            self._references = self._found()
        return self._references

    def losses(self, network: Weights) -> list[NDArray[np.float64]]:
        """Report losses ``[R]`` at the end of the runs of each setting under a policy."""
        jobs = [
            Play(self._config, setting, self._data_dir, self._start, network)
            for setting in self.settings
        ]
        return [losses for losses, _ in self._workers.start(jobs).results()]

    def linear_losses(self) -> list[NDArray[np.float64]]:
        """The same without a policy: from its start, the learning rate falls linearly to 0."""
        jobs = [
            FallLinearly(self._config, setting, self._data_dir, self._start)
            for setting in self.settings
        ]
        return self._workers.start(jobs).results()

    def report(self, network: Weights) -> Report:
        """Play all settings under a policy and compare."""
        return self.compare(self.losses(network))

    def compare(self, losses: Sequence[NDArray[np.float64]]) -> Report:
        """How losses as :meth:`losses` gives them compare with the references."""
        rows = []
        for setting, mine, other in zip(self.settings, losses, self.references, strict=True):
            won = other.won(mine)
            rows.append(
                (
                    other.rewards(mine, setting.total_steps),
                    other.rewards(other.control, setting.total_steps),
                    *(won[name] for name in ("default", "tuned", "control")),
                )
            )
        table = np.concatenate([np.stack(row) for row in rows], axis=1)
        reward, control_reward, default, tuned, control = table.mean(1).tolist()
        return Report(reward, control_reward, default, tuned, control, table.shape[1])

    def _found(self) -> list[References]:
        """References from the folder, or else from the workers."""
        depends_on = {
            "settings": [asdict(setting) for setting in self.settings],
            "start": {**self._start, "lr": self._control.lr},
            "control": self._control.to_plain(),
            "baseline": self._config.baseline,
            "options": self._config.policy.start_options.keywords(),
            "data_dir": str(self._data_dir),
        }
        rows = kept(self._folder, "references", depends_on, References._fields, self._find)
        return [References(*row) for row in rows]

    def _find(self) -> list[References]:
        jobs = [
            FindReferences(self._config, setting, self._data_dir, self._start, self._control)
            for setting in self.settings
        ]
        return self._workers.start(jobs).results()
