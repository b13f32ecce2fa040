"""What every integration needs: finding the optimizer, and keeping its lr in one hand."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import LRScheduler

from lhopt_fused.lhopt import LHOPT
from lhopt_fused.policy import RulePolicy

__all__ = ["PolicyLR", "check_one_hand_on_lr", "check_total_steps", "decides_at", "find_lhopt"]


class PolicyLR(LRScheduler):
    """A learning-rate scheduler that leaves the learning rate to the policy.

    For loops that insist on a scheduler. The constant schedules of other libraries set the learning
    rate back to its start at every step, so they are no substitute.
    """

    def get_lr(self) -> list[float | torch.Tensor]:
        """The learning rates as they are."""
        return [group["lr"] for group in self.optimizer.param_groups]


def find_lhopt(optimizer: object) -> LHOPT:
    """The LHOPT in ``optimizer``, which other libraries may have wrapped.

    Raises:
        TypeError: there is none in it.
    """
    found = optimizer
    while not isinstance(found, LHOPT):
        inner = getattr(found, "optimizer", None) or getattr(found, "_optimizer", None)
        if inner is None:
            raise TypeError(
                f"expected an lhopt_fused.LHOPT, or a wrapper with one in it, got {optimizer!r}"
            )
        found = inner
    return found


def check_one_hand_on_lr(optimizer: LHOPT, schedule: object, remedy: str) -> None:
    """Refuse a scheduler beside a policy that moves the learning rate.

    Raises:
        ValueError: saying so, and what to do: ``remedy``.
    """
    policy = optimizer.policy
    moves_lr = not isinstance(policy, RulePolicy) or "lr" in policy.schedules
    if schedule is not None and moves_lr and not isinstance(schedule, PolicyLR):
        raise ValueError(
            f"a {type(schedule).__name__} and the policy {policy.name!r} cannot both move the "
            f"learning rate: {remedy}"
        )


def check_total_steps(optimizer: LHOPT, steps: int, loop: str) -> None:
    """Refuse an LHOPT for a run of another length.

    Raises:
        ValueError: naming both lengths.
    """
    if optimizer.total_steps != steps:
        raise ValueError(
            f"LHOPT was built with total_steps={optimizer.total_steps}, but {loop} will do {steps} "
            "optimizer steps; build it with that number"
        )


def decides_at(optimizer: LHOPT, step: int) -> bool:
    """Whether the policy decides at the end of inner step ``step``, the first being 1."""
    outer, total = optimizer.outer_steps, optimizer.total_steps
    return step * outer // total > (step - 1) * outer // total
