"""The optimizers under test: how each is built, and the configurations that it is tuned over."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from lhopt_fused.actions import REGISTERS
from lhopt_fused.ciao import CIAO
from lhopt_fused.lhopt import LHOPT
from lhopt_fused.policy import load_policy
from lhopt_fused.schedules import GRID, SCHEDULES, Schedule

__all__ = [
    "CONTENDERS",
    "SHOWN",
    "Configuration",
    "Contender",
    "ContenderError",
    "Stepper",
    "build",
    "contender_version",
    "default_policy",
    "policy_configuration",
]

Configuration = Mapping[str, float | str]
"""Hyperparameters by name; ``schedule`` names one of ``schedules.SCHEDULES``."""

EvalLoss = Callable[[], float]

SHOWN: Final = "shown"
HIDDEN: Final = "hidden"
"""Eval losses, to a policy: ``eval_loss`` of its configuration."""


class ContenderError(Exception):
    """An optimizer that cannot be run here; says what is missing and how to get it."""


@dataclass
class Stepper:
    """An optimizer at work in one run, with its schedule.

    Attributes:
        optimizer: the one whose history and averages are of interest.
        total_steps: of the run.
        schedule: share of each group's learning rate against progress.
        beside: another optimizer, of the parameters that the first one leaves.
        views: parameters of the first optimizer that are views of a model's, with those.
        averages: whether weights in training are not those to be judged.
    """

    optimizer: Optimizer
    total_steps: int
    schedule: Schedule = SCHEDULES["constant"]
    beside: Optimizer | None = None
    views: Sequence[tuple[nn.Parameter, nn.Parameter]] = ()
    averages: bool = False
    _done: int = 0
    _peaks: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._peaks = [float(group["lr"]) for group in self._groups()]

    def step(self, loss: torch.Tensor) -> None:
        """One step, with gradients in place, and clear them."""
        if isinstance(self.optimizer, LHOPT):
            self.optimizer.observe(train_loss=loss.detach())
        else:
            share = self.schedule(self._done / self.total_steps)
            for group, peak in zip(self._groups(), self._peaks, strict=True):
                group["lr"] = peak * share
        for view, param in self.views:
            view.grad = None if param.grad is None else param.grad.flatten(1)
        for optimizer in self._optimizers():
            optimizer.step()
        self._done += 1

    @contextmanager
    def judged(self, model: nn.Module, refresh: Callable[[], None]) -> Iterator[None]:
        """Weights are those to be judged by, within.

        Args:
            model: in training mode.
            refresh: passes training batches through the model; called where the weights change, so
                that statistics of batch norm are of the weights that are judged.
        """
        if not self.averages:
            yield
            return
        optimizer: Any = self.optimizer
        optimizer.eval()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            with torch.no_grad():
                refresh()
        try:
            yield
        finally:
            optimizer.train()

    def _optimizers(self) -> list[Optimizer]:
        return [self.optimizer] + ([self.beside] if self.beside is not None else [])

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers() for group in optimizer.param_groups]


Build = Callable[[nn.Module, Configuration, int, EvalLoss], Stepper]


@dataclass(frozen=True)
class Contender:
    """An optimizer under test.

    Attributes:
        label: in tables and pictures.
        build: makes it for a model: configuration, number of steps, eval loss for policies.
        grid: what it is tuned over.
        default: what its authors would have one start with, one of the grid; None where there is
            nothing to tune.
        package: where it comes from, besides torch and this package.
    """

    label: str
    build: Build
    grid: Sequence[Configuration]
    default: Configuration | None = None
    package: str | None = None


def build(
    name: str, model: nn.Module, configuration: Configuration, steps: int, eval_loss: EvalLoss
) -> Stepper:
    """The optimizer ``name`` for a run.

    Raises:
        ContenderError: it cannot be run here, or there is none of that name.
    """
    if name not in CONTENDERS:
        raise ContenderError(
            f"there is no optimizer {name!r}; the optimizers are {', '.join(CONTENDERS)}"
        )
    return CONTENDERS[name].build(model, configuration, steps, eval_loss)


def contender_version(name: str) -> str:
    """The version of the package that an optimizer comes from; empty for torch's and ours.

    Raises:
        ContenderError: it is not installed.
    """
    package = CONTENDERS[name].package
    if package is None:
        return ""
    _need(package)
    return metadata.version(package)


def default_policy() -> str:
    """The policy that LHOPT takes where none is given."""
    return str(inspect.signature(LHOPT).parameters["policy"].default)


def policy_configuration(policy: str, *, eval_loss: bool = False) -> Configuration:
    """The configuration of LHOPT with a policy: where it is found, and what identifies it.

    That is what it decides, where it starts and what it is shown.

    Args:
        policy: a built-in policy or a policy file.
        eval_loss: whether it is shown the loss on its split at each decision, which takes time.

    Raises:
        FileNotFoundError, PolicyFileError: there is no such policy.
    """
    found = load_policy(policy)
    registers = REGISTERS if found.action_space.registers else 0
    probe = LHOPT([nn.Parameter(torch.zeros(1))], 1, policy=found, restart_registers=registers)
    start = {**found.start_options.to_plain(), **found.start_hyperparameters}
    identified = json.dumps([probe.state_dict()["lhopt"]["fingerprint"], start], sort_keys=True)
    fingerprint = hashlib.sha256(identified.encode()).hexdigest()
    return {
        "policy": policy,
        "name": found.name,
        "fingerprint": fingerprint,
        "eval_loss": SHOWN if eval_loss else HIDDEN,
    }


# ---------------------------------------------------------------------- how each is built


def _adamw(model: nn.Module, given: Configuration, steps: int, _: EvalLoss) -> Stepper:
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(given["lr"]), fused=True)
    return Stepper(optimizer, steps, _schedule(given))


def _schedule_free(model: nn.Module, given: Configuration, steps: int, _: EvalLoss) -> Stepper:
    made = _need("schedulefree").AdamWScheduleFree(model.parameters(), lr=float(given["lr"]))
    made.train()
    return Stepper(made, steps, averages=True)


def _prodigy(model: nn.Module, given: Configuration, steps: int, _: EvalLoss) -> Stepper:
    made = _need("prodigyopt").Prodigy(model.parameters(), d_coef=float(given["d_coef"]))
    return Stepper(made, steps, _schedule(given))


def _muon(model: nn.Module, given: Configuration, steps: int, _: EvalLoss) -> Stepper:
    """Muon for hidden matrices and filters, AdamW for the rest, in its author's proportion."""
    if not hasattr(torch.optim, "Muon"):
        raise ContenderError(
            f"muon needs torch.optim.Muon, which torch {torch.__version__} has not; "
            "run: pip install 'torch>=2.9'"
        )
    lr = float(given["lr"])
    hidden, rest = _hidden_and_rest(model)
    views = [(nn.Parameter(param.detach().flatten(1)), param) for param in hidden]
    adamw = torch.optim.AdamW(
        rest, lr=lr * 0.015, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True
    )
    if not hidden:
        return Stepper(adamw, steps, _schedule(given))
    muon = torch.optim.Muon([view for view, _ in views], lr=lr, weight_decay=0.0)
    return Stepper(muon, steps, _schedule(given), beside=adamw, views=views)


