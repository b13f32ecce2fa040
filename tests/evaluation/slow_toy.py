"""The command line with the toy task in it, which takes a moment, for tests that stop it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from evaluation.toys import Toy

from lhopt_fused.cli import app
from lhopt_fused.evaluation.tasks import TASKS


class SlowToy(Toy):
    """The same data, so the same runs."""

    def make_model(self) -> nn.Module:
        time.sleep(0.1)
        return super().make_model()


TASKS["toy"] = SlowToy

if __name__ == "__main__":
    app()
