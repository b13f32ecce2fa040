"""Fresh memory is poisoned, so that a value nobody wrote shows up as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# without it, no product of matrices on a GPU is deterministic, and torch refuses all of them
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN (or the largest integer) instead of whatever lies there."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before
    torch.use_deterministic_algorithms(False)
