"""Doing many runs, in several processes, so that nothing is done twice and nothing is lost."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from lhopt_fused import __version__
from lhopt_fused.evaluation.optimizers import CONTENDERS, contender_version
from lhopt_fused.evaluation.plan import Plan
from lhopt_fused.evaluation.rows import Circumstances, Row
from lhopt_fused.evaluation.run import PROTOCOL, RunResult, RunSpec, run
from lhopt_fused.evaluation.store import Store
from lhopt_fused.evaluation.task import Size
from lhopt_fused.evaluation.tasks import load_task
from lhopt_fused.stopping import StopRequest

__all__ = ["Campaign", "WorkerDiedError"]


class WorkerDiedError(Exception):
    """A process that did runs was killed."""


class Campaign:
    """Runs whose results go into a store.

    Args:
        store: where results go.
        data_dir: where data sets are.
        device: where models are.
        workers: processes; with one, runs are done in this process.
        stop: asked between runs whether to go on.
    """

    def __init__(
        self,
        store: Store,
        data_dir: Path | None,
        device: str,
        workers: int,
        stop: StopRequest | None = None,
    ) -> None:
        self.store, self.data_dir, self.device = store, data_dir, device
        self.workers = workers
        self.stop = stop if stop is not None else StopRequest()

    def circumstances(self, spec: RunSpec) -> Circumstances:
        """What else the result of a run depends on.

        Raises:
            DataError, ContenderError: its data or its optimizer is missing.
        """
        versions = {
            "lhopt-fused": __version__,
            "protocol": PROTOCOL,
            "torch": torch.__version__,
        }
        package = CONTENDERS[spec.optimizer].package
        if package is not None:
            versions[package] = contender_version(spec.optimizer)
        name = torch.cuda.get_device_name() if self.device.startswith("cuda") else self.device
        digest = _digest(spec.task, spec.size, self.data_dir)
        return Circumstances(digest, json.dumps(versions, sort_keys=True), name)

    def missing(self, specs: Sequence[RunSpec]) -> list[RunSpec]:
        """The runs that are not in the store, task by task, each in random order.

        The order lets several commands share a store without doing the same at the same time.
        """
        found = [spec for spec in specs if (spec, self.circumstances(spec)) not in self.store]
        random.shuffle(found)
        tasks = list(dict.fromkeys(spec.task for spec in specs))
        return sorted(found, key=lambda spec: tasks.index(spec.task))

    def known(self, plan: Plan) -> list[Row]:
        """The rows of a plan's tasks, size and seeds that were made as they would be now."""
        return [
            row
            for row in self.store.rows()
            if row.spec.task in plan.tasks
            and (row.spec.size == plan.size and row.spec.seed < plan.seeds)
            and self.circumstances(row.spec) == row.circumstances
        ]

    def run(self, specs: Sequence[RunSpec], on_done: Callable[[RunSpec], None]) -> bool:
        """Do runs, those of a task one after another.

        Args:
            specs: what is run, unless it is in the store by the time that its turn comes.
            on_done: called after each.

        Returns:
            Whether all are done; False where asked to stop.

        Raises:
            StoreError: a result cannot be written.
            WorkerDiedError: a process was killed; what others were doing is lost, no more.
        """
        waiting = list(reversed(specs))
        underway: dict[Future[RunResult], RunSpec] = {}
        try:
            with self._executor() as executor:
                while underway or (waiting and not self.stop.is_set):
                    while waiting and len(underway) < self.workers and not self.stop.is_set:
                        spec = waiting.pop()
                        if (spec, self.circumstances(spec)) in self.store:
                            on_done(spec)
                            continue
                        underway[executor.submit(run, spec, self.data_dir, self.device)] = spec
                    for future in wait(underway, return_when=FIRST_COMPLETED).done:
                        spec = underway.pop(future)
                        self.store.add(spec, self.circumstances(spec), future.result())
                        on_done(spec)
        except BrokenProcessPool as error:
            raise WorkerDiedError(
                "a process that did runs was killed, perhaps for want of memory; the same command "
                "goes on from here, with fewer --workers if it happens again"
            ) from error
        return not waiting

    @contextmanager
    def _executor(self) -> Iterator[Executor]:
        if self.workers == 1:
            yield _Here()
            return
        context = multiprocessing.get_context("spawn")
        pool = _Pool(self.workers, mp_context=context, initializer=_begin_worker)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    """Processes that never hear of Ctrl-C, from their first moment; it is for this one."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # they inherit it
        try:
            return super().submit(fn, *args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Here(Executor):
    """Does what is asked at once, in this process."""

    def submit(self, fn, /, *args, **kwargs):  # type: ignore[no-untyped-def]
        future: Future[RunResult] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def _begin_worker() -> None:
    torch.set_num_threads(1)


@cache
def _digest(task: str, size: Size, data_dir: Path | None) -> str:
    return load_task(task, size, data_dir).digest
