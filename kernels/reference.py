"""The inner step in plain torch, as the paper writes it: the definition the other backends meet.

Element-wise arithmetic is in the dtype of the moments (float32, or float64 for float64 parameters);
scalars are Python floats and every sum is taken in float64. Clarity over speed and memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lhopt_fused.kernels.formats import (
    decode,
    encode,
    in_memory_order,
    join_master,
    memory_order,
    split_master,
)
from lhopt_fused.kernels.gradients import Grads, GradTable
from lhopt_fused.kernels.rounding import random_words, round_stochastically
from lhopt_fused.types import (
    GRADIENT_SUMS,
    GROUP_STATE,
    PARTIAL_SUMS,
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
    flat = (memory_order(x) < 0).to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`is_negative_bits`: a bool tensor with the shape and memory order of ``like``."""
    positions = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[:, None] >> positions) & 1).flatten()[: like.numel()]
    return in_memory_order(flat.to(torch.bool), like)


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
class _Moment:
    """A moment as it is kept: numbers, or codes with scales."""

    stored: torch.Tensor
    scales: torch.Tensor | None

    def read(self) -> torch.Tensor:
        return decode(self.stored, self.scales)

    def write(self, values: torch.Tensor, step: int) -> None:
        stored, scales = encode(values, self.stored.dtype, step)
        self.stored.copy_(stored)
        if self.scales is not None and scales is not None:
            self.scales.copy_(scales.view_as(self.scales))


@dataclass
class _Weights:
    """What is stepped: a parameter, its float32 master, or the master that it has a part of."""

    param: torch.Tensor
    master: torch.Tensor | None
    correction: torch.Tensor | None

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """A copy."""
        if self.correction is not None:
            return join_master(self.param, self.correction)
        return (self.param if self.master is None else self.master).to(dtype, copy=True)

    def write(self, values: torch.Tensor) -> torch.Tensor:
        """Store, and return what has a norm: the parameter, or the master before it is split."""
        if self.correction is not None:
            param, correction = split_master(values, self.correction.dtype)
            self.param.copy_(param)
            self.correction.copy_(correction)
            return values
        if self.master is not None:
            self.master.copy_(values)
        self.param.copy_(values)
        return self.param if self.master is None else self.master


