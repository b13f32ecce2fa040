"""Runs a function on several ranks: processes of this machine.

They talk through gloo, or through NCCL where each has a GPU of its own.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_SECONDS = 300  # until a rank is taken to hang
_PRELOADED = ["torch.distributed.fsdp", "torch.distributed.checkpoint", "lhopt_fused"]
_DEVICE = torch.device("cpu")


def device() -> torch.device:
    """Where this rank's tensors are to be."""
    return _DEVICE


def run_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    patience: float = 60.0,
    device: str = "cpu",
) -> list[Any]:
    """What ``function(rank, ranks, *args)`` returns on each rank.

    Args:
        function: of a module that the processes can import.
        ranks: number of processes.
        patience: seconds after which a collective that waits for others fails.
        device: ``"cpu"``, or ``"cuda"`` for a GPU each.

    Raises:
        RuntimeError: a rank failed or died; with its traceback.
    """
    outcomes = Launched(function, ranks, *args, patience=patience, device=device).outcomes()
    failed = [
        f"rank {rank}: {said}" for rank, (is_good, said) in enumerate(outcomes) if not is_good
    ]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in outcomes]


class Launched:
    """``function`` at work on each rank; the arguments are those of :func:`run_ranks`."""

    def __init__(
        self,
        function: Callable[..., Any],
        ranks: int,
        *args: Any,
        patience: float = 60.0,
        device: str = "cpu",
    ) -> None:
        # a process cannot use CUDA if the one that it was forked from has looked for a GPU
        context: Any = multiprocessing.get_context("forkserver" if device == "cpu" else "spawn")
        if device == "cpu":
            context.set_forkserver_preload(_PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
        self._readers = [reader for reader, _ in pipes]
        self._processes = [
            context.Process(
                target=_rank,
                args=(function, rank, ranks, store, patience, device, writer, args),
                daemon=True,
            )
            for rank, (_, writer) in enumerate(pipes)
        ]
        for process, (_, writer) in zip(self._processes, pipes, strict=True):
            process.start()
            writer.close()

    def kill(self, first: int) -> None:
        """With SIGKILL, whatever they are doing: one rank, then the others."""
        for process in (self._processes[first], *self._processes):
            process.kill()

    def outcomes(self) -> list[tuple[bool, Any]]:
        """Wait; for each rank, whether all went well, and what it returned or what went wrong."""
        outcomes = [_outcome(reader) for reader in self._readers]
        for process in self._processes:
            process.join(10)
            process.kill()
        self._folder.cleanup()
        return outcomes


def _outcome(reader: Connection) -> tuple[bool, Any]:
    if not reader.poll(_SECONDS):
        return False, f"no word in {_SECONDS} seconds"
    try:
        outcome: tuple[bool, Any] = pickle.loads(reader.recv_bytes())
    except EOFError:
        return False, "died"
    return outcome


def _rank(
    function: Callable[..., Any],
    rank: int,
    ranks: int,
    store: str,
    patience: float,
    kind: str,
    writer: Connection,
    args: tuple[Any, ...],
) -> None:
    global _DEVICE
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        if kind == "cuda":
            _DEVICE = torch.device("cuda", rank)
            torch.cuda.set_device(_DEVICE)
        dist.init_process_group(
            "nccl" if kind == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=patience),
        )
        # by value: what multiprocessing shares goes with the process
        writer.send_bytes(pickle.dumps((True, function(rank, ranks, *args))))
    except BaseException:
        writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
