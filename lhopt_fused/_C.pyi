"""The extension built from csrc/."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

NUM_ACCUMULATED: int
NUM_POLICY_FEATURES: int
TABLE_COLUMNS: tuple[int, ...]

def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def counter_uniform(seed: int, step: int, head: int) -> float: ...

@final
class GroupOptions:
    def __init__(
        self,
        *,
        denominator: int,
        weight_decay: int,
        clip: int,
        trust: int,
        trust_ignores_vectors: bool,
        radam_warmup: bool,
        maximize: bool,
    ) -> None: ...

@final
class TensorSpec:
    def __init__(
        self,
        *,
        param: int,
        dtype: int,
        master: int | None,
        correction: tuple[int, int] | None,
        size: int,
        moments: int,
        exp_avg: int,
        exp_avg_sq: int,
        scales: tuple[int, int] | None,
        grad_signs: int | None,
        group: int,
        is_vector: bool,
    ) -> None: ...

@final
class Step:
    def __init__(
        self,
        *,
        tensors: Sequence[TensorSpec],
        groups: Sequence[GroupOptions],
        run_of: Sequence[int],
        num_runs: int,
        scalars: int,
        group_state: int,
        tensor_state: int,
        skipped_steps: int,
        masks_nonfinite: bool,
        rounding_seed: int | None,
    ) -> None: ...
    def set_gradients(self, addresses: NDArray[np.int64], dtypes: NDArray[np.int8]) -> None: ...
    def run(self, statistics: int, num_threads: int) -> None: ...
    def measure_gradients(self, sums: int, num_threads: int) -> None: ...
    def update_moments(self, sums: int, partial: int, measures: bool, num_threads: int) -> None: ...
    def apply(self, partial: int, num_threads: int) -> None: ...
    @property
    def isa(self) -> str: ...

@final
class InnerFeatures:
    def __init__(
        self,
        *,
        numel: Sequence[int],
        group_of: Sequence[int],
        group_clips: Sequence[bool],
        run_of: Sequence[int],
        num_runs: int,
    ) -> None: ...
    def accumulate(self, statistics: int, sums: int) -> None: ...

def knows_exchange(capsule: object) -> bool: ...

@final
class Placement:
    def __init__(
        self,
        *,
        capsule: object,
        types: tuple[type, ...],
        params: list[Tensor],
        views: list[Tensor],
    ) -> None: ...
    def look(
        self,
        groups: list[dict[str, Any]],
        params: list[Tensor],
        states: list[dict[str, Any]],
        exp_avgs: list[Tensor],
        grads: list[Tensor | None],
    ) -> int: ...
    @property
    def addresses(self) -> NDArray[np.int64]: ...
    @property
    def dtypes(self) -> NDArray[np.int8]: ...

@final
class PolicyRunner:
    def __init__(
        self,
        *,
        weights: Mapping[str, NDArray[np.float32]],
        actions: Sequence[tuple[bool, Sequence[float], float, float]],
        registers: bool,
        mode: Literal["mean", "sample", "argmax"],
        seed: int,
    ) -> None: ...
    def decide(
        self,
        inner: Sequence[float],
        train_loss: float,
        eval_loss: float | None,
        progress: float,
        outer_steps: int,
        path_length: float,
        param_norm: float,
        hyperparameters: Sequence[float],
        start_hyperparameters: Sequence[float],
        register_losses: Sequence[float],
        register_progress: Sequence[float],
    ) -> tuple[
        NDArray[np.float64],
        NDArray[np.float64],
        int,
        NDArray[np.float32],
        NDArray[np.float64],
    ]: ...
    def get_state(self) -> NDArray[np.float64]: ...
    def set_state(self, state: NDArray[np.float64]) -> None: ...
    @property
    def isa(self) -> str: ...
