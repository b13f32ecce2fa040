"""Every backend against the recorded trajectories of the published inner optimizer."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from cases import Golden, load_golden, run_golden
from tolerances import GOLDEN_FEATURES, GOLDEN_PARAMETERS, assert_close

from lhopt_fused import CIAO

SCENARIOS = load_golden()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("cpu", torch.float32),
    *([("triton", torch.float32)] if INTERPRETED else []),  # ./dev interpret
    *(
        [pytest.param("triton", torch.float32, marks=pytest.mark.gpu)]
        if torch.cuda.is_available() and not INTERPRETED
        else []
    ),
]


def check(golden: Golden, backend: str, dtype: torch.dtype, **wrong: Any) -> None:
    def build(params: list[torch.nn.Parameter], keywords: dict[str, Any]) -> CIAO:
        return CIAO(params, **{**keywords, **wrong}, backend=backend)  # type: ignore[arg-type]

    device = "cuda" if backend == "triton" and not INTERPRETED else "cpu"
    reached, features = run_golden(golden, build, dtype, device)
    scale = max(abs(p).max() for p in golden.start)
    for step, expected in zip(reached, golden.params, strict=True):
        for param, value in zip(step, expected, strict=True):
            assert_close(param, torch.from_numpy(value), GOLDEN_PARAMETERS[dtype], scale)
    for measured, recorded in zip(features, golden.features, strict=True):
        assert list(measured) == golden.feature_names
        for name, value in zip(golden.feature_names, recorded, strict=True):
            expected_value = math.nan if value is None else value
            assert_close(
                torch.tensor(measured[name]),
                torch.tensor(expected_value),
                GOLDEN_FEATURES[dtype],
                max(1.0, abs(value or 0.0)),
            )


@pytest.mark.parametrize("golden", SCENARIOS, ids=lambda golden: golden.name)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_reproduces_the_published_optimizer(
    golden: Golden, backend: str, dtype: torch.dtype
) -> None:
    check(golden, backend, dtype)


@pytest.mark.parametrize("golden", SCENARIOS, ids=lambda golden: golden.name)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_wrong_optimizer_does_not(golden: Golden, backend: str, dtype: torch.dtype) -> None:
    slightly_more = golden.hyperparameters["weight_decay"] * 1.05
    with pytest.raises(AssertionError, match="off by"):
        check(golden, backend, dtype, weight_decay=slightly_more)
