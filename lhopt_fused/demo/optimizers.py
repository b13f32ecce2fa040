"""The optimizers that a run can use, built as its config says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias, cast

import torch

from lhopt_fused.actions import REGISTERS
from lhopt_fused.adamw import AdamW
from lhopt_fused.ciao import CIAO
from lhopt_fused.demo.text import InputError
from lhopt_fused.lhopt import LHOPT
from lhopt_fused.policy import LearnedPolicy, Policy, PolicyFileError, load_policy, policy_for_run
from lhopt_fused.types import BackendUnavailableError

if TYPE_CHECKING:
    from lhopt_fused.demo.run import RunConfig

__all__ = [
    "DEFAULT_POLICY",
    "OPTIMIZERS",
    "BackendName",
    "TimedLHOPT",
    "absolute_policy",
    "backend_problem",
    "build_optimizer",
    "default_lr",
    "find_policy",
]

OPTIMIZERS: Final = {
    "torch": "torch AdamW",
    "adamw": "AdamW",
    "ciao": "CIAO.lhopt",
    "lhopt": "LHOPT",
}
"""Name on the command line -> name on screen; torch's own AdamW is its fused one."""

BackendName: TypeAlias = Literal["auto", "reference", "cpu", "triton"]

DEFAULT_POLICY: Final = "default"

_DEFAULT_LR: Final = {"torch": 2e-3, "adamw": 2e-3, "ciao": 2e-2, "lhopt": 2e-2}


class TimedLHOPT(LHOPT):
    """An LHOPT that takes the time of its outer machinery: losses, features, decision, apply.

    Attributes:
        outer_seconds: spent on it since this was last set to 0.
    """

    outer_seconds = 0.0

    def observe(self, *losses: Any, **named: Any) -> None:
        """As :meth:`LHOPT.observe`."""
        begin = time.perf_counter()
        super().observe(*losses, **named)
        self.outer_seconds += time.perf_counter() - begin

    def _end_outer_step(self) -> None:
        begin = time.perf_counter()
        super()._end_outer_step()
        self.outer_seconds += time.perf_counter() - begin


def build_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer that ``config`` asks for.

    Raises:
        InputError: its policy cannot be used.
    """
    backend = cast(BackendName, config.backend)
    match config.optimizer:
        case "adamw":
            return AdamW(model.parameters(), lr=config.lr, backend=backend)
        case "ciao":
            return CIAO.lhopt(model.parameters(), lr=config.lr, backend=backend)
        case "lhopt":
            policy = find_policy(config.policy)
            return TimedLHOPT(
                model.parameters(),
                config.steps,
                policy=policy,
                restart_registers=REGISTERS if policy.action_space.registers else 0,
                lr=config.lr,
                backend=backend,
            )
        case _:
            return torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)


def default_lr(optimizer: str, policy: str, steps: int) -> float:
    """A good learning rate for the demo; a learned policy starts as it was trained to.

    Raises:
        InputError: the policy cannot be used.
    """
    if optimizer == "lhopt":
        found = find_policy(policy)
        if isinstance(found, LearnedPolicy):
            return policy_for_run(found, steps).start_hyperparameters["lr"]
    return _DEFAULT_LR[optimizer]


def find_policy(name_or_file: str) -> Policy:
    """A built-in policy or the one in a file.

    Raises:
        InputError: there is none, or the file is not a policy.
    """
    try:
        return load_policy(name_or_file)
    except (PolicyFileError, OSError) as error:
        raise InputError("--policy", " ".join(str(error).split())) from error


def absolute_policy(name_or_file: str) -> str:
    """``name_or_file`` so that it is found from other folders too."""
    path = Path(name_or_file)
    return str(path.absolute()) if path.is_file() else name_or_file


def backend_problem(backend: str) -> str | None:
    """Why ``backend`` cannot step a model on this machine; None where it can."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    param = torch.nn.Parameter(torch.ones(2, device=device))
    param.grad = torch.ones_like(param)
    try:
        AdamW([param], backend=cast(BackendName, backend)).step()
    except (ImportError, BackendUnavailableError, ValueError) as error:
        return " ".join(str(error).split())
    return None
