"""When pieces and whole tensors have reached the same."""

from __future__ import annotations

from typing import Any

import torch
from distributed.runs import uses_exact_trust
from tolerances import SHARDED, assert_close


def assert_same(outcome: dict[str, Any], backend: str, options: str) -> None:
    """What :func:`distributed.runs.trajectory` has found agrees to the rounding of sums."""
    # what exact trust ratios do without is not remembered by Triton's kernels
    remembers_norms = backend != "triton" or not uses_exact_trust(options)
    tolerance = SHARDED[backend]
    for name in ("params", "moments"):
        for value, expected in zip(*outcome[name], strict=True):
            scale = expected.abs().max() if expected.numel() else 0.0
            assert_close(value, expected, tolerance, scale)
    statistics, expected = outcome["statistics"]
    for name in expected:
        scale = expected[name].abs().nan_to_num().max()
        assert_close(statistics[name], expected[name], tolerance, scale)
    for name in ("norms", "features") if remembers_norms else ("features",):
        value, expected = outcome[name]
        if isinstance(expected, dict):
            value, expected = ([x[k] for k in sorted(x)] for x in (value, expected))
        expected = torch.tensor(expected, dtype=torch.float64)
        scale = expected.abs().nan_to_num().clamp_min(1.0)
        assert_close(torch.tensor(value, dtype=torch.float64), expected, tolerance, scale)