def _hidden_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Contiguous matrices and filters of hidden layers, and all other parameters."""
    outer = {
        id(param)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or name.split(".")[-1] == "head"
        for param in module.parameters()
    }
    params = list(model.parameters())
    inner = [p.dim() >= 2 and id(p) not in outer and p.is_contiguous() for p in params]
    hidden = [param for param, is_hidden in zip(params, inner, strict=True) if is_hidden]
    return hidden, [param for param, is_hidden in zip(params, inner, strict=True) if not is_hidden]


def _ciao(model: nn.Module, given: Configuration, steps: int, _: EvalLoss) -> Stepper:
    lr = float(given["lr"])
    optimizer = CIAO.lhopt(model.parameters(), lr=lr, inner_feature_frequency=0)
    return Stepper(optimizer, steps, _schedule(given))


def _lhopt(model: nn.Module, given: Configuration, steps: int, eval_loss: EvalLoss) -> Stepper:
    policy = load_policy(str(given["policy"]))
    optimizer = LHOPT(
        model.parameters(),
        steps,
        policy=policy,
        restart_registers=REGISTERS if policy.action_space.registers else 0,
        eval_fn=eval_loss if given["eval_loss"] == SHOWN else None,
    )
    return Stepper(optimizer, steps)


def _schedule(given: Configuration) -> Schedule:
    return SCHEDULES[str(given["schedule"])]


def _need(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise ContenderError(
            f"the package {package} is missing ({error}); run: pip install 'lhopt-fused[eval]'"
        ) from error


def _grid(rates: Sequence[float], schedules: Sequence[str]) -> list[Configuration]:
    return [{"lr": lr, "schedule": name} for lr in rates for name in schedules]


_CONTROL_RATES: Final = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)

CONTENDERS: Final[dict[str, Contender]] = {
    "adamw": Contender(
        "AdamW, tuned", _adamw, _grid(GRID, list(SCHEDULES)), {"lr": 1e-3, "schedule": "constant"}
    ),
    "schedule_free": Contender(
        "Schedule-Free AdamW",
        _schedule_free,
        [{"lr": lr} for lr in (5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2)],
        {"lr": 2.5e-3},
        "schedulefree",
    ),
    "prodigy": Contender(
        "Prodigy",
        _prodigy,
        [{"d_coef": d_coef, "schedule": "cosine"} for d_coef in (0.5, 1.0, 2.0)],
        {"d_coef": 1.0, "schedule": "cosine"},
        "prodigyopt",
    ),
    "muon": Contender(
        "Muon + AdamW",
        _muon,
        _grid((2e-3, 6e-3, 2e-2, 6e-2, 2e-1), ["linear"]),
        {"lr": 2e-2, "schedule": "linear"},
    ),
    "ciao": Contender(
        "CIAO, fixed schedule",
        _ciao,
        _grid(_CONTROL_RATES, ["constant", "linear", "cosine"]),
        {"lr": 3e-2, "schedule": "linear"},
    ),
    "lhopt": Contender("LHOPT", _lhopt, []),
}
"""Every optimizer by its name. ``ciao`` is the hand control: our inner optimizer without a policy;
the configurations of ``lhopt`` are policies, see :func:`policy_configuration`."""
