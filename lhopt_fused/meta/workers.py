"""Where episodes are run: processes on this machine, or a Ray cluster, behind one interface."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

import torch

__all__ = ["LocalWorkers", "Pending", "RayWorkers", "Workers"]

_T = TypeVar("_T")
_Job = Callable[[], _T]

_MOST_TRIES: Final = 5
_LOST: Final = (
    f"a job lost its worker process {_MOST_TRIES} times; the processes are killed from outside, or "
    "run out of memory: use fewer workers or smaller batches"
)


class Pending(Protocol[_T]):
    """Jobs that have been handed out."""

    def results(self, on_result: Callable[[], None] | None = None) -> list[_T]:
        """Wait for all of them; in the order in which they were handed out.

        Args:
            on_result: called whenever the next one in that order is there.

        Raises:
            RuntimeError: a job lost its worker again and again.
            Exception: what a job raised.
        """


class Workers(Protocol):
    """Runs jobs side by side. A job is a picklable callable without arguments, and may be run again
    when its worker has died, so it must be a pure function."""

    def start(self, jobs: Iterable[_Job[_T]]) -> Pending[_T]:
        """Hand out jobs; returns at once."""

    def close(self) -> None:
        """Stop all workers."""


class _Closing(ABC):
    """Closed at the end of a ``with`` block."""

    @abstractmethod
    def close(self) -> None:
        """Stop all workers."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# ---------------------------------------------------------------------- this machine


def _begin_process() -> None:
    """One thread; Ctrl-C is for the parent to see; and no life after the parent's."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(job: _Job[_T]) -> _T:
    return job()


class _Process:
    """One process that runs one job at a time; another one after it has died."""

    def __init__(self) -> None:
        self._executor = self._new()

    @staticmethod
    def _new() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin_process)

    def run(self, job: _Job[_T]) -> _T:
        for left in reversed(range(_MOST_TRIES)):
            try:
                return self._executor.submit(_run, job).result()
            except BrokenProcessPool as error:
                self._executor.shutdown(wait=False)
                self._executor = self._new()
                if not left:
                    raise RuntimeError(_LOST) from error
        raise AssertionError("unreachable")

    def close(self) -> None:
        self._executor.shutdown(wait=True)


class LocalWorkers(_Closing):
    """Processes on this machine, each with one thread.

    A process that is killed takes only its running job with it, which is run again.

    Args:
        count: number of processes, at least 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"workers is {count}, expected at least 1")
        self._processes: list[_Process] = []
        self._own = threading.local()  # of each thread, its process
        self._threads = ThreadPoolExecutor(count, initializer=self._begin_thread)

    def __enter__(self) -> LocalWorkers:
        return self

    def _begin_thread(self) -> None:
        self._own.process = _Process()
        self._processes.append(self._own.process)

    def _run_elsewhere(self, job: _Job[_T]) -> _T:
        process: _Process = self._own.process
        return process.run(job)

    def start(self, jobs: Iterable[_Job[_T]]) -> Pending[_T]:
        """See :meth:`Workers.start`."""
        return _LocalPending([self._threads.submit(self._run_elsewhere, job) for job in jobs])

    def close(self) -> None:
        """See :meth:`Workers.close`; waits for the running jobs and leaves out the others."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.close()


class _LocalPending(Generic[_T]):
    def __init__(self, futures: list[Future[_T]]) -> None:
        self._futures = futures

    def results(self, on_result: Callable[[], None] | None = None) -> list[_T]:
        return _in_order((future.result for future in self._futures), on_result)


def _in_order(waits: Iterable[Callable[[], _T]], on_result: Callable[[], None] | None) -> list[_T]:
    found = []
    for wait in waits:
        found.append(wait())
        if on_result is not None:
            on_result()
    return found


# ---------------------------------------------------------------------- a cluster


class RayWorkers(_Closing):
    """Workers of a Ray cluster, one core and one thread a job.

    A worker or a machine that dies takes only its running jobs with it: Ray runs them again.

    Args:
        address: of the cluster as ``ray.init`` takes it; None starts one on this machine.
        gpus: how many GPUs a job needs.

    Raises:
        ModuleNotFoundError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """

    def __init__(self, address: str | None = None, gpus: float = 0.0) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Ray is not installed; pip install 'lhopt-fused[ray]', or use local workers"
            ) from error
        self._ray: Any = ray
        if address is not None:
            _check_answers(address)
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        self._remote: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_MOST_TRIES - 1)(
            _run_single_thread
        )

    def __enter__(self) -> RayWorkers:
        return self

    def start(self, jobs: Iterable[_Job[_T]]) -> Pending[_T]:
        """See :meth:`Workers.start`."""
        return _RayPending(self._ray, [self._remote.remote(job) for job in jobs])

    def close(self) -> None:
        """See :meth:`Workers.close`."""
        self._ray.shutdown()


def _check_answers(address: str) -> None:
    """Whether something listens at ``host:port``, which Ray itself takes minutes to find out."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(
            f"no Ray cluster answers at {address} ({error}); start one there with "
            f"`ray start --head --port {port}`, or give 'local'"
        ) from error


def _run_single_thread(job: _Job[_T]) -> _T:
    torch.set_num_threads(1)
    return job()


class _RayPending(Generic[_T]):
    def __init__(self, ray: Any, references: list[Any]) -> None:
        self._ray, self._references = ray, references

    def results(self, on_result: Callable[[], None] | None = None) -> list[_T]:
        waits = (partial(self._ray.get, reference) for reference in self._references)
        try:
            return _in_order(waits, on_result)
        except self._ray.exceptions.WorkerCrashedError as error:
            raise RuntimeError(_LOST) from error
