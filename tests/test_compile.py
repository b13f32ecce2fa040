"""Compiled training loops: the step is called as it is, and moving numbers compiles nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from policy.samples import random_policy
from torch._dynamo.testing import CompileCounter

from lhopt_fused import LHOPT

STEPS = 12


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():  # of dynamo's own, on torch's optimizers too
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def loop(compiles: Callable[[Callable[[torch.Tensor], None]], Callable[[torch.Tensor], None]]):
    """Train with ``compiles(train_step)``; what is reached, and the learning rates decided."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    policy = random_policy(0, registers=False)
    optimizer = LHOPT(model.parameters(), STEPS, policy=policy, outer_steps=6)

    def train_step(x: torch.Tensor) -> None:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step = compiles(train_step)
    for number in range(STEPS):
        step(torch.randn(4, 5, generator=torch.Generator().manual_seed(number)))
    rates = [decided.hyperparameters["lr"] for decided in optimizer.history]
    return [p.detach().clone() for p in model.parameters()], rates


def test_a_moved_hyperparameter_compiles_nothing() -> None:
    counter = CompileCounter()
    counts = []

    def compiles(function: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
        compiled = torch.compile(function, backend=counter)

        def counted(x: torch.Tensor) -> None:
            compiled(x)
            counts.append(counter.frame_count)

        return counted

    params, rates = loop(compiles)
    expected, expected_rates = loop(lambda function: function)
    assert len(set(rates)) == len(rates) == 6
    assert counts[0] > 0, "nothing was compiled"
    assert counts[2:] == [counts[1]] * (STEPS - 2), "after the first steps, nothing is compiled"
    assert rates == expected_rates
    assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))


def test_the_step_itself_is_not_traced() -> None:
    params = [torch.nn.Parameter(torch.ones(3, 2))]
    optimizer = LHOPT(params, STEPS, policy="fixed")
    params[0].grad = torch.ones(3, 2)
    counter = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=counter)
    for _ in range(4):
        compiled()
    assert counter.frame_count == 0
    assert float(optimizer.state[params[0]]["step"]) == 4
