"""The training script in examples/, at toy size: to the end, in two goes, on two ranks."""

from __future__ import annotations

import math
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

NANOGPT = Path(__file__).parent.parent / "examples" / "nanogpt.py"
TOY = ["--steps", "12", "--width", "16", "--layers", "1", "--context", "16", "--batch", "2"]


@pytest.fixture
def nanogpt(capsys: pytest.CaptureFixture[str]) -> Callable[..., float]:
    """Runs the script; the eval loss that it prints."""
    main: Any = runpy.run_path(str(NANOGPT))["main"]

    def run(*arguments: str) -> float:
        main([*TOY, *arguments])
        return eval_loss(capsys.readouterr().out)

    return run


def eval_loss(printed: str) -> float:
    found = re.search(r"eval loss (\S+) nats per byte", printed)
    assert found is not None, printed
    return float(found[1])


def test_nanogpt_goes_on_to_the_bit(nanogpt: Callable[..., float], tmp_path: Path) -> None:
    whole = nanogpt("--out", str(tmp_path / "whole"))
    assert 0 < whole < math.log(256)  # better than knowing nothing
    resumed = ["--out", str(tmp_path / "resumed"), "--save-every", "5"]
    half = nanogpt(*resumed, "--stop-after", "7")
    assert half != whole
    assert nanogpt(*resumed) == whole
    weights = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["model"]
        for name in ("whole", "resumed")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nanogpt_on_two_ranks(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(NANOGPT), *TOY, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert 0 < eval_loss(done.stdout) < math.log(256)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 12
