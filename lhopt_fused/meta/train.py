"""Meta-training from a configuration to a policy file: search, imitate, improve, choose."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from lhopt_fused.actions import ACTIONS
from lhopt_fused.meta.config import START_HYPERPARAMETERS, MetaConfig, config_from_plain
from lhopt_fused.meta.control import HandControl, control_grid
from lhopt_fused.meta.demonstrations import PolicyTeacher, ScheduleTeacher, Teacher
from lhopt_fused.meta.evaluate import trained_config
from lhopt_fused.meta.jobs import (
    Collect,
    Demonstrate,
    FirstLook,
    ScoreControls,
    Weights,
    make_critic,
    make_network,
    pack,
)
from lhopt_fused.meta.kept import kept
from lhopt_fused.meta.learner import Learner, clone_behaviour
from lhopt_fused.meta.ppo import Episodes
from lhopt_fused.meta.reward import wins
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.teacher import expected_worth, teacher_weights
from lhopt_fused.meta.validation import Report, Validation
from lhopt_fused.meta.workers import Pending, Workers
from lhopt_fused.policy import FEATURES_HASH, LearnedPolicy, load_policy, save_policy

__all__ = ["MetaTraining", "Update"]

# one stream of seeds for each purpose, so that none depends on how much another drew
_COLLECT, _SEARCH, _VALIDATE = range(3)
_CHECKPOINT: Final = "checkpoint.pt"
_LOG: Final = "log.jsonl"
_STATE_KEYS: Final = {
    "config",
    "features",
    "learner",
    "acting",
    "updates",
    "episodes",
    "seconds",
    "control",
    "best_score",
    "best",
    "best_report",
}


@dataclass(frozen=True)
class Update:
    """What one update did.

    Attributes:
        index: updates done.
        episodes: collected so far.
        seconds: of training so far.
        reward: mean over the new episodes.
        metrics: of the learner.
        report: of the averaged policy, where this update was followed by a validation.
    """

    index: int
    episodes: int
    seconds: float
    reward: float
    metrics: Mapping[str, float]
    report: Report | None


@dataclass
class _Progress:
    """What a checkpoint holds beside the learner; plain values and weights."""

    updates: int = 0
    episodes: int = 0
    seconds: float = 0.0
    control: HandControl | None = None
    best_score: float = -float("inf")
    best: Weights | None = None
    best_report: dict[str, Any] = field(default_factory=dict)


class MetaTraining:
    """One meta-training run in a folder; it may be stopped at any time and goes on where it was.

    Every batch of episodes is a pure function of the configuration, its number and the weights that
    it is sent; the weights are always those before the last update, so that episodes are collected
    while the learner learns. The run is the same for any number of workers, and after a resume, as
    long as torch uses as many threads for the learner.

    Args:
        config: what is trained.
        folder: for checkpoints, the log and the policy; made if need be.
        workers: who runs episodes.
        data_dir: for families that read files.
        commit: of the code, for the policy file.
        kept_in: where results that other trainings can share are kept; ``folder`` if not given.

    Raises:
        ValueError: the folder holds the run of another configuration, or of other policy features.
    """

    def __init__(
        self,
        config: MetaConfig,
        folder: Path,
        workers: Workers,
        *,
        data_dir: Path | None = None,
        commit: str = "",
        kept_in: Path | None = None,
    ) -> None:
        self.config, self.folder, self.commit = config, folder, commit
        self._initial = _initial_policy(config)
        self._kept_in = folder if kept_in is None else kept_in
        self._workers, self._data_dir = workers, data_dir
        folder.mkdir(parents=True, exist_ok=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network, critic = make_network(config), make_critic(config)
        self._learner = Learner(network, critic, config.ppo, seed=config.seed)
        self._progress = _Progress()
        self._acting = self._weights()
        self._load()

    @property
    def updates(self) -> int:
        """Updates done."""
        return self._progress.updates

    @property
    def seconds(self) -> float:
        """Of training, over all runs."""
        return self._progress.seconds

    @property
    def log(self) -> Path:
        """A line of JSON for each update."""
        return self.folder / _LOG

    # ------------------------------------------------------------------ the run

    def run(
        self,
        on_update: Callable[[Update], None] | None = None,
        on_save: Callable[[], None] | None = None,
    ) -> Path:
        """Train until the configuration's updates or minutes are used up.

        Args:
            on_update: called after each update; what it raises ends the run there, and :meth:`save`
                keeps it.
            on_save: called after each checkpoint.

        Returns:
            Path of the policy file.
        """
        began = time.monotonic()
        before = self._progress.seconds
        if self._progress.control is None:
            self._begin()
            self._clock(before, began)
            self._save_and_tell(on_save)
        saved = time.monotonic()
        pending: Pending[dict[str, Any]] | None = None
        while not self._over():
            pending = pending or self._start_collecting()
            arrays = pending.results()
            pending = None
            acting = self._weights()
            following = self._collect_jobs(self._progress.updates + 1, acting)
            if not self._last():
                pending = self._workers.start(following)
            update = self._learn(arrays)
            self._acting = acting
            self._clock(before, began)
            update = replace(update, seconds=self._progress.seconds)
            if self._progress.updates % self.config.validation.every == 0:
                update = replace(update, report=self._validate())
            self._log(update)
            if on_update is not None:
                on_update(update)
            if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                self._save_and_tell(on_save)
                saved = time.monotonic()
        if pending is not None:
            pending.results()
        self._validate()
        self._save_and_tell(on_save)
        return self._write_policy()

    def _over(self) -> bool:
        done = self._progress
        return done.updates >= self.config.updates or done.seconds >= 60 * self.config.minutes

    def _last(self) -> bool:
        """Whether the update to come is the last one by number."""
        return self._progress.updates + 1 >= self.config.updates

    def _clock(self, before: float, began: float) -> None:
        self._progress.seconds = before + time.monotonic() - began

    def settings(self, purpose: int, count: int, first: int = 0) -> list[Setting]:
        """Settings of one of the streams of seeds."""
        distribution = self.config.validation_tasks if purpose == _VALIDATE else self.config.tasks
        seeds = [
            int(np.random.SeedSequence([self.config.seed, purpose, index]).generate_state(1)[0])
            for index in range(first, first + count)
        ]
        return [distribution.draw(seed) for seed in seeds]

    # ------------------------------------------------------------------ before PPO

    def _begin(self) -> None:
        """Come to a hand control and to a network that PPO can go on from."""
        if self._initial is None:
            self._begin_anew()
        else:
            self._begin_from(self._initial)
        self._acting = self._weights()

    def _begin_anew(self) -> None:
        """Find the hand control, and start from imitating what is best on each task."""
        own = self.config.cloning
        settings = self.settings(_SEARCH, own.settings)
        found = self._scores([replace(setting, repeats=1) for setting in settings])
        scores = np.mean([rewards.mean(-1) for _, rewards in found], axis=0)
        control = control_grid()[int(scores.argmax())]
        self._progress.control = control
        table = [
            {**candidate.to_plain(), "reward": float(score)}
            for candidate, score in zip(control_grid(), scores, strict=True)
        ]
        (self.folder / "controls.json").write_text(json.dumps(table, indent=1))
        if own.batches:
            of_control = control_grid().index(control)
            worth = [
                rewards + self.config.win_weight * wins(losses, losses[of_control])
                for losses, rewards in (map(torch.tensor, pair) for pair in found[: own.batches])
            ]
            settings = settings[: own.batches]
            weights = self._teacher_weights(settings, worth)
            self._imitate(settings, [ScheduleTeacher(x.numpy()) for x in weights])

    def _begin_from(self, policy: LearnedPolicy) -> None:
        """Take over a policy, and imitate what it has no head for."""
        _, self._progress.control = trained_config(policy)
        network = self._learner.network
        known = policy.network().state_dict()
        network.load_state_dict({**network.state_dict(), **known})
        self._learner.start_from_network()
        batches = self.config.cloning.batches
        if policy.shape.heads != network.shape.heads and batches:
            self._imitate(self.settings(_SEARCH, batches), [PolicyTeacher(policy)] * batches)

    def _scores(self, settings: list[Setting]) -> list[tuple[NDArray[np.float64], ...]]:
        """Losses and rewards ``[C, T]`` of all possible hand controls on the tasks of settings."""
        jobs = [
            ScoreControls(self.config, setting, self._data_dir, START_HYPERPARAMETERS)
            for setting in settings
        ]
        depends_on = {
            "settings": [asdict(setting) for setting in settings],
            "controls": [control.to_plain() for control in control_grid()],
            "start": START_HYPERPARAMETERS,
            "baseline": self.config.baseline,
            "options": self.config.policy.start_options.keywords(),
            "data_dir": str(self._data_dir),
        }
        fields = ("losses", "rewards")
        return kept(
            self._kept_in,
            "controls",
            depends_on,
            fields,
            lambda: self._workers.start(jobs).results(),
        )

    def _imitate(self, settings: list[Setting], teachers: Sequence[Teacher]) -> None:
        """Imitate a teacher on the tasks of each setting."""
        own = self.config.cloning
        jobs = [
            Demonstrate(self.config, setting, self._data_dir, self.start, teacher)
            for setting, teacher in zip(settings, teachers, strict=True)
        ]
        features, targets, mask = _padded(self._workers.start(jobs).results())
        curve = clone_behaviour(
            self._learner.network,
            features,
            targets,
            mask,
            steps=own.steps,
            learning_rate=own.learning_rate,
            exploration=own.exploration,
            seed=self.config.seed,
        )
        (self.folder / "imitation.json").write_text(json.dumps(curve))
        self._learner.start_from_network()

    def _teacher_weights(
        self, settings: list[Setting], worth: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What the teachers of each setting's tasks make of each schedule, ``[T, C]``.

        Args:
            settings: of the tasks.
            worth: of each possible hand control on the tasks of each setting, ``[C, T]``.
        """
        config = replace(self.config, tasks=replace(self.config.tasks, hidden_eval=0.0))
        jobs = [
            FirstLook(config, replace(setting, repeats=1), self._data_dir, self.start)
            for setting in settings
        ]
        seen = [torch.tensor(features) for features in self._workers.start(jobs).results()]
        sizes = [len(features) for features in seen]
        setting_of_task = torch.arange(len(seen)).repeat_interleave(torch.tensor(sizes))
        expected = expected_worth(
            torch.cat(seen), torch.cat(worth, dim=1), setting_of_task, self.config.seed
        )
        weights = teacher_weights(expected, self.config.cloning.temperature)
        return list(torch.split(weights, sizes))

    @property
    def start(self) -> dict[str, float]:
        """Hyperparameters that runs under the policy start with."""
        control, lr = self._progress.control, self.config.policy.start_lr
        if lr is None:
            lr = START_HYPERPARAMETERS["lr"] if control is None else control.lr
        return {**START_HYPERPARAMETERS, "lr": lr}

    # ------------------------------------------------------------------ PPO

    def _weights(self) -> tuple[Weights, Weights]:
        return pack(self._learner.network), pack(self._learner.critic)

    def _start_collecting(self) -> Pending[dict[str, Any]]:
        return self._workers.start(self._collect_jobs(self._progress.updates, self._acting))

    def _collect_jobs(self, update: int, acting: tuple[Weights, Weights]) -> list[Collect]:
        count = self.config.batches
        version = max(0, update - 1)
        return [
            Collect(
                self.config, setting, self._data_dir, self.start, self.control, *acting, version
            )
            for setting in self.settings(_COLLECT, count, update * count)
        ]

    def _learn(self, arrays: list[dict[str, Any]]) -> Update:
        parts = [
            Episodes.from_tensors({name: torch.tensor(array) for name, array in part.items()})
            for part in arrays
        ]
        metrics = self._learner.update(Episodes.concatenate(parts))
        rewards = torch.cat([part.rewards.sum(1) for part in parts])
        self._progress.updates += 1
        self._progress.episodes += len(rewards)
        return Update(
            self._progress.updates,
            self._progress.episodes,
            self._progress.seconds,
            float(rewards.mean()),
            metrics,
            None,
        )

    # ------------------------------------------------------------------ choosing

    @property
    def episodes(self) -> int:
        """Episodes collected so far."""
        return self._progress.episodes

    @property
    def control(self) -> HandControl:
        """What the policy started from.

        Raises:
            RuntimeError: it has not been searched yet.
        """
        if self._progress.control is None:
            raise RuntimeError("there is no hand control yet: run() searches it first")
        return self._progress.control

    def validation(self) -> Validation:
        """The tasks that policies are chosen on."""
        return Validation(
            self.config,
            self.settings(_VALIDATE, self.config.validation.settings),
            self.start,
            self.control,
            self._workers,
            self._kept_in,
            self._data_dir,
        )

    def _validate(self) -> Report:
        weights = pack(self._learner.average)
        report = self.validation().report(weights)
        score = report.reward + self.config.win_weight * report.beats_control
        if score > self._progress.best_score:
            self._progress.best_score, self._progress.best = score, weights
            self._progress.best_report = {
                **report.to_plain(),
                "updates": self._progress.updates,
                "episodes": self._progress.episodes,
            }
        return report

    def policy(self) -> LearnedPolicy:
        """The best policy so far."""
        best = self._progress.best
        network = make_network(
            self.config, best if best is not None else pack(self._learner.average)
        )
        control = self._progress.control
        return LearnedPolicy.from_network(
            network,
            name=self.config.name,
            action_space=self.config.policy.action_space,
            start_hyperparameters=self.start,
            start_options=self.config.policy.start_options,
            trained_on={
                "config": self.config.to_plain(),
                "control": None if control is None else control.to_plain(),
                "validation": self._progress.best_report,
                "updates": self._progress.updates,
                "episodes": self._progress.episodes,
                "hours": self._progress.seconds / 3600,
                "torch": torch.__version__,
            },
            commit=self.commit,
        )

    def _write_policy(self) -> Path:
        path = self.folder / f"{self.config.name}.safetensors"
        save_policy(self.policy(), path)
        return path

    # ------------------------------------------------------------------ saving

    def _log(self, update: Update) -> None:
        row = {
            "update": update.index,
            "episodes": update.episodes,
            "seconds": update.seconds,
            "reward": update.reward,
            **update.metrics,
        }
        if update.report is not None:
            row |= {f"validation_{name}": x for name, x in update.report.to_plain().items()}
        with self.log.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _save_and_tell(self, on_save: Callable[[], None] | None) -> None:
        self.save()
        if on_save is not None:
            on_save()

    def save(self) -> None:
        """Write a checkpoint; the file is whole at any time."""
        progress = self._progress
        state = {
            "config": self.config.to_plain(),
            "features": FEATURES_HASH,
            "learner": self._learner.state_dict(),
            "acting": [_tensors(weights) for weights in self._acting],
            "updates": progress.updates,
            "episodes": progress.episodes,
            "seconds": progress.seconds,
            "control": None if progress.control is None else progress.control.to_plain(),
            "best_score": progress.best_score,
            "best": None if progress.best is None else _tensors(progress.best),
            "best_report": progress.best_report,
        }
        partial = self.folder / f"{_CHECKPOINT}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / _CHECKPOINT)

    def _load(self) -> None:
        path = self.folder / _CHECKPOINT
        if not path.is_file():
            return
        state = _read_checkpoint(path)
        if state["features"] != FEATURES_HASH:
            raise ValueError(
                f"{path} was written for other policy features than this version has; "
                "begin anew in another folder, or go on with the version that wrote it"
            )
        self._check_config(path, state["config"])
        try:
            self._learner.load_state_dict(state["learner"])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        acting, critic = (_arrays(tensors) for tensors in state["acting"])
        self._acting = acting, critic
        control, best = state["control"], state["best"]
        self._progress = _Progress(
            state["updates"],
            state["episodes"],
            state["seconds"],
            None if control is None else HandControl(**control),
            state["best_score"],
            None if best is None else _arrays(best),
            state["best_report"],
        )
        self._forget_later_updates()

    def _forget_later_updates(self) -> None:
        """Take updates out of the log that are to be done again."""
        if not self.log.is_file():
            return
        lines = self.log.read_text().splitlines(keepends=True)
        kept = [line for line in lines if _update_of(line) <= self._progress.updates]
        partial = self.log.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(self.log)

    def _check_config(self, path: Path, plain: Mapping[str, Any]) -> None:
        """A run may go on for longer, or with other workers, but not with anything else."""
        free = ("updates", "minutes", "workers", "checkpoint_minutes")
        mine = {**self.config.to_plain(), **dict.fromkeys(free)}
        try:
            written = config_from_plain(plain)
        except ValueError as error:
            raise ValueError(
                f"{path} was written by a version with other configurations: {error}; begin anew "
                "in another folder"
            ) from error
        theirs = {**written.to_plain(), **dict.fromkeys(free)}
        for name, value in mine.items():
            if theirs[name] != value:
                raise ValueError(
                    f"{path} was written with {name} = {theirs[name]!r}, the configuration has "
                    f"{value!r}; begin anew in another folder"
                )


