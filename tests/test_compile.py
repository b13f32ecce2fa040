"""Compiled training loops: the step is an operator in the graph, and moving numbers compiles
nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import DEVICES, make_params, set_grads
from policy.samples import random_policy
from torch._dynamo import config
from torch._dynamo.testing import CompileCounterWithBackend

from lhopt_fused import CIAO, LHOPT, AdamW
from lhopt_fused.types import NonFiniteGradientError

STEPS = 12
WAYS: dict[str, dict[str, bool]] = {
    "backward between graphs": {},
    "compiled autograd": {"compiled_autograd": True},
    "one graph": {"trace_autograd_ops": True},
}
"""Settings of dynamo under which a whole loop is compiled, as far as this torch has them."""

TrainStep = Callable[[torch.Tensor], None]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():  # of dynamo's own, on torch's optimizers too
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def loop(
    compiles: Callable[[TrainStep], TrainStep], device: str
) -> tuple[list[torch.Tensor], LHOPT]:
    """Train with ``compiles(train_step)``; the parameters reached, and the optimizer."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).to(device)
    policy = random_policy(0, registers=False)
    optimizer = LHOPT(model.parameters(), STEPS, policy=policy, outer_steps=6)

    def train_step(x: torch.Tensor) -> None:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.observe(train_loss=loss)
        optimizer.step()
        optimizer.zero_grad()

    step = compiles(train_step)
    for number in range(STEPS):
        step(torch.randn(4, 5, generator=torch.Generator().manual_seed(number)).to(device))
    return [p.detach().clone() for p in model.parameters()], optimizer


def called(counter: CompileCounterWithBackend) -> list[list[str]]:
    """What the graphs call of ours."""
    names = [[str(node.target) for node in graph.graph.nodes] for graph in counter.graphs]
    return [[name for name in graph if name.startswith("lhopt_fused")] for graph in names]


def equal(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "way", [way for way, needs in WAYS.items() if all(hasattr(config, name) for name in needs)]
)
def test_a_loop_is_compiled_once(way: str, device: str) -> None:
    counter = CompileCounterWithBackend("eager")
    counts = []

    def compiles(function: TrainStep) -> TrainStep:
        compiled = torch.compile(function, backend=counter, fullgraph=way == "one graph")

        def counted(x: torch.Tensor) -> None:
            compiled(x)
            counts.append(counter.frame_count)

        return counted

    with config.patch(WAYS[way]):
        params, optimizer = loop(compiles, device)
    expected, plain = loop(lambda function: function, device)
    rates = [decided.hyperparameters["lr"] for decided in optimizer.history]
    assert len(set(rates)) == len(rates) == 6
    assert ["lhopt_fused.observe", "lhopt_fused.step"] in called(counter), "no break between them"
    assert counts == [1 if way == "one graph" else counts[0]] * STEPS, "compiled once"
    assert equal(params, expected)
    assert repr(optimizer.history) == repr(plain.history)


def stepping(optimizer: torch.optim.Optimizer, backend: str = "eager") -> tuple[Any, Any]:
    """The compiled step, in one graph, and what has been compiled."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(lambda: optimizer.step(), backend=counter, fullgraph=True), counter


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("build", [AdamW, torch.optim.AdamW])
def test_numbers_may_move(build: Any, device: str) -> None:
    """By hand and by a scheduler; torch's own optimizer shows what is counted when they are in the
    graph."""
    params, plain = make_params(device=device), make_params(device=device)
    optimizer, uncompiled = build(params, lr=0.01), build(plain, lr=0.01)
    both = optimizer, uncompiled
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in both]
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(lambda: optimizer.step(), backend=counter, fullgraph=build is AdamW)
    first = 0
    for number in range(6):
        set_grads(params, 0)
        set_grads(plain, 0)
        step()
        uncompiled.step()
        for one, scheduler in zip(both, schedulers, strict=True):
            scheduler.step()
            one.param_groups[0]["weight_decay"] = 0.1 * number
        first = first or counter.frame_count
    assert (counter.frame_count == first) == (build is AdamW)
    if build is AdamW:
        assert equal(params, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiler_that_works_on_copies(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached() -> list[torch.Tensor]:
        torch._dynamo.reset()
        params = make_params(device=device)
        step, _ = stepping(CIAO.lhopt(params, lr=0.01), "aot_eager")
        for _ in range(3):
            set_grads(params, 0)
            step()
        return [p.detach() for p in params]

    plain = make_params(device=device)
    optimizer = CIAO.lhopt(plain, lr=0.01)
    for _ in range(3):
        set_grads(plain, 0)
        optimizer.step()
    assert equal(reached(), plain)
    monkeypatch.setattr("lhopt_fused.compiled._values", lambda params, given: nullcontext())
    assert not equal(reached(), plain)


@pytest.mark.parametrize("device", DEVICES)
def test_missing_gradients_and_new_groups_compile_anew(device: str) -> None:
    params, plain = make_params(device=device), make_params(device=device)
    optimizer, uncompiled = AdamW(params[:3]), AdamW(plain[:3])
    step, counter = stepping(optimizer)
    for number in range(5):  # the second parameter has no gradient in the fourth step
        set_grads(params, number)
        set_grads(plain, number)
        if number == 2:
            optimizer.add_param_group({"params": params[3:], "lr": 0.1})
            uncompiled.add_param_group({"params": plain[3:], "lr": 0.1})
        step()
        uncompiled.step()
    assert counter.frame_count == 3
    assert equal(params, plain)


def test_groups_changed_by_hand_are_noticed() -> None:
    params, other = make_params(), make_params(seed=1)
    optimizer = AdamW(params)
    step, _ = stepping(optimizer, "aot_eager")
    set_grads(params, 0)
    step()
    set_grads(other, 1)
    optimizer.param_groups[0]["params"] = other
    before = [p.detach().clone() for p in other]
    with pytest.raises(RuntimeError, match="param_groups were changed by hand"):
        step()
    assert equal(other, before)
    step()
    assert not equal(other, before)


def test_a_closure_breaks_the_graph_and_works() -> None:
    (param,) = make_params(shapes=[(3,)])
    optimizer = AdamW([param], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    compiled = torch.compile(lambda: optimizer.step(closure), backend="eager")
    losses = [compiled() for _ in range(3)]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 3


def test_an_error_in_a_compiled_step_is_the_steps() -> None:
    params = make_params()
    optimizer = AdamW(params, nonfinite="raise")
    step, _ = stepping(optimizer, "aot_eager")
    set_grads(params, 0)
    params[0].grad[0, 0] = torch.nan
    before = [p.detach().clone() for p in params]
    with pytest.raises(NonFiniteGradientError, match="a gradient holds NaN"):
        step()
    assert equal(params, before)
