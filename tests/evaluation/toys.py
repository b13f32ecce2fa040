"""A tiny task without files, and a full disk, for tests of all that is around tasks."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from lhopt_fused.evaluation.task import Batch, Size
from lhopt_fused.evaluation.tasks.supervised import Classification


class Toy(Classification):
    """Two clusters; a small network with batch norm."""

    name = "toy"

    def __init__(self, size: Size = "small", data_dir: Path | None = None, steps: int = 12) -> None:
        super().__init__(
            _clusters(64, 0),
            {"policy_eval": _clusters(40, 1), "report": _clusters(300, 2)},
            steps=steps,
            batch_size=8,
        )

    def make_model(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                hidden=nn.Linear(4, 8),
                norm=nn.BatchNorm1d(8),
                relu=nn.ReLU(),
                head=nn.Linear(8, 2),
            )
        )


def _clusters(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(2, (count,), generator=generator)
    inputs = torch.randn(count, 4, generator=generator) + classes[:, None]
    return inputs, classes


def fill_disk(patch: pytest.MonkeyPatch) -> None:
    """No SQLite file grows any more: its pages are all that the disk has room for."""
    connect = sqlite3.connect

    def full(*arguments: object, **named: object) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **named)  # type: ignore[call-overload]
        connection.execute("PRAGMA max_page_count = 1")
        return connection

    patch.setattr(sqlite3, "connect", full)
