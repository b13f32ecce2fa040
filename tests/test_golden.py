"""Every backend against the recorded trajectories of the published inner optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import Golden, device_of, load_golden, run_golden, with_triton
from tolerances import GOLDEN_FEATURES, GOLDEN_PARAMETERS, assert_close

from lhopt_fused import CIAO

SCENARIOS = load_golden()
BACKENDS = [
    ("reference", torch.float64),
    ("reference", torch.float32),
    ("cpu", torch.float32),
    *with_triton(torch.float32),
]


def check(golden: Golden, backend: str, dtype: torch.dtype, **wrong: Any) -> None:
    def build(params: list[torch.nn.Parameter], keywords: dict[str, Any]) -> CIAO:
        return CIAO(params, **{**keywords, **wrong}, backend=backend)  # type: ignore[arg-type]

    reached, features = run_golden(golden, build, dtype, device_of(backend))
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
