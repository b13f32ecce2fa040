"""Restart registers: places for a whole training state, to go back to or to swap with.

A training state is every tensor that an inner step reads or writes: parameters, moments, running
norms. Hyperparameters are not part of it; a policy goes on moving them.

On disk, a register is a safetensors file with a checksum of each tensor. A file is replaced as a
whole, never changed, and belongs to one object: names hold a random number, so that runs can share
a folder. What lasts is :meth:`RestartRegisters.state_dict`; the files go with the object.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import uuid
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import safetensors
import torch
from safetensors.torch import save_file

__all__ = ["RegisterFileError", "RestartRegisters", "state_bytes"]

_CHECKSUMS: Final = "crc32"

_State = Mapping[str, torch.Tensor]


class RegisterFileError(OSError):
    """A register cannot be written, or is gone or damaged; the message names it and its file."""


class RestartRegisters:
    """Copies of training states in host memory (pinned for CUDA tensors) or in files.

    Each register takes :func:`state_bytes` once it is filled; a file takes twice as much while it
    is replaced.

    Args:
        count: number of registers, >= 0.
        folder: keep them in files there instead of in memory; made if it is not there.

    Attributes:
        folder: where the files are; None in memory.
        losses: train loss that was saved with each register, NaN where it is empty.
        progress: share of the run at which each was saved, NaN where it is empty.

    Raises:
        ValueError: ``count`` is something else, or there is a folder for no registers.
        RegisterFileError: the folder cannot be written to.
    """

    def __init__(self, count: int, folder: str | os.PathLike[str] | None = None) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"restart_registers must be a number >= 0, got {count!r}")
        if folder is not None and count == 0:
            raise ValueError(
                f"register_folder is {os.fspath(folder)!r}, but restart_registers is 0; say how "
                "many there are to be, or leave the folder out"
            )
        self.losses = [math.nan] * count
        self.progress = [math.nan] * count
        self._held: list[dict[str, torch.Tensor] | None] = [None] * count
        self._filled = [False] * count
        self.folder = None if folder is None else _writable(Path(folder))
        self._key = uuid.uuid4().hex
        if self.folder is not None:
            paths = [self._path(index) for index in range(count)]
            weakref.finalize(self, _remove, paths, os.getpid())

    def __len__(self) -> int:
        return len(self._filled)

    def save(self, index: int, state: _State, loss: float, progress: float) -> None:
        """Copy ``state`` into register ``index``; bit-exact.

        Raises:
            IndexError: there is no such register.
            RegisterFileError: there is no room on the disk; the register is as it was.
        """
        self._check(index)
        if self.folder is not None:
            self._write(index, state)
        else:
            held = self._held[index]
            if held is None or not _can_hold(held, state):
                held = {name: _host_like(value) for name, value in state.items()}
            for name, value in state.items():
                held[name].copy_(value)
            self._held[index] = held
        self._filled[index] = True
        self.losses[index], self.progress[index] = loss, progress

    def load(self, index: int, state: _State) -> bool:
        """Copy register ``index`` back into ``state``, in place; False if it is empty.

        Raises:
            IndexError: there is no such register.
            ValueError: it holds the state of other tensors.
            RegisterFileError: its file is gone or damaged.
            Nothing has been written then.
        """
        self._check(index)
        if not self._filled[index]:
            return False
        held = self._read_for(index, state)
        for name, value in state.items():
            value.copy_(held[name])
        return True

    def swap(self, index: int, state: _State, loss: float, progress: float) -> bool:
        """Exchange register ``index`` with ``state``; an empty register is just saved to.

        Returns:
            Whether ``state`` has changed.

        Raises:
            As :meth:`save` and :meth:`load`; nothing has been written then.
        """
        self._check(index)
        if not self._filled[index]:
            self.save(index, state, loss, progress)
            return False
        held = self._read_for(index, state)
        if self.folder is not None:
            self._write(index, state)  # a new file: what has been read stays
            for name, value in state.items():
                value.copy_(held[name])
        else:
            for name, value in state.items():  # one by one: room for one tensor is enough
                current = value.detach().clone()
                value.copy_(held[name])
                held[name].copy_(current)
        self.losses[index], self.progress[index] = loss, progress
        return True

    # ------------------------------------------------------------------ saving

    def state_dict(self) -> dict[str, Any]:
        """Contents as tensors and plain values; the tensors of files as well.

        ``"held"`` has them by the register's number, as a string, for those that are filled.

        Raises:
            RegisterFileError: a file is gone or damaged.
        """
        held = {str(i): self._read(i) for i, filled in enumerate(self._filled) if filled}
        return {"losses": list(self.losses), "progress": list(self.progress), "held": held}

    def check(self, state: Mapping[str, Any]) -> None:
        """Refuse what :meth:`load_state_dict` does not take.

        Raises:
            ValueError: it is of another number of registers, or has lost what they held.
        """
        progress = state["progress"]
        if len(progress) != len(self):
            raise ValueError(
                f"the state dict has {len(progress)} restart registers, the optimizer "
                f"{len(self)}; build it with restart_registers={len(progress)}"
            )
        filled = {str(index) for index, at in enumerate(progress) if not math.isnan(at)}
        if filled != set(state["held"]):
            raise ValueError(
                f"the state dict has the tensors of the restart registers {sorted(state['held'])}, "
                f"but {sorted(filled)} were filled; where rank 0 alone has loaded it, load it on "
                "every rank: torch broadcasts no tensors that the other optimizers lack"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, into memory or files as it is here.

        Raises:
            ValueError: :meth:`check` refuses it; nothing has changed.
            RegisterFileError: there is no room on the disk.
        """
        self.check(state)
        self._filled = [False] * len(self)
        for index, held in state["held"].items():
            self.save(int(index), held, 0.0, 0.0)
        self.losses, self.progress = list(state["losses"]), list(state["progress"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies have contents of their own, in files of their own."""
        return {"count": len(self), "folder": self.folder, "contents": self.state_dict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        RestartRegisters.__init__(self, state["count"], state["folder"])
        self.load_state_dict(state["contents"])

    # ------------------------------------------------------------------ files

    def _read_for(self, index: int, state: _State) -> dict[str, torch.Tensor]:
        held = self._read(index)
        if _kinds(held) != _kinds(state):
            raise ValueError(
                f"restart register {index} holds the state of other tensors than the optimizer "
                "steps now; parameters that join later or change their dtype cannot be restarted"
            )
        return held

    def _read(self, index: int) -> dict[str, torch.Tensor]:
        if self.folder is None:
            held = self._held[index]
            assert held is not None
            return held
        path = self._path(index)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                checksums = json.loads(file.metadata()[_CHECKSUMS])
                loaded = {name: file.get_tensor(name) for name in checksums}
        except FileNotFoundError:
            raise RegisterFileError(
                f"restart register {index} is gone: something has removed its file {path}; leave "
                "the register_folder alone while a run uses it, and resume from a checkpoint"
            ) from None
        except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
            raise RegisterFileError(_damaged(index, path, str(error))) from None
        for name, value in loaded.items():
            if _checksum(value) != checksums[name]:
                raise RegisterFileError(_damaged(index, path, f"{name} has changed"))
        return loaded

    def _write(self, index: int, state: _State) -> None:
        """Replace the file of a register as a whole, or leave it as it is."""
        assert self.folder is not None
        path = self._path(index)
        host = {name: _own(value.detach().cpu()) for name, value in state.items()}
        partial = path.with_suffix(".partial")
        try:
            _check_room(self.folder, state_bytes(host))
            checksums = {name: _checksum(value) for name, value in host.items()}
            save_file(host, partial, {_CHECKSUMS: json.dumps(checksums)})
            partial.replace(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise RegisterFileError(
                f"restart register {index} takes {state_bytes(host)} bytes that cannot be written "
                f"to {path}: {error}; make room, or give another register_folder"
            ) from error
        finally:
            partial.unlink(missing_ok=True)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"register_{index}.{self._key}.safetensors"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"there is no restart register {index}; there are {len(self)}")


def state_bytes(state: _State) -> int:
    """Bytes that a register with this state takes."""
    return sum(value.nbytes for value in state.values())


def _kinds(state: _State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (value.shape, value.dtype) for name, value in state.items()}


def _can_hold(held: _State, state: _State) -> bool:
    return _kinds(held) == _kinds(state) and all(
        held[name].is_pinned() or not value.is_cuda for name, value in state.items()
    )


def _host_like(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)


def _own(value: torch.Tensor) -> torch.Tensor:
    """``value`` without others in its memory, which would be written along."""
    alone = value.untyped_storage().nbytes() == value.nbytes and value.is_contiguous()
    return value if alone else value.clone(memory_format=torch.contiguous_format)


def _checksum(value: torch.Tensor) -> int:
    return zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data)


def _damaged(index: int, path: Path, problem: str) -> str:
    return f"restart register {index} is damaged: {path}: {problem}; resume from a checkpoint"


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{free} bytes are free there")


def _writable(folder: Path) -> Path:
    """The folder, made if need be, once a file has been written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RegisterFileError(
            f"register_folder {folder} cannot be written to: {error.strerror}; give a folder that "
            "can, or leave it out to keep restart registers in memory"
        ) from error
    return folder.absolute()


def _remove(paths: list[Path], owner: int) -> None:
    if os.getpid() == owner:  # a child process that was forked is not the one
        for path in paths:
            path.unlink(missing_ok=True)
