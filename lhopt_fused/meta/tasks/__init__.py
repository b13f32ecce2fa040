"""The inner tasks of meta-training: families of small problems, run in batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lhopt_fused.meta.tasks.addition import AdditionFamily
from lhopt_fused.meta.tasks.base import (
    PRIVILEGED,
    PRIVILEGED_NAMES,
    Split,
    TaskBatch,
    TaskFamily,
)
from lhopt_fused.meta.tasks.clusters import ClustersFamily
from lhopt_fused.meta.tasks.heldout import HELDOUT
from lhopt_fused.meta.tasks.image_cnn import ImageCNNFamily
from lhopt_fused.meta.tasks.image_mlp import ImageMLPFamily
from lhopt_fused.meta.tasks.quadratic import QuadraticFamily
from lhopt_fused.meta.tasks.tabular import TabularFamily
from lhopt_fused.meta.tasks.teacher import TeacherFamily
from lhopt_fused.meta.tasks.text_rnn import TextRNNFamily
from lhopt_fused.meta.tasks.transformer import TransformerFamily
from lhopt_fused.meta.tasks.xor import XorFamily

__all__ = [
    "FAMILIES",
    "HELDOUT",
    "PRIVILEGED",
    "PRIVILEGED_NAMES",
    "Split",
    "TaskBatch",
    "TaskFamily",
]

FAMILIES: Final[Mapping[str, type[TaskFamily]]] = {
    family.name: family
    for family in (
        QuadraticFamily,
        XorFamily,
        AdditionFamily,
        ImageMLPFamily,
        ImageCNNFamily,
        TextRNNFamily,
        TransformerFamily,
        TeacherFamily,
        ClustersFamily,
        TabularFamily,
    )
}
"""The families that policies are trained on, by name."""
