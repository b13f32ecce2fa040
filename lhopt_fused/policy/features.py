"""Policy features: the one ordered table of what a policy sees, and the function that fills it.

One definition over leading batch dimensions, float64 inside: meta-training uses it, and the policy
runner of the extension is its twin. Every feature is unitless and finite, whatever the losses are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Final

import torch

from lhopt_fused.actions import ACTIONS, REGISTER_CHOICES, REGISTERS, Action, relative_to_start
from lhopt_fused.cdf import END_WEIGHTS, CdfState, update_cdf
from lhopt_fused.types import HYPERPARAMETERS, INNER_FEATURES

__all__ = [
    "FEATURES",
    "FEATURES_HASH",
    "FEATURES_VERSION",
    "LARGEST_FEATURE",
    "SERIES",
    "FeatureState",
    "Observation",
    "policy_features",
    "schema_hash",
]

FEATURES_VERSION: Final = 1
"""Counts changes of what a feature means under the same name."""

SERIES: Final = (
    *INNER_FEATURES,
    "log_loss_ratio",  # log train loss - log eval loss
    "log_path_ratio",  # log path length - log |p|
    "log_norm_ratio",  # log |p| - log |p| one outer step before
    "log_train_loss",
    "log_eval_loss",
)
"""The series that CDF features are taken of, in the order of their state."""


def _cdf_names(series: str) -> list[str]:
    return [f"{series}_cdf_{weight:g}" for weight in END_WEIGHTS]


def _table() -> Iterable[str]:
    yield from ("progress", "outer_step_length")
    for name in INNER_FEATURES:
        yield from (name, *_cdf_names(name))
    yield from ("log_loss_ratio_tanh", *_cdf_names("log_loss_ratio"), "log_loss_ratio_is_nan")
    for name in ("log_path_ratio", "log_norm_ratio"):
        yield from (f"{name}_tanh", *_cdf_names(name))
    for name in ("log_train_loss", "log_eval_loss"):
        yield from (*_cdf_names(name), f"{name}_is_nan", f"{name}_is_inf")
    for register in range(REGISTERS):
        yield from (f"register_{register}_log_loss_ratio_tanh", f"register_{register}_progress")
    yield from (f"{name}_relative_to_start" for name in HYPERPARAMETERS)
    yield from (f"previous_{name}" for name in HYPERPARAMETERS)
    yield from (f"previous_register_{choice}" for choice in REGISTER_CHOICES)
    yield "no_eval_loss"


FEATURES: Final = tuple(_table())
"""Names of the policy features, in the order of the vector."""

LARGEST_FEATURE: Final = 1e6
"""Raw values are clamped to this magnitude, so that float32 can square them."""


def schema_hash(names: Sequence[str], version: int) -> str:
    """sha256, in hexadecimal, that identifies an ordered table of features."""
    return hashlib.sha256("\n".join((str(version), *names)).encode()).hexdigest()


FEATURES_HASH: Final = schema_hash(FEATURES, FEATURES_VERSION)


@dataclass(frozen=True)
class Observation:
    """What one outer step shows of a training run; float64 over a batch ``[...]``.

    Attributes:
        inner: ``[..., 13]``, the inner features, NaN where not measured.
        train_loss: ``[...]``, mean over the outer step; may be NaN, infinite or not positive.
        eval_loss: ``[...]``, likewise; anything where there is none.
        has_eval_loss: bool ``[...]``.
        progress: ``[...]``, share of the run that is done, 0 to 1.
        outer_steps: ``[...]``, outer steps of the whole run.
        path_length: ``[...]``, sum of ``|p_new - p|`` over the inner steps since the last decision.
        param_norm: ``[...]``, ``|p|`` now.
        hyperparameters: ``[..., 8]``, now.
        start_hyperparameters: ``[..., 8]``, at the start of the run.
        register_losses: ``[..., 3]``, train loss saved with each register, NaN where empty.
        register_progress: ``[..., 3]``, progress saved with each register, NaN where empty.
    """

    inner: torch.Tensor
    train_loss: torch.Tensor
    eval_loss: torch.Tensor
    has_eval_loss: torch.Tensor
    progress: torch.Tensor
    outer_steps: torch.Tensor
    path_length: torch.Tensor
    param_norm: torch.Tensor
    hyperparameters: torch.Tensor
    start_hyperparameters: torch.Tensor
    register_losses: torch.Tensor
    register_progress: torch.Tensor


@dataclass(frozen=True)
class FeatureState:
    """What the features remember from one outer step to the next; ``[...]`` is the batch.

    Attributes:
        cdf: moments of :data:`SERIES`.
        param_norm: float64 ``[...]``, ``|p|`` one outer step before; NaN at first.
        shifts: float64 ``[..., 8]``, the previous decision; 0 at first.
        register: int64 ``[...]``, its register choice; -1 at first.
    """

    cdf: CdfState
    param_norm: torch.Tensor
    shifts: torch.Tensor
    register: torch.Tensor

    @classmethod
    def initial(cls, batch: Sequence[int] = (), device: torch.device | str = "cpu") -> FeatureState:
        """The state at the start of a run."""
        return cls(
            CdfState.initial(batch, len(SERIES), device),
            torch.full(tuple(batch), torch.nan, dtype=torch.float64, device=device),
            torch.zeros(*batch, len(HYPERPARAMETERS), dtype=torch.float64, device=device),
            torch.full(tuple(batch), -1, dtype=torch.int64, device=device),
        )

    def after(self, shifts: torch.Tensor, register: torch.Tensor) -> FeatureState:
        """The state once a decision has been taken."""
        return replace(self, shifts=shifts, register=register)

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, for a checkpoint."""
        cdf = {f"cdf_{field.name}": getattr(self.cdf, field.name) for field in fields(self.cdf)}
        return {
            **cdf,
            "param_norm": self.param_norm,
            "shifts": self.shifts,
            "register": self.register,
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> FeatureState:
        """The inverse of :meth:`tensors`."""
        cdf = CdfState(*(tensors[f"cdf_{field.name}"] for field in fields(CdfState)))
        return cls(cdf, tensors["param_norm"], tensors["shifts"], tensors["register"])


def policy_features(
    observation: Observation, state: FeatureState, actions: Sequence[Action] = ACTIONS
) -> tuple[torch.Tensor, FeatureState]:
    """What a policy sees after one more outer step.

    A log loss is the plain logarithm: a loss of 0 raises the flag for infinities, a negative one
    the flag for NaN. Without an eval loss its flags are 0 and its CDFs 0.5, as if it had no series
    yet. NaN becomes 0 elsewhere; infinities saturate where there is a tanh.

    Args:
        observation: float64 over a batch ``[...]``.
        state: of the same batch.
        actions: kinds and bounds of the hyperparameters.

    Returns:
        The features, float32 ``[..., len(FEATURES)]``, all finite; and the state for the next
        outer step, which still holds the previous decision (see :meth:`FeatureState.after`).
    """
    series = _series(observation, state)
    cdfs, cdf_state = update_cdf(state.cdf, torch.stack(list(series.values()), dim=-1))
    columns = {
        **_run_columns(observation),
        **_cdf_columns(cdfs),
        **{name: _finite(series[name]) for name in INNER_FEATURES},
        **_log_columns(series, observation.has_eval_loss),
        **_register_columns(observation),
        **_hyperparameter_columns(observation, actions),
        **_previous_columns(state),
    }
    vector = torch.stack([columns[name] for name in FEATURES], dim=-1)
    return vector.to(torch.float32), replace(
        state, cdf=cdf_state, param_norm=observation.param_norm
    )


def _series(observation: Observation, state: FeatureState) -> dict[str, torch.Tensor]:
    """One value per series, each ``[...]``, in the order of :data:`SERIES`."""
    log_norm = observation.param_norm.log()
    log_train = observation.train_loss.log()
    log_eval = observation.eval_loss.log()
    unseen = ~observation.has_eval_loss
    derived = (
        (log_train - log_eval).masked_fill(unseen, torch.nan),
        observation.path_length.log() - log_norm,
        log_norm - state.param_norm.log(),
        log_train,
        log_eval.masked_fill(unseen, torch.nan),
    )
    return dict(zip(SERIES, (*observation.inner.unbind(-1), *derived), strict=True))


def _run_columns(observation: Observation) -> dict[str, torch.Tensor]:
    return {
        "progress": _finite(observation.progress),
        "outer_step_length": _finite(1.0 / observation.outer_steps),
        "no_eval_loss": _flag(~observation.has_eval_loss),
    }


def _cdf_columns(cdfs: torch.Tensor) -> dict[str, torch.Tensor]:
    names = [name for series in SERIES for name in _cdf_names(series)]
    return dict(zip(names, cdfs.flatten(-2).unbind(-1), strict=True))


def _log_columns(
    series: Mapping[str, torch.Tensor], has_eval_loss: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Everything but the CDFs that is made of losses and norms."""
    columns = {
        f"{name}_tanh": _tanh(series[name])
        for name in ("log_loss_ratio", "log_path_ratio", "log_norm_ratio")
    }
    given = {
        "log_loss_ratio": has_eval_loss,
        "log_train_loss": torch.ones_like(has_eval_loss),
        "log_eval_loss": has_eval_loss,
    }
    for name, seen in given.items():
        columns[f"{name}_is_nan"] = _flag(series[name].isnan() & seen)
        columns[f"{name}_is_inf"] = _flag(series[name].isinf() & seen)
    return columns


def _register_columns(observation: Observation) -> dict[str, torch.Tensor]:
    ratios = observation.register_losses.log() - observation.train_loss.log()[..., None]
    progress = _finite(observation.register_progress)
    columns = {}
    for register in range(REGISTERS):
        columns[f"register_{register}_log_loss_ratio_tanh"] = _tanh(ratios[..., register])
        columns[f"register_{register}_progress"] = progress[..., register]
    return columns


def _hyperparameter_columns(
    observation: Observation, actions: Sequence[Action]
) -> dict[str, torch.Tensor]:
    relative = relative_to_start(
        observation.hyperparameters, observation.start_hyperparameters, actions
    )
    names = (f"{name}_relative_to_start" for name in HYPERPARAMETERS)
    return dict(zip(names, _finite(relative).unbind(-1), strict=True))


def _previous_columns(state: FeatureState) -> dict[str, torch.Tensor]:
    columns = {
        f"previous_{name}": shift
        for name, shift in zip(HYPERPARAMETERS, state.shifts.unbind(-1), strict=True)
    }
    for index, choice in enumerate(REGISTER_CHOICES):
        columns[f"previous_register_{choice}"] = _flag(state.register == index)
    return columns


def _finite(x: torch.Tensor) -> torch.Tensor:
    """0 where not finite, and within float32's squares."""
    return torch.where(x.isfinite(), x, 0.0).clamp(-LARGEST_FEATURE, LARGEST_FEATURE)


def _tanh(x: torch.Tensor) -> torch.Tensor:
    """0 for NaN; infinities saturate."""
    return torch.where(x.isnan(), 0.0, x).tanh()


def _flag(condition: torch.Tensor) -> torch.Tensor:
    return condition.to(torch.float64)
