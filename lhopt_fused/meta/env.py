"""Meta-training as a gymnasium environment: an episode is a whole inner training run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from lhopt_fused.actions import ActionSpace
from lhopt_fused.kernels import BackendName
from lhopt_fused.meta.config import START_HYPERPARAMETERS, MetaConfig
from lhopt_fused.meta.episode import EpisodeBatch
from lhopt_fused.policy import FEATURES
from lhopt_fused.policy.features import LARGEST_FEATURE

__all__ = ["LHOPTEnv", "LHOPTVectorEnv"]

_Features = NDArray[np.float32]
_Choices = NDArray[np.int64]


def _observation_space() -> spaces.Box:
    return spaces.Box(-LARGEST_FEATURE, LARGEST_FEATURE, (len(FEATURES),), np.float32)


def _action_space(space: ActionSpace) -> spaces.MultiDiscrete:
    return spaces.MultiDiscrete(np.array(space.head_sizes))


class LHOPTVectorEnv(gymnasium.vector.VectorEnv[_Features, _Choices, NDArray[Any]]):
    """Many inner training runs side by side, tasks of one architecture and length in each episode.

    An observation is the policy features of one outer step, an action one choice per head; the
    reward is 0 until the last outer step, and there the log speed-up over the baseline. All runs
    of an episode end together; the step after that begins the next one (gymnasium's
    ``AutoresetMode.NEXT_STEP``). What only a critic may see is in the infos under
    ``"privileged"``, float32 ``[num_envs, PRIVILEGED_INPUTS]``; the report loss at the end of a run
    under ``"report_loss"``.

    Args:
        config: of the tasks, noise, baseline and actions; ``config.tasks`` says how many runs.
        start: hyperparameters that runs start with, before the noise.
        backend: of the inner steps.
        device: where the runs are.
        data_dir: for families that read files.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012

    def __init__(
        self,
        config: MetaConfig,
        *,
        start: Mapping[str, float] | None = None,
        backend: BackendName = "auto",
        device: torch.device | str = "cpu",
        data_dir: Path | None = None,
    ) -> None:
        self.num_envs = config.tasks.tasks * config.tasks.repeats
        self.single_observation_space = _observation_space()
        self.single_action_space = _action_space(config.policy.action_space)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._config = config
        self._start = {**START_HYPERPARAMETERS, **(start or {})}
        self._where: dict[str, Any] = {"backend": backend, "device": device, "data_dir": data_dir}
        self._batch: EpisodeBatch | None = None

    @property
    def batch(self) -> EpisodeBatch:
        """The runs behind the current episode.

        Raises:
            RuntimeError: there is none yet.
        """
        if self._batch is None:
            raise RuntimeError("there is no episode yet: call reset() first")
        return self._batch

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Features, dict[str, Any]]:
        """Begin an episode on new tasks and show its first outer step.

        Args:
            seed: of all episodes from here on; one number.
            options: not used.
        """
        if isinstance(seed, list):
            raise ValueError("seed is a list; runs of an episode share their setting: pass one int")
        super().reset(seed=seed)
        return self._begin()

    def step(
        self, actions: _Choices
    ) -> tuple[_Features, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Decide, and do the next outer step.

        Raises:
            ValueError: ``actions`` is not in the action space; nothing has happened.
        """
        nothing = np.zeros(self.num_envs, dtype=bool)
        batch = self.batch
        if batch.done:
            seen, infos = self._begin()
            return seen, np.zeros(self.num_envs), nothing, nothing.copy(), infos
        if not self.action_space.contains(actions):
            raise ValueError(
                f"the actions are no choices of {self.num_envs} runs in {self.single_action_space}"
            )
        choices = torch.from_numpy(np.asarray(actions, dtype=np.int64))
        batch.act(*batch.shifts_of(choices.to(batch.inner.scalars.device)))
        features, infos = self._advance()
        rewards = np.zeros(self.num_envs)
        if batch.done:
            rewards = batch.rewards().cpu().numpy()
            infos |= self._info("report_loss", batch.inner.loss("report"))
        done = np.full(self.num_envs, batch.done)
        return features, rewards, done, nothing, infos

    def _begin(self) -> tuple[_Features, dict[str, Any]]:
        config = self._config
        setting = config.tasks.draw(int(self.np_random.integers(2**62)))
        start, space = config.policy.for_run(self._start, setting.total_steps)
        self._batch = EpisodeBatch(
            setting,
            config.policy.settings(start),
            space,
            noise=config.noise,
            hidden_eval=config.tasks.hidden_eval,
            baseline=config.baseline,
            hide=config.policy.hide,
            **self._where,
        )
        return self._advance()

    def _advance(self) -> tuple[_Features, dict[str, Any]]:
        seen = self.batch.advance()
        return seen.features.cpu().numpy(), self._info("privileged", seen.privileged)

    def _info(self, name: str, values: torch.Tensor) -> dict[str, Any]:
        return {name: values.cpu().numpy(), f"_{name}": np.ones(self.num_envs, dtype=bool)}


class LHOPTEnv(gymnasium.Env[_Features, _Choices]):
    """One inner training run an episode; see :class:`LHOPTVectorEnv`.

    Args:
        config: of the tasks, noise, baseline and actions; the number of tasks in it is not used.
        options: as for :class:`LHOPTVectorEnv`.
    """

    def __init__(self, config: MetaConfig, **options: Any) -> None:
        single = replace(config, tasks=replace(config.tasks, tasks=1, repeats=1))
        self._runs = LHOPTVectorEnv(single, **options)
        self.observation_space = self._runs.single_observation_space
        self.action_space = self._runs.single_action_space

    @property
    def batch(self) -> EpisodeBatch:
        """The run behind the current episode, as a batch of one."""
        return self._runs.batch

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Features, dict[str, Any]]:
        """Begin a run on a new task and show its first outer step."""
        super().reset(seed=seed)
        features, infos = self._runs.reset(seed=int(self.np_random.integers(2**31)))
        return features[0], _first(infos)

    def step(self, action: _Choices) -> tuple[_Features, float, bool, bool, dict[str, Any]]:
        """Decide, and do the next outer step.

        Raises:
            RuntimeError: the run is over; call :meth:`reset`.
            ValueError: ``action`` is not in the action space.
        """
        if self.batch.done:
            raise RuntimeError("the run is over: call reset() first")
        features, rewards, done, _, infos = self._runs.step(np.asarray(action)[None])
        return features[0], float(rewards[0]), bool(done[0]), False, _first(infos)


def _first(infos: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[0] for name, value in infos.items() if not name.startswith("_")}
