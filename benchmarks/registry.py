"""What is timed and on what: the words that the other modules of the benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from lhopt_fused.kernels import BackendName

__all__ = [
    "Build",
    "Run",
    "Settings",
    "Shape",
    "Unavailable",
    "Variant",
    "Workload",
    "mean_bytes",
    "select",
]

Shape = tuple[int, ...]


class Unavailable(RuntimeError):
    """A peer that is not installed or cannot run on this device; the message says why."""


@dataclass(frozen=True)
class Settings:
    """What every variant of a run is built with."""

    lr: float
    max_norm: float  # for variants that clip by an absolute norm
    backend: BackendName = "auto"
    captured: bool = False  # the step is going to be captured in a CUDA graph


@dataclass(frozen=True)
class Run:
    """One optimizer at work on one set of parameters."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer | None = None


Build = Callable[[list[torch.nn.Parameter], Settings], Run]


@dataclass(frozen=True)
class Variant:
    """One way to do an optimizer step.

    Attributes:
        build: makes it for some parameters.
        reference: the definition it must agree with, built on float64 copies of them.
        bytes_per_element: bytes that the algorithm moves per element of a tensor of a shape;
            of a composition of torch operations, what those read and write.
        peer: the variant that its time is divided by.
        features_reference: where it takes statistics, the definition of its features.
        cached_bytes_per_element: what is left where a tensor stays in the last-level cache.
        dtype: of parameters and gradients.
        tolerance: of the gate, relative to the tensor's largest parameter, element by element.
        period: a sample is the mean of a multiple of so many steps.
        on_request: devices on which it is timed only where it is named, and why.
    """

    name: str
    label: str
    build: Build
    reference: Build
    bytes_per_element: Callable[[Shape], int]
    peer: str
    ours: bool = False
    features_reference: Build | None = None
    cached_bytes_per_element: int | None = None
    dtype: torch.dtype = torch.float32
    tolerance: float = 2e-6
    period: int = 1
    devices: tuple[str, ...] = ("cpu", "cuda")
    capturable: bool = True
    on_request: tuple[str, ...] = ()
    on_request_reason: str = ""


@dataclass(frozen=True)
class Workload:
    """A set of parameter tensors.

    Attributes:
        shapes: tensor shapes by device type; a device that is missing is not run by default.
        quick_shapes: a small set of the same character.
        gate_shapes: what variants are verified on: small and ragged, of the same character.
        steps_per_sample: steps that are timed together, by device type, else one; the fewer
            elements, the more.
        lead_steps: untimed steps before each sample, where the tensors fit in a cache.
    """

    name: str
    label: str
    shapes: dict[str, Sequence[Shape]]
    quick_shapes: Sequence[Shape]
    gate_shapes: Sequence[Shape]
    steps_per_sample: Mapping[str, int] = field(default_factory=dict)
    lead_steps: int = 0

    def on(self, device: str, *, quick: bool) -> Sequence[Shape]:
        """Shapes to time on a device type; those of another one where it has none of its own."""
        if quick:
            return self.quick_shapes
        return self.shapes.get(device) or next(iter(self.shapes.values()))


def mean_bytes(bytes_per_element: Callable[[Shape], int], shapes: Sequence[Shape]) -> float:
    """Bytes per element over all tensors."""
    sizes = [math.prod(shape) for shape in shapes]
    moved = sum(bytes_per_element(shape) * size for shape, size in zip(shapes, sizes, strict=True))
    return moved / sum(sizes)


Named = TypeVar("Named", Variant, Workload)


def select(known: Iterable[Named], names: str | None, what: str) -> list[Named]:
    """Those of ``known`` that a comma-separated list names, or all of them.

    Raises:
        ValueError: a name that is not known; the message lists the known ones.
    """
    by_name = {item.name: item for item in known}
    if names is None:
        return list(by_name.values())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in by_name]:
        raise ValueError(f"no {what} named {', '.join(unknown)}; there are {', '.join(by_name)}")
    return [by_name[name] for name in wanted]
