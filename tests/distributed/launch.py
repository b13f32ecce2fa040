"""Runs a function on several ranks: processes of this machine that talk through gloo."""

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


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, patience: float = 60.0
) -> list[Any]:
    """What ``function(rank, ranks, *args)`` returns on each rank.

    Args:
        function: of a module that the processes can import.
        ranks: number of processes.
        patience: seconds after which a collective that waits for others fails.

    Raises:
        RuntimeError: a rank failed or died; with its traceback.
    """
    outcomes = start_ranks(function, ranks, *args, patience=patience)()
    failed = [
        f"rank {rank}: {text}" for rank, (is_good, text) in enumerate(outcomes) if not is_good
    ]
    if failed:
        raise RuntimeError("\n".join(failed))
    return [value for _, value in outcomes]


def start_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, patience: float = 60.0
) -> Callable[[], list[tuple[bool, Any]]]:
    """Start ``function`` on each rank; the result waits for them.

    It returns for each rank whether all went well, and what it returned or what went wrong.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    folder = tempfile.TemporaryDirectory()
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    processes = [
        context.Process(
            target=_rank,
            args=(function, rank, ranks, str(Path(folder.name) / "store"), patience, pipe[1], args),
            daemon=True,
        )
        for rank, pipe in enumerate(pipes)
    ]
    for process, (_, writer) in zip(processes, pipes, strict=True):
        process.start()
        writer.close()

    def wait() -> list[tuple[bool, Any]]:
        outcomes = [_outcome(reader) for reader, _ in pipes]
        for process in processes:
            process.join(10)
            process.kill()
        folder.cleanup()
        return outcomes

    return wait


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
    writer: Connection,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=patience),
        )
        # by value: what multiprocessing shares goes with the process
        writer.send_bytes(pickle.dumps((True, function(rank, ranks, *args))))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        writer.send_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
