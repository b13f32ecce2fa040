"""Restart registers: places for a whole training state, to go back to or to swap with.

A training state is every tensor that an inner step reads or writes: parameters, moments, running
norms. Hyperparameters are not part of it; a policy goes on moving them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["RestartRegisters"]


class RestartRegisters:
    """Copies of training states in host memory (pinned for CUDA tensors) or in files.

    Args:
        count: number of registers.
        folder: keep them in files there instead of in memory.

    Attributes:
        losses: train loss that was saved with each register, NaN where it is empty.
        progress: share of the run at which each was saved, NaN where it is empty.
    """

    def __init__(self, count: int, folder: Path | None = None) -> None:
        self.losses = [math.nan] * count
        self.progress = [math.nan] * count
        self._folder = folder
        self._held: list[dict[str, torch.Tensor] | None] = [None] * count
        self._filled = [False] * count

    def __len__(self) -> int:
        return len(self._filled)

    def save(
        self, index: int, state: Mapping[str, torch.Tensor], loss: float, progress: float
    ) -> None:
        """Copy ``state`` into register ``index``; bit-exact.

        Raises:
            IndexError: there is no such register.
        """
        self._check(index)
        if self._folder is not None:
            host = {name: value.detach().cpu() for name, value in state.items()}
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(host, self._path(index))
        else:
            held = self._held[index]
            if held is None or held.keys() != state.keys():
                held = {name: _host_like(value) for name, value in state.items()}
            for name, value in state.items():
                held[name].copy_(value)
            self._held[index] = held
        self._filled[index] = True
        self.losses[index], self.progress[index] = loss, progress

    def load(self, index: int, state: Mapping[str, torch.Tensor]) -> bool:
        """Copy register ``index`` back into ``state``, in place; False if it is empty.

        Raises:
            IndexError: there is no such register.
            ValueError: it holds the state of other tensors; nothing has been written.
        """
        self._check(index)
        if not self._filled[index]:
            return False
        held = self._read(index)
        if {n: v.shape for n, v in held.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError(
                f"restart register {index} holds the state of other tensors than the optimizer "
                "steps now; parameters that join later cannot be restarted"
            )
        for name, value in state.items():
            value.copy_(held[name])
        return True

    def swap(
        self, index: int, state: Mapping[str, torch.Tensor], loss: float, progress: float
    ) -> bool:
        """Exchange register ``index`` with ``state``; an empty register is just saved to.

        Returns:
            Whether ``state`` has changed.
        """
        self._check(index)
        current = {name: value.detach().clone() for name, value in state.items()}
        changed = self.load(index, state)
        self.save(index, current, loss, progress)
        return changed

    def state_dict(self) -> dict[str, Any]:
        """Contents as tensors and plain values."""
        held = [self._read(i) if filled else None for i, filled in enumerate(self._filled)]
        return {"losses": list(self.losses), "progress": list(self.progress), "held": held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of another number of registers.
        """
        if len(state["held"]) != len(self):
            raise ValueError(
                f"the checkpoint has {len(state['held'])} restart registers, the optimizer "
                f"{len(self)}; build it with restart_registers={len(state['held'])}"
            )
        for index, held in enumerate(state["held"]):
            if held is not None:
                self.save(index, held, 0.0, 0.0)
            self._filled[index] = held is not None
        self.losses, self.progress = list(state["losses"]), list(state["progress"])

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        if self._folder is None:
            held = self._held[index]
            assert held is not None
            return held
        loaded: dict[str, torch.Tensor] = torch.load(self._path(index), weights_only=True)
        return loaded

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"register_{index}.pt"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no restart register {index}; there are {len(self)}")


def _host_like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
