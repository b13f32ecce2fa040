"""The inner step in plain torch, as the paper writes it: the definition the other backends meet.

Element-wise arithmetic is in the dtype of the moments (float32, or float64 for float64 parameters);
scalars are Python floats and every sum is taken in float64. Clarity over speed and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lhopt_fused.kernels.gradients import Grads, GradTable
from lhopt_fused.kernels.rounding import random_words, round_stochastically
from lhopt_fused.types import (
    GROUP_STATE,
    SCALARS,
    STATISTICS,
    TENSOR_STATE,
    Clip,
    Denominator,
    StepLayout,
    StepOptions,
    Trust,
    WeightDecay,
)

__all__ = ["ReferenceBackend", "clip_coefficient", "is_negative_bits", "unpack_bits"]


def _total(x: torch.Tensor) -> float:
    return float(x.double().sum())


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return _total(x.double() * y.double())


def is_negative_bits(x: torch.Tensor) -> torch.Tensor:
    """Pack ``x < 0`` into uint8 ``[ceil(numel / 8)]``: element i, in memory order, is bit i % 8."""
    flat = (_memory_order(x) < 0).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`is_negative_bits`: a bool tensor with the shape and memory order of ``like``."""
    positions = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[:, None] >> positions) & 1).flatten()[: like.numel()]
    return _in_memory_order(flat.to(torch.bool), like)


def _memory_order(x: torch.Tensor) -> torch.Tensor:
    """The elements of a dense tensor as a 1-d view in the order in which they lie in memory."""
    return x.as_strided((x.numel(),), (1,))


