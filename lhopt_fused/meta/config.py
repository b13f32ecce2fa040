"""Configurations of meta-training: frozen, checked, read from TOML."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal

import dacite

from lhopt_fused.actions import ACTIONS, Action, ActionSpace
from lhopt_fused.ciao import LHOPT_START
from lhopt_fused.meta.baselines import Baseline
from lhopt_fused.meta.inner import Settings, ciao_settings
from lhopt_fused.meta.ppo import PPOConfig
from lhopt_fused.meta.setting import StartNoise, TaskDistribution
from lhopt_fused.policy import FEATURES, NetworkShape
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
    "load_config",
    "shipped_configs",
]


def _with_keep(action: Action) -> Action:
    """The action with a choice that changes nothing."""
    neutral = 1.0 if action.kind == "scale" else 0.0
    choices = tuple(sorted({*action.choices, neutral}))
    return Action(action.name, action.kind, choices, action.low, action.high)


_ACTIONS_WITH_KEEP: Final = tuple(map(_with_keep, ACTIONS))


@dataclass(frozen=True)
class PolicyConfig:
    """The policy that is trained.

    Attributes:
        hidden: width of the network; a multiple of 16.
        head_hidden: width inside a head; a multiple of 16.
        registers: whether it decides about restart registers.
        keep: whether every head has a choice that changes nothing.
        trust: trust ratios of the inner optimizer.
        hide: policy features that it does not see, by prefix of their name (an ablation).
    """

    hidden: int = 128
    head_hidden: int = 32
    registers: bool = False
    keep: bool = True
    trust: Literal["exact", "delayed"] = "exact"
    hide: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for prefix in self.hide:
            if not any(name.startswith(prefix) for name in FEATURES):
                raise ValueError(f"policy.hide has {prefix!r}, which begins no policy feature")

    @property
    def action_space(self) -> ActionSpace:
        """What it may do."""
        return ActionSpace(_ACTIONS_WITH_KEEP if self.keep else ACTIONS, self.registers)

    @property
    def shape(self) -> NetworkShape:
        """Sizes of its network."""
        heads = self.action_space.head_sizes
        return NetworkShape(len(FEATURES), heads, self.hidden, self.head_hidden)

    def settings(self, hyperparameters: Mapping[str, float]) -> Settings:
        """What the inner optimizer starts with."""
        return ciao_settings(trust=self.trust, **hyperparameters)


@dataclass(frozen=True)
class CloningConfig:
    """The supervised start: imitate the best fixed schedule, the hand control.

    Attributes:
        settings: batches of episodes to search the hand control on.
        batches: batches of episodes to learn from; 0 for a start from scratch.
        steps: of gradient descent on them.
        learning_rate: of Adam.
        entropy: weight of the entropy that heads keep.
        wander: standard deviation of the noise on the teacher's log learning rates.
    """

    settings: int = 24
    batches: int = 24
    steps: int = 600
    learning_rate: float = 1e-3
    entropy: float = 1e-2
    wander: float = 0.15


@dataclass(frozen=True)
class ValidationConfig:
    """How a policy is judged while it trains: on new tasks, without noise.

    Attributes:
        settings: batches of tasks, always the same.
        tasks: in each.
        every: updates between validations.
        outer_steps, inner_steps, longest: as of the training tasks, but up to twice as long.
    """

    settings: int = 32
    tasks: int = 8
    every: int = 20
    outer_steps: tuple[int, int] = (2, 128)
    inner_steps: tuple[int, int] = (4, 64)
    longest: int = 2048


@dataclass(frozen=True)
class MetaConfig:
    """A meta-training run.

    Attributes:
        name: of the policy.
        seed: of everything.
        updates: of PPO, at most.
        minutes: of training, at most, over all runs that it is spread over.
        batches: of episodes collected for each update.
        workers: processes that collect them.
        checkpoint_minutes: between checkpoints.
        baseline: what the reward compares with.
    """

    name: str
    seed: int = 0
    updates: int = 10_000
    minutes: float = 180.0
    batches: int = 4
    workers: int = 2
    checkpoint_minutes: float = 3.0
    baseline: Baseline = "tuned"
    tasks: TaskDistribution = field(default_factory=TaskDistribution)
    noise: StartNoise = field(default_factory=StartNoise)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    cloning: CloningConfig = field(default_factory=CloningConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        for name in ("updates", "batches", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        for name in ("minutes", "checkpoint_minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected more than 0")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"seed is {self.seed}, expected 0 to 2**31 - 1")

    def to_plain(self) -> dict[str, Any]:
        """Plain values, as TOML and JSON hold them."""
        return asdict(self)

    @property
    def validation_tasks(self) -> TaskDistribution:
        """What the validation's settings are drawn from."""
        own = self.validation
        return TaskDistribution(
            families=self.tasks.families,
            tasks=own.tasks,
            repeats=1,
            outer_steps=own.outer_steps,
            inner_steps=own.inner_steps,
            longest=own.longest,
            hidden_eval=self.tasks.hidden_eval,
        )


START_HYPERPARAMETERS: Final = {name: float(LHOPT_START[name]) for name in HYPERPARAMETERS}
"""Where runs start until a hand control says where."""


def shipped_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = resources.files("lhopt_fused.meta") / "configs"
    return {path.stem: path for path in sorted(Path(str(folder)).glob("*.toml"))}


def load_config(config: str | Path) -> MetaConfig:
    """The configuration in a TOML file, or a shipped one by its name.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a key is unknown, missing or of another type, or values contradict one another;
            the message names the file and the key.
    """
    path = shipped_configs().get(str(config), Path(config))
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no configuration {str(config)!r}: the shipped ones are "
            f"{', '.join(shipped_configs())}, and no file has that path"
        )
    try:
        with path.open("rb") as file:
            plain = tomllib.load(file)
        return config_from_plain(plain)
    except (tomllib.TOMLDecodeError, dacite.DaciteError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_from_plain(plain: Mapping[str, Any]) -> MetaConfig:
    """The inverse of :meth:`MetaConfig.to_plain`.

    Raises:
        dacite.DaciteError: a key is unknown, missing or of another type.
        ValueError: a value is out of range or contradicts another.
    """
    checks = dacite.Config(strict=True, cast=[tuple], type_hooks={float: _number})
    return dacite.from_dict(MetaConfig, dict(plain), checks)


def _number(value: object) -> object:
    """TOML writes 3 for 3.0."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
