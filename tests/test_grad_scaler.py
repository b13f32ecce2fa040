"""Under torch's GradScaler: unscaled once, clipped after that, and skipped where it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tolerances import TRAJECTORY, assert_close

from lhopt_fused import CIAO, LHOPT, AdamW

STEPS = 6
SCALE = 2.0**10  # a power of two, so that scaling rounds nothing
BUILT: dict[str, Any] = {
    "adamw": lambda params: AdamW(params, lr=0.01),
    "masked": lambda params: AdamW(params, lr=0.01, nonfinite="mask"),
    "ciao": lambda params: CIAO.lhopt(params, lr=0.01),
    "lhopt": lambda params: LHOPT(params, STEPS, outer_steps=2),
}


def model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(8, 4)


def losses(trained: torch.nn.Module, step: int) -> torch.Tensor:
    inputs = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    return trained(inputs).square().mean()


def finished(name: str, scale: float | None, factor: float = 1.0) -> list[torch.Tensor]:
    """Parameters after a run, under a scaler or without one."""
    trained = model()
    optimizer = BUILT[name](trained.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = losses(trained, step)
        scaler.scale(factor * loss).backward()
        if name == "lhopt":
            optimizer.observe(train_loss=loss)
        if step % 2:  # either way
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return [p.detach().clone() for p in trained.parameters()]


@pytest.mark.parametrize("name", BUILT)
def test_a_scaled_run_is_the_run_without(name: str) -> None:
    expected = finished(name, None)
    check(finished(name, SCALE), expected)
    halved = finished(name, None, 0.5)  # a factor that nobody takes out
    with pytest.raises(AssertionError):
        check(halved, expected)


def check(reached: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for param, value in zip(reached, expected, strict=True):
        assert_close(param, value, TRAJECTORY[torch.float32], value.abs().max())


@pytest.mark.parametrize("name", BUILT)
def test_an_overflow_is_skipped_and_scaled_down(name: str) -> None:
    trained = model()
    optimizer = BUILT[name](trained.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    before = [p.detach().clone() for p in trained.parameters()]
    scaler.scale(losses(trained, 0)).backward()
    next(trained.parameters()).grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert all(torch.equal(p, kept) for p, kept in zip(trained.parameters(), before, strict=True))
    assert optimizer.skipped_steps == 0  # the scaler's, not ours
