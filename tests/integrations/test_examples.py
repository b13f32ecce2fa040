"""The examples that need other libraries, at toy size."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the libraries' own are none of ours
]


def test_huggingface_trainer(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLES / "huggingface_trainer.py"))["main"]
    sizes = ["--steps", "32", "--width", "16", "--layers", "1", "--context", "16", "--batch", "2"]
    trainer = main([*sizes, "--out", str(tmp_path)])
    logged = trainer.state.log_history
    evaluated = [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    assert evaluated[-1] < evaluated[0] < math.log(256) + 0.1
    decided = [entry["step"] for entry in logged if "lhopt/progress" in entry]
    assert decided == [16, 32]
    assert (tmp_path / "lhopt_history.csv").exists()
