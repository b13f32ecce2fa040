"""LHOPT under the real Accelerate: wrapped, stepped, saved, resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.samples import random_policy

from lhopt_fused import LHOPT
from lhopt_fused.integrations import find_lhopt

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the library's own are none of ours
]

STEPS = 24


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """A model, an LHOPT with a random network, and the Accelerator around them."""

    def __init__(self, accumulation: int = 1) -> None:
        from accelerate import Accelerator

        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        optimizer = LHOPT(
            model.parameters(),
            STEPS,
            policy=random_policy(0),
            outer_steps=8,
            restart_registers=3,
            backend="reference",
        )
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    @property
    def lhopt(self) -> LHOPT:
        return find_lhopt(self.optimizer)

    def train(self, first: int, last: int) -> None:
        for batch in range(first, last):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(batch))
            with self.accelerator.accumulate(self.model):
                loss = (self.model(x).squeeze(-1) - x.sum(-1)).square().mean()
                self.accelerator.backward(loss)
                self.lhopt.observe(train_loss=loss)
                self.optimizer.step()
                self.optimizer.zero_grad()

    def parameters(self) -> list[torch.Tensor]:
        return [p.detach() for p in self.model.parameters()]


def test_the_wrapped_optimizer_observes_decides_and_acts() -> None:
    run = Run()
    start = [p.clone() for p in run.parameters()]
    assert not isinstance(run.optimizer, LHOPT)
    run.train(0, STEPS)
    assert len(run.lhopt.history) == 8
    assert run.lhopt.history[-1].train_loss > 0
    assert any(step.shifts["lr"] != 0 for step in run.lhopt.history)
    assert run.optimizer.param_groups[0]["lr"] == run.lhopt.history[-1].hyperparameters["lr"]
    assert not any(torch.equal(p, q) for p, q in zip(start, run.parameters(), strict=True))


def test_accumulated_batches_are_one_inner_step() -> None:
    run = Run(accumulation=2)
    run.train(0, STEPS)
    assert [step.inner_step for step in run.lhopt.history] == [3, 6, 9, 12]


@pytest.mark.parametrize("saved_at", [0, 5, 12])
def test_save_state_and_load_state_go_on_bit_identically(tmp_path: Path, saved_at: int) -> None:
    whole = Run()
    whole.train(0, saved_at)
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.train(saved_at, STEPS)
    resumed: Any = Run()
    resumed.accelerator.load_state(str(tmp_path / "state"))
    resumed.train(saved_at, STEPS)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert repr(whole.lhopt.history) == repr(resumed.lhopt.history)


def test_another_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected an lhopt_fused\.LHOPT"):
        find_lhopt(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
