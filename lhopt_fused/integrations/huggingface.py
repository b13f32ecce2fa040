"""LHOPT in Hugging Face's Trainer: losses in, history out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lhopt_fused.history import write_csv
from lhopt_fused.integrations.common import (
    PolicyLR,
    check_one_hand_on_lr,
    check_total_steps,
    decides_at,
    find_lhopt,
)
from lhopt_fused.lhopt import LHOPT

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "lhopt_fused.integrations.huggingface needs transformers: "
        "pip install 'lhopt-fused[huggingface]'"
    ) from error

__all__ = ["LHOPTCallback", "PolicyLR"]

_REMEDY = (
    "pass Trainer(optimizers=(optimizer, PolicyLR(optimizer))) with "
    "lhopt_fused.integrations.huggingface.PolicyLR, or use a policy that leaves lr alone "
    '(policy="fixed")'
)


class LHOPTCallback(TrainerCallback):  # type: ignore[misc]
    """Shows LHOPT the Trainer's losses and puts its history into the Trainer's logs::

        optimizer = LHOPT(model.parameters(), total_steps=args.max_steps)
        Trainer(
            model,
            args,
            optimizers=(optimizer, PolicyLR(optimizer)),
            callbacks=[LHOPTCallback()],
            ...,
        )

    Train losses are those that the Trainer logs: means over everything between two logs, over all
    processes. It logs at least once before each decision, whatever ``logging_steps`` is, so the
    policy sees the losses of an outer step up to its last but one inner step. The Trainer leaves
    NaN and inf out of them unless ``logging_nan_inf_filter=False``. LHOPT clips gradients itself:
    ``max_grad_norm=0`` leaves that to it.

    Every outer step becomes an entry of ``trainer.state.log_history``, its numbers under
    ``lhopt/``; at the end, all are written to ``history_file`` in the output folder.

    Args:
        eval_metric: metric of an evaluation that is the eval loss.
        history_file: name of a CSV file, or None for none.
    """

    def __init__(
        self, eval_metric: str = "eval_loss", history_file: str | None = "lhopt_history.csv"
    ) -> None:
        self.eval_metric = eval_metric
        self.history_file = history_file
        self._optimizer: LHOPT | None = None
        self._logged = 0  # outer steps
        self._seen_until = 0  # inner step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the optimizer.

        Raises:
            TypeError: the Trainer's optimizer is not LHOPT.
            ValueError: it is for another number of steps, or a scheduler moves lr too.
        """
        optimizer = find_lhopt(kwargs.get("optimizer"))
        check_one_hand_on_lr(optimizer, kwargs.get("lr_scheduler"), _REMEDY)
        check_total_steps(optimizer, state.max_steps, "the Trainer")
        self._optimizer = optimizer
        self._logged = len(optimizer.history)
        self._seen_until = state.global_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Log what the policy did; have losses logged before it decides and before a checkpoint."""
        optimizer = self._lhopt()
        for step in optimizer.history[self._logged :]:
            numbers = {f"lhopt/{name}": value for name, value in step.scalars().items()}
            state.log_history.append(numbers | {"epoch": state.epoch, "step": state.global_step})
        self._logged = len(optimizer.history)
        # a checkpoint does not hold losses that are not logged yet
        if control.should_save or decides_at(optimizer, state.global_step + 1):
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the train loss."""
        if self._optimizer is not None and logs is not None and "loss" in logs:
            for _ in range(self._seen_until, state.global_step):  # it is the mean over these
                self._optimizer.observe(train_loss=logs["loss"])
            self._seen_until = state.global_step

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the eval loss."""
        if self._optimizer is not None and metrics is not None and self.eval_metric in metrics:
            self._optimizer.observe(eval_loss=metrics[self.eval_metric])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the history."""
        if self.history_file is not None and state.is_world_process_zero:
            write_csv(self._lhopt().history, Path(args.output_dir) / self.history_file)

    def _lhopt(self) -> LHOPT:
        assert self._optimizer is not None, "on_train_begin comes first"
        return self._optimizer
