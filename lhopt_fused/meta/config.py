"""Configurations of meta-training: frozen, checked, read from TOML."""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

import dacite
import torch

from lhopt_fused.actions import ACTIONS, Action, ActionSpace
from lhopt_fused.ciao import LHOPT_START
from lhopt_fused.meta.baselines import Baseline
from lhopt_fused.meta.inner import Settings, ciao_settings
from lhopt_fused.meta.ppo import PPOConfig
from lhopt_fused.meta.setting import StartNoise, TaskDistribution
from lhopt_fused.policy import FEATURES, NetworkShape, StartOptions
from lhopt_fused.types import HYPERPARAMETERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "CloningConfig",
    "MetaConfig",
    "PolicyConfig",
    "ValidationConfig",
    "config_from_plain",
    "load_config",
    "shipped_configs",
]


_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_T = TypeVar("_T")


@dataclass(frozen=True)
class PolicyConfig:
    """The policy that is trained.

    Attributes:
        hidden: width of the network; a multiple of 16.
        head_hidden: width inside a head; a multiple of 16.
        registers: whether it decides about restart registers.
        keep: whether every head has a choice that changes nothing.
        moves: the hyperparameters that it may move; the others stay where they start.
        lr_choices: factors of the learning rate; empty for the published ones.
        start_lr: where the learning rate starts; None for the peak of the hand control.
        lr_steps: inner steps of a run that this is meant for; others start as
            :meth:`lhopt_fused.policy.StartOptions.for_run` says. None where all start alike.
        lr_reach: how far above that decisions may take it, as there; None for no such bound.
        trust, lamb_ignore_vectors: of the inner optimizer, as of :class:`lhopt_fused.CIAO`.
        memory: False for a policy that decides by the last outer step alone (an ablation; such a
            policy cannot be deployed).
        hide: policy features that it does not see, by patterns of their names (an ablation).
    """

    hidden: int = 128
    head_hidden: int = 32
    registers: bool = False
    keep: bool = True
    moves: tuple[str, ...] = HYPERPARAMETERS
    lr_choices: tuple[float, ...] = ()
    start_lr: float | None = None
    lr_steps: int | None = None
    lr_reach: float | None = None
    trust: Literal["exact", "delayed"] = "exact"
    lamb_ignore_vectors: bool = True
    memory: bool = True
    hide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in self.hide:
            if not fnmatch.filter(FEATURES, pattern):
                raise ValueError(f"hide has {pattern!r}, which is like no policy feature")
        for name in self.moves:
            if name not in HYPERPARAMETERS:
                raise ValueError(
                    f"moves has {name!r}; the hyperparameters are {', '.join(HYPERPARAMETERS)}"
                )
        for factor in self.lr_choices:
            if not 0 < factor < math.inf:
                raise ValueError(f"lr_choices has {factor}, expected factors above 0")
        if self.start_lr is not None:
            _check_above_zero(self, "start_lr")
        self.start_options  # noqa: B018 - its own checks
        self.shape  # noqa: B018 - its own checks

    @property
    def action_space(self) -> ActionSpace:
        """What it may do."""
        return ActionSpace(tuple(map(self._action, ACTIONS)), self.registers)

    def _action(self, published: Action) -> Action:
        choices = published.choices
        neutral = 1.0 if published.kind == "scale" else 0.0
        if published.name == "lr" and self.lr_choices:
            choices = self.lr_choices
        if published.name not in self.moves:
            choices = (neutral,)
        elif self.keep:
            choices = tuple(sorted({*choices, neutral}))
        return replace(published, choices=choices)

    @property
    def shape(self) -> NetworkShape:
        """Sizes of its network."""
        heads = self.action_space.head_sizes
        return NetworkShape(len(FEATURES), heads, self.hidden, self.head_hidden)

    def settings(self, hyperparameters: Mapping[str, float]) -> Settings:
        """What the inner optimizer starts with."""
        return ciao_settings(**self.start_options.keywords(), **hyperparameters)

    def for_run(
        self, start: Mapping[str, float], total_steps: int
    ) -> tuple[dict[str, float], ActionSpace]:
        """Where a run of ``total_steps`` inner steps starts, and what may be done to it."""
        return self.start_options.for_run(start, self.action_space, total_steps)

    @property
    def start_options(self) -> StartOptions:
        """What runs are like beside their hyperparameters."""
        return StartOptions(self.trust, self.lamb_ignore_vectors, self.lr_steps, self.lr_reach)


