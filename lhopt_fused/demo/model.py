"""A small GPT over bytes or tokens: pre-norm blocks, learned positions, tied output."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn
from torch.nn import functional as F

from lhopt_fused.demo.text import InputError

__all__ = ["GPT", "GPTConfig"]


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a :class:`GPT`.

    Raises:
        InputError: a size is not positive, or ``width`` does not split into ``heads``.
    """

    context: int = 128
    width: int = 128
    layers: int = 4
    heads: int = 4
    vocabulary: int = 256

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not isinstance(size, int) or size < 1:
                raise InputError(f"--{field.name}", f"must be an integer >= 1, got {size}")
        if self.width % self.heads:
            raise InputError(
                "--width",
                f"{self.width} does not split into {self.heads} heads; choose a multiple of "
                f"{self.heads} or another --heads",
            )


class _Block(nn.Module):
    """Causal self-attention, then a four times wider layer, each on a normalised residual."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, context, width]
        x = x + self._attend(self.attention_norm(x))
        mixed: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return mixed

    def _attend(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)  # [batch, heads, context, -1]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended: torch.Tensor = self.attention_out(mixed.transpose(1, 2).flatten(-2))
        return attended


class GPT(nn.Module):
    """Model of the next byte, or token; its initial weights follow from ``seed`` alone."""

    def __init__(self, config: GPTConfig, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.token = nn.Embedding(config.vocabulary, config.width)
            self.position = nn.Embedding(config.context, config.width)
            self.blocks = nn.Sequential(*(_Block(config) for _ in range(config.layers)))
            self.norm = nn.LayerNorm(config.width)
            self._init_weights(config)

    def _init_weights(self, config: GPTConfig) -> None:
        """GPT-2's start: small normal weights, smaller where layers add up in the residual."""
        for name, param in self.named_parameters():
            if param.dim() < 2:
                continue
            adds_up = name.endswith(("attention_out.weight", "mlp.2.weight"))
            nn.init.normal_(param, std=0.02 / (2 * config.layers) ** 0.5 if adds_up else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[batch, length, vocabulary]`` of what follows each of ``tokens`` (``int64``)."""
        positions = torch.arange(tokens.shape[-1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        return F.linear(self.norm(self.blocks(x)), self.token.weight)

    def loss(self, windows: torch.Tensor) -> torch.Tensor:
        """Mean nats per token of ``windows`` ``[batch, length + 1]``, each after its past."""
        logits = self(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
