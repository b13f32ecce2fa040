"""On how many ranks the tests run: processes on the CPU, and as many as there are GPUs."""

from __future__ import annotations

from typing import Any, Final

import pytest
import torch

GPUS: Final = min(2, torch.cuda.device_count())
"""Ranks with a GPU each: on a single one, what one rank does with NCCL is seen."""


def worlds(*sizes: int, fewest_gpus: int = 1) -> list[Any]:
    """Device and number of ranks: so many on the CPU each, and those with GPUs."""
    on_gpus = [on("cuda", GPUS)] if fewest_gpus <= GPUS else []
    return [*(on("cpu", size) for size in sizes), *on_gpus]


def on(device: str, *values: Any) -> Any:
    """Parameters of a test on a device, marked if it is a GPU."""
    return pytest.param(device, *values, marks=[pytest.mark.gpu] if device == "cuda" else [])