def _in_memory_order(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``flat [numel]`` with the shape of ``like``: element i is the i-th of ``like`` in memory."""
    shaped = torch.empty_like(like, dtype=flat.dtype)
    _memory_order(shaped).copy_(flat)
    return shaped


def clip_coefficient(
    norm: float, options: StepOptions, scalars: dict[str, float], state: dict[str, float]
) -> float:
    """The factor c <= 1 for a group's gradients of norm N; advances the group's ``state``.

    ``c = min(1, clip / (N + 1e-6))`` as :func:`torch.nn.utils.clip_grad_norm_`, where ``clip`` is
    an absolute norm, a share of the rolling maximum ``R = max(N, (1 - grad_clip_ombeta) R)``, or
    ``exp(mu + z sigma)`` of the log norms seen so far, this one included (LHOPT, appendix).
    """
    beta = 1.0 - scalars["grad_clip_ombeta"]
    match options.clip:
        case Clip.NONE:
            return 1.0
        case Clip.NORM:
            clip = scalars["group_clip_grad_norm"]
        case Clip.ROLLING_MAX:
            state["rolling_max"] = max(norm, beta * state["rolling_max"])
            clip = scalars["group_clip_grad_norm"] * state["rolling_max"]
        case Clip.Z_SCORE:
            log_norm = math.log(norm + 1e-15)
            state["log_norm_ema"] = beta * state["log_norm_ema"] + (1 - beta) * log_norm
            correction = beta * state["log_norm_bias_correction"] + (1 - beta)
            state["log_norm_bias_correction"] = correction
            mean = state["log_norm_ema"] / correction
            squared = (log_norm - mean) ** 2
            state["log_norm_emvar"] = beta * state["log_norm_emvar"] + (1 - beta) * squared
            deviation = math.sqrt(state["log_norm_emvar"] / correction)
            clip = math.exp(mean + scalars["group_clip_grad_z_score"] * deviation)
    return min(1.0, clip / (norm + 1e-6))


@dataclass
class _TensorStep:
    """One tensor's step: its arrays and the scalars that govern it.

    ``weights`` is what is stepped: the parameter, or its float32 master. Elements with a gradient
    that is not finite are left alone, and out of every sum but ``param_sq``.
    """

    options: StepOptions
    scalars: dict[str, float]
    state: dict[str, float]
    clip: float
    uses_trust: bool
    weights: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad_signs: torch.Tensor | None
    random_key: tuple[int, int] | None  # seed and tensor, where rounding is stochastic

    def run(self) -> dict[str, float]:
        """Update parameter, moments and state in place; return the statistics."""
        s, state = self.scalars, self.state
        beta1, beta2 = 1.0 - s["ombeta1"], 1.0 - s["ombeta2"]
        finite = torch.isfinite(self.grad)
        g = self.grad.to(self.exp_avg.dtype).where(finite, 0.0)
        g = g * (-self.clip if self.options.maximize else self.clip)
        p = self.weights.to(self.exp_avg.dtype, copy=True)
        momentum = self.exp_avg.where(finite, 0.0)
        first_step = state["step"] == 0

        state["step"] += 1
        state["bias_correction1"] = beta1 * state["bias_correction1"] + (1 - beta1)
        state["bias_correction2"] = beta2 * state["bias_correction2"] + (1 - beta2)

        m = beta1 * momentum + (1 - beta1) * g
        if self.options.denominator is Denominator.MAX:
            v = torch.maximum(beta2 * self.exp_avg_sq, g.abs())
            denominator = v
        else:
            v = beta2 * self.exp_avg_sq + (1 - beta2) * g.square()
            denominator = v.sqrt() / math.sqrt(state["bias_correction2"])
        m_hat = m / state["bias_correction1"]
        u = m_hat / (denominator + s["epsilon"])
        if self.options.weight_decay is WeightDecay.IN_UPDATE:
            u = u + s["weight_decay"] * p
        u = u.where(finite, 0.0)

        param_sq, update_sq = _dot(p, p), _dot(u, u)
        step_size = s["lr"] * self._warmup() * self._trust_ratio(param_sq, update_sq, first_step)
        decay = 1.0
        if self.options.weight_decay is WeightDecay.DECOUPLED:
            decay = 1.0 - step_size * s["weight_decay"]
        self.exp_avg.copy_(m.where(finite, self.exp_avg))
        self.exp_avg_sq.copy_(v.where(finite, self.exp_avg_sq))
        self.weights.copy_(self._rounded((p * decay - step_size * u).where(finite, p)))
        if self.uses_trust:
            state["param_norm"] = math.sqrt(_dot(self.weights, self.weights))

        m_hat_minus_grad = 0.0 if first_step else _dot(m_hat - g, m_hat - g)
        return {
            "taken": 1.0,
            "grad_nonfinite": float(not finite.all()),
            "clip_coefficient": self.clip,
            "step_size": step_size,
            "decay_factor": decay,
            "grad_sq": _dot(g, g),
            "param_sq": param_sq,
            "update_sq": update_sq,
            "m_hat_sq": _dot(m_hat, m_hat),
            "m_hat_minus_grad_sq": m_hat_minus_grad,
            "grad_dot_param": _dot(g, p),
            "grad_dot_m_hat": _dot(g, m_hat),
            "grad_dot_update": _dot(g, u),
            "count_gt_epsilon": _total((denominator > s["epsilon"]) & finite),
            "sum_log_abs_update": _total((u.abs() + 1e-8).log()[finite]),
            "grad_dot_momentum": _dot(g, momentum),
            "momentum_sq": _dot(momentum, momentum),
            "count_same_sign_momentum": _total(((g < 0) == (momentum < 0)) & finite),
            "count_same_sign_grad": self._same_sign_as_last(g, finite, first_step),
        }

    def _rounded(self, result: torch.Tensor) -> torch.Tensor:
        """``result`` as a number of the weights' dtype, where chance has a say in that."""
        if self.random_key is None or self.weights.dtype not in (torch.bfloat16, torch.float16):
            return result
        elements = torch.arange(result.numel(), device=result.device)
        words = random_words(*self.random_key, int(self.state["step"]), elements)
        return round_stochastically(
            result, _in_memory_order(words, self.weights), self.weights.dtype
        )

    def _warmup(self) -> float:
        """Approximate RAdam warm-up of the learning rate, or 1."""
        if not self.options.radam_warmup:
            return 1.0
        return math.sqrt(2.0 / (2.0 - self.state["bias_correction2"]) - 1.0)

    def _trust_ratio(self, param_sq: float, update_sq: float, first_step: bool) -> float:
        """LAMB's trust ratio T; advances the running norm of the update."""
        if not self.uses_trust:
            return 1.0
        s, state = self.scalars, self.state
        delayed = self.options.trust is Trust.DELAYED and not first_step
        param_norm = state["param_norm"] if delayed else math.sqrt(param_sq)
        before = state["update_norm_ema"], state["update_norm_bias_correction"]

        ombeta = s["lamb_update_norm_ombeta"]
        norm = math.sqrt(update_sq)
        state["update_norm_ema"] = (1 - ombeta) * before[0] + ombeta * norm
        state["update_norm_bias_correction"] = (1 - ombeta) * before[1] + ombeta

        ema, correction = (
            before if delayed else (state["update_norm_ema"], state["update_norm_bias_correction"])
        )
        update_norm = ema / correction
        if param_norm < 1e-8 or update_norm < 1e-8:
            return 1.0
        trust = min(max(param_norm / update_norm, s["lamb_min_trust"]), s["lamb_max_trust"])
        return float(trust ** s["lamb_power"])

    def _same_sign_as_last(self, g: torch.Tensor, finite: torch.Tensor, first_step: bool) -> float:
        """#(sign g_t = sign g_{t-1}), or NaN where there is no last gradient; keeps the signs."""
        if self.grad_signs is None:
            return math.nan
        last = unpack_bits(self.grad_signs, g)
        self.grad_signs.copy_(is_negative_bits(g))
        return math.nan if first_step else _total(((g < 0) == last) & finite)


class ReferenceBackend:
    """Steps one tensor after the other with torch operations, on any device and float dtype."""

    def __init__(self, layout: StepLayout) -> None:
        self.layout = layout

    @torch.no_grad()
    def step(self, grads: Grads, statistics: torch.Tensor | None = None) -> None:
        layout = self.layout
        if isinstance(grads, GradTable):
            grads = grads.tensors
        if statistics is not None:
            statistics.zero_()
        skipped = self._skipped_runs(grads, statistics)
        grads = [
            None if layout.run_of[group] in skipped else grad
            for grad, group in zip(grads, layout.group_of, strict=True)
        ]
        scalars = [dict(zip(SCALARS, row, strict=True)) for row in layout.scalars.tolist()]
        clips = [self._clip(group, grads, scalars[group]) for group in range(len(scalars))]
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            group = layout.group_of[index]
            options = layout.options[group]
            row = layout.tensor_state[index]
            state = dict(zip(TENSOR_STATE, row.tolist(), strict=True))
            master = layout.master_params[index] if layout.master_params else None
            measured = _TensorStep(
                options=options,
                scalars=scalars[group],
                state=state,
                clip=clips[group],
                uses_trust=options.trust is not Trust.NONE
                and not (options.trust_ignores_vectors and layout.is_vector[index]),
                weights=layout.params[index] if master is None else master,
                grad=grad,
                exp_avg=layout.exp_avgs[index],
                exp_avg_sq=layout.exp_avg_sqs[index],
                grad_signs=layout.grad_signs[index] if layout.grad_signs else None,
                random_key=(
                    (layout.rounding_seed, index) if layout.rounding == "stochastic" else None
                ),
            ).run()
            if master is not None:
                layout.params[index].copy_(master)
            row.copy_(torch.tensor([state[name] for name in TENSOR_STATE], dtype=torch.float64))
            if statistics is not None:
                values = [measured[name] for name in STATISTICS]
                statistics[index].copy_(torch.tensor(values, dtype=torch.float64))

    def _skipped_runs(
        self, grads: Sequence[torch.Tensor | None], statistics: torch.Tensor | None
    ) -> set[int]:
        """Count and mark gradients with NaN or inf; the runs whose step is to be left out."""
        layout = self.layout
        bad = [
            index
            for index, grad in enumerate(grads)
            if grad is not None and not bool(torch.isfinite(grad).all())
        ]
        runs = {layout.run_of[layout.group_of[index]] for index in bad}
        for run in runs:
            layout.skipped_steps[run] += 1
        if statistics is not None:
            statistics[bad, STATISTICS.index("grad_nonfinite")] = 1.0
        return set() if layout.masks_nonfinite else runs

    def _clip(
        self, group: int, grads: Sequence[torch.Tensor | None], scalars: dict[str, float]
    ) -> float:
        layout = self.layout
        members = [
            grad
            for grad, of in zip(grads, layout.group_of, strict=True)
            if grad is not None and of == group
        ]
        if not members:
            return 1.0
        norm = math.sqrt(sum(_dot(g, g) for g in (grad[grad.isfinite()] for grad in members)))
        row = layout.group_state[group]
        state = dict(zip(GROUP_STATE, row.tolist(), strict=True))
        clip = clip_coefficient(norm, layout.options[group], scalars, state)
        row.copy_(torch.tensor([state[name] for name in GROUP_STATE], dtype=torch.float64))
        return clip
