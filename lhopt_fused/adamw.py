"""AdamW that measures itself."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from lhopt_fused.kernels import BackendName
from lhopt_fused.numbers import LARGEST, number
from lhopt_fused.optimizer import MeasuredOptimizer
from lhopt_fused.ranks import RankGroup
from lhopt_fused.types import MasterWeights, Moments, NonFinite, Rounding, StepOptions

__all__ = ["AdamW"]


class AdamW(MeasuredOptimizer):
    """Drop-in for :class:`torch.optim.AdamW` that measures itself (Loshchilov & Hutter 2019).

    The same arguments, defaults and result, to rounding: moments are kept in float32 for 16-bit
    parameters, where torch keeps 16 bits, or as ``moments`` says. Checkpoints of
    :class:`torch.optim.AdamW` load.

    Args:
        params: parameters or param groups.
        lr: learning rate, >= 0; a float or a 0-dim tensor.
        betas: decays of the two moments, each in [0, 1).
        eps: added to the denominator, >= 0.
        weight_decay: decoupled weight decay, >= 0.
        amsgrad: not supported; must be False.
        maximize: step along the gradient instead of against it.
        foreach, capturable, fused: accepted for compatibility; the backend decides.
        differentiable: not supported; must be False.
        inner_feature_frequency, backend, nonfinite, keep_grad_signs, master_weights, moments,
            rounding, rounding_seed, process_group: as for :class:`CIAO`.

    Raises:
        ValueError, TypeError: a bad hyperparameter or parameter, named.
    """

    _values_of = itemgetter("betas", "eps", "weight_decay", "amsgrad", "maximize", "differentiable")

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        inner_feature_frequency: int | None = None,
        backend: BackendName = "auto",
        nonfinite: NonFinite = "skip",
        keep_grad_signs: bool = False,
        master_weights: MasterWeights = False,
        moments: Moments = "float32",
        rounding: Rounding = "nearest",
        rounding_seed: int = 0,
        process_group: RankGroup = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(
            params,
            defaults,
            inner_feature_frequency=inner_feature_frequency,
            backend=backend,
            nonfinite=nonfinite,
            keep_grad_signs=keep_grad_signs,
            master_weights=master_weights,
            moments=moments,
            rounding=rounding,
            rounding_seed=rounding_seed,
            process_group=process_group,
        )

    def _options(self, group: dict[str, Any]) -> StepOptions:
        for name in ("amsgrad", "differentiable"):
            if group.get(name):
                raise ValueError(f"{name}=True is not supported here; use torch.optim.AdamW for it")
        return StepOptions(maximize=bool(group["maximize"]))

    def _scalars(self, group: dict[str, Any]) -> tuple[float, ...]:
        try:
            beta1, beta2 = (float(beta) for beta in group["betas"])
        except (TypeError, ValueError):
            beta1 = beta2 = math.nan
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"betas must be two numbers in [0, 1), got {group['betas']!r}")
        return (
            1 - beta1,
            1 - beta2,
            number(group, "eps", 0, LARGEST),
            number(group, "weight_decay", 0, LARGEST),
            *(math.inf, 1 - beta2, 1.0, 0.0, 0.0, 0.0, math.inf),  # no clipping, no trust ratio
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`MeasuredOptimizer.load_state_dict`; takes :class:`torch.optim.AdamW`'s too."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                if "step" in state and "bias_correction1" not in state:
                    step = float(state["step"])
                    state["bias_correction1"] = 1 - float(group["betas"][0]) ** step
                    state["bias_correction2"] = 1 - float(group["betas"][1]) ** step
