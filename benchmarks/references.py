"""Float64 definitions that variants are verified against, each as its paper or manual has it.

They call nothing of what they verify: AdamW is torch's for-loop, CIAO the reference backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lhopt_fused
from benchmarks.registry import Build, Run, Settings

__all__ = [
    "BETAS",
    "EPSILON",
    "WEIGHT_DECAY",
    "adamw",
    "clamped_adamw",
    "lamb",
    "lhopt",
    "measured_adamw",
]

BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01

Params = list[torch.nn.Parameter]
Denominator = Callable[[torch.Tensor], torch.Tensor]


def adamw(params: Params, settings: Settings, *, clips: bool = False) -> Run:
    """torch's AdamW, one tensor after the other, clipped by the norm of all gradients or not."""
    optimizer = torch.optim.AdamW(
        params, settings.lr, BETAS, EPSILON, WEIGHT_DECAY, foreach=False, fused=False
    )

    def step() -> None:
        if clips:
            torch.nn.utils.clip_grad_norm_(params, settings.max_norm, foreach=False)
        optimizer.step()

    return Run(step, optimizer)


class _Moments:
    """First and second moments of every parameter, and what a step makes of them."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.first = [torch.zeros_like(p) for p in params]
        self.second = [torch.zeros_like(p) for p in params]
        self.steps = 0

    @torch.no_grad()
    def step(self, update: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]) -> None:
        self.steps += 1
        for p, m, v in zip(self.params, self.first, self.second, strict=True):
            assert p.grad is not None
            m.mul_(BETAS[0]).add_(p.grad, alpha=1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
            update(p, m, v, self.steps)


def clamped_adamw(params: Params, settings: Settings) -> Run:
    """AdamW with max(sqrt(v_hat), epsilon) for sqrt(v_hat) + epsilon, as HeavyBall has it."""
    moments = _Moments(params)

    def update(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, steps: int) -> None:
        m_hat, v_hat = m / (1 - BETAS[0] ** steps), v / (1 - BETAS[1] ** steps)
        p.mul_(1 - settings.lr * WEIGHT_DECAY)
        p.sub_(settings.lr * m_hat / v_hat.sqrt().clamp_min(EPSILON))

    return Run(lambda: moments.step(update))


def lamb(params: Params, settings: Settings) -> Run:
    """LAMB as pytorch-optimizer has it: only the first moment's bias is corrected, outside the
    trust ratio; norms of parameters count up to 10; decay is decoupled.
    """
    moments = _Moments(params)

    def update(p: torch.Tensor, m: torch.Tensor, v: torch.Tensor, steps: int) -> None:
        p.mul_(1 - settings.lr * WEIGHT_DECAY)
        u = m / (v.sqrt() + EPSILON)
        trust = p.norm().clamp_max(10) / (u.norm() + EPSILON)
        p.sub_(settings.lr / (1 - BETAS[0] ** steps) * trust * u)

    return Run(lambda: moments.step(update))


def lhopt(**keywords: Any) -> Build:
    """LHOPT's start by the reference backend."""

    def build(params: Params, settings: Settings) -> Run:
        optimizer = lhopt_fused.CIAO.lhopt(
            params, **{"lr": settings.lr, **keywords, "backend": "reference"}
        )
        return Run(optimizer.step, optimizer)

    return build


def measured_adamw(params: Params, settings: Settings) -> Run:
    """AdamW by the reference backend, for its features."""
    optimizer = lhopt_fused.AdamW(
        params, settings.lr, BETAS, EPSILON, WEIGHT_DECAY, backend="reference"
    )
    return Run(optimizer.step, optimizer)
