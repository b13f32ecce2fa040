"""A small diffusion model of Fashion-MNIST: from noise to pictures along straight lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.task import Batch, Scores, Size, Split, Task
from lhopt_fused.evaluation.tasks.fashion import fashion_splits

__all__ = ["Diffusion"]


class _Denoiser(nn.Module):
    """A U-Net of two scales, told how much noise there is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, 2 * width))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, 2 * width)
        self.middle = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Noise minus picture, ``[B, 1, H, W]``, of what lies between them at ``times`` ``[B]``."""
        angles = times[:, None] * torch.pi * 2.0 ** torch.arange(4, device=times.device)
        told = self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        fine = F.silu(self.enter(noisy))
        coarse = F.silu(self.norm(self.down(fine)) + told)
        coarse = coarse + F.silu(self.middle(coarse))
        velocity: torch.Tensor = self.head(F.silu(self.mix(torch.cat([fine, self.up(coarse)], 1))))
        return velocity


class Diffusion(Task):
    """Flow matching (Lipman et al. 2023): the direction from a picture to the noise upon it.

    A batch has pictures, uint8 ``[B, 1, 28, 28]`` or half as wide when small, times from 0 to 1
    ``[B]`` and noise; those of the held-out splits are drawn once and for all. The metric is the
    error of the picture that is found behind the noise.
    """

    name = "diffusion"
    metric = "denoised_squared_error"
    higher_is_better = False

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        small = size == "small"
        training, found = fashion_splits(size, data_dir)
        held_out: dict[Split, Batch] = {
            split: _with_noise(_pictures(batch[0], small), torch.Generator().manual_seed(seed))
            for seed, (split, batch) in enumerate(sorted(found.items()))
        }
        steps, batch_size = (250, 32) if small else (8_000, 128)
        pictures = _pictures(training[0], small)
        super().__init__((pictures,), held_out, steps=steps, batch_size=batch_size)
        self.width = 16 if small else 128

    def make_model(self) -> nn.Module:
        return _Denoiser(self.width)

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        for (pictures,) in super().batches(generator):
            yield _with_noise(pictures, generator)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        velocity, clean, _, noise = self._found(model, batch)
        return F.mse_loss(velocity, noise - clean)

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        velocity, clean, times, noise = self._found(model, batch)
        denoised = torch.lerp(clean, noise, times) - times * velocity
        error = F.mse_loss(denoised, clean).item()
        loss = F.mse_loss(velocity, noise - clean).item()
        return Scores(loss, {"denoised_squared_error": error})

    def _found(self, model: nn.Module, batch: Batch) -> Batch:
        """What the model finds, pictures from -1 to 1, times ``[B, 1, 1, 1]`` and noise."""
        pictures, times, noise = batch
        clean = pictures.float() / 127.5 - 1.0
        spread = times[:, None, None, None]
        return model(torch.lerp(clean, noise, spread), times), clean, spread, noise


def _pictures(images: torch.Tensor, small: bool) -> torch.Tensor:
    return F.avg_pool2d(images.float(), 2).round().byte() if small else images


def _with_noise(pictures: torch.Tensor, generator: torch.Generator) -> Batch:
    times = torch.rand(len(pictures), generator=generator)
    return pictures, times, torch.randn(pictures.shape, generator=generator)
