"""The step, and the look at losses, as operators of torch's: what compiled training loops call.

A graph holds parameters, gradients and losses. Everything else that a step reads or writes stays
with the optimizer, for which a small tensor stands, its ticket; hyperparameters are read when the
operator runs, so that nothing is compiled again when they move. Every operator writes to the
ticket as far as a graph can tell, which keeps them in order.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, Final, Protocol

import torch

__all__ = ["Compilable", "ticket_for", "traced_observe", "traced_step"]

_KEYWORDS: Final[dict[str, Any]] = (
    {"tags": (torch.Tag.cudagraph_unsafe,)}
    if hasattr(torch.Tag, "cudagraph_unsafe")
    and "tags" in signature(torch.library.custom_op).parameters
    else {}  # before, the ticket keeps graphs out of CUDA graphs: it is on the CPU
)


class Compilable(Protocol):
    """What the operators need of an optimizer; of one that observes losses, a little more."""

    _members: list[torch.Tensor]  # its parameters over all groups, in order, as graphs take them
    _ticket: torch.Tensor

    def _find_members(self) -> list[torch.Tensor]:
        """Bring ``_members`` up to date."""

    def _step_at_once(self) -> object:
        """One step with the gradients at hand."""


_NUMBERS: Final = itertools.count()
_HOLDERS: Final[weakref.WeakValueDictionary[int, Any]] = weakref.WeakValueDictionary()
# Operators take tensors and numbers alone, so that one has to be looked up. Nothing but a compiled
# graph has a ticket, and a graph has it from its optimizer.


def ticket_for(optimizer: Compilable) -> torch.Tensor:
    """A tensor that stands for ``optimizer`` in graphs: int64, no dimensions, on the CPU."""
    number = next(_NUMBERS)
    _HOLDERS[number] = optimizer
    return torch.tensor(number)


def traced_step(optimizer: Compilable) -> None:
    """Put a step of ``optimizer`` into the graph that is being traced."""
    members = optimizer._members
    with torch.no_grad():
        torch.ops.lhopt_fused.step(members, [p.grad for p in members], optimizer._ticket)


def traced_observe(
    optimizer: Compilable, train_loss: torch.Tensor | None, eval_loss: torch.Tensor | None
) -> None:
    """Put a look at losses into the graph that is being traced."""
    with torch.no_grad():
        torch.ops.lhopt_fused.observe(train_loss, eval_loss, optimizer._ticket)


@torch.library.custom_op(
    "lhopt_fused::step",
    mutates_args=("params", "ticket"),
    schema="(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) ticket) -> ()",
    **_KEYWORDS,
)
@torch.no_grad()
def _step(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], ticket: torch.Tensor
) -> None:
    optimizer = _HOLDERS[int(ticket)]
    traced_with = optimizer._members
    own = optimizer._find_members()
    if len(own) != len(params) or any(p is not q for p, q in zip(own, traced_with, strict=False)):
        raise RuntimeError(
            "param_groups were changed by hand and hold other parameters than this step was "
            "compiled for; nothing has been written. Change them with add_param_group, or do "
            "another step, which compiles it for these"
        )
    with _gradients(own, grads), _values(own, params):
        optimizer._step_at_once()


@torch.library.custom_op(
    "lhopt_fused::observe",
    mutates_args=("ticket",),
    schema="(Tensor? train_loss, Tensor? eval_loss, Tensor(a!) ticket) -> ()",
    **_KEYWORDS,
)
def _observe(
    train_loss: torch.Tensor | None, eval_loss: torch.Tensor | None, ticket: torch.Tensor
) -> None:
    _HOLDERS[int(ticket)]._observe_at_once(train_loss, eval_loss)


@_step.register_fake
def _(params: object, grads: object, ticket: object) -> None:
    """There is nothing to say of results: there are none."""


@_observe.register_fake
def _(train_loss: object, eval_loss: object, ticket: object) -> None:
    """As for the step."""


@contextmanager
def _gradients(
    params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None]
) -> Iterator[None]:
    """Let ``params`` have these gradients for a while: what a graph has set is not there yet."""
    before = [p.grad for p in params]
    try:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        yield
    finally:
        for param, grad in zip(params, before, strict=True):
            param.grad = grad


@contextmanager
def _values(params: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> Iterator[None]:
    """Let ``params`` have the values of ``given`` for a while, and these what they become.

    They are the same but where a graph's compiler works on a copy and writes it back itself.
    """
    copied = [
        (param, copy, param.clone())
        for param, copy in zip(params, given, strict=True)
        if param.data_ptr() != copy.data_ptr()
    ]
    try:
        for param, copy, _ in copied:
            param.copy_(copy)
        yield
        for param, copy, _ in copied:
            copy.copy_(param)
    finally:
        for param, _, before in copied:
            param.copy_(before)
