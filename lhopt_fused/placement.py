"""Where an optimizer's parameters, moments and gradients are, looked up before every step.

The only thing about a step whose cost in Python grows with the number of tensors, so that it is
done in C++ (csrc/placement_bindings.cpp) where torch offers what that takes: DLPack's exchange of C
functions, from torch 2.10 on.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final

import numpy as np
import torch

from lhopt_fused import _C
from lhopt_fused.kernels.gradients import DTYPE_CODES, MISSING, GradTable
from lhopt_fused.layout import DenseViews, same_memory_order

__all__ = ["ExchangePlacement", "Placement", "PythonPlacement", "Sight", "place"]

_PLAIN: Final = (torch.Tensor, torch.nn.Parameter)  # of which subclasses may mean something else
_EXP_AVG: Final = operator.itemgetter("exp_avg")


class Sight(IntEnum):
    """What a look has found."""

    UNBOUND = 0  # other parameters or moments than those that are bound, or they have moved
    UNFIT = 1  # a gradient is not to be read as it is: it has to be checked, and copied or refused
    READY = 2


class Placement(ABC):
    """What is bound, T parameters with their moments, and where its gradients are.

    Attributes:
        gradients: what the last look has found, if all of them were ready. The tensors are there
            until they are let go.
    """

    gradients: GradTable

    @abstractmethod
    def look(self, groups: list[dict[str, Any]]) -> int:
        """A :class:`Sight` of the parameters in ``groups``, in order.

        Those beside the bound ones must have no gradient; else they are unbound.
        """

    def let_go(self) -> None:
        """Drop the gradients, so that they can be freed."""
        self.gradients.tensors[:] = [None] * len(self.gradients.tensors)


def place(
    params: list[torch.Tensor],
    views: DenseViews,
    states: list[dict[str, Any]],
    exp_avgs: list[torch.Tensor],
) -> Placement:
    """A placement of parameters, to be looked up in the quickest way that there is here.

    Args:
        params: T parameters.
        views: their dense stand-ins, whose memory order gradients are to have.
        states: of each parameter, with its first moment under ``"exp_avg"``.
        exp_avgs: those first moments.
    """
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    is_plain = all(type(p) in _PLAIN and p.device.type in ("cpu", "cuda") for p in params)
    if is_plain and _C.knows_exchange(capsule):
        return ExchangePlacement(capsule, params, views, states, exp_avgs)
    return PythonPlacement(params, views, states, exp_avgs)


class ExchangePlacement(Placement):
    """A :class:`Placement` that is looked up in C++, for plain tensors on the CPU or a GPU."""

    def __init__(
        self,
        capsule: object,
        params: list[torch.Tensor],
        views: DenseViews,
        states: list[dict[str, Any]],
        exp_avgs: list[torch.Tensor],
    ) -> None:
        self._placement = _C.Placement(
            capsule=capsule, types=_PLAIN, params=params, views=views.params
        )
        grads: list[torch.Tensor | None] = [None] * len(params)
        self._bound = list(params), list(states), list(exp_avgs), grads
        self.gradients = GradTable(grads, self._placement.addresses, self._placement.dtypes)

    def look(self, groups: list[dict[str, Any]]) -> int:
        sight = self._placement.look(groups, *self._bound)
        if sight == Sight.UNBOUND:
            self.let_go()
        return sight


class PythonPlacement(Placement):
    """A :class:`Placement` that is looked up in Python: for every torch and any kind of tensor."""

    def __init__(
        self,
        params: list[torch.Tensor],
        views: DenseViews,
        states: list[dict[str, Any]],
        exp_avgs: list[torch.Tensor],
    ) -> None:
        self._params, self._states, self._exp_avgs = params, states, exp_avgs
        self._pointers = self._pointers_of(params)
        self._bound_ids = set(map(id, params))
        self._forms = [(p.device, p.shape, p.stride(), p) for p in views.params]
        self._seen: tuple[list[int], list[torch.dtype | None]] | None = None
        count = len(params)
        nowhere = np.zeros(count, np.int64), np.full(count, MISSING, np.int8)
        self.gradients = GradTable([None] * count, *nowhere)

    def look(self, groups: list[dict[str, Any]]) -> int:
        if not self._binds([p for group in groups for p in group["params"]]):
            return Sight.UNBOUND
        table = self.gradients
        table.tensors[:] = grads = self._grads()
        try:
            seen = (
                [0 if g is None else g.data_ptr() for g in grads],
                [None if g is None else g.dtype for g in grads],
            )
        except RuntimeError:  # a sparse gradient has no address
            return Sight.UNFIT
        if seen != self._seen:
            self._seen = None
            if not all(map(self._fits, range(len(grads)), grads)):
                return Sight.UNFIT
            table.addresses[:] = seen[0]
            table.dtypes[:] = [MISSING if d is None else DTYPE_CODES[d] for d in seen[1]]
            self._seen = seen
        return Sight.READY

    def _pointers_of(self, params: Sequence[torch.Tensor]) -> list[int]:
        return list(map(torch.Tensor.data_ptr, params))

    def _grads(self) -> list[torch.Tensor | None]:
        return [p.grad for p in self._params]

    def _binds(self, params: list[torch.Tensor]) -> bool:
        """Whether it is these parameters, and they and their moments are where they were."""
        if len(params) != len(self._params):
            others = [p for p in params if id(p) not in self._bound_ids]
            if any(p.grad is not None for p in others):
                return False
            params = [p for p in params if id(p) in self._bound_ids]
        try:
            return (
                len(params) == len(self._params)
                and all(map(operator.is_, params, self._params))
                and self._pointers == self._pointers_of(params)
                and all(map(operator.is_, map(_EXP_AVG, self._states), self._exp_avgs))
            )
        except KeyError:  # someone has taken a moment out of the state
            return False

    def _fits(self, index: int, grad: torch.Tensor | None) -> bool:
        """Whether a gradient is missing or to be read as it is."""
        device, shape, stride, view = self._forms[index]
        return grad is None or (
            type(grad) in _PLAIN
            and grad.dtype in DTYPE_CODES
            and grad.layout is torch.strided
            and grad.device == device
            and grad.shape == shape
            and (grad.stride() == stride or same_memory_order(grad, view))
        )
