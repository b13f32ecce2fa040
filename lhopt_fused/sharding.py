"""Steps over pieces of tensors: which pieces count, and how their sums become the whole tensors'.

What a backend sees is local pieces. Between its phases, one small all-reduce over all tensors at
once makes partial sums whole; trust ratios, which follow from them, are taken here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from lhopt_fused.kernels import PhasedBackend
from lhopt_fused.kernels.formats import BLOCK, scales_shape, takes_blocks
from lhopt_fused.kernels.gradients import Grads, GradTable
from lhopt_fused.placement import PythonPlacement
from lhopt_fused.ranks import Ranks, is_sharded, local_tensor
from lhopt_fused.types import (
    GRADIENT_SUMS,
    PARTIAL_SUMS,
    SCALARS,
    STATISTICS,
    TENSOR_STATE,
    RanksDisagreeError,
    Trust,
    WeightDecay,
)

__all__ = [
    "PendingSums",
    "PiecePlacement",
    "ShardedStep",
    "check_holds_blocks",
    "counts_here",
    "describe",
    "grad_piece",
    "is_piece",
    "pieces",
    "placed",
]

_VOTES: Final = 2  # columns of GRADIENT_SUMS in which every rank has a say, also beside a copy
_FIRST_SUM: Final = PARTIAL_SUMS.index("grad_sq")  # columns before it say the same everywhere
_SUMS: Final = len(PARTIAL_SUMS) - _FIRST_SUM


def _column(name: str) -> int:
    return PARTIAL_SUMS.index(name)


def pieces(tensors: Sequence[torch.Tensor], where: str) -> list[torch.Tensor]:
    """What this rank has of each tensor; plain tensors as they are.

    Raises:
        ValueError: a DTensor waits for a sum over ranks, or this rank is not in its mesh.
    """
    for index, tensor in enumerate(tensors):
        if is_sharded(tensor):
            _check_placements(f"{where}['params'][{index}]", tensor)
    return list(map(local_tensor, tensors))


def _check_placements(name: str, tensor: Any) -> None:
    if any(placement.is_partial() for placement in tensor.placements):
        raise ValueError(
            f"{name} has the placements {tensor.placements}: it is yet to be summed over ranks; "
            "redistribute it to Replicate or Shard first"
        )
    if tensor.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"{name} is on {tensor.device_mesh}, which this rank is not in; give each rank an "
            "optimizer of its own parameters"
        )


def grad_piece(index: int, param: torch.Tensor) -> torch.Tensor | None:
    """What this rank has of the gradient of ``param``.

    Raises:
        ValueError: the gradient is laid out otherwise than its parameter.
    """
    grad = param.grad
    if grad is None or not is_sharded(param):
        return grad
    laid_out = getattr(grad, "placements", None)
    if laid_out != param.placements:  # type: ignore[attr-defined]
        raise ValueError(
            f"the gradient of parameter {index} has the placements {laid_out}, its parameter "
            f"{param.placements}; redistribute the gradient before the step"  # type: ignore[attr-defined]
        )
    return local_tensor(grad)


def is_piece(param: torch.Tensor) -> bool:
    """Whether this rank holds less than the whole parameter, or may."""
    return is_sharded(param) and any(
        placement.is_shard() and size > 1
        for placement, size in zip(param.placements, param.device_mesh.shape, strict=True)  # type: ignore[attr-defined]
    )


def check_holds_blocks(param: torch.Tensor, name: str) -> None:
    """Refuse a parameter whose moments take blocks, but whose pieces do not hold whole ones.

    The same on every rank: the placements decide, not a rank's piece.

    Raises:
        ValueError: the error says what to do.
    """
    if not is_piece(param) or not takes_blocks(param.shape):
        return
    size = param.shape[-1]
    for placement, ranks in zip(param.placements, param.device_mesh.shape, strict=True):  # type: ignore[attr-defined]
        if not placement.is_shard() or ranks == 1 or placement.dim == 0:
            continue
        share = -(-size // ranks)
        is_plain = param.dim() == 2 and type(placement).__name__ == "Shard"
        if not is_plain or share % BLOCK or size % BLOCK:
            raise ValueError(
                f"{name}, of shape {tuple(param.shape)}, is laid out as {param.placements}, in "  # type: ignore[attr-defined]
                f"pieces that cut blocks of {BLOCK} elements; moments='int8' needs rows, or "
                f"columns of matrices in multiples of {BLOCK}: shard dimension 0, or use "
                "moments='bfloat16'"
            )
        size = share


def counts_here(param: torch.Tensor, ranks: Ranks) -> bool:
    """Whether the sums over this rank's piece count: one of several copies does.

    A parameter on a part of the ranks counts as copied to the others, as one without a mesh does.
    """
    if not is_sharded(param):
        return ranks.rank == 0
    mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
    first = torch.distributed.get_process_group_ranks(ranks.group)[0]
    place = zip(mesh.get_coordinate(), placements, strict=True)
    is_first_copy = all(at == 0 for at, placement in place if placement.is_replicate())
    return is_first_copy and first in mesh.mesh.flatten().tolist()


def describe(param: torch.Tensor) -> tuple[Any, ...]:
    """What every rank must say of a parameter alike."""
    laid_out = (str(param.device_mesh.shape), str(param.placements)) if is_sharded(param) else ()  # type: ignore[attr-defined]
    return tuple(param.shape), str(param.dtype), *laid_out


def placed(local: torch.Tensor, param: torch.Tensor, is_scales: bool = False) -> torch.Tensor:
    """``local``, a piece in the memory order of the parameter's, laid out like the parameter.

    Or, like its rows of blocks, the scales of a piece.
    """
    if not is_sharded(param):
        return local
    from torch.distributed.tensor import DTensor

    shape, stride = param.shape, param.stride()
    if is_scales:
        shape = torch.Size(scales_shape(param.shape))
        stride = (shape[1], 1)
    return DTensor.from_local(
        local,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=shape,
        stride=stride,
    )


class PiecePlacement(PythonPlacement):
    """Where this rank's pieces of parameters and gradients are."""

    def _pointers_of(self, params: Sequence[torch.Tensor]) -> list[int]:
        return super()._pointers_of(list(map(local_tensor, params)))

    def _grads(self) -> list[torch.Tensor | None]:
        return list(itertools.starmap(grad_piece, enumerate(self._params)))


