"""torchtitan's containers with LHOPT in them: an optimizer, and schedulers that leave it alone.

In a torchtitan config (0.3), they take the places of ``optimizer`` and ``lr_scheduler``::

    Trainer.Config(
        ...,
        optimizer=LHOPTContainer.Config(
            param_groups=[
                ParamGroupConfig(pattern=r"bias$|norm", optimizer_name="LHOPT",
                                 optimizer_kwargs={"weight_decay": 0.0}),
                ParamGroupConfig(pattern=r".*", optimizer_name="LHOPT"),
            ],
            optimizer_factory_kwargs_by_name={"LHOPT": {"total_steps": 10_000}},
        ),
        lr_scheduler=PolicySchedulers.Config(),
    )

and the trainer shows the policy its losses, once for each backward pass::

    class LHOPTTrainer(Trainer):
        def forward_backward_step(self, **batch):
            loss = super().forward_backward_step(**batch)
            self.optimizers.observe(loss)
            return loss

LHOPT clips gradients itself: leave ``training.max_norm`` large.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer

from lhopt_fused import LHOPT
from lhopt_fused.integrations import PolicyLR


class LHOPTContainer(OptimizersContainer[LHOPT]):
    """An LHOPT for each part of a model; checkpoints hold the policy's side of the run too."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As torchtitan's; ``optimizer_name`` is ``"LHOPT"``."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        if name != "LHOPT":
            raise NotImplementedError(f"LHOPTContainer is for LHOPT, got optimizer_name={name!r}")
        return LHOPT

    def observe(self, train_loss: torch.Tensor) -> None:
        """Show every policy a train loss."""
        for optimizer in self.optimizers:
            optimizer.observe(train_loss=train_loss)

    def state_dict(self) -> dict[str, Any]:
        """By part, what ``torch.distributed.checkpoint`` saves of it."""
        pairs = zip(self.model_parts, self.optimizers, strict=True)
        return {
            str(index): get_optimizer_state_dict(part, optimizer)
            for index, (part, optimizer) in enumerate(pairs)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pairs = zip(self.model_parts, self.optimizers, strict=True)
        for index, (part, optimizer) in enumerate(pairs):
            set_optimizer_state_dict(part, optimizer, state_dict[str(index)])


class PolicySchedulers(LRSchedulersContainer):
    """Schedulers that leave every learning rate to the policy."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """Of its fields, none is used."""

        def build(
            self, *, optimizers: OptimizersContainer[LHOPT], training_steps: int
        ) -> PolicySchedulers:
            return PolicySchedulers(optimizers)

    def __init__(self, optimizers: OptimizersContainer[LHOPT]) -> None:
        self.schedulers = [PolicyLR(optimizer) for optimizer in optimizers]
