"""The toy task among the others, for as long as a test takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from evaluation.toys import Toy
from policy.conftest import one_thread

from lhopt_fused.evaluation.campaign import _digest
from lhopt_fused.evaluation.tasks import TASKS, load_task

__all__ = ["one_thread", "toy"]


@pytest.fixture
def toy() -> Iterator[Toy]:
    """Registered as ``toy``."""
    load_task.cache_clear()
    _digest.cache_clear()
    TASKS["toy"] = Toy
    yield Toy()
    del TASKS["toy"]
    load_task.cache_clear()