class PendingSums:
    """What the last step has left to be summed along with the next one's gradients.

    It belongs to the parameters of an optimizer, P of them, whichever of them a backend steps.

    Attributes:
        partial: float64 ``[P, len(PARTIAL_SUMS)]``.
        ombeta: float64 ``[P]``, ``lamb_update_norm_ombeta`` of that step.
        owes_norm: bool ``[P]``, tensors whose running norm of the update is to be advanced.
        has_norm: bool ``[P]``, tensors whose norm is to be remembered.
        is_measured: whether statistics were wanted.
        is_waiting: whether there is anything.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.partial = torch.zeros(count, len(PARTIAL_SUMS), dtype=torch.float64, device=device)
        self.ombeta = self.partial.new_zeros(count)
        self.owes_norm = torch.zeros(count, dtype=torch.bool, device=device)
        self.has_norm = torch.zeros_like(self.owes_norm)
        self.is_measured = self.is_waiting = False
        self.disagreements = self.partial.new_zeros(())


class ShardedStep:
    """Steps a layout of pieces: one all-reduce a step, two where a trust ratio is exact.

    Where no trust ratio has to wait for this step's norms, statistics and norms are summed along
    with the gradients of the next step, or when :meth:`settle` asks for them.

    Args:
        backend: steps the pieces.
        ranks: whose pieces they are.
        rows: ``[T]``, the place of each tensor of the layout among the optimizer's parameters.
        counts: ``[P]``, whether this rank's piece of each of them counts.
        pending: what the steps of another layout have left; changed from here on.
        record: called with the whole statistics of a step, float64 ``[T, len(STATISTICS)]``.
    """

    def __init__(
        self,
        backend: PhasedBackend,
        ranks: Ranks,
        rows: Sequence[int],
        counts: Sequence[bool],
        pending: PendingSums,
        record: Callable[[torch.Tensor], None],
    ) -> None:
        self.layout = layout = backend.layout
        self._backend, self._ranks, self._record = backend, ranks, record
        self.pending = pending
        device = layout.device
        self._rows = torch.tensor(rows, device=device)
        self._copies = ~torch.tensor(counts, device=device)
        self._group_of = torch.tensor(layout.group_of, device=device)
        tensors = range(len(layout.params))
        trusts = [layout.options[group].trust for group in layout.group_of]
        self._uses_trust = torch.tensor([layout.uses_trust(t) for t in tensors], device=device)
        self._is_exact = torch.tensor([trust is Trust.EXACT for trust in trusts], device=device)
        self._decays = torch.tensor(
            [layout.options[g].weight_decay is WeightDecay.DECOUPLED for g in layout.group_of],
            device=device,
        )
        self._exact = {t for t in tensors if layout.uses_trust(t) and trusts[t] is Trust.EXACT}
        self._unstarted = {t for t in tensors if layout.uses_trust(t)} - self._exact
        self._any_trust = bool(self._exact or self._unstarted)
        self._sums = layout.scalars.new_zeros(len(tensors), len(GRADIENT_SUMS))
        self._partial = layout.scalars.new_zeros(len(tensors), len(PARTIAL_SUMS))

    def step(self, grads: Grads, measures: bool) -> None:
        """One inner step; see :class:`~lhopt_fused.kernels.StepBackend`.

        Raises:
            RanksDisagreeError: on every rank, where some have a gradient that others lack; nothing
                has been written. On a GPU it comes with the next :meth:`settle`.
        """
        self._backend.measure_gradients(grads, self._sums)
        self._sum_over_ranks(self._sums)
        if self.layout.device.type == "cpu":
            self._check_presence()
        waits = self._waits_for_norms(grads)
        self._backend.update_moments(self._sums, self._partial, measures)
        is_bad = self._sums[:, GRADIENT_SUMS.index("nonfinite")] > 0  # here or on another rank
        self._partial[:, _column("grad_nonfinite")] = is_bad.to(self._partial.dtype)
        self._remember(measures)
        if waits:
            self._finish()

    def settle(self) -> None:
        """Make what the last step has left whole: a collective, if there is anything."""
        if self.pending.is_waiting:
            self._sum_over_ranks(torch.zeros_like(self._sums))
        self._check_presence()

    # ------------------------------------------------------------------ sums

    def _sum_over_ranks(self, sums: torch.Tensor) -> None:
        """Sum the gradients' ``sums``, in place, and what is pending, in one message.

        The message has the same shape whatever is in it, so that sums do not depend on what else
        is summed.
        """
        pending = self.pending
        message = sums.new_zeros(len(pending.partial), len(GRADIENT_SUMS) + _SUMS)
        message[self._rows, : len(GRADIENT_SUMS)] = sums
        message[:, len(GRADIENT_SUMS) :] = pending.partial[:, _FIRST_SUM:]
        message[self._copies, _VOTES:] = 0.0
        self._ranks.sum(message)
        sums.copy_(message[self._rows, : len(GRADIENT_SUMS)])
        present = message[:, 0]
        pending.disagreements += ((present > 0) & (present < self._ranks.size)).sum()
        if pending.is_waiting:
            pending.partial[:, _FIRST_SUM:] = message[:, len(GRADIENT_SUMS) :]
            self._take_pending()

    def _check_presence(self) -> None:
        if bool(self.pending.disagreements > 0):
            self.pending.disagreements.zero_()
            raise RanksDisagreeError(
                "some ranks have gradients of parameters that other ranks have none of; every "
                "rank must compute the gradients of the same parameters in each step"
            )

    def _take_pending(self) -> None:
        """Draw the conclusions from whole sums of the last step."""
        pending, rows = self.pending, self._rows
        partial, state = pending.partial[rows], self.layout.tensor_state
        if pending.is_measured:
            self._record(partial[:, : len(STATISTICS)])
        self._advance_norms(partial, pending.owes_norm[rows], pending.ombeta[rows])
        norm = state[:, TENSOR_STATE.index("param_norm")]
        now = partial[:, _column("new_param_sq")].sqrt()
        norm.copy_(torch.where(pending.has_norm[rows], now, norm))
        pending.partial.zero_()
        pending.is_waiting = pending.is_measured = False

    def _remember(self, measures: bool) -> None:
        """Leave what the pieces add for the next sum."""
        pending, rows = self.pending, self._rows
        pending.partial[rows] = self._partial
        taken = self._partial[:, _column("taken")] > 0
        pending.ombeta[rows] = self._scalar("lamb_update_norm_ombeta")
        pending.owes_norm[rows] = pending.has_norm[rows] = self._uses_trust & taken
        pending.is_measured = measures
        pending.is_waiting = measures or self._any_trust

    # ------------------------------------------------------------------ trust ratios

    def _waits_for_norms(self, grads: Grads) -> bool:
        """Whether a trust ratio of this step needs its own norms; every rank says the same.

        That is so for exact ones, and for delayed ones in the first step of a tensor.
        """
        tensors = grads.tensors if isinstance(grads, GradTable) else grads
        present = {index for index, grad in enumerate(tensors) if grad is not None}
        if unsure := self._unstarted & present:
            steps = self.layout.tensor_state[:, TENSOR_STATE.index("step")].tolist()
            self._unstarted -= {index for index in unsure if steps[index] > 0}
        return bool((self._exact | self._unstarted) & present)

    def _finish(self) -> None:
        """Sum over ranks at once, and do the updates that have waited for it."""
        pending, rows = self.pending, self._rows
        message = pending.partial[:, _FIRST_SUM:].clone()
        message[self._copies] = 0.0
        self._ranks.sum(message)
        partial = self._partial
        partial[:, _FIRST_SUM:] = message[rows]
        taken = partial[:, _column("taken")] > 0
        self._advance_norms(partial, self._uses_trust & taken, pending.ombeta[rows])
        first_step = self.layout.tensor_state[:, TENSOR_STATE.index("step")] == 1
        deferred = self._uses_trust & taken & (self._is_exact | first_step)
        trust = torch.where(deferred, self._trust_ratios(partial), 1.0)
        partial[:, _column("step_size")] *= trust
        decays = deferred & self._decays
        decay = 1.0 - partial[:, _column("step_size")] * self._scalar("weight_decay")
        known = partial[:, _column("decay_factor")]
        known.copy_(torch.where(decays, decay, known))
        if pending.is_measured:
            self._record(partial[:, : len(STATISTICS)])
        new_param_sq = pending.partial[rows, _column("new_param_sq")]
        self._backend.apply(partial)
        applied = partial[:, _column("new_param_sq")]
        pending.partial.zero_()
        pending.partial[rows, _column("new_param_sq")] = torch.where(
            deferred, applied, new_param_sq
        )
        pending.owes_norm.zero_()
        pending.is_measured = False

    def _advance_norms(
        self, partial: torch.Tensor, which: torch.Tensor, ombeta: torch.Tensor
    ) -> None:
        """Take the norms of the update in ``partial`` into the running ones."""
        norm = partial[:, _column("update_sq")].sqrt()
        for name, value in (("ema", norm), ("bias_correction", torch.ones_like(norm))):
            held = self.layout.tensor_state[:, TENSOR_STATE.index(f"update_norm_{name}")]
            held.copy_(torch.where(which, (1 - ombeta) * held + ombeta * value, held))

    def _trust_ratios(self, partial: torch.Tensor) -> torch.Tensor:
        """LAMB's trust ratios ``[T]`` from whole norms; see ``reference`` for the formula."""
        state = dict(zip(TENSOR_STATE, self.layout.tensor_state.unbind(-1), strict=True))
        param_norm = partial[:, _column("param_sq")].sqrt()
        update_norm = state["update_norm_ema"] / state["update_norm_bias_correction"]
        ratio = param_norm / update_norm
        ratio = ratio.maximum(self._scalar("lamb_min_trust"))
        ratio = ratio.minimum(self._scalar("lamb_max_trust"))
        is_something = (param_norm >= 1e-8) & (update_norm >= 1e-8)
        return torch.where(is_something, ratio.pow(self._scalar("lamb_power")), 1.0)

    def _scalar(self, name: str) -> torch.Tensor:
        """A hyperparameter of each tensor ``[T]``."""
        return self.layout.scalars[:, SCALARS.index(name)][self._group_of]