def _initial_policy(config: MetaConfig) -> LearnedPolicy | None:
    """The policy that a training starts from, if any.

    Raises:
        FileNotFoundError, ValueError: it is not there, is a rule, or has other sizes or choices.
    """
    if not config.initial:
        return None
    policy = load_policy(config.initial)
    if not isinstance(policy, LearnedPolicy):
        raise ValueError(f"initial is {config.initial!r}, a rule; expected a learned policy")
    trained_config(policy)  # its own checks
    wanted = config.policy.shape
    without_registers = replace(wanted, heads=wanted.heads[: len(ACTIONS)])
    same_choices = [action.choices for action in policy.action_space.actions] == [
        action.choices for action in config.policy.action_space.actions
    ]
    if policy.shape not in (wanted, without_registers) or not same_choices:
        raise ValueError(
            f"initial is {config.initial!r}, whose network or choices differ from those of the "
            f"configuration: it has {policy.shape}; give policy.hidden, head_hidden, moves, keep, "
            "lr_choices and registers the values that it was trained with"
        )
    return policy


def _padded(shown: list[tuple[Any, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Demonstrations of several lengths as features ``[N, T, F]``, targets and mask."""
    longest = max(targets.shape[1] for _, targets in shown)
    columns = []
    for features, targets in shown:
        mask = np.ones(targets.shape[:2], dtype=bool)
        room = [(0, 0), (0, longest - targets.shape[1])]
        columns.append(
            [np.pad(x, [*room, *[(0, 0)] * (x.ndim - 2)]) for x in (features, targets, mask)]
        )
    stacked = [torch.from_numpy(np.concatenate(column)) for column in zip(*columns, strict=True)]
    return stacked[0], stacked[1], stacked[2]


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """What :meth:`MetaTraining.save` wrote, on the CPU.

    Raises:
        ValueError: the file is something else, or was cut short.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint: {error}") from error
    found = set(state) if isinstance(state, dict) else set()
    if found != _STATE_KEYS:
        odd = ", ".join(sorted(map(str, found ^ _STATE_KEYS)))
        raise ValueError(
            f"{path} is no checkpoint of meta-training of this version: it differs in {odd}; use "
            "another folder"
        )
    return dict(state)


def _update_of(line: str) -> float:
    """The update that a line of the log is of; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["update"])
    except (ValueError, KeyError):
        return float("inf")


def _tensors(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Weights:
    return {name: value.numpy() for name, value in tensors.items()}
