"""A torch optimizer over the backends: state, param groups, measurements, checkpoints; no maths."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, ClassVar, Protocol, get_args, overload

import numpy as np
import numpy.typing as npt
import torch
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lhopt_fused.compiled import ticket_for, traced_step
from lhopt_fused.features import ACCUMULATED, FeatureAccumulator
from lhopt_fused.kernels import BackendName, PhasedBackend, get_backend, resolve_backend
from lhopt_fused.kernels.formats import scales_shape
from lhopt_fused.kernels.gradients import Grads
from lhopt_fused.layout import (
    DenseViews,
    bind_layout,
    check_disjoint,
    check_grad,
    check_params,
    check_split,
    check_storage,
)
from lhopt_fused.numbers import LARGEST, number
from lhopt_fused.placement import Sight, place
from lhopt_fused.ranks import RankGroup, Ranks, is_sharded, local_tensor, ranks_of
from lhopt_fused.sharding import (
    PendingSums,
    PiecePlacement,
    ShardedStep,
    check_holds_blocks,
    counts_here,
    describe,
    grad_piece,
    is_piece,
    pieces,
    placed,
)
from lhopt_fused.types import (
    EXTRA_FEATURES,
    INNER_FEATURES,
    SCALARS,
    STATISTICS,
    MasterWeights,
    Moments,
    NonFinite,
    NonFiniteGradientError,
    Rounding,
    StepOptions,
)

__all__ = ["MeasuredOptimizer", "listed"]

_STATE_KEY = "lhopt_fused"
_VERSION = 2  # of a state dict, which holds it under that key
_STORAGE = ("rounding", "rounding_seed", "master_weights", "moments")  # what a checkpoint brings
_LIKE_PARAMETER = ("exp_avg", "exp_avg_sq", "master_param", "master_correction")  # of its shape
_SCALES = ("exp_avg_scale", "exp_avg_sq_scale")  # state of its rows, by blocks


class _Run:
    """One binding of parameters, state and backend; replaced when any of them changes.

    ``pieces`` are the parameters as far as this rank has them.
    """

    def __init__(
        self,
        params: list[torch.Tensor],
        pieces: list[torch.Tensor],
        views: DenseViews,
        states: list[dict[str, Any]],
        backend: PhasedBackend,
    ) -> None:
        self.params = params
        self.pieces = pieces
        self.views = views
        self.backend = backend
        self.sharded: ShardedStep | None = None
        self.layout = backend.layout
        is_placed = any(mine is not param for mine, param in zip(pieces, params, strict=True))
        find = PiecePlacement if is_placed else place
        self.placement = find(params, views, states, [state["exp_avg"] for state in states])
        self.features = FeatureAccumulator(
            self.layout, getattr(backend, "accumulate_features", None)
        )
        self.last_statistics: torch.Tensor | None = None
        self.is_new = True

    def step(self, grads: Grads, measures: bool) -> None:
        """One step of the backend, statistics included where they are wanted."""
        if self.sharded is not None:
            self.sharded.step(grads, measures)
            return
        statistics = self.features.next_statistics() if measures else None
        self.backend.step(grads, statistics)
        if statistics is not None:
            self.features.recorded()
            self.last_statistics = statistics

    def record(self, whole: torch.Tensor) -> None:
        """Take in the statistics of a step over pieces, once they are whole."""
        self.last_statistics = self.features.next_statistics().copy_(whole)
        self.features.recorded()

    def settle(self) -> None:
        """See that nothing of the last step is pending: a collective where tensors are sharded."""
        if self.sharded is not None:
            self.sharded.settle()

    def dense_grads(self) -> list[torch.Tensor | None]:
        """The gradients, as far as this rank has them, each checked, as the backend reads them."""
        grads = list(itertools.starmap(grad_piece, enumerate(self.params)))
        for index, grad in enumerate(grads):
            if grad is not None:
                check_grad(index, self.pieces[index], grad)
        return [
            None if grad is None else self.views.grad(index, grad)
            for index, grad in enumerate(grads)
        ]


class _Release(Protocol):
    """Steps gradients during the backward pass; see :mod:`lhopt_fused.release`."""

    def take(self, param: torch.Tensor) -> None:
        """Step the gradient of ``param`` with its bucket, and free it then."""

    def finish(self) -> _Run | None:
        """Step what is left; the binding, None if there were no gradients ever."""


class MeasuredOptimizer(Optimizer):
    """A fused Adam-family optimizer that takes statistics of its own steps.

    Subclasses say what their param groups mean through :meth:`_options` and :meth:`_scalars`.
    """

    _values_of: ClassVar[itemgetter[Any]]  # what a step reads of a param group beside "lr"
    _carried_keys: ClassVar[tuple[str, ...]] = (_STATE_KEY,)  # of a state dict, beside torch's
    _process_group: RankGroup = "auto"

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        inner_feature_frequency: int | None,
        backend: BackendName,
        nonfinite: NonFinite,
        keep_grad_signs: bool,
        rounding: Rounding,
        rounding_seed: int,
        master_weights: MasterWeights,
        moments: Moments,
        process_group: RankGroup,
    ) -> None:
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite must be one of {get_args(NonFinite)}, got {nonfinite!r}")
        check_storage(rounding, rounding_seed, master_weights, moments)
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
            "rounding": rounding,
            "rounding_seed": rounding_seed,
            "master_weights": master_weights,
            "moments": moments,
        }
        if process_group != "auto":
            self._process_group = process_group
        self._reset_run()
        super().__init__(params, defaults)

    def _reset_run(self) -> None:
        self._ticket = ticket_for(self)
        self._members: list[torch.Tensor] = []
        self._run: _Run | None = None
        self._release: _Release | None = None
        self._pending: PendingSums | None = None
        self._ranks: Ranks | None = None
        self._has_met = False
        self._group_lrs: list[Any] = []
        self._group_values: list[tuple[Any, ...]] = []
        self._group_options: list[StepOptions] = []
        self._inner_step = 0
        self._group_scalars: npt.NDArray[np.float64] = np.empty((0, len(SCALARS)))
        self._feature_sums: torch.Tensor | None = None
        self._skipped = 0
        self._warned_nonfinite = False

    # ------------------------------------------------------------------ what a subclass says

    @abstractmethod
    def _options(self, group: dict[str, Any]) -> StepOptions:
        """The static side of ``group``; refuses contradictions."""

    @abstractmethod
    def _scalars(self, group: dict[str, Any]) -> tuple[float, ...]:
        """The numbers of ``group`` in the order of :data:`SCALARS` after the learning rate; refuses
        bad values."""

    def settings(self, group: int = 0) -> tuple[StepOptions, tuple[float, ...]]:
        """What the backends step a param group with, checked.

        Returns:
            Its static options, and its numbers in the order of ``types.SCALARS``.

        Raises:
            ValueError: a hyperparameter is not acceptable.
        """
        chosen = self.param_groups[group]
        return self._options(chosen), (_learning_rate(chosen), *self._scalars(chosen))

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
        group["params"] = listed(param_group["params"])
        tensors = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        if not tensors:
            raise ValueError(f"{where} has no parameters; leave empty groups out")
        if all(isinstance(p, torch.Tensor) for p in tensors):  # else torch says what is wrong
            mine = pieces(tensors, where)
            check_params(mine, where)
            check_split(mine, self._settings["master_weights"], where)
            check_disjoint([*map(local_tensor, self._all_params()), *mine])
        checked = {**self.defaults, **group}
        self._options(checked)
        _learning_rate(checked)
        self._scalars(checked)
        self._settle()
        super().add_param_group(group)
        self._find_members()
        self._group_values = []
        self._retire_run()
        self._pending = None
        self._has_met = False

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

        In a function under ``torch.compile`` it is an operator in the graph, but for DTensors and
        with a closure, which it calls as it is, between two graphs.
        """
        if is_dynamo_compiling() and closure is None and self._is_traceable:
            traced_step(self)
            return None
        return self._step_at_once(closure)

    # torch's schedulers put a function that cannot be compiled around steps that do not say this,
    # to set _opt_called; it is set here
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    @_disable_dynamo
    def _step_at_once(self, closure: Callable[[], float] | None = None) -> float | None:
        """:meth:`step` without its hooks, as the operator in compiled loops calls it."""
        self._opt_called = True
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step(loss)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`, without a break in a compiled graph."""
        if is_dynamo_compiling() and set_to_none and self._is_traceable:
            for param in self._members:
                param.grad = None
        else:
            super().zero_grad(set_to_none)

    def _find_members(self) -> list[torch.Tensor]:
        """The parameters over all groups, as graphs are to take them from now on."""
        self._members = self._all_params()
        self._is_traceable = not any(map(is_sharded, self._members))
        return self._members

    def _step(self, loss: float | None) -> None:
        """One inner step; ``loss`` is what the closure returned, if there was one."""
        measures = self._measures_now()
        if self._release is not None:
            run = self._release.finish()
        else:
            run = self._advance(lambda run, grads: run.step(grads, measures))
        if run is None:
            return
        self._inner_step += 1
        self._report_nonfinite(run)

    def _advance(self, step: Callable[[_Run, Grads], None]) -> _Run | None:
        """Let ``step`` take the gradients at hand; the binding, None if there are no tensors."""
        scalars_changed = self._read_groups()
        self._met_ranks()
        run, is_ready = self._current_run()
        if run is None:
            return None
        try:
            grads = run.placement.gradients if is_ready else run.dense_grads()
            if scalars_changed or run.is_new:
                self._push_scalars(run)
            run.views.load()
            step(run, grads)
            run.views.store()
        finally:
            run.placement.let_go()
        run.is_new = False
        return run

    def _met_ranks(self) -> Ranks | None:
        """The ranks that train this model; at first, see that they have the same to do."""
        if not self._has_met:
            self._read_groups()
            ranks = ranks_of(self._all_params(), self._process_group)
            if ranks is not None:
                ranks.check_agreement(self._said())
            self._ranks, self._has_met = ranks, True
        return self._ranks

    def _said(self) -> dict[str, Any]:
        """By topic, what every rank must have alike."""
        settings = {name: value for name, value in self._settings.items() if name != "backend"}
        return {
            "parameters": [list(map(describe, group["params"])) for group in self.param_groups],
            "options": [self._group_options, settings],
            "hyperparameters": self._group_scalars.tolist(),
        }

    def _settle(self) -> None:
        if self._run is not None:
            self._run.settle()

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
        means, _ = self._pop_measured()
        return {name: means[name] for name in names}

    def _pop_measured(self, *along: torch.Tensor) -> tuple[dict[str, float], list[float]]:
        """Begin a new outer step.

        Args:
            along: float64 tensors on the parameters' device that come over in the same copy.

        Returns:
            Means of :data:`ACCUMULATED` by name, NaN where not measured, and what came along.
        """
        self._settle()
        self._inner_step = 0
        size = len(ACCUMULATED)
        if self._run is not None:
            means = self._run.features.pop()[0]
        else:
            device = self._all_params()[0].device
            means = torch.full((size,), math.nan, dtype=torch.float64, device=device)
        numbers = torch.cat([means, *(x.reshape(-1) for x in along)]).tolist()
        return dict(zip(ACCUMULATED, numbers[:size], strict=True)), numbers[size:]

    def statistics(self) -> dict[str, torch.Tensor]:
        """Raw sums of every tensor in the last inner step with statistics.

        Returns:
            Name -> float64 ``[number of parameters]``, in the order of the parameters over all
            groups, on their device; the names are those of :data:`lhopt_fused.types.STATISTICS`.
            Parameters that never had a gradient have zeros throughout. Of sharded parameters, the
            sums are those of the whole tensors, and every rank must call this.

        Raises:
            RuntimeError: no step with statistics has been done yet.
        """
        self._settle()
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

    @property
    def compile_seconds(self) -> float:
        """What compiling kernels, or reading them from a cache, has taken; logged at INFO too.

        It is spent in the first step. Backends that come compiled need none.
        """
        return float(getattr(self._run.backend, "compile_seconds", 0.0)) if self._run else 0.0

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
                stacklevel=8,  # the line that calls step()
            )

    # ------------------------------------------------------------------ binding

    def _all_params(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _backend_name(self, params: Sequence[torch.Tensor]) -> str:
        dtypes = {p.dtype for p in params}
        return resolve_backend(self._settings["backend"], params[0].device, dtypes)

    def _storage(self) -> dict[str, Any]:
        """Settings of how numbers are kept between steps."""
        return {name: self._settings[name] for name in _STORAGE}

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
        lrs = list(map(itemgetter("lr"), self.param_groups))
        values = list(map(self._values_of, self.param_groups))
        in_tensors = any(isinstance(lr, torch.Tensor) for lr in lrs)
        if values != self._group_values:
            options = [self._options(group) for group in self.param_groups]
            scalars = np.array([self.settings(i)[1] for i in range(len(values))])
            if options != self._group_options:
                self._retire_run()
            self._group_options = options
        elif in_tensors or lrs != self._group_lrs:  # as schedules do
            scalars = self._group_scalars.copy()
            scalars[:, 0] = [_learning_rate(group) for group in self.param_groups]
        else:
            return False
        self._group_scalars, self._group_lrs, self._group_values = scalars, lrs, values
        return True

    def _push_scalars(self, run: _Run) -> None:
        """Bring the table on the device up to date with ``param_groups``; waits for nothing."""
        table = run.layout.scalars
        rows = torch.from_numpy(self._group_scalars)
        if table.device.type == "cuda":
            rows = rows.pin_memory()
        table.copy_(rows, non_blocking=True)
        for index, group in enumerate(self.param_groups):
            lr = group["lr"]
            if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
                table[index, 0].copy_(lr)

    def _current_run(self) -> tuple[_Run | None, bool]:
        """The binding of all parameters that have state or a gradient, None if there are none.

        And whether its gradients are ready to be read as they are.
        """
        run = self._run
        sight = Sight.UNBOUND if run is None else run.placement.look(self.param_groups)
        if sight == Sight.UNBOUND:
            active = [p for p in self._all_params() if p.grad is not None or p in self.state]
            if not active:
                return None, False
            run = self._bind(active)
            sight = run.placement.look(self.param_groups)
        return run, sight == Sight.READY

    def _bind(self, params: list[torch.Tensor]) -> _Run:
        """Lay out ``params`` for the backend; on an error nothing has changed."""
        self._retire_run()
        self._find_members()
        mine = pieces(params, "param_groups")
        self._check_pieces(params)
        check_params(mine, "param_groups")
        check_split(mine, self._settings["master_weights"], "param_groups")
        check_disjoint(mine)
        for index, param in enumerate(params):
            grad = grad_piece(index, param)
            if grad is not None:
                check_grad(index, mine[index], grad)
        groups = self.param_groups
        index_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        views = DenseViews(mine)
        states = [dict(self.state[p]) if p in self.state else {} for p in params]
        mine_of = [
            {k: local_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
            for state in states
        ]
        clip_states = [{"clip_state": group.get("clip_state")} for group in groups]
        layout = bind_layout(
            mine,
            views.params,
            mine_of,
            [index_of[id(p)] for p in params],
            clip_states,
            self._group_options,
            keep_grad_signs=self._settings["keep_grad_signs"],
            masks_nonfinite=self._settings["nonfinite"] == "mask",
            whole_shapes=[p.shape for p in params],
            **self._storage(),
        )
        layout.skipped_steps.fill_(self._skipped)
        backend = get_backend(self._backend_name(mine), layout)
        states = list(map(_placed_state, params, states, mine_of))
        run = _Run(params, mine, views, states, backend)
        if self._feature_sums is not None:
            run.features.sums.copy_(self._feature_sums)
        self.state.update(zip(params, states, strict=True))
        for group, clip_state in zip(groups, clip_states, strict=True):
            group.update(clip_state)
        self._shard(run)
        self._run = run
        return run

    def _check_pieces(self, params: Sequence[torch.Tensor]) -> None:
        """Refuse what depends on an element's place in the whole tensor, where there are pieces."""
        held = list(filter(is_piece, params))
        if self._settings["moments"] == "int8":
            for index, param in enumerate(params):
                check_holds_blocks(param, f"parameter {index}")
        halves = any(p.dtype in (torch.bfloat16, torch.float16) for p in held)
        if held and self._settings["keep_grad_signs"]:
            raise ValueError(
                "keep_grad_signs=True packs one bit per element and cannot be resharded; leave it "
                "out where parameters are sharded"
            )
        if halves and self._settings["rounding"] == "stochastic":
            raise ValueError(
                "rounding='stochastic' draws by an element's place in the whole tensor, which "
                "pieces do not know; use master_weights=True where parameters are sharded"
            )

    def _shard(self, run: _Run) -> None:
        """Let ``run`` step pieces of tensors, if it has any."""
        everyone = self._all_params()
        ranks = self._met_ranks()
        if ranks is None or not any(map(is_piece, everyone)):
            return
        if self._pending is None:
            self._pending = PendingSums(len(everyone), run.layout.device)
        place = {id(p): index for index, p in enumerate(everyone)}
        run.sharded = ShardedStep(
            run.backend,
            ranks,
            rows=[place[id(p)] for p in run.params],
            counts=[counts_here(p, ranks) for p in everyone],
            pending=self._pending,
            record=run.record,
        )

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """As torch's, and under ``"lhopt_fused"`` what the optimizer has measured so far.

        Where parameters are sharded, so is their state, and every rank must call this. It is all
        tensors and plain values: ``torch.load(weights_only=True)`` reads it. A run resumed from it
        is bit-identical to one that never stopped.

        The corrections of ``"split16"`` are the bits of their int16 as bfloat16: no collective of
        gloo or NCCL, which put whole states together, takes int16.
        """
        measured = self._measured()
        saved = super().state_dict()
        saved["state"] = {
            place: {
                name: _viewed(value, torch.int16, torch.bfloat16) for name, value in kept.items()
            }
            for place, kept in saved["state"].items()
        }
        return self._carry(saved, _STATE_KEY, measured)

    def _measured(self) -> dict[str, Any]:
        """What the optimizer goes on from beside its groups and state."""
        self._settle()
        run = self._run
        sums = run.features.folded_sums() if run is not None else self._feature_sums
        return {
            "version": _VERSION,
            "inner_step": self._inner_step,
            "skipped_steps": self.skipped_steps,
            "feature_sums": sums.clone() if sums is not None else None,
            **self._storage(),
        }

    @staticmethod
    def _carry(
        saved: dict[str, Any], key: str, value: dict[str, Any], large: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """Put ``value`` into a state dict, and into its first group: it is ``param_groups`` and
        ``state`` alone that torch.distributed.checkpoint keeps.

        There it is bytes, so that what has more entries than in the optimizer that loads it is
        kept whole, and beside them the tensors of the entries in ``large``, dicts by name.
        """
        packed = io.BytesIO()
        torch.save({name: held for name, held in value.items() if name not in large}, packed)
        saved[key] = value
        saved["param_groups"][0][key] = (
            packed.getvalue(),
            {name: value[name] for name in large},
        )
        return saved

    @staticmethod
    def _carried(state_dict: dict[str, Any], key: str) -> dict[str, Any] | None:
        """What :meth:`_carry` has put there, without what is empty of the large entries; None if
        there is nothing."""
        if key in state_dict:
            held: dict[str, Any] = state_dict[key]
            return held
        places = (group for group in state_dict.get("param_groups", ()) if key in group)
        if (group := next(places, None)) is None:
            return None
        packed, *large = group[key]  # a list of the bytes alone, where torch has flattened it
        value = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
        return {**value, **(large[0] if large else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave; moments and scalars keep their own dtype.

        How moments are kept and 16-bit parameters are rounded comes with it, like what is in
        ``param_groups``; a state dict that does not say it is taken over in the format set here.

        Raises:
            ValueError: the saved groups or tensors do not fit the ones here, or a newer version
                has saved them; nothing has changed.
        """
        self._check_saved(state_dict)
        groups = [
            {name: value for name, value in group.items() if name not in self._carried_keys}
            for group in state_dict["param_groups"]
        ]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        # torch casts floating state to its parameter's dtype; take it as it was saved instead
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for saved_id, param in zip(saved_ids, self._all_params(), strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, torch.Tensor):
                    value = value.detach().to(param.device, copy=True)
                    if name == "master_correction":
                        value = _viewed(value, torch.bfloat16, torch.int16)
                    self.state[param][name] = value
        measured = self._carried(state_dict, _STATE_KEY) or {}
        self._settings |= {name: measured[name] for name in _STORAGE if name in measured}
        self._run = self._pending = None
        self._group_values = []
        self._inner_step = measured.get("inner_step", 0)
        self._skipped = measured.get("skipped_steps", 0)
        sums = measured.get("feature_sums")
        self._feature_sums = sums.clone() if sums is not None else None

    def _check_saved(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state dict that does not fit, before anything is written."""
        version = (self._carried(state_dict, _STATE_KEY) or {}).get("version", _VERSION)
        if version > _VERSION:
            raise ValueError(
                f"the state dict is of version {version}, this package reads up to {_VERSION}; "
                "install the newer lhopt-fused that saved it"
            )
        saved, here = state_dict["param_groups"], self.param_groups
        if len(saved) != len(here):
            raise ValueError(f"the state dict has {len(saved)} param_groups, here are {len(here)}")
        params: dict[Any, tuple[str, torch.Tensor]] = {}
        for position, (group, mine) in enumerate(zip(saved, here, strict=True)):
            _check_same_params(position, group, mine)
            for index, saved_id in enumerate(group["params"]):
                name = f"param_groups[{position}]['params'][{index}]"
                params[saved_id] = name, mine["params"][index]
        if unknown := sorted(map(str, state_dict["state"].keys() - params.keys())):
            raise ValueError(f"the state dict has state of parameters in no group: {unknown}")
        for saved_id, state in state_dict["state"].items():
            name, param = params[saved_id]
            for key in (*_LIKE_PARAMETER, *_SCALES):
                if key not in state:
                    continue
                expected = scales_shape(param.shape) if key in _SCALES else param.shape
                if state[key].shape != expected:
                    raise ValueError(
                        f"state {key!r} of {name} has shape {tuple(state[key].shape)}, the "
                        f"parameter {tuple(param.shape)}; was it saved from another model?"
                    )
                if is_piece(param) and not is_sharded(state[key]):
                    raise ValueError(
                        f"state {key!r} of {name} is a whole tensor, but the parameter is sharded; "
                        "load it through torch.distributed.checkpoint.state_dict"
                    )

    def __getstate__(self) -> dict[str, Any]:
        measured = self._measured()
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
        self._find_members()


def _learning_rate(group: dict[str, Any]) -> float:
    return number(group, "lr", 0, LARGEST)


def _check_same_params(number: int, saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a saved group of other parameters, by name where both have names."""
    key = "param_names" if "param_names" in saved and "param_names" in here else "params"
    names, own = ([*g[key]] if key == "param_names" else range(len(g[key])) for g in (saved, here))
    missing, extra = [x for x in own if x not in names], [x for x in names if x not in own]
    if missing or extra:
        raise ValueError(
            f"param_groups[{number}] of the state dict does not fit: it lacks the parameters "
            f"{missing} and has {extra}, which are not here"
        )


def _viewed(value: Any, dtype: torch.dtype, other: torch.dtype) -> Any:
    """A tensor of ``dtype`` as the bits of ``other``, in the same memory; others as they are."""
    if not isinstance(value, torch.Tensor) or value.dtype != dtype:
        return value
    return placed(local_tensor(value).view(other), value)


def _placed_state(
    param: torch.Tensor, state: dict[str, Any], mine: dict[str, Any]
) -> dict[str, Any]:
    """``mine``, state of a piece, laid out like its parameter; as it was where it is the same."""
    result = dict(mine)
    for name in (*_LIKE_PARAMETER, *_SCALES):
        if name in mine:
            held = state.get(name)
            is_same = held is not None and local_tensor(held) is mine[name]
            result[name] = held if is_same else placed(mine[name], param, name in _SCALES)
    return result


def listed(params: Any) -> Any:
    """``params`` of a group as torch takes them, as a list where it is an iterator."""
    if isinstance(params, torch.Tensor):
        return [params]
    return params if isinstance(params, set) else list(params)
