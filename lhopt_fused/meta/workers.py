"""Where episodes are run: processes on this machine, or a Ray cluster, behind one interface."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import torch

__all__ = ["LocalWorkers", "Pending", "RayWorkers", "Workers"]

_T = TypeVar("_T", covariant=True)
_Job = Callable[[], _T]


class Pending(Protocol[_T]):
    """Jobs that have been handed out."""

    def results(self) -> list[_T]:
        """Wait for all of them; in the order in which they were handed out."""


class Workers(Protocol):
    """Runs jobs side by side. A job is a picklable callable without arguments, and may be run again
    when its worker has died, so it must be a pure function."""

    def start(self, jobs: Iterable[_Job[_T]]) -> Pending[_T]:
        """Hand out jobs; returns at once."""

    def close(self) -> None:
        """Stop all workers."""


def _single_thread() -> None:
    torch.set_num_threads(1)


def _run(job: _Job[_T]) -> _T:
    return job()


class LocalWorkers:
    """Processes on this machine, each with one thread.

    A process that is killed takes only its running jobs with it: they are run again.

    Args:
        count: number of processes, at least 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"workers is {count}, expected at least 1")
        self._count = count
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._count, context, _single_thread)

    def submit(self, job: _Job[_T]) -> Future[_T]:
        """Hand out one job, to a new set of processes if one of them has died."""
        try:
            return self._pool.submit(_run, job)
        except BrokenProcessPool:
            self._pool.shutdown(wait=False)
            self._pool = self._new_pool()
            return self._pool.submit(_run, job)

    def start(self, jobs: Iterable[_Job[_T]]) -> Pending[_T]:
        """See :meth:`Workers.start`."""
        return _LocalPending(self, list(jobs))

    def close(self) -> None:
        """See :meth:`Workers.close`."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> LocalWorkers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _LocalPending(Generic[_T]):
    _MOST_TRIES = 5

    def __init__(self, workers: LocalWorkers, jobs: list[_Job[_T]]) -> None:
        self._workers, self._jobs = workers, jobs
        self._futures = [workers.submit(job) for job in jobs]

    def results(self) -> list[_T]:
        return [self._result(index) for index in range(len(self._jobs))]

    def _result(self, index: int) -> _T:
        for _ in range(self._MOST_TRIES):
            try:
                return self._futures[index].result()
            except BrokenProcessPool:
                self._futures[index] = self._workers.submit(self._jobs[index])
        raise RuntimeError(
            f"a job lost its worker process {self._MOST_TRIES} times; the processes are killed "
            "from outside, or run out of memory: use fewer workers or smaller batches"
        )


class RayWorkers:
    """Workers of a Ray cluster, one core and one thread a job; Ray runs lost jobs again.

    Args:
        address: of the cluster as ``ray.init`` takes it; None starts or finds one.

    Raises:
        ModuleNotFoundError: Ray is not installed.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Ray is not installed; pip install 'lhopt-fused[ray]', or use local workers"
            ) from error
        self._ray: Any = ray
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False)
        self._remote: Any = ray.remote(num_cpus=1, max_retries=-1)(_run_alone)

    def start(self, jobs: Iterable[_Job[_T]]) -> Pending[_T]:
        """See :meth:`Workers.start`."""
        return _RayPending(self._ray, [self._remote.remote(job) for job in jobs])

    def close(self) -> None:
        """See :meth:`Workers.close`."""
        self._ray.shutdown()


def _run_alone(job: _Job[_T]) -> _T:
    _single_thread()
    return job()


class _RayPending(Generic[_T]):
    def __init__(self, ray: Any, references: list[Any]) -> None:
        self._ray, self._references = ray, references

    def results(self) -> list[_T]:
        return list(self._ray.get(self._references))
