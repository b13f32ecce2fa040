"""The tasks of the evaluation, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Final

from lhopt_fused.evaluation.task import Size, Task
from lhopt_fused.evaluation.tasks.cartpole import CartPole
from lhopt_fused.evaluation.tasks.diffusion import Diffusion
from lhopt_fused.evaluation.tasks.fashion import FashionAutoencoder, FashionCNN, FashionMLP
from lhopt_fused.evaluation.tasks.language_model import (
    LanguageModel,
    LanguageModelBPE,
    LanguageModelNarrow,
    LanguageModelWide,
)
from lhopt_fused.evaluation.tasks.quadratic import NoisyQuadratic
from lhopt_fused.evaluation.tasks.recommendation import GMF, NeuMF
from lhopt_fused.evaluation.tasks.resnet import ResNet
from lhopt_fused.evaluation.tasks.sentiment import SentimentLSTM, SentimentTransformer
from lhopt_fused.evaluation.tasks.sequences import AdditionRNN, XorRNN
from lhopt_fused.evaluation.tasks.speech import SpeechCTC, SpeechKeyword

__all__ = ["SHORT", "TASKS", "load_task"]

TASKS: Final[dict[str, Callable[[Size, Path | None], Task]]] = {
    kind.name: kind
    for kind in (
        LanguageModelNarrow,
        LanguageModel,
        LanguageModelWide,
        LanguageModelBPE,
        FashionMLP,
        FashionCNN,
        ResNet,
        GMF,
        NeuMF,
        SentimentLSTM,
        SentimentTransformer,
        SpeechKeyword,
        SpeechCTC,
        FashionAutoencoder,
        Diffusion,
        CartPole,
        XorRNN,
        AdditionRNN,
        NoisyQuadratic,
    )
}
"""Every task by its name; they take a size and the folder where the user's data sets are."""

SHORT: Final = (
    *("language_model_narrow", "fashion_mlp", "gmf", "neumf", "autoencoder", "diffusion"),
    *("xor_rnn", "addition_rnn", "noisy_quadratic"),
)
"""Those whose runs take a few seconds on a CPU when small."""


@lru_cache(maxsize=1)
def load_task(name: str, size: Size, data_dir: Path | None) -> Task:
    """A task with its data; the last one is kept, since runs of one task follow one another.

    Raises:
        ValueError: there is no such task.
        DataError: its data is missing or damaged.
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name](size, data_dir)
