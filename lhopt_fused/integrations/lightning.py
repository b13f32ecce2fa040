"""LHOPT in Lightning's Trainer: losses in, history out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lhopt_fused.integrations.common import (
    check_one_hand_on_lr,
    check_total_steps,
    find_lhopt,
)
from lhopt_fused.lhopt import LHOPT

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "lhopt_fused.integrations.lightning needs lightning: pip install 'lhopt-fused[lightning]'"
    ) from error

__all__ = ["LHOPTCallback"]

_REMEDY = (
    "return no scheduler from configure_optimizers, or use a policy that leaves lr alone "
    '(policy="fixed")'
)


class LHOPTCallback(Callback):  # type: ignore[misc]
    """Shows LHOPT the losses of a Lightning run and gives its history to the loggers::

        class Model(LightningModule):
            def configure_optimizers(self):
                steps = self.trainer.estimated_stepping_batches
                return LHOPT(self.parameters(), total_steps=steps)


        Trainer(callbacks=[LHOPTCallback()], ...).fit(Model(), batches)

    The train loss is what ``training_step`` returns, over all batches that an optimizer step
    accumulates. Every outer step goes to all loggers, its numbers under ``lhopt/``.

    Args:
        eval_metric: name that ``validation_step`` logs the eval loss under.
    """

    def __init__(self, eval_metric: str = "val_loss") -> None:
        self.eval_metric = eval_metric
        self._optimizer: LHOPT | None = None
        self._logged = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the optimizer.

        Raises:
            TypeError: the module has another optimizer than LHOPT.
            ValueError: it has several, or for another number of steps, or a scheduler moves lr too.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(
                f"expected one optimizer, an LHOPT, got {len(trainer.optimizers)} of them"
            )
        optimizer = find_lhopt(trainer.optimizers[0])
        for config in trainer.lr_scheduler_configs:
            check_one_hand_on_lr(optimizer, config.scheduler, _REMEDY)
        steps = trainer.estimated_stepping_batches
        if math.isfinite(steps):
            check_total_steps(optimizer, int(steps), "the Trainer")
        # the closure's loss is of the last of the accumulated batches, divided by their number
        optimizer.observes_closure = False
        self._optimizer = optimizer
        self._logged = len(optimizer.history)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: torch.Tensor | Mapping[str, Any] | None,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the train loss, and log what the policy did."""
        optimizer = self._lhopt()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            optimizer.observe(train_loss=loss * scale)
        for step in optimizer.history[self._logged :]:
            numbers = {f"lhopt/{name}": value for name, value in step.scalars().items()}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=step.inner_step)
        self._logged = len(optimizer.history)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the eval loss."""
        loss = trainer.callback_metrics.get(self.eval_metric)
        if self._optimizer is not None and loss is not None and not trainer.sanity_checking:
            self._optimizer.observe(eval_loss=loss)

    def _lhopt(self) -> LHOPT:
        assert self._optimizer is not None, "on_train_start comes first"
        return self._optimizer
