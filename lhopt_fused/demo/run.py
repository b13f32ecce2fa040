"""One training run of a GPT: what it consists of, its steps, and saving and continuing it."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch

from lhopt_fused.demo.model import GPT, GPTConfig
from lhopt_fused.demo.optimizers import (
    DEFAULT_POLICY,
    OPTIMIZERS,
    BackendName,
    TimedLHOPT,
    build_optimizer,
)
from lhopt_fused.demo.record import Row, new_row
from lhopt_fused.demo.text import InputError, Text
from lhopt_fused.history import OuterStep
from lhopt_fused.optimizer import MeasuredOptimizer

__all__ = [
    "RunConfig",
    "Training",
    "load_checkpoint",
    "save_checkpoint",
]

_FORMAT = "lhopt-train-2"
_ROWS = 100  # rows that a run records
_EVALS = 20  # evaluations in a run, besides the one before its first step
_EVAL_WINDOWS = 256


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run computes, besides its text.

    Raises:
        InputError: a value is out of range; the message names the option.
    """

    optimizer: str = "adamw"
    policy: str = DEFAULT_POLICY  # of LHOPT: a built-in one or a file
    steps: int = 1000
    lr: float = 2e-3
    batch: int = 8
    eval_fraction: float = 0.1
    seed: int = 0
    backend: str = "auto"
    threads: int = field(default_factory=torch.get_num_threads)
    model: GPTConfig = field(default_factory=GPTConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "threads"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name}", f"must be an integer >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise InputError("--seed", f"must be an integer in [0, 2**63), got {self.seed}")
        if not 0 < self.lr < math.inf:
            raise InputError("--lr", f"must be a finite number > 0, got {self.lr:g}")
        if not 0 < self.eval_fraction < 1:
            raise InputError(
                "--eval-fraction", f"must be a number in (0, 1), got {self.eval_fraction:g}"
            )
        for name, choices in (("optimizer", tuple(OPTIMIZERS)), ("backend", get_args(BackendName))):
            if getattr(self, name) not in choices:
                raise InputError(f"--{name}", f"{getattr(self, name)!r} is none of {choices}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of :func:`dataclasses.asdict`."""
        return cls(**{**values, "model": GPTConfig(**values["model"])})


def _warmup_cosine(step: int, steps: int) -> float:
    """Factor on the learning rate: linear over the first tenth, then a cosine to a hundredth."""
    warmup = math.ceil(steps / 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2


class Training:
    """A model on its way; ``rows`` is what was measured so far.

    Two trainings with one seed start from the same weights and see the same batches, whatever
    their optimizers are.
    """

    def __init__(self, config: RunConfig, text: Text) -> None:
        self.config = config
        self.text = text
        self.step = 0
        self.rows: list[Row] = []
        self.model = GPT(config.model, config.seed)
        self.optimizer = build_optimizer(config, self.model)
        self._schedule = None  # LHOPT's policy moves the learning rate
        if not isinstance(self.optimizer, TimedLHOPT):
            self._schedule = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer, partial(_warmup_cosine, steps=config.steps)
            )
        self._generator = torch.Generator().manual_seed(config.seed)
        self._eval_windows = text.eval_windows(config.model.context, _EVAL_WINDOWS)
        self._interval = max(1, config.steps // _ROWS)
        self._eval_interval = self._interval * max(1, config.steps // self._interval // _EVALS)
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._optimizer_seconds: list[float] = []

    @property
    def name(self) -> str:
        """What the optimizer is called on screen and in pictures."""
        return OPTIMIZERS[self.config.optimizer]

    @property
    def is_done(self) -> bool:
        return self.step >= self.config.steps

    @property
    def has_just_evaluated(self) -> bool:
        return self.is_done or (self.step > 0 and self.step % self._eval_interval == 0)

    @property
    def has_policy(self) -> bool:
        """Whether a policy moves the learning rate, instead of the schedule."""
        return self._schedule is None

    @property
    def history(self) -> list[OuterStep]:
        """What LHOPT's policy saw and did; nothing for other optimizers."""
        return self.optimizer.history if isinstance(self.optimizer, TimedLHOPT) else []

    def advance(self) -> None:
        """Do one step, and measure where it is time to."""
        if self.step == 0:
            self.rows.append(new_row({"step": 0, "eval_loss": self.evaluate()}))
        self._train_step()
        self.step += 1
        if self.is_done or self.step % self._interval == 0:
            self._record()

    def _train_step(self) -> None:
        begin = time.perf_counter()
        windows = self.text.batch(self.config.batch, self.config.model.context, self._generator)
        loss = self.model.loss(windows)
        torch.autograd.backward(loss)
        before_optimizer = time.perf_counter()
        if isinstance(self.optimizer, TimedLHOPT):
            self.optimizer.observe(train_loss=loss)
        self.optimizer.step()
        after_optimizer = time.perf_counter()
        self.optimizer.zero_grad()
        if self._schedule is not None:
            self._schedule.step()
        self._losses.append(loss.item())
        self._optimizer_seconds.append(after_optimizer - before_optimizer)
        self._seconds.append(time.perf_counter() - begin)

    def _record(self) -> None:
        """Close the interval with a row."""
        features, outer_ms = self._measure()
        steps = len(self._losses)
        measured = {
            "step": self.step,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "train_loss": math.fsum(self._losses) / steps,
            "optimizer_ms": 1e3 * math.fsum(self._optimizer_seconds) / steps,
            "step_ms": 1e3 * math.fsum(self._seconds) / steps,
            "outer_ms": outer_ms,
        }
        if self.has_just_evaluated:
            measured["eval_loss"] = self.evaluate()
        self.rows.append(new_row(measured | features))
        for values in (self._losses, self._seconds, self._optimizer_seconds):
            values.clear()

    def _measure(self) -> tuple[dict[str, float], float]:
        """Inner features since the row before, and what has been spent on them in milliseconds."""
        if isinstance(self.optimizer, TimedLHOPT):  # it takes them itself, for its policy
            seconds, self.optimizer.outer_seconds = self.optimizer.outer_seconds, 0.0
            last = self.history[-1] if self.history else None
            is_new = last is not None and last.inner_step > self.rows[-1]["step"]
            return (last.features if last is not None and is_new else {}), 1e3 * seconds
        if isinstance(self.optimizer, MeasuredOptimizer):
            begin = time.perf_counter()
            features = self.optimizer.pop_inner_features()
            return features, 1e3 * (time.perf_counter() - begin)
        return {}, math.nan

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean nats per byte on the held-out text."""
        batches = torch.split(self._eval_windows, 32)
        losses = [self.model.loss(batch).item() * len(batch) for batch in batches]
        return math.fsum(losses) / len(self._eval_windows)

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on as if the run had never stopped."""
        return {
            "step": self.step,
            "rows": [dict(row) for row in self.rows],
            "losses": list(self._losses),
            "seconds": list(self._seconds),
            "optimizer_seconds": list(self._optimizer_seconds),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict() if self._schedule is not None else None,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``, which a training with the same config gave."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._schedule is not None:
            self._schedule.load_state_dict(state["schedule"])
        self._generator.set_state(state["generator"])
        self.step = state["step"]
        self.rows = [new_row(row) for row in state["rows"]]
        self._losses = list(state["losses"])
        self._seconds = list(state["seconds"])
        self._optimizer_seconds = list(state["optimizer_seconds"])


def save_checkpoint(path: Path, training: Training, text_files: list[str]) -> None:
    """Write ``training`` to ``path``, whole or not at all."""
    checkpoint = {
        "format": _FORMAT,
        "config": asdict(training.config),
        "text_files": text_files,
        "text_digest": training.text.digest,
        "training": training.state_dict(),
    }
    partial_path = path.with_suffix(".partial")
    torch.save(checkpoint, partial_path)
    partial_path.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, with ``config`` as a :class:`RunConfig`.

    Raises:
        InputError: ``path`` is no such file.
    """
    try:
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["format"] != _FORMAT:
            raise ValueError(f"its format is {checkpoint['format']!r}, not {_FORMAT!r}")
        checkpoint["config"] = RunConfig.from_dict(checkpoint["config"])
    except (
        *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
        *(AttributeError, IndexError, KeyError, TypeError, ValueError),
    ) as error:
        raise InputError(
            "--resume", f"{path} is not a checkpoint of lhopt train; give the checkpoint.pt of one"
        ) from error
    return cast(dict[str, Any], checkpoint)
