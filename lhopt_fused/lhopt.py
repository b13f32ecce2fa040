"""LHOPT: CIAO with its hyperparameters in the hands of a policy, a few dozen times a run."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import ParamsT

from lhopt_fused.actions import REGISTER_CHOICES, REGISTERS
from lhopt_fused.ciao import CIAO, LHOPT_START
from lhopt_fused.compiled import traced_observe
from lhopt_fused.history import OuterStep
from lhopt_fused.kernels import BackendName
from lhopt_fused.policy import (
    LearnedPolicy,
    Policy,
    RunDecision,
    RunObservation,
    load_policy,
    policy_for_run,
)
from lhopt_fused.policy.plain import moved
from lhopt_fused.ranks import Ranks
from lhopt_fused.registers import RestartRegisters, state_bytes
from lhopt_fused.sharding import is_piece
from lhopt_fused.types import HYPERPARAMETERS, INNER_FEATURES

__all__ = ["LHOPT"]

_LOG = logging.getLogger(__name__)
_LR = HYPERPARAMETERS.index("lr")
_STATE_KEY = "lhopt"
_COPIED = (
    *("policy", "total_steps", "outer_steps", "eval_fn", "callback", "registers", "history"),
    "observes_closure",
    *("_draws", "_done_steps", "_said_over", "_start", "_left_lr", "_losses", "_observed"),
)
"""Attributes that copies of an optimizer take along as they are."""

Loss = float | torch.Tensor


class LHOPT(CIAO):
    """An optimizer that tunes itself while it trains (Almeida et al. 2021, arXiv 2106.00958).

    The inner step is :class:`CIAO`'s at LHOPT's start. The run is cut into outer steps; at the end
    of each, a policy looks at the inner features and the observed losses and moves the
    hyperparameters, from the next inner step on::

        optimizer = LHOPT(model.parameters(), total_steps=10_000)
        for batch in batches:
            loss = model(batch)
            loss.backward()
            optimizer.observe(train_loss=loss)
            optimizer.step()
            optimizer.zero_grad()

    Under DDP and FSDP2 every rank takes the same decision, from the losses of all ranks, which is
    checked to be the same bit for bit; every rank has to do the same steps.

    Args:
        params: parameters or param groups. Every group's hyperparameters are moved alike; those
            that are 0 or None stay so (weight decay of biases, for example).
        total_steps: inner steps of the whole run, >= 1.
        policy: name of a built-in policy, path of a policy file, or a :class:`Policy`.
        outer_steps: how often the policy decides, 1 to ``total_steps``; by default every 16 inner
            steps, at most 64 times.
        backend: as for :class:`CIAO`.
        sample: draw decisions instead of taking the mean of the log multipliers.
        seed: of those draws.
        restart_registers: number of :class:`RestartRegisters`; a policy that uses them needs 3.
        register_folder: keep registers in files there instead of in memory; runs can share it,
            and the files go with the optimizer: checkpoints hold what they hold.
        eval_fn: called without gradients at the end of each outer step; returns the eval loss.
        callback: called with the :class:`OuterStep` at the end of each outer step; for example
            :func:`lhopt_fused.history.tensorboard_callback` of a ``SummaryWriter``.
        start: other keywords of :class:`CIAO`, to start elsewhere than the policy says. Where it
            starts, and how far it may take the learning rate, may depend on ``total_steps``: see
            :meth:`lhopt_fused.policy.StartOptions.for_run`.

    Attributes:
        policy: as runs of ``total_steps`` have it.
        history: an :class:`OuterStep` for each outer step so far.
        registers: the restart registers.
        observes_closure: whether the loss that a closure returns counts as a train loss; False
            where someone else observes it.

    Raises:
        ValueError: ``total_steps`` or ``outer_steps`` do not fit, or the policy needs registers.
        RegisterFileError: ``register_folder`` cannot be written to.
        PolicyFileError, FileNotFoundError: there is no such policy, or the file is not one.
        TypeError: ``policy``, ``eval_fn`` or ``callback`` is something else.
    """

    _carried_keys = (*CIAO._carried_keys, _STATE_KEY)

    def __init__(
        self,
        params: ParamsT,
        total_steps: int,
        *,
        policy: str | os.PathLike[str] | Policy = "default",
        outer_steps: int | None = None,
        backend: BackendName = "auto",
        sample: bool = False,
        seed: int = 0,
        restart_registers: int = 0,
        register_folder: str | os.PathLike[str] | None = None,
        eval_fn: Callable[[], Loss] | None = None,
        callback: Callable[[OuterStep], None] | None = None,
        **start: Any,
    ) -> None:
        found = load_policy(policy) if isinstance(policy, str | os.PathLike) else policy
        if not hasattr(found, "start_run"):
            raise TypeError(f"policy must be a name, a path or a Policy, got {policy!r}")
        for name, function in (("eval_fn", eval_fn), ("callback", callback)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r}")
        self.total_steps, self.outer_steps = _check_steps(total_steps, outer_steps)
        self.policy = policy_for_run(found, total_steps)
        if self.policy.action_space.registers and restart_registers != REGISTERS:
            raise ValueError(
                f"policy {self.policy.name!r} uses restart registers: pass "
                f"restart_registers={REGISTERS}; each takes as much memory as parameters and "
                "optimizer state together"
            )
        self._draws: dict[str, Any] = {"mode": "sample" if sample else "mean", "seed": seed}
        self._policy_run = self.policy.start_run(**self._draws)
        self.registers = RestartRegisters(restart_registers, register_folder)
        self.eval_fn, self.callback = eval_fn, callback
        self.history: list[OuterStep] = []
        self.observes_closure = True
        self._done_steps = 0
        self._said_over = False
        wanted = {**self.policy.start_options.keywords(), **self.policy.start_hyperparameters}
        keywords = {**LHOPT_START, **wanted, **start}
        super().__init__(params, backend=backend, **keywords)
        if restart_registers and any(map(is_piece, self._all_params())):
            raise ValueError(
                "restart registers hold whole tensors: use a policy without them where parameters "
                "are sharded"
            )
        self._start = self._hyperparameters(self.param_groups[0])
        self._left_lr: list[float] = []
        self._losses = torch.zeros(2, dtype=torch.float64, device=self._all_params()[0].device)
        self._observed = [0, 0]

    # ------------------------------------------------------------------ observe

    def observe(self, train_loss: Loss | None = None, eval_loss: Loss | None = None) -> None:
        """Show the policy losses; it sees their means over the outer step.

        Args:
            train_loss: of the coming or last inner step; a number or a tensor with one element, on
                any device. Tensors on the parameters' device are read without waiting for them.
                NaN and inf are shown as they are.
            eval_loss: likewise, on data that is not trained on.

        Raises:
            ValueError: a tensor with more than one element.
            TypeError: something that is no number. Neither loss has been taken then.
        """
        losses = train_loss, eval_loss
        if is_dynamo_compiling() and all(x is None or isinstance(x, torch.Tensor) for x in losses):
            traced_observe(self, train_loss, eval_loss)  # type: ignore[arg-type]
        else:
            self._observe_at_once(train_loss, eval_loss)

    @_disable_dynamo
    def _observe_at_once(self, train_loss: Loss | None, eval_loss: Loss | None) -> None:
        """:meth:`observe`, as the operator in compiled loops calls it."""
        sums = self._loss_sums()
        numbers = [
            None if loss is None else _one_number(loss, sums.device)
            for loss in (train_loss, eval_loss)
        ]
        for index, number in enumerate(numbers):
            if number is None:
                continue
            if sums.device.type == "cpu":  # a few microseconds, where small tensors cost 100
                held = sums.numpy()
                held[index] = held.item(index) + number
            else:
                sums[index].add_(number)
            self._observed[index] += 1

    def _loss_sums(self) -> torch.Tensor:
        """Sums of the losses, beside the parameters, which may have moved to another device."""
        device = self.param_groups[0]["params"][0].device
        if self._losses.device != device:
            self._losses = self._losses.to(device)
        return self._losses

    # ------------------------------------------------------------------ step

    def _step(self, loss: float | None) -> None:
        if loss is not None and self.observes_closure:
            self.observe(train_loss=loss)
        super()._step(loss)
        self._done_steps += 1
        if self._done_steps > self.total_steps:
            self._say_over()
        elif self._outer_index(self._done_steps) > self._outer_index(self._done_steps - 1):
            self._end_outer_step()

    def _outer_index(self, steps: int) -> int:
        """Outer steps that are over after so many inner steps."""
        return steps * self.outer_steps // self.total_steps

    def _say_over(self) -> None:
        if not self._said_over:
            self._said_over = True
            warnings.warn(
                f"more than total_steps={self.total_steps} inner steps: the policy keeps the "
                "hyperparameters that it had then (this warning is shown once)",
                RuntimeWarning,
                stacklevel=8,  # the line that calls step()
            )

    def _end_outer_step(self) -> None:
        """Observe, decide, apply."""
        if self.eval_fn is not None:
            self.observe(eval_loss=self.eval_fn())
        previous = self.history[-1].inner_step if self.history else 0
        features, losses = self._pop_measured(self._loss_sums())
        counts: Sequence[float] = self._observed
        if (ranks := self._met_ranks()) is not None:
            features, losses, counts = _shared(ranks, self._losses.device, features, losses, counts)
        train_loss, eval_loss = (
            loss / count if count else None for loss, count in zip(losses, counts, strict=True)
        )
        self._losses.zero_()
        self._observed = [0, 0]
        progress = self._done_steps / self.total_steps
        train_loss = math.nan if train_loss is None else train_loss
        group = self.param_groups[0]
        decision = self._policy_run.decide(
            RunObservation(
                inner=[features[name] for name in INNER_FEATURES],
                train_loss=train_loss,
                eval_loss=eval_loss,
                progress=progress,
                outer_steps=self.outer_steps,
                path_length=features["update_norm"] * (self._done_steps - previous),
                param_norm=features["param_norm"],
                hyperparameters=self._hyperparameters(group),
                start_hyperparameters=self._start,
                register_losses=_padded(self.registers.losses),
                register_progress=_padded(self.registers.progress),
            )
        )
        if ranks is not None:
            ranks.check_agreement(self._decided(decision))
        self._apply(decision)
        register = REGISTER_CHOICES[decision.register]
        self._use_register(register, train_loss, progress)
        self._record(features, train_loss, eval_loss, decision, register)

    def _said(self) -> dict[str, Any]:
        run = [self.total_steps, self.outer_steps, self._done_steps, len(self.registers)]
        return {
            **super()._said(),
            "total_steps, outer_steps, steps done and restart registers": run,
            "the policy": [self.policy.name, _fingerprint(self.policy), self._draws],
            "whether there is an eval_fn": self.eval_fn is not None,
        }

    def _decided(self, decision: RunDecision) -> dict[str, Any]:
        """By topic, what every rank must decide alike."""
        memory = hashlib.sha256(self._policy_run.get_state().tobytes())
        return {
            "the decision": [decision.register, np.asarray(decision.shifts).tolist()],
            "the hyperparameters": np.asarray(decision.hyperparameters).tolist(),
            "the policy's memory": memory.hexdigest(),
        }

    def _apply(self, decision: RunDecision) -> None:
        """Move every group's hyperparameters; all or none."""
        shifts = np.asarray(decision.shifts, dtype=np.float64).tolist()
        learning_rates = [float(group["lr"]) for group in self.param_groups]
        left = self._left_lr  # groups may have been added since
        if shifts[_LR] != 0 and learning_rates[: len(left)] != left:
            raise RuntimeError(
                f"lr was set to {learning_rates} after the policy {self.policy.name!r} left it at "
                f"{left}: a learning-rate scheduler and a policy cannot both move it. "
                'Remove the scheduler, or use a policy that leaves lr alone (policy="fixed")'
            )
        first = self._hyperparameters(self.param_groups[0])
        for group in self.param_groups:
            before = self._hyperparameters(group)
            if before == first:
                after = np.asarray(decision.hyperparameters, dtype=np.float64).tolist()
            else:
                after = list(map(moved, before, shifts, self.policy.action_space.actions))
            _set_hyperparameters(group, [a if b else b for a, b in zip(after, before, strict=True)])
        self._left_lr = [float(group["lr"]) for group in self.param_groups]

    def _record(
        self,
        features: dict[str, float],
        train_loss: float,
        eval_loss: float | None,
        decision: RunDecision,
        register: str,
    ) -> None:
        after = self._hyperparameters(self.param_groups[0])
        step = OuterStep(
            outer_step=len(self.history) + 1,
            inner_step=self._done_steps,
            progress=self._done_steps / self.total_steps,
            train_loss=train_loss,
            eval_loss=eval_loss,
            features={name: features[name] for name in INNER_FEATURES},
            shifts=dict(zip(HYPERPARAMETERS, map(float, decision.shifts), strict=True)),
            register=register,
            hyperparameters=dict(zip(HYPERPARAMETERS, after, strict=True)),
        )
        self.history.append(step)
        if self.callback is not None:
            self.callback(step)

    @staticmethod
    def _hyperparameters(group: dict[str, Any]) -> list[float]:
        """The eight numbers of a group, NaN where it does without."""
        return [math.nan if group[n] is None else float(group[n]) for n in HYPERPARAMETERS]

    # ------------------------------------------------------------------ restart registers

    @property
    def register_bytes(self) -> int:
        """Bytes that one restart register takes."""
        return state_bytes(self._training_state())

    def save_register(self, index: int) -> None:
        """Copy the training state (parameters and optimizer state) into register ``index``."""
        self._state_of_use(index)
        self.registers.save(index, self._training_state(), *self._last_seen())

    def load_register(self, index: int) -> None:
        """Go back to the training state in register ``index``; an empty one changes nothing."""
        self.registers.load(index, self._training_state())

    def swap_register(self, index: int) -> None:
        """Exchange the training state with register ``index``; an empty one is saved to."""
        self._state_of_use(index)
        self.registers.swap(index, self._training_state(), *self._last_seen())

    def _use_register(self, choice: str, train_loss: float, progress: float) -> None:
        if choice == "keep" or len(self.registers) == 0:
            return
        verb, index = choice.split("_")
        state = self._training_state()
        if verb == "load":
            self.registers.load(int(index), state)
            return
        self._state_of_use(int(index))
        keep = self.registers.save if verb == "save" else self.registers.swap
        keep(int(index), state, train_loss, progress)

    def _state_of_use(self, index: int) -> None:
        """Say how much memory a register takes before it is taken."""
        if index < len(self.registers) and math.isnan(self.registers.progress[index]):
            where = self.registers.folder or "host memory"
            _LOG.info("restart register %d takes %d bytes in %s", index, self.register_bytes, where)

    def _last_seen(self) -> tuple[float, float]:
        last = self.history[-1] if self.history else None
        loss = last.train_loss if last is not None else math.nan
        return loss, self._done_steps / self.total_steps

    def _training_state(self) -> dict[str, torch.Tensor]:
        """Every tensor that an inner step reads or writes, by name."""
        if self._run is None:
            raise RuntimeError("there is no training state yet: call step() first")
        layout = self._run.layout
        state = {"tensor_state": layout.tensor_state, "group_state": layout.group_state}
        per_tensor: dict[str, Sequence[torch.Tensor | None]] = {
            "param": [p.detach() for p in self._run.pieces],
            "exp_avg": layout.exp_avgs,
            "exp_avg_sq": layout.exp_avg_sqs,
            "grad_signs": layout.grad_signs or [],
            "exp_avg_scale": layout.exp_avg_scales or [],
            "exp_avg_sq_scale": layout.exp_avg_sq_scales or [],
            "master_param": layout.master_params or [],
            "master_correction": layout.master_corrections or [],
        }
        for name, tensors in per_tensor.items():
            state |= {
                f"{name}.{index}": tensor
                for index, tensor in enumerate(tensors)
                if tensor is not None
            }
        return state

    # ------------------------------------------------------------------ saving

    def __getstate__(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _COPIED}
        return {**super().__getstate__(), **own, "_policy_state": self._policy_run.get_state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        policy_state = state.pop("_policy_state", None)
        super().__setstate__(state)
        if policy_state is not None:
            self._policy_run = self.policy.start_run(**self._draws)
            self._policy_run.set_state(policy_state)

    def state_dict(self) -> dict[str, Any]:
        """As :class:`CIAO`'s, and under ``"lhopt"`` the policy's side of the run."""
        registers = self.registers.state_dict()
        own = {
            "policy": self.policy.name,
            "fingerprint": _fingerprint(self.policy),
            "policy_state": torch.from_numpy(self._policy_run.get_state().copy()),
            "total_steps": self.total_steps,
            "outer_steps": self.outer_steps,
            "done_steps": self._done_steps,
            "start": list(self._start),
            "left_lr": list(self._left_lr),
            "losses": self._losses.clone(),
            "observed": list(self._observed),
            "register_states": registers.pop("held"),
            "registers": registers,
            "history": [step.to_plain() for step in self.history],
        }
        return self._carry(super().state_dict(), _STATE_KEY, own, large=("register_states",))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of another optimizer, policy or length of run; nothing has changed.
        """
        saved = self._carried(state_dict, _STATE_KEY)
        if saved is None:
            raise ValueError("the state dict has no 'lhopt' entry: it was not saved by LHOPT")
        mine = {
            "total_steps": self.total_steps,
            "outer_steps": self.outer_steps,
            "fingerprint": _fingerprint(self.policy),  # which may depend on these
        }
        for name, value in mine.items():
            if saved[name] != value:
                what = f"policy {saved['policy']!r}" if name == "fingerprint" else saved[name]
                here = f"policy {self.policy.name!r}" if name == "fingerprint" else value
                raise ValueError(f"the state dict was saved with {name} {what}, here it is {here}")
        registers = {**saved["registers"], "held": saved.get("register_states", {})}
        self.registers.check(registers)
        self._check_saved(state_dict)
        self.registers.load_state_dict(registers)
        super().load_state_dict(state_dict)
        self._policy_run.set_state(saved["policy_state"].cpu().numpy())
        self._done_steps = saved["done_steps"]
        self._start = list(saved["start"])
        self._left_lr = list(saved["left_lr"])
        self._losses.copy_(saved["losses"])
        self._observed = list(saved["observed"])
        self.history = [OuterStep(**step) for step in saved["history"]]


def _check_steps(total_steps: int, outer_steps: int | None) -> tuple[int, int]:
    if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
        raise ValueError(f"total_steps must be a number of inner steps >= 1, got {total_steps!r}")
    if outer_steps is None:
        return total_steps, min(64, max(1, total_steps // 16))
    if isinstance(outer_steps, bool) or not isinstance(outer_steps, int) or outer_steps < 1:
        raise ValueError(f"outer_steps must be a number >= 1, got {outer_steps!r}")
    if outer_steps > total_steps:
        raise ValueError(
            f"outer_steps={outer_steps} needs at least as many inner steps, got "
            f"total_steps={total_steps}"
        )
    return total_steps, outer_steps


def _one_number(loss: Loss, device: torch.device) -> float | torch.Tensor:
    if not isinstance(loss, torch.Tensor):
        if isinstance(loss, str) or not hasattr(loss, "__float__"):
            raise TypeError(f"a loss must be one number or a tensor, got {type(loss).__name__}")
        return float(loss)
    if loss.numel() != 1:
        raise ValueError(
            f"a loss must be one number, got a tensor of shape {tuple(loss.shape)}; reduce it first"
        )
    if loss.is_complex():
        raise TypeError("a loss must be one real number, got a complex tensor")
    if device.type == "cpu":
        return float(loss.item())
    return loss.detach().reshape(()).to(device, torch.float64, non_blocking=True)


def _shared(
    ranks: Ranks,
    device: torch.device,
    features: dict[str, float],
    losses: Sequence[float],
    counts: Sequence[float],
) -> tuple[dict[str, float], list[float], list[float]]:
    """What every rank decides on: losses and their counts over all ranks, rank 0's features."""
    observed = torch.tensor([*losses, *counts], dtype=torch.float64, device=device)
    ranks.sum(observed)
    table = torch.tensor([*features.values()], dtype=torch.float64, device=device)
    table = torch.cat([table, observed])
    ranks.copy_from_first(table)
    numbers = table.tolist()
    size, kinds = len(features), len(losses)
    return (
        dict(zip(features, numbers[:size], strict=True)),
        numbers[size : size + kinds],
        numbers[size + kinds :],
    )


def _padded(values: Sequence[float]) -> list[float]:
    return [*values, *[math.nan] * REGISTERS][:REGISTERS]


def _set_hyperparameters(group: dict[str, Any], values: Sequence[float]) -> None:
    for name, value in zip(HYPERPARAMETERS, values, strict=True):
        if isinstance(group[name], torch.Tensor):
            group[name].fill_(value)
        elif group[name] is not None:
            group[name] = value


def _fingerprint(policy: Policy) -> str:
    """Identifies a policy by what decides: name, action space, and weights if it has any."""
    digest = hashlib.sha256(repr((policy.name, policy.action_space)).encode())
    if isinstance(policy, LearnedPolicy):
        for name in sorted(policy.weights):
            digest.update(name.encode() + policy.weights[name].tobytes())
    return digest.hexdigest()
