"""CIAO, LHOPT's inner optimizer."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import Any, Final, Literal

import torch
from torch.optim.optimizer import ParamsT

from lhopt_fused.kernels import BackendName
from lhopt_fused.numbers import LARGEST, number, number_or
from lhopt_fused.optimizer import MeasuredOptimizer
from lhopt_fused.ranks import RankGroup
from lhopt_fused.types import (
    SCALARS,
    Clip,
    Denominator,
    MasterWeights,
    Moments,
    NonFinite,
    Rounding,
    StepOptions,
    Trust,
    WeightDecay,
)

__all__ = ["CIAO", "LHOPT_START"]

LHOPT_START: Final[dict[str, Any]] = {
    "lr": 1e-3,
    "ombeta1": 0.1,
    "ombeta2": 1e-2,
    "epsilon": 1e-6,
    "weight_decay": 1e-2,
    "denominator_norm": "inf",
    "adam_update_include_weight_decay": True,
    "group_clip_grad_norm": 0.8,
    "scale_grad_norm_by_rolling_max": True,
    "grad_clip_ombeta": 1e-2,
    "lamb_power": 1,
    "lamb_min_trust": 1e-3,
    "lamb_ignore_vectors": True,
    "lamb_update_norm_ombeta": 0.05,
    "inner_feature_frequency": 4,
}
"""Keywords of :class:`CIAO` that LHOPT starts from (published config)."""


class CIAO(MeasuredOptimizer):
    """LHOPT's customizable inner adaptive optimizer, fused (arXiv 2106.00958, appendix).

    An Adam-family step with a choice of denominator, gradient clipping by group and LAMB trust
    ratios, which takes the 13 inner features of LHOPT from its own pass over the parameters. The
    defaults are AdamW's; :meth:`lhopt` gives LHOPT's start. Keywords are the published names, and
    every one may be set per param group; numbers may be changed in ``param_groups`` at any step.

    Args:
        params: parameters or param groups, as for every torch optimizer.
        lr: learning rate, >= 0; a float or a 0-dim tensor.
        ombeta1: one minus the decay of the first moment, in (0, 1].
        ombeta2: one minus the decay of the second moment, in (0, 1].
        epsilon: added to the denominator, >= 0.
        weight_decay: >= 0.
        denominator_norm: None or 2 for Adam's root mean square, ``"inf"`` for AdaMax's maximum.
        adam_update_include_weight_decay: decay inside the update (and its norm), not decoupled.
        group_clip_grad_norm: clip each group's gradient norm to this, > 0.
        scale_grad_norm_by_rolling_max: it is a share of the decaying maximum of the norms.
        group_clip_grad_z_score: clip at this z-score of the log norm, instead.
        grad_clip_ombeta: one minus the decay of what clipping remembers; None means ``ombeta2``.
        lamb_power: exponent of LAMB's trust ratio, in [0, 1]; None for none.
        lamb_min_trust, lamb_max_trust: bounds of the trust ratio, before the power.
        lamb_ignore_vectors: no trust ratio for tensors with fewer than two dimensions.
        lamb_update_norm_ombeta: one minus the decay of the running norm of the update that the
            trust ratio uses; None uses the current norm.
        approximate_radam_warmup: scale lr by sqrt(2 / (2 - bias_correction2) - 1).
        inner_feature_frequency: take statistics at every so many inner steps, counted from the last
            :meth:`pop_inner_features`; None for every step, 0 for never.
        trust: ``"exact"`` uses the current update's norm; ``"delayed"`` the running norm of the
            updates before it, which saves a pass over the parameters.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"``.
        nonfinite: what NaN or inf in a gradient does: ``"skip"`` the step, ``"mask"`` the elements
            (no pass over the gradients before the step), or ``"raise"``.
        keep_grad_signs: keep one bit per element for the sign agreement of consecutive gradients.
        master_weights: keep float32 weights in the state of bfloat16 and float16 parameters; the
            step is theirs, and the parameters are their copies, rounded to the nearest. They begin
            as the parameters are at the first step; what is written to a parameter after that is
            lost. Other parameters have none. ``"split8"`` and ``"split16"`` keep just the 8 or 16
            bits that bfloat16 parameters lack of such weights (16: exact; 8: to 2^-8 of the
            distance between two parameters), and float16 ones are refused.
        moments: how both moments are kept: ``"float32"``, ``"bfloat16"``, or ``"int8"``, which
            takes 8 bits and 1/64 of a 16-bit scale for elements of matrices of 4,096 and more whose
            rows are multiples of 64, and leaves others as they are. Steps are taken in float32 and
            rounded when they are stored, dithered, so that nothing is lost on average.
        rounding: what becomes of results in bfloat16 and float16 parameters without such weights:
            ``"nearest"`` loses updates that are too small for the parameter, ``"stochastic"``
            rounds up or down at random, so that they are there on average.
        rounding_seed: of that randomness; with the same seed, a run gives the same bits.
        process_group: the ranks that train this model together, which see at their first step that
            they have the same to do. ``"auto"`` takes those that the parameters are sharded over,
            or else all there are; None says that this rank is on its own.

    Raises:
        ValueError, TypeError: a bad hyperparameter or parameter, named.
    """

    _values_of = itemgetter(
        *SCALARS[1:],
        "denominator_norm",
        "adam_update_include_weight_decay",
        "scale_grad_norm_by_rolling_max",
        "lamb_ignore_vectors",
        "approximate_radam_warmup",
        "trust",
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        ombeta1: float = 0.1,
        ombeta2: float = 1e-3,
        epsilon: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        denominator_norm: int | Literal["inf"] | None = None,
        adam_update_include_weight_decay: bool = False,
        group_clip_grad_norm: float | None = None,
        scale_grad_norm_by_rolling_max: bool = False,
        group_clip_grad_z_score: float | None = None,
        grad_clip_ombeta: float | None = None,
        lamb_power: float | None = None,
        lamb_min_trust: float = 0.0,
        lamb_max_trust: float = math.inf,
        lamb_ignore_vectors: bool = False,
        lamb_update_norm_ombeta: float | None = None,
        approximate_radam_warmup: bool = False,
        inner_feature_frequency: int | None = None,
        trust: Literal["exact", "delayed"] = "exact",
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
            "ombeta1": ombeta1,
            "ombeta2": ombeta2,
            "epsilon": epsilon,
            "weight_decay": weight_decay,
            "denominator_norm": denominator_norm,
            "adam_update_include_weight_decay": adam_update_include_weight_decay,
            "group_clip_grad_norm": group_clip_grad_norm,
            "scale_grad_norm_by_rolling_max": scale_grad_norm_by_rolling_max,
            "group_clip_grad_z_score": group_clip_grad_z_score,
            "grad_clip_ombeta": grad_clip_ombeta,
            "lamb_power": lamb_power,
            "lamb_min_trust": lamb_min_trust,
            "lamb_max_trust": lamb_max_trust,
            "lamb_ignore_vectors": lamb_ignore_vectors,
            "lamb_update_norm_ombeta": lamb_update_norm_ombeta,
            "approximate_radam_warmup": approximate_radam_warmup,
            "trust": trust,
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

    @classmethod
    def lhopt(cls, params: ParamsT, **overrides: Any) -> CIAO:
        """LHOPT's start: what its policy begins with (arXiv 2106.00958, published config).

        Args:
            params: parameters or param groups.
            overrides: any keyword of :class:`CIAO`.
        """
        return cls(params, **{**LHOPT_START, **overrides})

    def _options(self, group: dict[str, Any]) -> StepOptions:
        if group["denominator_norm"] not in (None, 2, "inf"):
            raise ValueError(
                f"denominator_norm must be None, 2 or 'inf', got {group['denominator_norm']!r}"
            )
        if group["trust"] not in ("exact", "delayed"):
            raise ValueError(f"trust must be 'exact' or 'delayed', got {group['trust']!r}")
        trust = Trust.EXACT if group["trust"] == "exact" else Trust.DELAYED
        return StepOptions(
            denominator=Denominator.MAX if group["denominator_norm"] == "inf" else Denominator.RMS,
            weight_decay=(
                WeightDecay.IN_UPDATE
                if group["adam_update_include_weight_decay"]
                else WeightDecay.DECOUPLED
            ),
            clip=self._clip(group),
            trust=Trust.NONE if group["lamb_power"] is None else trust,
            trust_ignores_vectors=bool(group["lamb_ignore_vectors"]),
            radam_warmup=bool(group["approximate_radam_warmup"]),
        )

    @staticmethod
    def _clip(group: dict[str, Any]) -> Clip:
        norm, z_score = group["group_clip_grad_norm"], group["group_clip_grad_z_score"]
        if norm is not None and z_score is not None:
            raise ValueError(
                "group_clip_grad_norm and group_clip_grad_z_score exclude one another; set one"
            )
        if group["scale_grad_norm_by_rolling_max"] and norm is None:
            raise ValueError(
                "scale_grad_norm_by_rolling_max needs group_clip_grad_norm, the share of the "
                "maximum to clip to"
            )
        if z_score is not None:
            return Clip.Z_SCORE
        if norm is None:
            return Clip.NONE
        return Clip.ROLLING_MAX if group["scale_grad_norm_by_rolling_max"] else Clip.NORM

    def _scalars(self, group: dict[str, Any]) -> tuple[float, ...]:
        low = number(group, "lamb_min_trust", 0, math.inf)
        return (
            number(group, "ombeta1", 0, 1, open_low=True),
            number(group, "ombeta2", 0, 1, open_low=True),
            number(group, "epsilon", 0, LARGEST),
            number(group, "weight_decay", 0, LARGEST),
            number_or(group, "group_clip_grad_norm", math.inf, 0, math.inf, open_low=True),
            number_or(group, "grad_clip_ombeta", group["ombeta2"], 0, 1, open_low=True),
            number_or(group, "lamb_update_norm_ombeta", 1.0, 0, 1, open_low=True),
            number_or(group, "group_clip_grad_z_score", 0.0, -LARGEST, LARGEST),
            number_or(group, "lamb_power", 0.0, 0, 1),
            low,
            number(group, "lamb_max_trust", low, math.inf),
        )
