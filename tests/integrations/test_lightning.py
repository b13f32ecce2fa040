"""LHOPT in the real Lightning Trainer: losses are seen, the policy acts, checkpoints go on."""

from __future__ import annotations

import csv
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from policy.samples import random_policy
from torch.utils.data import DataLoader, TensorDataset

from lhopt_fused import LHOPT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the library's own are none of ours
]

STEPS = 24


def line(scheduler: bool = False, total_steps: int | None = None, **keywords: Any) -> Any:
    """A linear module whose train losses are kept in ``seen``."""
    from lightning.pytorch import LightningModule

    class Line(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = torch.nn.Linear(4, 1)
            self.seen: list[float] = []

        def loss(self, batch: list[torch.Tensor]) -> torch.Tensor:
            (x,) = batch
            return (self.linear(x).squeeze(-1) - x.sum(-1) - 3).square().mean()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.seen.append(loss.item())
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            steps = total_steps or int(self.trainer.estimated_stepping_batches)
            optimizer = LHOPT(self.parameters(), steps, **({"outer_steps": 4} | keywords))
            if not scheduler:
                return optimizer
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    return Line()


def batches(count: int) -> Any:
    x = torch.randn(8 * count, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=8)


def fit(
    folder: Path, module: Any, *, train: int = 6, checkpoint: Path | None = None, **options: Any
) -> Any:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    from lhopt_fused.integrations.lightning import LHOPTCallback

    arguments: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 1,
    }
    callbacks = [LHOPTCallback(), *options.pop("callbacks", [])]
    trainer = Trainer(
        callbacks=callbacks, logger=CSVLogger(folder, name="", version=""), **arguments | options
    )
    trainer.fit(module, batches(train), batches(2), ckpt_path=checkpoint)
    return trainer


def test_the_policy_sees_the_losses_and_moves_the_learning_rate(tmp_path: Path) -> None:
    module = line(policy="cosine", lr=0.05, lamb_power=None)
    trainer = fit(tmp_path, module)
    history = trainer.optimizers[0].history
    assert [step.inner_step for step in history] == [6, 12, 18, 24]
    # the last loss of an outer step comes after its decision; so does the evaluation
    ends = [0, 5, 11, 17, 23]
    expected = [sum(module.seen[a:b]) / (b - a) for a, b in pairwise(ends)]
    assert [step.train_loss for step in history] == pytest.approx(expected)
    assert [step.eval_loss is None for step in history] == [True, False, False, False]
    cosine = [0.05 * (1 + math.cos(math.pi * step.progress)) / 2 for step in history[:-1]]
    assert [step.hyperparameters["lr"] for step in history[:-1]] == pytest.approx(cosine)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["lhopt/hyperparameters/lr"]]
    assert [int(row["step"]) for row in logged] == [6, 12, 18, 24]


def test_accumulated_batches_count_alike(tmp_path: Path) -> None:
    module = line(policy="fixed")
    trainer = fit(tmp_path, module, train=12, accumulate_grad_batches=2)
    history = trainer.optimizers[0].history
    assert [step.inner_step for step in history] == [6, 12, 18, 24]
    ends = [0, 11, 23, 35, 47]
    expected = [sum(module.seen[a:b]) / (b - a) for a, b in pairwise(ends)]
    assert [step.train_loss for step in history] == pytest.approx(expected)


@pytest.mark.parametrize("saved_at", [6, 12])
def test_a_checkpoint_goes_on_bit_identically(tmp_path: Path, saved_at: int) -> None:
    """Saved at the end of an epoch, where Lightning itself goes on exactly."""
    from lightning.pytorch.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(
        tmp_path, filename="{step}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True
    )
    keywords = {
        "policy": random_policy(0),
        "sample": True,
        "outer_steps": 5,  # none of them ends with an epoch but the last
        "restart_registers": 3,
    }
    whole, resumed = line(**keywords), line(**keywords)
    one = fit(tmp_path / "whole", whole, callbacks=[keep])
    checkpoint = tmp_path / f"step={saved_at}.ckpt"
    other = fit(tmp_path / "resumed", resumed, checkpoint=checkpoint)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert len(one.optimizers[0].history) == 5
    assert repr(one.optimizers[0].history) == repr(other.optimizers[0].history)


def test_a_scheduler_beside_the_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ExponentialLR and the policy 'default' cannot both"):
        fit(tmp_path, line(scheduler=True))
    fit(tmp_path, line(scheduler=True, policy="fixed"))


def test_another_length_or_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"total_steps=30, but the Trainer will do 24"):
        fit(tmp_path, line(total_steps=30))
    module = line()
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"expected an lhopt_fused\.LHOPT"):
        fit(tmp_path, module)
