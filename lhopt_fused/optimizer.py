"""The optimizers a user sees: CIAO, LHOPT's inner optimizer, and AdamW, both measuring themselves.

State, param groups and checkpoints as :class:`torch.optim.Optimizer` has them; no maths.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Literal, get_args, overload

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lhopt_fused.features import FeatureAccumulator
from lhopt_fused.kernels import BackendName, StepBackend, get_backend, resolve_backend
from lhopt_fused.layout import DenseViews, bind_layout, check_disjoint, check_grad, check_params
from lhopt_fused.types import (
    EXTRA_FEATURES,
    INNER_FEATURES,
    SCALARS,
    STATISTICS,
    Clip,
    Denominator,
    NonFinite,
    NonFiniteGradientError,
    StepOptions,
    Trust,
    WeightDecay,
)

__all__ = ["CIAO", "LHOPT_START", "AdamW", "MeasuredOptimizer"]

_STATE_KEY = "lhopt_fused"
_LARGEST = sys.float_info.max

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


class _Run:
    """One binding of parameters, state and backend; replaced when any of them changes."""

    def __init__(
        self,
        params: list[torch.Tensor],
        views: DenseViews,
        states: list[dict[str, Any]],
        backend: StepBackend,
    ) -> None:
        self.params = params
        self.views = views
        self.states = states
        self.backend = backend
        self.layout = backend.layout
        self.features = FeatureAccumulator(
            self.layout, getattr(backend, "accumulate_features", None)
        )
        self.param_pointers = _pointers(params)
        self.grad_pointers: list[int] | None = None
        self.last_statistics: torch.Tensor | None = None
        self.is_new = True

    def binds(self, params: list[torch.Tensor]) -> bool:
        """Whether it is these parameters, and they and their moments are where they were."""
        return (
            len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
            and self.param_pointers == _pointers(params)
            and all(
                state.get("exp_avg") is moment
                for state, moment in zip(self.states, self.layout.exp_avgs, strict=True)
            )
        )

    def dense_grads(self, grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Gradients as the backend reads them, checked whenever one has moved."""
        try:
            pointers = [0 if g is None else g.data_ptr() for g in grads]
        except RuntimeError:  # a sparse gradient has no pointer; the check below names it
            pointers = None
        if pointers is not None and pointers == self.grad_pointers:
            return grads
        for index, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            if grad is not None:
                check_grad(index, param, grad)
        dense = [
            None if grad is None else self.views.grad(index, grad)
            for index, grad in enumerate(grads)
        ]
        all_dense = all(x is y for x, y in zip(dense, grads, strict=True))
        self.grad_pointers = pointers if all_dense else None
        return dense


