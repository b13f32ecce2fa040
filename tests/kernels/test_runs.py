"""Several training runs in one layout: each steps as it would alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import device_of, with_triton

from lhopt_fused.features import FeatureAccumulator
from lhopt_fused.kernels import get_backend
from lhopt_fused.types import (
    GROUP_STATE,
    SCALARS,
    TENSOR_STATE,
    Clip,
    Denominator,
    StepLayout,
    StepOptions,
    Trust,
    WeightDecay,
)

SHAPES = ((5, 7), (7,), (9, 3))
RUNS = 4
LHOPT = StepOptions(Denominator.MAX, WeightDecay.IN_UPDATE, Clip.ROLLING_MAX, Trust.EXACT, True)
OPTIONS = [LHOPT, StepOptions(), replace(LHOPT, trust=Trust.DELAYED), LHOPT]
BASE = dict.fromkeys(SCALARS, 0.0) | {
    "lr": 1e-2,
    "ombeta1": 0.1,
    "ombeta2": 0.01,
    "epsilon": 1e-6,
    "weight_decay": 0.01,
    "group_clip_grad_norm": 0.8,
    "grad_clip_ombeta": 0.01,
    "lamb_update_norm_ombeta": 0.05,
    "lamb_power": 1.0,
    "lamb_max_trust": float("inf"),
}


def make_layout(runs: list[int], masks: bool, device: str) -> StepLayout:
    """A layout of the given runs, each with a group and parameters of its own."""
    params = [
        torch.randn(shape, generator=torch.Generator().manual_seed(10 * run + index)).to(device)
        for run in runs
        for index, shape in enumerate(SHAPES)
    ]
    rows = [[{**BASE, "lr": 1e-2 * (run + 1)}[name] for name in SCALARS] for run in runs]

    def table(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return StepLayout(
        params=params,
        exp_avgs=[torch.zeros_like(p) for p in params],
        exp_avg_sqs=[torch.zeros_like(p) for p in params],
        grad_signs=None,
        group_of=[group for group in range(len(runs)) for _ in SHAPES],
        is_vector=[p.dim() <= 1 for p in params],
        options=[OPTIONS[run] for run in runs],
        run_of=list(range(len(runs))),
        scalars=torch.tensor(rows, dtype=torch.float64, device=device),
        group_state=table(len(runs), len(GROUP_STATE)),
        tensor_state=table(len(params), len(TENSOR_STATE)),
        skipped_steps=table(len(runs), dtype=torch.int64),
        masks_nonfinite=masks,
    )


def train(
    backend: str, runs: list[int], bad_run: int | None, masks: bool
) -> tuple[StepLayout, torch.Tensor]:
    """Six steps; in the third, a gradient of ``bad_run`` holds a NaN."""
    layout = make_layout(runs, masks, device_of(backend))
    stepper = get_backend(backend, layout)
    features = FeatureAccumulator(layout, getattr(stepper, "accumulate_features", None))
    for step in range(6):
        generators = {run: torch.Generator().manual_seed(1000 + 10 * step + run) for run in runs}
        grads = [
            torch.randn(p.shape, generator=generators[runs[group]]).to(p.device)
            for p, group in zip(layout.params, layout.group_of, strict=True)
        ]
        if step == 2 and bad_run in runs:
            grads[len(SHAPES) * runs.index(bad_run)][0, 0] = torch.nan
        stepper.step(grads, features.next_statistics())
        features.recorded()
    return layout, features.pop()


@pytest.mark.parametrize("backend", ["reference", "cpu", *with_triton()])
@pytest.mark.parametrize("bad_run", [None, 0, 2])
@pytest.mark.parametrize("masks", [False, True])
def test_each_run_is_as_it_would_be_alone(backend: str, masks: bool, bad_run: int | None) -> None:
    together, features = train(backend, list(range(RUNS)), bad_run, masks)
    for run in range(RUNS):
        alone, own_features = train(backend, [run], bad_run, masks)
        rows = slice(run * len(SHAPES), (run + 1) * len(SHAPES))
        for mine, theirs in zip(together.params[rows], alone.params, strict=True):
            assert torch.equal(mine, theirs)
        assert torch.equal(together.tensor_state[rows], alone.tensor_state)
        assert torch.equal(together.group_state[run], alone.group_state[0])
        assert together.skipped_steps[run] == alone.skipped_steps[0] == int(run == bad_run)
        assert torch.equal(features[run].isnan(), own_features[0].isnan())
        assert torch.allclose(features[run], own_features[0], rtol=1e-12, equal_nan=True)