@dataclass
class _TensorStep:
    """One tensor's step: its arrays and the scalars that govern it.

    Elements with a gradient that is not finite are left alone, to the rounding of their moments,
    and out of every sum but ``param_sq``. A piece of a tensor is stepped in two calls, between
    which its sums become those of the whole.
    """

    options: StepOptions
    scalars: dict[str, float]
    state: dict[str, float]
    clip: float
    uses_trust: bool
    weights: _Weights
    grad: torch.Tensor
    exp_avg: _Moment
    exp_avg_sq: _Moment
    grad_signs: torch.Tensor | None
    random_key: tuple[int, int] | None  # seed and tensor, where rounding is stochastic
    is_deferred: bool = False  # the parameter's update, until |u| is known

    def run(self) -> dict[str, float]:
        """Update parameter, moments and state in place; return the statistics."""
        measured = self.update_moments()
        if not self.uses_trust:
            return measured
        self._advance_update_norm(math.sqrt(measured["update_sq"]))
        if self.is_deferred:
            trust = self._trust_ratio(math.sqrt(measured["param_sq"]))
            measured["step_size"] *= trust
            measured["decay_factor"] = self._decay_factor(measured["step_size"])
            measured["new_param_sq"] = self.apply(measured)
        self.state["param_norm"] = math.sqrt(measured["new_param_sq"])
        return measured

    def update_moments(self) -> dict[str, float]:
        """Update the moments, and the parameter too unless its trust ratio has to wait for |u|.

        Returns:
            A row of ``PARTIAL_SUMS``. Where the update is deferred, the step size in it lacks the
            trust ratio, and ``new_param_sq`` is 0.
        """
        s, state = self.scalars, self.state
        beta1, beta2 = 1.0 - s["ombeta1"], 1.0 - s["ombeta2"]
        finite = torch.isfinite(self.grad)
        m_before, v_before = self.exp_avg.read(), self.exp_avg_sq.read()
        g = self.grad.to(m_before.dtype).where(finite, 0.0)
        g = g * (-self.clip if self.options.maximize else self.clip)
        p = self.weights.read(m_before.dtype)
        momentum = m_before.where(finite, 0.0)
        first_step = state["step"] == 0
        self.is_deferred = self.uses_trust and (self.options.trust is Trust.EXACT or first_step)

        state["step"] += 1
        state["bias_correction1"] = beta1 * state["bias_correction1"] + (1 - beta1)
        state["bias_correction2"] = beta2 * state["bias_correction2"] + (1 - beta2)

        m = beta1 * momentum + (1 - beta1) * g
        if self.options.denominator is Denominator.MAX:
            v = torch.maximum(beta2 * v_before, g.abs())
            denominator = v
        else:
            v = beta2 * v_before + (1 - beta2) * g.square()
            denominator = v.sqrt() / math.sqrt(state["bias_correction2"])
        m_hat = m / state["bias_correction1"]
        u = m_hat / (denominator + s["epsilon"])
        if self.options.weight_decay is WeightDecay.IN_UPDATE:
            u = u + s["weight_decay"] * p
        u = u.where(finite, 0.0)
        self.exp_avg.write(m.where(finite, m_before), int(state["step"]))
        self.exp_avg_sq.write(v.where(finite, v_before), int(state["step"]))
        self.update, self.finite = u, finite

        knows_trust = self.uses_trust and not self.is_deferred
        step_size = s["lr"] * self._warmup()
        step_size *= self._trust_ratio(state["param_norm"]) if knows_trust else 1.0
        m_hat_minus_grad = 0.0 if first_step else _dot(m_hat - g, m_hat - g)
        measured = {
            "taken": 1.0,
            "grad_nonfinite": float(not finite.all()),
            "clip_coefficient": self.clip,
            "step_size": step_size,
            "decay_factor": self._decay_factor(step_size),
            "grad_sq": _dot(g, g),
            "param_sq": _dot(p, p),
            "update_sq": _dot(u, u),
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
        measured["new_param_sq"] = 0.0 if self.is_deferred else self.apply(measured)
        return measured

    def apply(self, measured: dict[str, float]) -> float:
        """Update the parameter as ``measured`` says; returns the square of its norm then."""
        p = self.weights.read(self.update.dtype)
        new = p * measured["decay_factor"] - measured["step_size"] * self.update
        stored = self.weights.write(self._rounded(new.where(self.finite, p)))
        return _dot(stored, stored)

    def _decay_factor(self, step_size: float) -> float:
        if self.options.weight_decay is WeightDecay.DECOUPLED:
            return 1.0 - step_size * self.scalars["weight_decay"]
        return 1.0

    def _rounded(self, result: torch.Tensor) -> torch.Tensor:
        """``result`` as a number of the parameter's dtype, where chance has a say in that."""
        param = self.weights.param
        if self.random_key is None or param.dtype not in (torch.bfloat16, torch.float16):
            return result
        elements = torch.arange(result.numel(), device=result.device)
        words = random_words(*self.random_key, int(self.state["step"]), elements)
        return round_stochastically(result, in_memory_order(words, param), param.dtype)

    def _warmup(self) -> float:
        """Approximate RAdam warm-up of the learning rate, or 1."""
        if not self.options.radam_warmup:
            return 1.0
        return math.sqrt(2.0 / (2.0 - self.state["bias_correction2"]) - 1.0)

    def _trust_ratio(self, param_norm: float) -> float:
        """LAMB's trust ratio T for a parameter of this norm."""
        s, state = self.scalars, self.state
        update_norm = state["update_norm_ema"] / state["update_norm_bias_correction"]
        if param_norm < 1e-8 or update_norm < 1e-8:
            return 1.0
        trust = min(max(param_norm / update_norm, s["lamb_min_trust"]), s["lamb_max_trust"])
        return float(trust ** s["lamb_power"])

    def _advance_update_norm(self, norm: float) -> None:
        """Take the norm of this step's update into the running one."""
        ombeta, state = self.scalars["lamb_update_norm_ombeta"], self.state
        state["update_norm_ema"] = (1 - ombeta) * state["update_norm_ema"] + ombeta * norm
        correction = (1 - ombeta) * state["update_norm_bias_correction"] + ombeta
        state["update_norm_bias_correction"] = correction

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
        self._grads: Sequence[torch.Tensor | None] = []
        self._steps: dict[int, _TensorStep] = {}

    @torch.no_grad()
    def step(self, grads: Grads, statistics: torch.Tensor | None = None) -> None:
        rows = self.layout.tensor_state.new_zeros(len(self.layout.params), len(PARTIAL_SUMS))
        self.measure_gradients(grads, sums := rows.new_zeros(len(rows), len(GRADIENT_SUMS)))
        for index, step in self._begin(sums, rows).items():
            self._store(rows[index], step.run(), PARTIAL_SUMS)
            self._store(self.layout.tensor_state[index], step.state, TENSOR_STATE)
        if statistics is not None:
            statistics.copy_(rows[:, : len(STATISTICS)])

    @torch.no_grad()
    def measure_gradients(self, grads: Grads, sums: torch.Tensor) -> None:
        self._grads = grads.tensors if isinstance(grads, GradTable) else grads
        for grad, row in zip(self._grads, sums, strict=True):
            measured = dict.fromkeys(GRADIENT_SUMS, 0.0)
            if grad is not None:
                finite = grad[grad.isfinite()]
                nonfinite = grad.numel() - finite.numel()
                measured = {"present": 1.0, "nonfinite": nonfinite, "sum_sq": _dot(finite, finite)}
            self._store(row, measured, GRADIENT_SUMS)

    @torch.no_grad()
    def update_moments(self, sums: torch.Tensor, partial: torch.Tensor, measures: bool) -> None:
        self._steps = self._begin(sums, partial)
        for index, step in self._steps.items():
            self._store(partial[index], step.update_moments(), PARTIAL_SUMS)
            self._store(self.layout.tensor_state[index], step.state, TENSOR_STATE)

    @torch.no_grad()
    def apply(self, partial: torch.Tensor) -> None:
        for index, step in self._steps.items():
            if step.is_deferred:
                measured = dict(zip(PARTIAL_SUMS, partial[index].tolist(), strict=True))
                partial[index, PARTIAL_SUMS.index("new_param_sq")] = step.apply(measured)

    def _begin(self, sums: torch.Tensor, partial: torch.Tensor) -> dict[int, _TensorStep]:
        """Mark in ``partial``, zero otherwise, what is not finite; who takes part, by index."""
        layout = self.layout
        measured = [dict(zip(GRADIENT_SUMS, row, strict=True)) for row in sums.tolist()]
        bad = [index for index, row in enumerate(measured) if row["nonfinite"] > 0]
        partial.zero_()
        partial[bad, PARTIAL_SUMS.index("grad_nonfinite")] = 1.0
        runs = {layout.run_of[layout.group_of[index]] for index in bad}
        for run in runs:
            layout.skipped_steps[run] += 1
        members: dict[int, list[int]] = {}
        for index, group in enumerate(layout.group_of):
            skipped = layout.run_of[group] in runs and not layout.masks_nonfinite
            if self._grads[index] is not None and not skipped:
                members.setdefault(group, []).append(index)
        steps: dict[int, _TensorStep] = {}
        for group, indices in sorted(members.items()):
            scalars = dict(zip(SCALARS, layout.scalars[group].tolist(), strict=True))
            norm = math.sqrt(sum(measured[index]["sum_sq"] for index in indices))
            clip = self._clip(group, norm, scalars)
            steps |= {index: self._tensor_step(index, scalars, clip) for index in indices}
        return dict(sorted(steps.items()))

    def _clip(self, group: int, norm: float, scalars: dict[str, float]) -> float:
        row = self.layout.group_state[group]
        state = dict(zip(GROUP_STATE, row.tolist(), strict=True))
        clip = clip_coefficient(norm, self.layout.options[group], scalars, state)
        self._store(row, state, GROUP_STATE)
        return clip

    def _tensor_step(self, index: int, scalars: dict[str, float], clip: float) -> _TensorStep:
        layout, grad = self.layout, self._grads[index]
        assert grad is not None

        def own(tensors: Sequence[torch.Tensor | None] | None) -> torch.Tensor | None:
            return tensors[index] if tensors else None

        state = layout.tensor_state[index].tolist()
        return _TensorStep(
            options=layout.options[layout.group_of[index]],
            scalars=scalars,
            state=dict(zip(TENSOR_STATE, state, strict=True)),
            clip=clip,
            uses_trust=layout.uses_trust(index),
            weights=_Weights(
                layout.params[index], own(layout.master_params), own(layout.master_corrections)
            ),
            grad=grad,
            exp_avg=_Moment(layout.exp_avgs[index], own(layout.exp_avg_scales)),
            exp_avg_sq=_Moment(layout.exp_avg_sqs[index], own(layout.exp_avg_sq_scales)),
            grad_signs=own(layout.grad_signs),
            random_key=(layout.rounding_seed, index) if layout.rounding == "stochastic" else None,
        )

    @staticmethod
    def _store(row: torch.Tensor, values: dict[str, float], names: Sequence[str]) -> None:
        row.copy_(torch.tensor([values[name] for name in names], dtype=torch.float64))