def _pointers(tensors: Sequence[torch.Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


class MeasuredOptimizer(Optimizer):
    """A fused Adam-family optimizer that takes statistics of its own steps.

    Subclasses say what their param groups mean through :meth:`_options` and :meth:`_scalars`.
    """

    _group_keys: ClassVar[tuple[str, ...]]  # what a step reads of a param group; "lr" first

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        inner_feature_frequency: int | None,
        backend: BackendName,
        nonfinite: NonFinite,
        keep_grad_signs: bool,
    ) -> None:
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {nonfinite!r}")
        resolve_backend(backend, torch.device("cpu"), set())
        if inner_feature_frequency is not None and (
            isinstance(inner_feature_frequency, bool)
            or not isinstance(inner_feature_frequency, int)
            or inner_feature_frequency < 0
        ):
            raise ValueError(
                "inner_feature_frequency must be None (every inner step), 0 (never) or a number of "
                f"inner steps, got {inner_feature_frequency!r}"
            )
        self._settings: dict[str, Any] = {
            "inner_feature_frequency": inner_feature_frequency,
            "backend": backend,
            "nonfinite": nonfinite,
            "keep_grad_signs": keep_grad_signs,
        }
        self._reset_run()
        super().__init__(params, defaults)

    def _reset_run(self) -> None:
        self._run: _Run | None = None
        self._group_values: list[tuple[Any, ...]] = []
        self._group_options: list[StepOptions] = []
        self._inner_step = 0
        self._group_scalars: list[tuple[float, ...]] = []
        self._feature_sums: torch.Tensor | None = None
        self._skipped = 0
        self._warned_nonfinite = False

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _options(self, group: dict[str, Any]) -> StepOptions:
        """The static side of ``group``; refuses contradictions."""

    @abstractmethod
    def _scalars(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The numbers of ``group`` in the order of :data:`SCALARS`; refuses bad values."""

    # ------------------------------------------------------------------ torch's optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as :meth:`torch.optim.Optimizer.add_param_group`, checked before it is added.

        Raises:
            TypeError: a parameter is sparse, complex or integral.
            ValueError: no parameters, a parameter that overlaps itself or another one, or bad
                hyperparameters.
        """
        where = f"param_groups[{len(self.param_groups)}]"
        group = dict(param_group)
        group["params"] = _listed(param_group["params"])
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        if not tensors:
            raise ValueError(f"{where} has no parameters; leave empty groups out")
        if all(isinstance(p, torch.Tensor) for p in tensors):  # else torch says what is wrong
            check_params(tensors, where)
            check_disjoint([*self._all_params(), *tensors])
        checked = {**self.defaults, **group}
        self._options(checked)
        self._scalars(checked)
        super().add_param_group(group)
        self._group_values = []
        self._retire_run()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Do one inner step with the gradients at hand.

        Args:
            closure: re-evaluates the model and returns the loss, as torch's optimizers take it.

        Raises:
            ValueError: a hyperparameter in ``param_groups`` or a gradient is not acceptable.
            TypeError: a gradient is sparse, complex or of another kind than its parameter.
            BackendUnavailableError: the backend that was asked for cannot run here.
            NonFiniteGradientError: a gradient holds NaN or inf, with ``nonfinite="raise"``.
            Nothing has been written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        scalars_changed = self._read_groups()
        grads = [p.grad for p in self._all_params()]
        run = self._current_run(grads)
        if run is None:
            return
        if len(run.params) != len(grads):
            grads = [p.grad for p in run.params]
        dense = run.dense_grads(grads)
        if scalars_changed or run.is_new:
            self._push_scalars(run)
        statistics = run.features.next_statistics() if self._measures_now() else None
        run.views.load()
        run.backend.step(dense, statistics)
        run.views.store()
        run.is_new = False
        if statistics is not None:
            run.features.recorded()
            run.last_statistics = statistics
        self._inner_step += 1
        self._report_nonfinite(run)

    def _measures_now(self) -> bool:
        frequency = self._settings["inner_feature_frequency"]
        return frequency is None or (frequency > 0 and self._inner_step % frequency == 0)

    # ------------------------------------------------------------------ measurements

    def pop_inner_features(self, *, extra: bool = False) -> dict[str, float]:
        """Means of the inner features since the last call; begins a new outer step.

        Args:
            extra: add the three features beyond the paper, on the agreement of a gradient with the
                momentum before its step and with the gradient before it.

        Returns:
            The 13 features of LHOPT by name (mean over tensors, then groups, then inner steps), NaN
            where nothing was measured (``did_grad_clip`` where no group clips, for example).
        """
        names = (*INNER_FEATURES, *EXTRA_FEATURES) if extra else INNER_FEATURES
        self._inner_step = 0
        if self._run is None:
            return dict.fromkeys(names, math.nan)
        means = self._run.features.pop()
        return {name: means[name] for name in names}

    def statistics(self) -> dict[str, torch.Tensor]:
        """Raw sums of every tensor in the last inner step with statistics.

        Returns:
            Name -> float64 ``[number of parameters]``, in the order of the parameters over all
            groups, on their device; the names are those of :data:`lhopt_fused.types.STATISTICS`.
            Parameters that never had a gradient have zeros throughout.

        Raises:
            RuntimeError: no step with statistics has been done yet.
        """
        if self._run is None or self._run.last_statistics is None:
            raise RuntimeError(
                "no step has taken statistics yet: call step() first, and see that "
                "inner_feature_frequency is not 0"
            )
        rows = self._run.last_statistics
        position = {id(p): index for index, p in enumerate(self._all_params())}
        table = rows.new_zeros(len(position), len(STATISTICS))
        table[[position[id(p)] for p in self._run.params]] = rows
        return dict(zip(STATISTICS, table.unbind(-1), strict=True))

    @property
    def skipped_steps(self) -> int:
        """Steps with NaN or inf in a gradient: left out whole, or with ``"mask"`` in part."""
        return int(self._run.layout.skipped_steps) if self._run is not None else self._skipped

    @property
    def backend(self) -> str:
        """The backend that steps the parameters: ``"reference"``, ``"cpu"`` or ``"triton"``."""
        return self._backend_name(self._all_params())

    def _report_nonfinite(self, run: _Run) -> None:
        """Warn once or raise; on a GPU only ``"raise"`` waits for the device."""
        nonfinite = self._settings["nonfinite"]
        if run.layout.device.type != "cpu" and nonfinite != "raise":
            return
        skipped = int(run.layout.skipped_steps)
        if skipped == self._skipped:
            return
        self._skipped = skipped
        if nonfinite == "raise":
            raise NonFiniteGradientError(
                "a gradient holds NaN or inf; parameters and state are unchanged. Lower the "
                'learning rate or scale the loss, or use nonfinite="skip" to leave such steps out'
            )
        if not self._warned_nonfinite:
            self._warned_nonfinite = True
            left_out = (
                "the step was skipped" if nonfinite == "skip" else "its elements were left out"
            )
            warnings.warn(
                f"a gradient holds NaN or inf; {left_out} (counted in skipped_steps; this warning "
                "is shown once)",
                RuntimeWarning,
                stacklevel=6,
            )

    # ------------------------------------------------------------------ binding

    def _all_params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _backend_name(self, params: Sequence[torch.Tensor]) -> str:
        dtypes = {p.dtype for p in params}
        return resolve_backend(self._settings["backend"], params[0].device, dtypes)

    def _retire_run(self) -> None:
        """Forget the binding, keeping what it has counted."""
        if self._run is not None:
            self._feature_sums = self._run.features.folded_sums()
            self._skipped = int(self._run.layout.skipped_steps)
            self._run = None

    def _read_groups(self) -> bool:
        """Check ``param_groups`` where they changed since the last step; whether scalars did.

        Groups are compared by value, so that a step over hundreds of unchanged groups costs
        microseconds; learning rates held in tensors are read anew each time.
        """
        values = [self._values_of(group) for group in self.param_groups]
        tensors = any(isinstance(value[0], torch.Tensor) for value in values)
        if not tensors and values == self._group_values:
            return False
        options = [self._options(group) for group in self.param_groups]
        self._group_scalars = [self._scalars(group) for group in self.param_groups]
        if options != self._group_options:
            self._retire_run()
        self._group_options = options
        self._group_values = values
        return True

    def _values_of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(map(group.__getitem__, self._group_keys))

    def _push_scalars(self, run: _Run) -> None:
        """Bring the table on the device up to date with ``param_groups``; waits for nothing."""
        table = run.layout.scalars
        rows = torch.tensor(
            self._group_scalars, dtype=table.dtype, pin_memory=table.device.type == "cuda"
        )
        table.copy_(rows, non_blocking=True)
        for row, group in zip(table, self.param_groups, strict=True):
            if isinstance(group["lr"], torch.Tensor) and group["lr"].device.type != "cpu":
                row[SCALARS.index("lr")].copy_(group["lr"])

    def _current_run(self, grads: Sequence[torch.Tensor | None]) -> _Run | None:
        """The binding of all parameters that have state or a gradient; None if there are none."""
        params = self._all_params()
        run = self._run
        if run is None or len(run.params) < len(params) or not run.binds(params):
            active = [
                p for p, g in zip(params, grads, strict=True) if g is not None or p in self.state
            ]
            if run is None or not run.binds(active):
                return self._bind(active) if active else None
        return run

    def _bind(self, params: list[torch.Tensor]) -> _Run:
        """Lay out ``params`` for the backend; on an error nothing has changed."""
        self._retire_run()
        check_params(params, "param_groups")
        check_disjoint(params)
        for index, param in enumerate(params):
            if param.grad is not None:
                check_grad(index, param, param.grad)
        groups = self.param_groups
        index_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        views = DenseViews(params)
        states = [dict(self.state[p]) if p in self.state else {} for p in params]
        clip_states = [{"clip_state": group.get("clip_state")} for group in groups]
        layout = bind_layout(
            params,
            views.params,
            states,
            [index_of[id(p)] for p in params],
            clip_states,
            self._group_options,
            keep_grad_signs=self._settings["keep_grad_signs"],
            masks_nonfinite=self._settings["nonfinite"] == "mask",
        )
        layout.skipped_steps.fill_(self._skipped)
        run = _Run(params, views, states, get_backend(self._backend_name(params), layout))
        if self._feature_sums is not None:
            run.features.sums.copy_(self._feature_sums)
        self.state.update(zip(params, states, strict=True))
        for group, clip_state in zip(groups, clip_states, strict=True):
            group.update(clip_state)
        self._run = run
        return run

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under ``"lhopt_fused"`` what the optimizer has measured so far.

        Everything is tensors and plain values: ``torch.load(weights_only=True)`` reads it. A run
        resumed from it is bit-identical to one that never stopped.
        """
        saved = super().state_dict()
        run = self._run
        sums = run.features.folded_sums() if run is not None else self._feature_sums
        saved[_STATE_KEY] = {
            "inner_step": self._inner_step,
            "skipped_steps": self.skipped_steps,
            "feature_sums": sums.clone() if sums is not None else None,
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; moments and scalars keep their own dtype.

        Raises:
            ValueError: the saved groups do not fit the ones here.
        """
        super().load_state_dict(state_dict)
        # torch casts floating state to its parameter's dtype; take it as it was saved instead
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for saved_id, param in zip(saved_ids, self._all_params(), strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, torch.Tensor):
                    self.state[param][name] = value.detach().to(param.device, copy=True)
        measured = state_dict.get(_STATE_KEY, {})
        self._run = None
        self._group_values = []
        self._inner_step = measured.get("inner_step", 0)
        self._skipped = measured.get("skipped_steps", 0)
        sums = measured.get("feature_sums")
        self._feature_sums = sums.clone() if sums is not None else None

    def __getstate__(self) -> dict[str, Any]:
        measured = self.state_dict()[_STATE_KEY]
        return {
            **super().__getstate__(),
            "_settings": self._settings,
            _STATE_KEY: measured,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        measured = state.pop(_STATE_KEY, None)
        if measured is not None:
            self._reset_run()
            self._inner_step = measured["inner_step"]
            self._skipped = measured["skipped_steps"]
            self._feature_sums = measured["feature_sums"]
        super().__setstate__(state)


def _listed(params: Any) -> Any:
    """``params`` of a group as torch takes them, as a list where it is an iterator."""
    if isinstance(params, torch.Tensor):
        return [params]
    return params if isinstance(params, set) else list(params)


def _number(
    group: dict[str, Any], name: str, low: float, high: float, *, open_low: bool = False
) -> float:
    """``group[name]`` as a float in [low, high] (or (low, high]); NaN never passes."""
    value = group[name]
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return math.nan  # stays on its device: it is copied into the table there
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        number = math.nan
    if not (low < number if open_low else low <= number) or not number <= high:
        bracket = "(" if open_low else "["
        raise ValueError(f"{name} must be a number in {bracket}{low:g}, {high:g}], got {value!r}")
    return number


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

    Raises:
        ValueError, TypeError: a bad hyperparameter or parameter, named.
    """

    _group_keys = (
        *SCALARS,
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
            trust_norm_ema=group["lamb_update_norm_ombeta"] is not None,
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
        low = _number(group, "lamb_min_trust", 0, math.inf)
        return (
            _number(group, "lr", 0, _LARGEST),
            _number(group, "ombeta1", 0, 1, open_low=True),
            _number(group, "ombeta2", 0, 1, open_low=True),
            _number(group, "epsilon", 0, _LARGEST),
            _number(group, "weight_decay", 0, _LARGEST),
            _optional(group, "group_clip_grad_norm", math.inf, 0, math.inf, open_low=True),
            _optional(group, "grad_clip_ombeta", group["ombeta2"], 0, 1, open_low=True),
            _optional(group, "lamb_update_norm_ombeta", 1.0, 0, 1, open_low=True),
            _optional(group, "group_clip_grad_z_score", 0.0, -_LARGEST, _LARGEST),
            _optional(group, "lamb_power", 0.0, 0, 1),
            low,
            _number(group, "lamb_max_trust", low, math.inf),
        )


def _optional(
    group: dict[str, Any],
    name: str,
    absent: float,
    low: float,
    high: float,
    *,
    open_low: bool = False,
) -> float:
    """As :func:`_number`, with a neutral value where the setting is None."""
    return absent if group[name] is None else _number(group, name, low, high, open_low=open_low)


class AdamW(MeasuredOptimizer):
    """Drop-in for :class:`torch.optim.AdamW` that measures itself (Loshchilov & Hutter 2019).

    The same arguments, defaults and result, to rounding: moments are kept in float32 for 16-bit
    parameters, where torch keeps 16 bits. Checkpoints of :class:`torch.optim.AdamW` load.

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
        inner_feature_frequency, backend, nonfinite, keep_grad_signs: as for :class:`CIAO`.

    Raises:
        ValueError, TypeError: a bad hyperparameter or parameter, named.
    """

    _group_keys = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "differentiable")

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
            _number(group, "lr", 0, _LARGEST),
            1 - beta1,
            1 - beta2,
            _number(group, "eps", 0, _LARGEST),
            _number(group, "weight_decay", 0, _LARGEST),
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
