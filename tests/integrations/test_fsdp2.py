"""LHOPT where libraries shard models with FSDP2: on two ranks, and gone on from checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.launch import run_ranks
from integrations.fsdp2 import accelerated, lightning
from tolerances import SHARDED_RUN, assert_close

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the libraries' own are none of ours
]


def check(found: list[dict[str, Any]]) -> None:
    """Ranks have come to the same, sharded, before and after a checkpoint."""
    first = found[0]
    assert first["whole"]["sharded"]
    for rank in found:
        assert rank["whole"]["bits"] == first["whole"]["bits"]
        assert rank["whole"]["history"] == first["whole"]["history"]
        assert rank["resumed"]["bits"] == first["whole"]["bits"]
        assert rank["resumed"]["history"] == first["whole"]["history"]


def follows(found: dict[str, Any]) -> bool:
    """Whether the parameters are those of the run on one rank, to the rounding of sums."""
    try:
        for mine, single in zip(found["whole"]["params"], found["alone"]["params"], strict=True):
            assert_close(mine, single, SHARDED_RUN, single.abs().max())
    except AssertionError:
        return False
    return True


def test_accelerate(tmp_path: Path) -> None:
    found = run_ranks(accelerated, 2, str(tmp_path))
    check(found)
    assert follows(found[0])
    found[0]["alone"]["params"][0][0, 0] += 1e-3
    assert not follows(found[0])


def test_lightning(tmp_path: Path) -> None:
    found = run_ranks(lightning, 2, str(tmp_path))
    check(found)
    # Lightning shows the last loss of an outer step after its decision, so that decisions differ
    assert all(torch.isfinite(p).all() for p in found[0]["whole"]["params"])
    assert found[0]["whole"]["history"] != found[0]["alone"]["history"]