@dataclass(frozen=True)
class CloningConfig:
    """The supervised start: imitate the possible hand control that promises most on each task.

    Attributes:
        settings: batches of tasks to try all of them on; the best on average is the hand control.
        batches: how many of these to learn from, 2 at least; 0 for a start from scratch.
        temperature: difference in what is expected by which the weight of a schedule falls to 1/e;
            the teacher's log learning rate on a task is the weighted mean over schedules.
        steps: of gradient descent on them.
        learning_rate: of Adam.
        exploration: share of the probability that is spread over all choices of a head.
        wander: standard deviation of the noise on the teacher's log learning rates.
    """

    settings: int = 16
    batches: int = 16
    temperature: float = 0.05
    steps: int = 600
    learning_rate: float = 1e-3
    exploration: float = 0.02
    wander: float = 0.15

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "settings", "steps")
        _check_at_least(self, 0, "batches", "wander")
        if not 0 <= self.exploration < 1:
            raise ValueError(f"exploration is {self.exploration}, expected 0 to below 1")
        _check_above_zero(self, "learning_rate", "temperature")
        if self.batches == 1:
            raise ValueError("batches is 1, expected 0, or 2 at least: some teach, some are taught")
        if self.batches > self.settings:
            raise ValueError(
                f"batches is {self.batches}, expected at most settings, {self.settings}"
            )


@dataclass(frozen=True)
class ValidationConfig:
    """How a policy is judged while it trains: on new tasks, without noise.

    Attributes:
        settings: batches of tasks, always the same.
        tasks: in each.
        every: updates between validations.
        outer_steps, inner_steps, longest: as of the training tasks, but up to twice as long.
    """

    settings: int = 24
    tasks: int = 6
    every: int = 20
    outer_steps: tuple[int, int] = (2, 128)
    inner_steps: tuple[int, int] = (4, 64)
    longest: int = 2048

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "settings", "every")
        try:
            self.distribution(TaskDistribution())
        except ValueError as error:
            raise ValueError(str(error).removeprefix("tasks.")) from error

    def distribution(self, training: TaskDistribution) -> TaskDistribution:
        """What its settings are drawn from, beside the training tasks."""
        return TaskDistribution(
            families=training.families,
            tasks=self.tasks,
            repeats=1,
            outer_steps=self.outer_steps,
            inner_steps=self.inner_steps,
            longest=self.longest,
            hidden_eval=training.hidden_eval,
        )


@dataclass(frozen=True)
class MetaConfig:
    """A meta-training run.

    Attributes:
        name: of the policy.
        initial: a policy, built in or a file, to go on from with its weights and its hand control,
            instead of searching one and imitating schedules. It may lack the register head: then
            that one is learned by imitation first. Empty for none.
        seed: of everything.
        updates: of PPO, at most.
        minutes: of training, at most, over all runs that it is spread over.
        batches: of episodes collected for each update.
        workers: processes that collect them.
        checkpoint_minutes: between checkpoints.
        baseline: what the reward compares with.
        win_weight: what ending below the hand control adds to the reward. The mean of log speed-ups
            is made by the few tasks on which they are large; this counts every task alike.
        device: where inner runs and gradient steps are: cpu, cuda, or cuda:N.

    Raises:
        ValueError: naming the field that is out of range or contradicts another.
    """

    name: str
    initial: str = ""
    seed: int = 0
    updates: int = 10_000
    minutes: float = 180.0
    batches: int = 4
    workers: int = 2
    checkpoint_minutes: float = 3.0
    baseline: Baseline = "tuned"
    win_weight: float = 2.0
    device: str = "cpu"
    tasks: TaskDistribution = field(default_factory=TaskDistribution)
    noise: StartNoise = field(default_factory=StartNoise)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    cloning: CloningConfig = field(default_factory=CloningConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if not _PLAIN_NAME.fullmatch(self.name):
            raise ValueError(
                f"name is {self.name!r}, expected letters, digits, '.', '_' and '-': the policy "
                "file is called so"
            )
        _check_at_least(self, 1, "updates", "batches", "workers")
        _check_at_least(self, 0, "win_weight")
        _check_above_zero(self, "minutes", "checkpoint_minutes")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2**31 - 1")
        if not _is_device(self.device):
            raise ValueError(f"device is {self.device!r}, expected cpu, cuda, or cuda:N")
        if self.episodes > self.ppo.buffer_episodes:
            raise ValueError(
                f"ppo.buffer_episodes is {self.ppo.buffer_episodes}, fewer than the "
                f"{self.episodes} episodes of an update (batches x tasks.tasks x tasks.repeats)"
            )

    @property
    def episodes(self) -> int:
        """Collected for each update."""
        return self.batches * self.tasks.tasks * self.tasks.repeats

    def to_plain(self) -> dict[str, Any]:
        """Plain values, as TOML and JSON hold them."""
        return asdict(self)

    @property
    def validation_tasks(self) -> TaskDistribution:
        """What the validation's settings are drawn from."""
        return self.validation.distribution(self.tasks)


def _check_at_least(config: object, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} is {getattr(config, name)}, expected at least {least}")


def _check_above_zero(config: object, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}, expected more than 0")


def _is_device(name: str) -> bool:
    try:
        return torch.device(name).type in ("cpu", "cuda")
    except RuntimeError:
        return False


START_HYPERPARAMETERS: Final = {name: float(LHOPT_START[name]) for name in HYPERPARAMETERS}
"""Where runs start until a hand control says where."""


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = resources.files("lhopt_fused.meta") / "configs"
    return {path.stem: path for path in sorted(Path(str(folder)).glob("*.toml"))}


def load_config(config: str | Path, overrides: Sequence[str] = ()) -> MetaConfig:
    """The configuration in a TOML file, or a shipped one by its name.

    Args:
        config: path or name.
        overrides: values that replace those of the file, as ``section.key=value``, in TOML.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a key is unknown, missing or of another type, or values contradict one another;
            the message names the file and the whole key. Or an override is not a key and a value.
    """
    path = shipped_configs().get(str(config), Path(config))
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no configuration {str(config)!r}: the shipped ones are "
            f"{', '.join(shipped_configs())}, and no file has that path"
        )
    try:
        plain = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    for override in overrides:
        _override(plain, override)
    try:
        return config_from_plain(plain)
    except ValueError as error:
        changed = f" with {', '.join(overrides)}" if overrides else ""
        raise ValueError(f"{path}{changed}: {error}") from error


