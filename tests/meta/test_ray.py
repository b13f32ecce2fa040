"""Workers of a Ray cluster of two nodes, both on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from meta.runs import Inline, outcome, same, trained
from meta.worker_jobs import Fail, Hold, Square, begun, is_running, wait_until

from lhopt_fused.meta.workers import RayWorkers

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the library's own are none of ours
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and one more node, with one core each; their processes find these tests."""
    import ray
    from ray.cluster_utils import Cluster

    path = pytest.MonkeyPatch()
    path.setenv("PYTHONPATH", str(Path(__file__).parent.parent), prepend=os.pathsep)
    head = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    found.second = found.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    yield found
    ray.shutdown()
    found.shutdown()
    path.undo()


@pytest.fixture(scope="module")
def two(cluster) -> Iterator[RayWorkers]:
    with RayWorkers(cluster.address) as workers:
        yield workers


def test_a_training_is_the_same_as_here(two, tmp_path):
    trained(tmp_path / "ray", two, "updates=3")
    trained(tmp_path / "here", Inline(), "updates=3")
    ray, here = outcome(tmp_path / "ray"), outcome(tmp_path / "here")
    assert same(ray, here)


def test_a_killed_process_loses_only_its_running_job(two, tmp_path):
    jobs = [Square(number, tmp_path, deaths=int(number == 1)) for number in range(6)]
    told: list[None] = []
    assert two.start(jobs).results(lambda: told.append(None)) == [0, 1, 4, 9, 16, 25]
    assert begun(tmp_path) == {0: 1, 1: 2, 2: 1, 3: 1, 4: 1, 5: 1}
    assert len(told) == 6


def test_what_a_job_raises_is_raised(two):
    with pytest.raises(KeyError, match="what went wrong"):
        two.start([Fail()]).results()


def test_an_address_without_a_cluster_is_an_error():
    with pytest.raises(ConnectionError, match=r"no Ray cluster answers at 127\.0\.0\.1:1 "):
        RayWorkers("127.0.0.1:1")


def test_a_killed_node_loses_only_its_running_job(cluster, two, tmp_path):
    import ray

    logging.getLogger("ray").setLevel(logging.CRITICAL)
    assert len(ray.nodes()) == 2
    folder = tmp_path / "jobs"
    folder.mkdir()
    pending = two.start([Hold(number, folder) for number in range(4)])
    wait_until(lambda: len(list(tmp_path.glob("process-*"))) == 2)
    processes = [int(path.name.partition("-")[2]) for path in tmp_path.glob("process-*")]
    cluster.remove_node(cluster.second, allow_graceful=False)
    wait_until(lambda: not all(map(is_running, processes)))
    (tmp_path / "go").touch()
    assert pending.results() == [0, 1, 4, 9]
    assert sorted(begun(folder).values()) == [1, 1, 1, 2]
