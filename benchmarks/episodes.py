"""Meta-training episodes per hour: ``python -m benchmarks.episodes``.

An episode is 300 inner steps of a small MLP with features at every fourth, 20 decisions of a
policy, and its reward, whose baseline is counted in and shared by the runs of a task.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import report
from lhopt_fused.meta.config import START_HYPERPARAMETERS, MetaConfig
from lhopt_fused.meta.control import HandControl
from lhopt_fused.meta.jobs import Collect, make_critic, make_network, pack
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.workers import LocalWorkers

STEPS, DECISIONS = 300, 20
_CONTROL = HandControl(0.03, "linear")


def main(
    family: Annotated[str, typer.Option(help="Family of the tasks.")] = "image_mlp",
    tasks: Annotated[int, typer.Option(help="Distinct tasks in a batch.")] = 16,
    repeats: Annotated[int, typer.Option(help="Runs of each.")] = 16,
    batches: Annotated[int, typer.Option(help="Batches that are timed, each of other tasks.")] = 16,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = os.cpu_count() or 1,
    device: Annotated[str, typer.Option(help="Where the inner runs are.")] = "cpu",
) -> None:
    """Time the collection of episodes, all workers at once."""
    config = replace(MetaConfig("throughput"), device=device)
    networks = pack(make_network(config)), pack(make_critic(config))

    def jobs(first: int) -> list[Collect]:
        settings = [
            Setting(family, first + index, tasks, repeats, STEPS, DECISIONS + 1)
            for index in range(batches)
        ]
        return [
            Collect(config, s, None, START_HYPERPARAMETERS, _CONTROL, *networks, 0)
            for s in settings
        ]

    with LocalWorkers(workers) as pool:
        pool.start(jobs(10**6)[:workers]).results()  # imports, data sets, first calls
        seconds = []
        for part in range(3):
            began = time.perf_counter()
            pool.start(jobs(part * batches)).results()
            seconds.append(time.perf_counter() - began)
    episodes = batches * tasks * repeats
    per_hour = [3600 * episodes / value for value in seconds]
    row = {
        "family": family,
        "inner_steps": STEPS,
        "decisions": DECISIONS,
        "workers": workers,
        "tasks": tasks,
        "repeats": repeats,
        "episodes_per_hour": statistics.median(per_hour),
        "all": per_hour,
    }
    console = Console(highlight=False)
    console.print(
        f"{family}: {row['episodes_per_hour']:,.0f} episodes an hour with {workers} processes "
        f"(from {min(per_hour):,.0f} to {max(per_hour):,.0f})"
    )
    report.keep("episodes", {"schema": 1, "rows": [row]}, torch.device(device))


if __name__ == "__main__":
    typer.run(main)
