"""A PyTorch optimizer that measures itself at the speed of a fused kernel.

Names are loaded when they are first asked for, so that ``lhopt --help`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lhopt_fused.adamw import AdamW
    from lhopt_fused.ciao import CIAO
    from lhopt_fused.lhopt import LHOPT
    from lhopt_fused.offload import HostOffload
    from lhopt_fused.release import GradientRelease
    from lhopt_fused.types import (
        EXTRA_FEATURES,
        HYPERPARAMETERS,
        INNER_FEATURES,
        BackendUnavailableError,
        NonFiniteGradientError,
    )

__version__ = "0.1.0"

__all__ = [
    "CIAO",
    "EXTRA_FEATURES",
    "HYPERPARAMETERS",
    "INNER_FEATURES",
    "LHOPT",
    "AdamW",
    "BackendUnavailableError",
    "GradientRelease",
    "HostOffload",
    "NonFiniteGradientError",
    "__version__",
]

_MODULES = {
    "AdamW": "adamw",
    "CIAO": "ciao",
    "GradientRelease": "release",
    "HostOffload": "offload",
    "LHOPT": "lhopt",
}  # the others are in types


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'types')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
