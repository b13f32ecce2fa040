"""A PyTorch optimizer that measures itself at the speed of a fused kernel."""

from lhopt_fused.adamw import AdamW
from lhopt_fused.ciao import CIAO
from lhopt_fused.lhopt import LHOPT
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
    "NonFiniteGradientError",
    "__version__",
]