def _override(plain: dict[str, Any], override: str) -> None:
    """Put ``section.key=value`` into the tables."""
    key, _, text = override.partition("=")
    *sections, name = (part.strip() for part in key.split("."))
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(
            f"{override!r} is not section.key=value with a value in TOML, such as "
            f"tasks.longest=512 or baseline='\"adamw\"': {error}"
        ) from error
    for section in sections:
        plain = plain.setdefault(section, {})
        if not isinstance(plain, dict):
            raise ValueError(f"{override!r}: {section} is a value, not a section")
    plain[name] = value


def config_from_plain(plain: Mapping[str, Any]) -> MetaConfig:
    """The inverse of :meth:`MetaConfig.to_plain`.

    Raises:
        ValueError: a key is unknown, missing or of another type, or a value is out of range or
            contradicts another; the message names the whole key.
    """
    for problem in _misfits(MetaConfig, plain, ""):
        raise ValueError(problem)
    values = dict(plain)
    for name, kind in get_type_hints(MetaConfig).items():
        if isinstance(kind, type) and is_dataclass(kind) and isinstance(values.get(name), Mapping):
            values[name] = _section(kind, values[name], f"{name}.")
    return _section(MetaConfig, values, "")


def _misfits(kind: Any, plain: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """What is wrong with the keys: those that there are not, and truth values for numbers."""
    hints = get_type_hints(kind)
    for key, value in plain.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            meant = f"; did you mean {prefix}{near[0]}?" if near else f", only {', '.join(hints)}"
            yield f"there is no key {prefix}{key}{meant}"
        elif isinstance(value, bool) and hints[key] is not bool:
            yield f"{prefix}{key} is {str(value).lower()}, expected a value of another type"
        elif is_dataclass(hints[key]) and isinstance(value, Mapping):
            yield from _misfits(hints[key], value, f"{prefix}{key}.")


def _section(kind: type[_T], values: Mapping[str, Any], prefix: str) -> _T:
    """A dataclass of plain values; what is wrong is said with ``prefix`` before the key."""
    checks = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _number})
    try:
        return dacite.from_dict(kind, values, checks)
    except dacite.MissingValueError as error:
        raise ValueError(f"{prefix}{error.field_path} is missing") from error
    except dacite.WrongTypeError as error:
        expected = _described(error.field_type)
        raise ValueError(
            f"{prefix}{error.field_path} is {error.value!r}, expected {expected}"
        ) from error
    except (dacite.DaciteError, TypeError, ValueError) as error:
        raise ValueError(f"{prefix}{str(error).removeprefix(prefix)}") from error


def _described(kind: Any) -> str:
    """A type in the words of an error."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return str(kind) if get_args(kind) else kind.__name__


def _number(value: object) -> object:
    """TOML writes 3 for 3.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
