"""One run: a task, an optimizer, a seed and a budget in; scores, curve and times out."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, NamedTuple

import torch

from lhopt_fused.evaluation.optimizers import Configuration, Stepper, build
from lhopt_fused.evaluation.task import Batch, Scores, Size, Task
from lhopt_fused.evaluation.tasks import load_task
from lhopt_fused.lhopt import LHOPT
from lhopt_fused.types import HYPERPARAMETERS

__all__ = ["PROTOCOL", "CurvePoint", "RunResult", "RunSpec", "run", "run_task"]

PROTOCOL: Final = "1"
"""Changes with what a run does: results of different protocols are not compared."""

_CURVE_POINTS: Final = 12  # at budget 1, where curves are drawn; else the end alone
_SHOWN_BATCHES: Final = 4  # how many are evaluated for a policy, at each of its decisions
_REFRESH_BATCHES: Final = 8  # passed through the model where weights change for a judgement


@dataclass(frozen=True)
class RunSpec:
    """What is run.

    Attributes:
        task: its name.
        size: of the task.
        optimizer: its name.
        configuration: its hyperparameters.
        seed: of weights and batches; the same for all optimizers.
        budget: share of the task's standard number of steps.

    Raises:
        ValueError: the budget is not positive.
    """

    task: str
    size: Size
    optimizer: str
    configuration: Configuration
    seed: int
    budget: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.budget < math.inf:
            raise ValueError(f"budget must be a number > 0, got {self.budget!r}")

    @property
    def hyperparameters(self) -> str:
        """The configuration as JSON, the same for the same; a policy is what it does, not where."""
        kept = {name: value for name, value in self.configuration.items() if name != "policy"}
        return json.dumps(kept, sort_keys=True)


class CurvePoint(NamedTuple):
    """A place on a learning curve.

    Attributes:
        step: steps done.
        seconds: spent on training until then, without the evaluations of the curve.
        train_loss: mean since the point before; NaN at step 0.
        eval_loss: on the split that policies see.
    """

    step: int
    seconds: float
    train_loss: float
    eval_loss: float


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    Attributes:
        steps: done; fewer than asked for where the loss became NaN.
        report_loss: on the report split; inf where the run diverged.
        metrics: on the report split, by name.
        eval_loss: on the split that policies see, at the end; inf where the run diverged.
        curve: about 12 points, evenly spread, from step 0 to the last; these two alone but at
            budget 1.
        seconds: of training: batches, gradients, steps.
        optimizer_seconds: of these, in the optimizer, with what a policy costs.
        trajectory: of a policy: progress and the eight hyperparameters after each outer step.
        parameters: of the model, how many numbers.
    """

    steps: int
    report_loss: float
    metrics: dict[str, float]
    eval_loss: float
    curve: list[CurvePoint]
    seconds: float
    optimizer_seconds: float
    trajectory: list[list[float]]
    parameters: int


def run(spec: RunSpec, data_dir: Path | None = None, device: str = "cpu") -> RunResult:
    """Do a run.

    Args:
        spec: what is run.
        data_dir: where data sets are.
        device: where the model is.

    Raises:
        DataError: the data is missing or damaged.
        ContenderError: the optimizer cannot be run here.
        ValueError: there is no such task or hyperparameter.
    """
    return run_task(load_task(spec.task, spec.size, data_dir), spec, device)


def run_task(task: Task, spec: RunSpec, device: str = "cpu") -> RunResult:
    """As :func:`run`, on a task at hand. Random numbers elsewhere go on as if nothing was."""
    devices = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(spec.seed)
        return _Run(task, spec, torch.device(device)).train()


class _Run:
    def __init__(self, task: Task, spec: RunSpec, device: torch.device) -> None:
        self.task, self.spec, self.device = task, spec, device
        self.total = max(1, round(spec.budget * task.steps))
        self.model = task.make_model().to(device)
        self.model.train()
        self.stepper = build(
            spec.optimizer, self.model, spec.configuration, self.total, self._shown_loss
        )
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.clock = _Clock(device)
        self.recent: deque[Batch] = deque(maxlen=_REFRESH_BATCHES)
        self.curve: list[CurvePoint] = []

    def train(self) -> RunResult:
        count = _CURVE_POINTS if self.spec.budget == 1 else 1
        points = {round(i * self.total / count) for i in range(1, count + 1)}
        self._measure(0, [])
        losses: list[torch.Tensor] = []
        done = 0
        for batch in islice(self._batches(), self.total):
            with self.clock.training():
                losses.append(self._step(batch))
            done += 1
            if done in points:
                self._measure(done, losses)
                losses = []
                if math.isnan(self.curve[-1].eval_loss):
                    break
        return self._result(done)

    def _batches(self) -> Iterator[Batch]:
        batches = self.task.stream(self.model, self.generator)
        while True:
            with self.clock.training():
                batch = tuple(tensor.to(self.device) for tensor in next(batches))
            self.recent.append(batch)
            yield batch

    def _step(self, batch: Batch) -> torch.Tensor:
        loss = self.task.loss(self.model, batch)
        torch.autograd.backward(loss)
        with self.clock.optimizing():
            self.stepper.step(loss)
        self.model.zero_grad()
        return loss.detach()

    def _shown_loss(self) -> float:
        """What a policy is shown: a part of its split, since it pays for it."""
        shown = _SHOWN_BATCHES * self.task.batch_size
        return self.task.evaluate(self.model, "policy_eval", shown).loss

    def _measure(self, step: int, losses: Sequence[torch.Tensor]) -> None:
        with self.stepper.judged(self.model, self._refresh):
            eval_loss = self.task.evaluate(self.model, "policy_eval").loss
        train_loss = torch.stack(list(losses)).double().mean().item() if losses else math.nan
        self.curve.append(CurvePoint(step, self.clock.seconds, train_loss, eval_loss))

    def _refresh(self) -> None:
        for batch in self.recent:
            self.task.loss(self.model, batch)

    def _result(self, done: int) -> RunResult:
        with self.stepper.judged(self.model, self._refresh):
            scores: Scores = self.task.evaluate(self.model, "report")
        return RunResult(
            steps=done,
            report_loss=_or_inf(scores.loss),
            metrics=dict(scores.metrics),
            eval_loss=_or_inf(self.curve[-1].eval_loss),
            curve=self.curve,
            seconds=self.clock.seconds,
            optimizer_seconds=self.clock.optimizer_seconds,
            trajectory=_trajectory(self.stepper),
            parameters=sum(param.numel() for param in self.model.parameters()),
        )


class _Clock:
    """Seconds of training and, within it, of the optimizer; waits for a GPU at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self.seconds = 0.0
        self.optimizer_seconds = 0.0

    def _now(self) -> float:
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def training(self) -> Iterator[None]:
        begin = self._now()
        yield
        self.seconds += self._now() - begin

    @contextmanager
    def optimizing(self) -> Iterator[None]:
        begin = self._now()
        yield
        self.optimizer_seconds += self._now() - begin


def _trajectory(stepper: Stepper) -> list[list[float]]:
    if not isinstance(stepper.optimizer, LHOPT):
        return []
    return [
        [step.progress, *(step.hyperparameters[name] for name in HYPERPARAMETERS)]
        for step in stepper.optimizer.history
    ]


def _or_inf(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss
