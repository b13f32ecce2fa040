"""Backends of the inner step, and the one place that chooses among them.

A backend steps a :class:`~lhopt_fused.types.StepLayout`. ``reference`` is the definition that the
others are tested against; ``cpu`` is C++; ``triton`` is for GPUs. They never import one another.
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch

from lhopt_fused.kernels.gradients import Grads
from lhopt_fused.types import StepLayout

__all__ = ["BackendName", "PhasedBackend", "StepBackend", "get_backend", "resolve_backend"]

BackendName = Literal["auto", "reference", "cpu", "triton"]


class StepBackend(Protocol):
    """One inner step over all tensors of a layout."""

    layout: StepLayout

    def step(self, grads: Grads, statistics: torch.Tensor | None = None) -> None:
        """Update parameters and state from ``grads``; the gradients are only read.

        Args:
            grads: T gradients in the layout's order, each in its parameter's memory order, of any
                supported float dtype; ``None`` leaves that tensor and its state alone. A group
                without a gradient keeps its state too. A table of them saves looking each up.
            statistics: float64 ``[T, len(STATISTICS)]`` on the layout's device to be filled, or
                ``None`` where no statistics are wanted in this step.

        A NaN or inf in any gradient adds one to its run's ``layout.skipped_steps`` and marks its
        tensor in ``statistics``. Nothing else of that run is written then (no tensor has
        ``taken``), or, with ``layout.masks_nonfinite``, the step leaves just those elements of
        parameter and state alone and keeps them out of every sum but ``param_sq``.
        """


class PhasedBackend(StepBackend, Protocol):
    """A backend whose step can be taken in phases, where tensors are pieces of larger ones.

    Between the phases, somebody makes sums over the pieces sums over the whole tensors; everything
    that follows from them, trust ratios and what they remember included, is theirs too.
    """

    def measure_gradients(self, grads: Grads, sums: torch.Tensor) -> None:
        """Sum up the pieces of the gradients and change nothing.

        Args:
            grads: as for :meth:`step`; they are read by the other phases too.
            sums: float64 ``[T, len(GRADIENT_SUMS)]`` to be filled.
        """

    def update_moments(self, sums: torch.Tensor, partial: torch.Tensor, measures: bool) -> None:
        """Clip, update the moments, and the parameters that need not wait for a trust ratio.

        Args:
            sums: as :meth:`measure_gradients` filled it, over whole tensors.
            partial: float64 ``[T, len(PARTIAL_SUMS)]`` to be filled with what the pieces add. The
                step size of a tensor that waits lacks its trust ratio.
            measures: whether all statistics are wanted; else ``param_sq``, ``update_sq`` and
                ``new_param_sq`` of tensors with a trust ratio will do.
        """

    def apply(self, partial: torch.Tensor) -> None:
        """Update the parameters that waited, and fill in their ``new_param_sq``.

        Args:
            partial: as :meth:`update_moments` filled it, with the final step sizes and decay
                factors.
        """


def resolve_backend(name: str, device: torch.device, dtypes: set[torch.dtype]) -> str:
    """The backend that ``name`` stands for, given where the parameters are and what they hold.

    ``"auto"`` means ``triton`` for CUDA parameters, ``cpu`` for float32, bfloat16 and float16 on
    the CPU, and ``reference`` for float64, which no fused backend steps.

    Raises:
        ValueError: ``name`` is not a backend.
    """
    if name not in get_args(BackendName):
        raise ValueError(f"backend must be one of {get_args(BackendName)}, got {name!r}")
    if name != "auto":
        return name
    if torch.float64 in dtypes:
        return "reference"
    return "triton" if device.type == "cuda" else "cpu"


def get_backend(name: str, layout: StepLayout) -> PhasedBackend:
    """Build the backend ``name`` (not ``"auto"``) over ``layout``.

    Raises:
        BackendUnavailableError: the backend cannot run here; the message says why.
        ValueError: the backend does not step tensors of this device or dtype, or is unknown.
    """
    match name:
        case "reference":
            from lhopt_fused.kernels.reference import ReferenceBackend

            return ReferenceBackend(layout)
        case "cpu":
            from lhopt_fused.kernels.cpu import CpuBackend

            return CpuBackend(layout)
        case "triton":
            from lhopt_fused.kernels.triton_backend import TritonBackend

            return TritonBackend(layout)
    raise ValueError(f"backend must be 'reference', 'cpu' or 'triton', got {name!r}")
