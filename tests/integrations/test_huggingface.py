"""LHOPT in the real Trainer: losses are seen, the policy acts, a checkpoint goes on to the bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lhopt_fused import LHOPT
from lhopt_fused.history import read_csv

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the library's own are none of ours
]

STEPS = 24


class Line(torch.nn.Module):
    """A linear model that returns its loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        predicted = self.linear(x).squeeze(-1)
        return {"loss": (predicted - labels).square().mean(), "logits": predicted}


def data(size: int) -> list[dict[str, torch.Tensor]]:
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": row, "labels": row.sum() + 3} for row in x]


def trainer(folder: Path, *, schedule: str = "policy", **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    from lhopt_fused.integrations.huggingface import LHOPTCallback, PolicyLR

    policy = options.pop("policy", "cosine")
    total_steps = options.pop("total_steps", STEPS)
    arguments = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "max_grad_norm": 0.0,
    }
    model = Line()
    optimizer = LHOPT(
        model.parameters(), total_steps, policy=policy, outer_steps=4, lr=0.05, lamb_power=None
    )
    return Trainer(
        model,
        TrainingArguments(**(arguments | options)),
        train_dataset=data(64),
        eval_dataset=data(16),
        optimizers=(optimizer, PolicyLR(optimizer) if schedule == "policy" else None),
        callbacks=[LHOPTCallback()],
    )


def lhopt_of(hf_trainer: Any) -> LHOPT:
    from lhopt_fused.integrations import find_lhopt

    return find_lhopt(hf_trainer.optimizer)


def test_the_policy_sees_the_losses_and_moves_the_learning_rate(tmp_path: Path) -> None:
    training = trainer(tmp_path, eval_strategy="steps", eval_steps=6)
    training.train()
    optimizer = lhopt_of(training)
    history = optimizer.history
    assert len(history) == 4
    assert history[-1].train_loss < history[0].train_loss
    assert [step.eval_loss is None for step in history] == [True, False, False, False]
    expected = [0.05 * (1 + math.cos(math.pi * step.progress)) / 2 for step in history[:-1]]
    moved = [step.hyperparameters["lr"] for step in history[:-1]]
    assert moved == pytest.approx(expected)
    logged = [entry for entry in training.state.log_history if "lhopt/progress" in entry]
    assert [entry["step"] for entry in logged] == [6, 12, 18, 24]
    assert [entry["lhopt/hyperparameters/lr"] for entry in logged[:-1]] == moved
    assert repr(read_csv(tmp_path / "lhopt_history.csv")) == repr(history)


@pytest.mark.parametrize("logging_steps", [1, 2, 500])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_do_not_depend_on_how_often_is_logged(
    tmp_path: Path, logging_steps: int, accumulation: int
) -> None:
    training = trainer(
        tmp_path,
        policy="fixed",
        logging_steps=logging_steps,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=64 // accumulation,
    )
    training.train()
    again = Line()  # the whole data in every step, so the loss follows from the parameters alone
    optimizer = LHOPT(again.parameters(), STEPS, policy="fixed", lr=0.05, lamb_power=None)
    batch = {name: torch.stack([row[name] for row in data(64)]) for name in ("x", "labels")}
    losses = []
    for _ in range(STEPS):
        loss = again(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    seen = [step.train_loss for step in lhopt_of(training).history]
    # up to the last but one step of each outer step
    expected = [sum(losses[:5]) / 5, *(sum(losses[i - 1 : i + 5]) / 6 for i in (6, 12, 18))]
    assert seen == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_goes_on_bit_identically(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=10)
    whole.train()
    resumed = trainer(tmp_path / "resumed", save_strategy="steps", save_steps=10)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert repr(lhopt_of(whole).history) == repr(lhopt_of(resumed).history)


@pytest.mark.parametrize("kind", ["linear", "constant"])
def test_the_trainers_own_schedule_is_refused(tmp_path: Path, kind: str) -> None:
    training = trainer(tmp_path, schedule="none", lr_scheduler_type=kind)
    with pytest.raises(ValueError, match=r"cannot both move the learning rate: pass .*PolicyLR"):
        training.train()
    assert lhopt_of(training).history == []


def test_it_is_fine_beside_a_policy_that_leaves_lr_alone(tmp_path: Path) -> None:
    training = trainer(tmp_path, schedule="none", policy="fixed")
    training.train()
    assert lhopt_of(training).param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-8)


def test_another_length_or_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"total_steps=30, but the Trainer will do 24"):
        trainer(tmp_path, total_steps=30).train()
    training = trainer(tmp_path)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.1)
    training.lr_scheduler = None
    with pytest.raises(TypeError, match=r"expected an lhopt_fused\.LHOPT"):
        training.train()
