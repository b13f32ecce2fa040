"""Many inner training runs side by side: the very step, statistics and actions of deployment.

A batch of tasks is one :class:`~lhopt_fused.types.StepLayout` in which every task is a run of its
own, so that the kernels that train large models train these too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lhopt_fused.actions import ACTIONS, REGISTER_CHOICES, REGISTERS, Action, apply_shifts
from lhopt_fused.adamw import AdamW
from lhopt_fused.ciao import CIAO
from lhopt_fused.features import ACCUMULATED, FeatureAccumulator
from lhopt_fused.kernels import BackendName, get_backend, resolve_backend
from lhopt_fused.kernels.gradients import Grads, tabulated
from lhopt_fused.meta.tasks import Split, TaskBatch
from lhopt_fused.policy import Observation
from lhopt_fused.types import (
    GROUP_STATE,
    HYPERPARAMETERS,
    INNER_FEATURES,
    SCALARS,
    TENSOR_STATE,
    StepLayout,
    StepOptions,
)

__all__ = ["InnerRuns", "Settings", "adamw_settings", "ciao_settings"]

Settings = tuple[StepOptions, tuple[float, ...]]
"""What one run steps with: static options, and numbers in the order of :data:`SCALARS`."""

_HYPERPARAMETERS = len(HYPERPARAMETERS)
_LR = SCALARS.index("lr")


def adamw_settings(**keywords: Any) -> Settings:
    """Settings of :class:`lhopt_fused.AdamW` with these keywords."""
    return AdamW([torch.zeros(1)], **keywords).settings()


def ciao_settings(**keywords: Any) -> Settings:
    """Settings of :meth:`lhopt_fused.CIAO.lhopt` with these keywords."""
    return CIAO.lhopt([torch.zeros(1)], **keywords).settings()


class InnerRuns:
    """R training runs, one per task, that are stepped together.

    Args:
        tasks: what is trained, R of them.
        settings: of all runs, or one per run.
        backend: as for :class:`lhopt_fused.CIAO`.
        feature_frequency: take statistics at inner steps 0, k, 2k, ... of each outer step; 0 for
            never.

    Attributes:
        step: inner steps done.
        scalars: float64 ``[R, len(SCALARS)]``, read by every step; may be changed between steps.
    """

    def __init__(
        self,
        tasks: TaskBatch,
        settings: Settings | Sequence[Settings],
        *,
        backend: BackendName = "auto",
        feature_frequency: int = 0,
    ) -> None:
        per_run = [settings] * tasks.runs if isinstance(settings, tuple) else list(settings)
        if len(per_run) != tasks.runs:
            raise ValueError(f"there are {len(per_run)} settings for {tasks.runs} tasks")
        self.tasks = tasks
        self.step = 0
        self._feature_frequency = feature_frequency
        self._outer_begin = 0
        start = tasks.init()
        self._leaves = {
            name: value.contiguous().requires_grad_(True) for name, value in start.items()
        }
        self._state = {f"param.{name}": leaf.detach() for name, leaf in self._leaves.items()}
        for moment in ("exp_avg", "exp_avg_sq"):
            self._state |= {f"{moment}.{n}": torch.zeros_like(x) for n, x in start.items()}
        self._grads = [torch.zeros_like(value) for value in start.values()]
        self._grad_views: Grads = self._per_run(self._grads)
        layout = self._lay_out(per_run)
        self.scalars = layout.scalars
        self.skipped_steps = layout.skipped_steps
        dtypes = {value.dtype for value in start.values()}
        name = resolve_backend(backend, layout.device, dtypes)
        self._backend = get_backend(name, layout)
        if name in ("cpu", "triton"):  # which look nothing up in a table
            self._grad_views = tabulated(self._grad_views, layout.params, name)
        self._features = FeatureAccumulator(
            layout, getattr(self._backend, "accumulate_features", None)
        )
        zeros = torch.zeros(tasks.runs, dtype=torch.float64, device=layout.device)
        self._loss_sum, self._last_norm = zeros, zeros.clone()
        self._start = self.hyperparameters.clone()
        nothing = torch.full((tasks.runs, REGISTERS), torch.nan, dtype=torch.float64)
        self._register_losses = nothing.to(layout.device)
        self._register_progress = self._register_losses.clone()
        self._registers: list[dict[str, torch.Tensor] | None] = [None] * REGISTERS

    def _per_run(self, stacked: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Views of one run after the other: ``R * len(stacked)`` tensors."""
        rows = [value.unbind(0) for value in stacked]
        return [row[run] for run in range(self.tasks.runs) for row in rows]

    def _stacked(self, prefix: str) -> list[torch.Tensor]:
        return [self._state[f"{prefix}.{name}"] for name in self._leaves]

    def _lay_out(self, settings: Sequence[Settings]) -> StepLayout:
        runs, tensors, device = self.tasks.runs, len(self._leaves), self.tasks.device
        shapes = [value.shape[1:] for value in self._leaves.values()]

        def table(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        # laid out run after run, so that every table has the run as its first dimension
        self._state["tensor_state"] = table(runs, tensors, len(TENSOR_STATE))
        self._state["group_state"] = table(runs, len(GROUP_STATE))
        rows = [scalars for _, scalars in settings]
        return StepLayout(
            params=self._per_run(self._stacked("param")),
            exp_avgs=self._per_run(self._stacked("exp_avg")),
            exp_avg_sqs=self._per_run(self._stacked("exp_avg_sq")),
            grad_signs=None,
            group_of=[run for run in range(runs) for _ in range(tensors)],
            is_vector=[len(shape) <= 1 for shape in shapes] * runs,
            options=[options for options, _ in settings],
            run_of=list(range(runs)),
            scalars=torch.tensor(rows, dtype=torch.float64, device=device),
            group_state=self._state["group_state"],
            tensor_state=self._state["tensor_state"].view(runs * tensors, -1),
            skipped_steps=torch.zeros(runs, dtype=torch.int64, device=device),
        )

    # ------------------------------------------------------------------ inner steps

    @property
    def params(self) -> dict[str, torch.Tensor]:
        """The parameters now, ``[R, *shape]``, by name."""
        return {name: leaf.detach() for name, leaf in self._leaves.items()}

    @property
    def hyperparameters(self) -> torch.Tensor:
        """float64 ``[R, 8]``, a view in the order of HYPERPARAMETERS."""
        return self.scalars[:, :_HYPERPARAMETERS]

    def begin(self, hyperparameters: torch.Tensor) -> None:
        """Start from other hyperparameters, float64 ``[R, 8]``, before the first step."""
        self.hyperparameters.copy_(hyperparameters)
        self._start = hyperparameters.clone()

    def advance(self, steps: int, learning_rates: torch.Tensor | None = None) -> None:
        """Do inner steps on the coming minibatches.

        Args:
            steps: how many.
            learning_rates: float64 ``[steps, R]``, of each step; otherwise as :attr:`scalars` says.
        """
        for index in range(steps):
            if learning_rates is not None:
                self.scalars[:, _LR] = learning_rates[index]
            with torch.enable_grad():
                losses = self.tasks.train_loss(self._leaves, self.step)
                grads = torch.autograd.grad(losses.sum(), list(self._leaves.values()))
            torch._foreach_copy_(self._grads, grads)
            frequency = self._feature_frequency
            measures = frequency > 0 and (self.step - self._outer_begin) % frequency == 0
            self._backend.step(
                self._grad_views, self._features.next_statistics() if measures else None
            )
            if measures:
                self._features.recorded()
            self._loss_sum += losses.detach()
            self.step += 1

    @torch.no_grad()
    def loss(self, split: Split) -> torch.Tensor:
        """Held-out loss of each run now, float64 ``[R]``."""
        return self.tasks.eval_loss(self._leaves, split).double()

    # ------------------------------------------------------------------ outer steps

    def observe(
        self, total_steps: int, outer_steps: int, has_eval_loss: torch.Tensor
    ) -> Observation:
        """What the outer step that ends here shows, as :class:`lhopt_fused.LHOPT` shows it.

        Args:
            total_steps: inner steps of the whole run.
            outer_steps: outer steps of the whole run.
            has_eval_loss: bool ``[R]``; the others are run without an eval loss.
        """
        means = dict(zip(ACCUMULATED, self._features.pop().unbind(-1), strict=True))
        since = self.step - self._outer_begin
        train_loss = self._loss_sum / since
        seen = bool(has_eval_loss.any())
        eval_loss = self.loss("eval") if seen else torch.full_like(train_loss, torch.nan)
        self._outer_begin = self.step
        self._loss_sum = torch.zeros_like(train_loss)
        self._last_train_loss = train_loss
        self._progress = self.step / total_steps
        return Observation(
            inner=torch.stack([means[name] for name in INNER_FEATURES], dim=-1),
            train_loss=train_loss,
            eval_loss=eval_loss.masked_fill(~has_eval_loss, torch.nan),
            has_eval_loss=has_eval_loss,
            progress=torch.full_like(train_loss, self._progress),
            outer_steps=torch.full_like(train_loss, outer_steps),
            path_length=means["update_norm"] * since,
            param_norm=means["param_norm"],
            hyperparameters=self.hyperparameters.clone(),
            start_hyperparameters=self._start,
            register_losses=self._register_losses.clone(),
            register_progress=self._register_progress.clone(),
        )

    def apply(
        self,
        shifts: torch.Tensor,
        register: torch.Tensor | None = None,
        actions: Sequence[Action] = ACTIONS,
    ) -> None:
        """Move the hyperparameters and use the registers, from the next inner step on.

        Args:
            shifts: float64 ``[R, 8]``, log multipliers or logit shifts.
            register: int64 ``[R]``, index into REGISTER_CHOICES; None for keep.
            actions: kinds and bounds of the hyperparameters.
        """
        self.hyperparameters.copy_(apply_shifts(self.hyperparameters, shifts, actions))
        if register is None:
            return
        for choice in torch.unique(register).tolist():
            verb, _, index = REGISTER_CHOICES[choice].partition("_")
            if verb != "keep":
                self._use_register(verb, int(index), register == choice)

    def _use_register(self, verb: str, index: int, chosen: torch.Tensor) -> None:
        """Save, load or swap the training state of the ``chosen`` runs, bool ``[R]``."""
        filled = ~self._register_progress[:, index].isnan()
        held = self._registers[index]
        if held is None:
            held = {name: value.clone() for name, value in self._state.items()}
            self._registers[index] = held
        kept = {name: value.clone() for name, value in self._state.items()}
        loads = chosen & filled if verb in ("load", "swap") else torch.zeros_like(chosen)
        saves = chosen if verb in ("save", "swap") else torch.zeros_like(chosen)
        for name, value in self._state.items():
            value[loads] = held[name][loads]
            held[name][saves] = kept[name][saves]
        self._register_losses[saves, index] = self._last_train_loss[saves]
        self._register_progress[saves, index] = self._progress
