"""Noisy quadratics: a random spectrum over decades, rotated, with noise in the gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from lhopt_fused.meta.tasks.base import Split, TaskFamily
from lhopt_fused.meta.tasks.seeded import (
    SeededTasks,
    architecture_random,
    log_uniform,
    normal_numbers,
    step_normals,
    task_seeds,
    uniform_numbers,
)

__all__ = ["QuadraticFamily", "QuadraticTasks"]

_HELD_OUT = 64  # centres in each held-out split


class QuadraticTasks(SeededTasks):
    """``|A (x - c)|^2 / 2`` in the mean over noisy centres c, plus a floor.

    Args:
        seeds: int64 ``[R]``.
        shapes: of the parameter tensors, whose elements together are x.
    """

    def __init__(self, seeds: torch.Tensor, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.size = sum(math.prod(shape) for shape in shapes.values())
        numbers = uniform_numbers(seeds, 0, 4)
        table = {
            "decades": 4.0 * numbers[:, 0],  # of the spectrum
            "noise": 10.0 ** (-2.0 + 1.7 * numbers[:, 1]),  # of a centre, relative to the scale
            "scale": 10.0 ** (-1.5 + 2.0 * numbers[:, 2]),  # of a coordinate
            "floor": 10.0 ** (-4.0 + 3.0 * numbers[:, 3]),  # of the loss, which starts near 1
        }
        table |= self._surface(seeds, table)
        rows = {name: value.to(torch.float32) for name, value in table.items()}
        super().__init__("quadratic", seeds, rows)

    def _surface(
        self, seeds: torch.Tensor, table: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Root A of the curvature, starting point, true centre and the held-out ones."""
        size = self.size
        rotation = torch.linalg.qr(normal_numbers(seeds, 1, size * size).view(-1, size, size))[0]
        spectrum = 10.0 ** (-table["decades"][:, None] * uniform_numbers(seeds, 2, size))
        spectrum = spectrum / spectrum.mean(dim=1, keepdim=True)
        scale = table["scale"][:, None]
        root = rotation * (spectrum.sqrt() / (scale * math.sqrt(size)))[:, None, :]
        centre = scale * normal_numbers(seeds, 3, size)
        noise = normal_numbers(seeds, 4, 2 * _HELD_OUT * size).view(-1, 2, _HELD_OUT, size)
        spread = (scale * table["noise"][:, None])[..., None, None]
        return {
            "root": root,  # [R, n, n]: rows are coordinates, columns are axes
            "start": scale * normal_numbers(seeds, 5, size),  # [R, n]
            "centre": centre,  # [R, n]
            "held_out": centre[:, None, None] + spread * noise,  # [R, 2, _HELD_OUT, n]
        }

    def init(self) -> dict[str, torch.Tensor]:
        """Starts as far from the centre as the centre is from zero."""
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = torch.split(self.table["start"], sizes, dim=1)
        return {
            name: part.reshape(self.runs, *shape).clone()
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _losses(self, params: Mapping[str, torch.Tensor], centres: torch.Tensor) -> torch.Tensor:
        """Mean loss over ``centres``, float32 ``[R, K, n]``."""
        flat = [params[name].reshape(self.runs, -1) for name in self.shapes]
        away = torch.bmm(torch.cat(flat, dim=1)[:, None] - centres, self.table["root"])
        return 0.5 * away.square().sum(dim=2).mean(dim=1) + self.table["floor"]

    def train_loss(self, params: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        """The loss around one noisy centre."""
        spread = self.table["noise"] * self.table["scale"]
        centres = torch.addcmul(self.table["centre"], spread[:, None], self.drawn(step))
        return self._losses(params, centres[:, None])

    def eval_loss(self, params: Mapping[str, torch.Tensor], split: Split) -> torch.Tensor:
        """The mean loss over the centres of a held-out split."""
        return self._losses(params, self.table["held_out"][:, ("eval", "report").index(split)])

    def draw(self, chunk: int) -> torch.Tensor:
        """Noise of the centres, float32 ``[CHUNK, R, n]``."""
        return step_normals(self.seeds, chunk, self.size).to(torch.float32)

    def numbers(self) -> dict[str, float | torch.Tensor]:
        """Size, decades of curvature, noise and scale."""
        return {
            "log_parameters": math.log(self.size),
            "log_curvature": self.table["decades"] * math.log(10.0),
            "gradient_noise": self.table["noise"],
            "log_initial_scale": self.table["scale"].log(),
            "squared_error": 1.0,
        }


class QuadraticFamily(TaskFamily):
    """Quadratics of 8 to 48 coordinates in one to three tensors, matrices and vectors.

    A batch shares the shapes. Each task has its own spectrum (log-uniform over 0 to 4 decades),
    rotation, scale of the coordinates (0.03 to 3), noise (0.01 to 0.5 of the scale) and floor
    (1e-4 to 0.1, where the loss starts near 1).
    """

    name = "quadratic"

    def sample(self, seed: int, runs: int, device: torch.device | str = "cpu") -> QuadraticTasks:
        """Draw the shapes and the tasks; see :meth:`TaskFamily.sample`."""
        seeds = task_seeds(seed, runs, device)
        generator = architecture_random(self.name, seed)
        size = round(log_uniform(generator, 8, 48))
        shapes: dict[str, tuple[int, ...]] = {}
        for index in range(generator.randint(1, 3)):
            rows = generator.choice((1, 2, 4))
            columns = size // (3 * rows)
            if columns > 1:
                shapes[f"matrix_{index}"] = (rows, columns)
        rest = size - sum(math.prod(shape) for shape in shapes.values())
        shapes |= {"vector": (rest,)} if rest else {}
        return QuadraticTasks(seeds, shapes)
