"""AdamW is torch.optim.AdamW, over 50 steps, element by element, in every dtype and backend."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_params, set_grads, trajectory
from tolerances import AUTOCAST_RUN, TRAJECTORY, assert_close

from lhopt_fused import AdamW

STEPS = 50
KEYWORDS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "strong": {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    "no_decay": {"weight_decay": 0.0},
    "maximize": {"maximize": True},
    "tensor_lr": {"lr": torch.tensor(0.003, dtype=torch.float64)},
}
CASES = [("reference", dtype) for dtype in TRAJECTORY] + [
    ("cpu", dtype) for dtype in TRAJECTORY if dtype != torch.float64
]


def torch_trajectory(dtype: torch.dtype, keywords: dict[str, Any]) -> list[list[torch.Tensor]]:
    """torch's AdamW with moments of at least float32, parameters rounded after every step."""
    rounded = make_params(dtype)
    params = [
        torch.nn.Parameter(p.detach().to(torch.promote_types(dtype, torch.float32)))
        for p in rounded
    ]
    optimizer = torch.optim.AdamW(params, **keywords)
    reached = []
    for step in range(STEPS):
        set_grads(rounded, step)
        for param, source in zip(params, rounded, strict=True):
            param.grad = None if source.grad is None else source.grad.to(param.dtype)
        optimizer.step()
        with torch.no_grad():
            for param in params:
                param.copy_(param.to(dtype))
        reached.append([p.detach().clone() for p in params])
    return reached


def check(backend: str, dtype: torch.dtype, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    params = make_params(dtype)
    optimizer = AdamW(params, **ours, backend=backend)  # type: ignore[arg-type]
    expected = torch_trajectory(dtype, theirs)
    for reached, step in zip(trajectory(optimizer, params, STEPS), expected, strict=True):
        scale = max(p.abs().max() for p in step if p.numel())
        for param, value in zip(reached, step, strict=True):
            assert_close(param, value, TRAJECTORY[dtype], scale)


@pytest.mark.parametrize("keywords", KEYWORDS.values(), ids=KEYWORDS)
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_is_torch_adamw(backend: str, dtype: torch.dtype, keywords: dict[str, Any]) -> None:
    check(backend, dtype, keywords, keywords)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_a_wrong_adamw_is_seen(backend: str, dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="off by"):
        check(backend, dtype, {"betas": (0.88, 0.999), "lr": 0.01}, {"lr": 0.01})


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
def test_learning_rate_schedulers_move_it(scheduler: str) -> None:
    def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter]) -> None:
        schedule: Any = (
            # moving betas is where we differ: bias corrections here follow the betas there were
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.01, total_steps=21, cycle_momentum=False
            )
            if scheduler == "onecycle"
            else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
        )
        for _ in trajectory(optimizer, params, 20):
            schedule.step()

    ours, theirs = make_params(), make_params()
    run(AdamW(ours), ours)
    run(torch.optim.AdamW(theirs), theirs)
    for param, expected in zip(ours, theirs, strict=True):
        assert_close(param, expected, TRAJECTORY[torch.float32], 2.0)


@pytest.mark.parametrize(
    ("begins", "goes_on"), [(torch.optim.AdamW, AdamW), (AdamW, torch.optim.AdamW)]
)
def test_a_checkpoint_of_one_is_one_of_the_other(begins: Any, goes_on: Any) -> None:
    params, others = make_params(), make_params()
    first, second = begins(params, lr=0.01), goes_on(others)
    for reached in trajectory(first, params, 10):
        for param, value in zip(others, reached, strict=True):
            param.data.copy_(value)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # which torch's shares
    both = zip(trajectory(second, others, 10, 10), trajectory(first, params, 10, 10), strict=True)
    for reached, expected in both:
        for param, value in zip(reached, expected, strict=True):
            assert_close(param, value, TRAJECTORY[torch.float32], 2.0)


def test_a_schedule_resumes_to_the_bit(tmp_path: Path) -> None:
    """Optimizer and schedule from a file, into new ones that begin elsewhere."""

    def begin(params: list[torch.nn.Parameter], lr: float) -> tuple[AdamW, Any]:
        optimizer = AdamW(params, lr=lr)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

    def go_on(params: list[torch.nn.Parameter], run: tuple[AdamW, Any], first: int) -> list[float]:
        for _ in trajectory(run[0], params, 10, first):
            run[1].step()
        return [run[1].get_last_lr()[0], run[0].param_groups[0]["lr"]]

    params = make_params()
    run = begin(params, 0.01)
    go_on(params, run, 0)
    torch.save((params, [part.state_dict() for part in run]), tmp_path / "run.pt")
    loaded, states = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = begin(loaded, 0.5)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    assert go_on(loaded, resumed, 10) == go_on(params, run, 10) == [0.0, 0.0]
    assert all(map(torch.equal, params, loaded))


def test_under_autocast_it_is_torch_adamw() -> None:
    """A model in float32 whose products are in bfloat16: gradients come in float32."""

    def run(build: Any) -> tuple[list[torch.Tensor], list[float]]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)
        )
        optimizer = build(model.parameters(), lr=0.01)
        losses = []
        for step in range(20):
            x = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x).float() - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return [p.detach() for p in model.parameters()], losses

    (ours, losses), (theirs, expected) = run(AdamW), run(torch.optim.AdamW)
    assert losses == pytest.approx(expected, rel=AUTOCAST_RUN.relative)
    for param, value in zip(ours, theirs, strict=True):
        assert_close(param, value, AUTOCAST_RUN, 1.0)
    wrong, _ = run(functools.partial(AdamW, betas=(0.89, 0.999)))
    with pytest.raises(AssertionError, match="off by"):
        assert_close(wrong[0], theirs[0], AUTOCAST_RUN, 1.0)


@pytest.mark.parametrize("name", ["amsgrad", "differentiable"])
def test_refuses_what_it_does_not_do(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=True is not supported"):
        AdamW(make_params(), **{name: True})  # type: ignore[arg-type]
