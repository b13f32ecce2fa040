"""LHOPT in torchtitan's containers: parts of a model, checkpoints, schedulers that let it be."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.samples import random_policy

from lhopt_fused import LHOPT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the library's own are none of ours
]

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "torchtitan_lhopt.py"
STEPS = 12


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


class Run:
    """A model in two parts, as under pipeline parallelism, and its containers."""

    def __init__(self, example: dict[str, Any], name: str = "LHOPT") -> None:
        from torchtitan.components.optimizer import ParamGroupConfig

        torch.manual_seed(0)
        self.parts = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)]
        policy = random_policy(0, registers=False)
        config = example["LHOPTContainer"].Config(
            param_groups=[
                ParamGroupConfig(
                    pattern=r"bias$", optimizer_name=name, optimizer_kwargs={"weight_decay": 0.0}
                ),
                ParamGroupConfig(pattern=r".*", optimizer_name=name),
            ],
            optimizer_factory_kwargs_by_name={
                "LHOPT": {"total_steps": STEPS, "outer_steps": 4, "policy": policy}
            },
        )
        self.optimizers = config.build(model_parts=self.parts)
        schedulers = example["PolicySchedulers"].Config()
        self.schedulers = schedulers.build(optimizers=self.optimizers, training_steps=STEPS)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            self.optimizers.zero_grad()
            loss = (self.parts[1](self.parts[0](x).tanh()).squeeze(-1) - x.sum(-1)).square().mean()
            loss.backward()
            self.optimizers.observe(loss)
            self.optimizers.step()
            self.schedulers.step()

    def params(self) -> list[torch.Tensor]:
        return [p.detach() for part in self.parts for p in part.parameters()]


def test_the_policy_moves_every_part(example: dict[str, Any]) -> None:
    run = Run(example)
    run.train(0, STEPS)
    assert [type(optimizer) for optimizer in run.optimizers] == [LHOPT, LHOPT]
    for optimizer in run.optimizers:
        assert len(optimizer.history) == 4
        assert optimizer.history[0].train_loss > 0
        decided = optimizer.history[-1].hyperparameters["lr"]
        assert [group["lr"] for group in optimizer.param_groups] == [decided, decided]
        assert optimizer.param_groups[0]["weight_decay"] == 0.0


@pytest.mark.parametrize("saved_at", [3, 5])
def test_a_checkpoint_goes_on_bit_identically(example: dict[str, Any], saved_at: int) -> None:
    whole, resumed = Run(example), Run(example)
    whole.train(0, saved_at)
    saved = whole.optimizers.state_dict(), whole.schedulers.state_dict()
    weights = [part.state_dict() for part in whole.parts]
    for part, state in zip(resumed.parts, weights, strict=True):
        part.load_state_dict(state)
    resumed.optimizers.load_state_dict(saved[0])
    resumed.schedulers.load_state_dict(saved[1])
    for run in (whole, resumed):
        run.train(saved_at, STEPS)
    pairs = list(zip(whole.params(), resumed.params(), strict=True))
    assert all(torch.equal(p, q) for p, q in pairs)
    for one, other in zip(whole.optimizers, resumed.optimizers, strict=True):
        assert repr(one.history) == repr(other.history)


def test_other_optimizers_are_refused(example: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="LHOPTContainer is for LHOPT"):
        Run(example, "AdamW")
