"""Inner runs that tests share: models of odd shapes, gradients with zeros and spikes, options."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton's kernels run on CPU tensors in its interpreter (./dev interpret)."""

GOLDEN = Path(__file__).parent / "golden"

DEVICES: list[Any] = ["cpu"]
"""Of tests that run on the CPU and where there is a GPU."""
if torch.cuda.is_available():
    DEVICES.append(pytest.param("cuda", marks=pytest.mark.gpu))

SHAPES: tuple[tuple[int, ...], ...] = ((8, 5), (5,), (3, 4, 3, 3), (1,), (), (0, 3), (33, 129))
"""Matrices, vectors, a kernel, a scalar, an empty one; none a multiple of a vector register."""

START = {
    "lr": 1e-3,
    "ombeta1": 0.1,
    "ombeta2": 1e-2,
    "epsilon": 1e-6,
    "weight_decay": 1e-2,
    "group_clip_grad_norm": 0.8,
    "grad_clip_ombeta": 1e-2,
    "lamb_update_norm_ombeta": 0.05,
    "group_clip_grad_z_score": 1.0,
    "lamb_power": 1.0,
    "lamb_min_trust": 1e-3,
    "lamb_max_trust": 10.0,
}
"""A number for each of SCALARS: where LHOPT starts, and some for what it leaves out."""

CIAO_OPTIONS: dict[str, dict[str, Any]] = {
    "lhopt": {
        "epsilon": 1e-6,
        "ombeta2": 1e-2,
        "denominator_norm": "inf",
        "adam_update_include_weight_decay": True,
        "group_clip_grad_norm": 0.8,
        "scale_grad_norm_by_rolling_max": True,
        "grad_clip_ombeta": 1e-2,
        "lamb_power": 1,
        "lamb_min_trust": 1e-3,
        "lamb_ignore_vectors": True,
        "lamb_update_norm_ombeta": 0.05,
    },
    "lhopt_delayed": {
        "denominator_norm": "inf",
        "adam_update_include_weight_decay": True,
        "group_clip_grad_norm": 0.8,
        "scale_grad_norm_by_rolling_max": True,
        "lamb_power": 1,
        "lamb_min_trust": 1e-3,
        "lamb_ignore_vectors": True,
        "lamb_update_norm_ombeta": 0.05,
        "trust": "delayed",
    },
    "adamw": {},
    "adamw_warmup": {"approximate_radam_warmup": True},
    "norm_clip_lamb": {"group_clip_grad_norm": 1.0, "lamb_power": 0.5, "lamb_max_trust": 10.0},
    "z_clip_decay_in_update": {
        "group_clip_grad_z_score": 1.0,
        "grad_clip_ombeta": 0.1,
        "adam_update_include_weight_decay": True,
    },
    "max_decoupled_delayed": {"denominator_norm": "inf", "lamb_power": 1.0, "trust": "delayed"},
}
"""One of each choice, in combinations that are used."""


def with_triton(*values: Any) -> list[Any]:
    """``values``, each with ``"triton"`` first, as test parameters: none where it cannot run."""
    if INTERPRETED:
        return [("triton", *values) if values else "triton"]
    parameters = ("triton", *values)
    return [pytest.param(*parameters, marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


def device_of(backend: str) -> str:
    """Where the tensors of a backend under test are."""
    return "cuda" if backend == "triton" and not INTERPRETED else "cpu"


def make_params(
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    seed: int = 0,
    device: str = "cpu",
) -> list[torch.nn.Parameter]:
    """Parameters of standard deviation 1/2, the same for every dtype up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(
            torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.5).to(device, dtype)
        )
        for shape in shapes
    ]


def set_grads(params: Sequence[torch.Tensor], step: int, *, scale: float = 1.0) -> None:
    """Reproducible gradients with zeros; a spike every seventh step, one missing every fifth."""
    for index, param in enumerate(params):
        generator = torch.Generator().manual_seed(1_000_003 * step + index)
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        keep = torch.rand(param.shape, generator=generator) > 0.1
        grad = grad * keep * scale * (30.0 if step % 7 == 6 else 1.0)
        missing = step % 5 == 3 and index == 1
        param.grad = None if missing else grad.to(param.device, param.dtype)


def trajectory(
    optimizer: torch.optim.Optimizer, params: Sequence[torch.Tensor], steps: int, first: int = 0
) -> Iterator[list[torch.Tensor]]:
    """Step through :func:`set_grads`; yields copies of the parameters after each step."""
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()
        yield [p.detach().clone() for p in params]


@dataclass(frozen=True)
class Golden:
    """One recorded scenario of the published optimizer (tests/golden/README.md)."""

    name: str
    hyperparameters: dict[str, Any]
    steps: int
    outer: int
    changes: dict[str, dict[str, float]]
    feature_names: list[str]
    features: list[list[float | None]]
    start: list[np.ndarray[Any, Any]]
    grads: list[list[np.ndarray[Any, Any]]]
    params: list[list[np.ndarray[Any, Any]]]


def load_golden() -> list[Golden]:
    """All recorded scenarios."""
    records = json.loads((GOLDEN / "ciao_trajectories.json").read_text())
    with np.load(GOLDEN / "ciao_trajectories.npz", allow_pickle=False) as arrays:

        def tensors(name: str, kind: str, record: dict[str, Any]) -> list[Any]:
            return [
                [arrays[f"{name}/{kind}/{step}/{i}"] for i in range(len(record["shapes"]))]
                for step in range(record["steps"])
            ]

        return [
            Golden(
                name=name,
                start=[arrays[f"{name}/p0/{i}"] for i in range(len(record["shapes"]))],
                grads=tensors(name, "grad", record),
                params=tensors(name, "p", record),
                **{k: v for k, v in record.items() if k != "shapes"},
            )
            for name, record in records.items()
        ]


def run_golden(
    golden: Golden,
    build: Callable[[list[torch.nn.Parameter], dict[str, Any]], Any],
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[list[list[torch.Tensor]], list[dict[str, float]]]:
    """Replay a scenario; the parameters after each step and the features of each outer step."""
    params = [torch.nn.Parameter(torch.tensor(p, dtype=dtype, device=device)) for p in golden.start]
    optimizer = build(params, golden.hyperparameters)
    reached, features = [], []
    for step, grads in enumerate(golden.grads):
        optimizer.param_groups[0].update(golden.changes.get(str(step), {}))
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, dtype=dtype, device=device)
        optimizer.step()
        reached.append([p.detach().clone() for p in params])
        if (step + 1) % golden.outer == 0:
            features.append(optimizer.pop_inner_features())
    return reached, features
