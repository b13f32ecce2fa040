"""Workers on this machine: results in order, and what a death costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
from meta.worker_jobs import Fail, Square, begun, is_running, wait_until

from lhopt_fused.meta import workers
from lhopt_fused.meta.workers import LocalWorkers


@pytest.fixture(scope="module")
def two() -> Iterator[LocalWorkers]:
    with LocalWorkers(2) as found:
        yield found


def test_results_come_in_the_order_of_the_jobs(two, tmp_path):
    told: list[None] = []
    pending = two.start([Square(number, tmp_path) for number in range(7)])
    assert pending.results(lambda: told.append(None)) == [0, 1, 4, 9, 16, 25, 36]
    assert len(told) == 7


def test_two_lots_may_be_out_at_once(two, tmp_path):
    first = two.start([Square(number, tmp_path) for number in range(3)])
    second = two.start([Square(number, tmp_path) for number in range(3, 5)])
    assert second.results() == [9, 16]
    assert first.results() == [0, 1, 4]


def test_no_jobs_are_no_results(two):
    assert two.start([]).results() == []


def test_a_killed_process_loses_only_its_running_job(two, tmp_path):
    jobs = [Square(number, tmp_path, deaths=int(number == 1)) for number in range(6)]
    assert two.start(jobs).results() == [0, 1, 4, 9, 16, 25]
    assert begun(tmp_path) == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1}


def test_a_job_that_kills_every_process_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "0").touch()  # so that it waits for no other job
    monkeypatch.setattr(workers, "_MOST_TRIES", 2)
    with LocalWorkers(1) as one, pytest.raises(RuntimeError, match="lost its worker process"):
        one.start([Square(3, tmp_path, deaths=99)]).results()
    assert begun(tmp_path)[3] == 2


def test_what_a_job_raises_is_raised(two, tmp_path):
    pending = two.start([Square(1, tmp_path), Fail()])
    with pytest.raises(KeyError, match="what went wrong"):
        pending.results()
    assert two.start([Square(2, tmp_path)]).results() == [4]


def test_at_least_one():
    with pytest.raises(ValueError, match="workers is 0"):
        LocalWorkers(0)


def test_processes_end_with_a_parent_that_is_killed():
    """Or they would hold their memory for ever."""
    code = """
import os, signal
from lhopt_fused.meta.workers import LocalWorkers
if __name__ == "__main__":
    workers = LocalWorkers(1)
    print(workers.start([os.getpid]).results()[0], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert parent.returncode == -9
    child = int(parent.stdout)
    wait_until(lambda: not is_running(child))
    assert not is_running(child)
