"""One decision of the policy: the C++ runner beside the same function in eager torch.

``python -m benchmarks.decision``: verify that they agree, then time, on one thread. The runner does
features, network, decision and actions in its one call; "torch, whole decision" is the same, "torch
network alone" is less. Each is timed with its weights in three places:

- warm: the same call over and over, in blocks;
- alternating: after one call of each of the others;
- cold: after 64 MiB have been written to, twice a last-level cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import report
from benchmarks.timing import quartiles, ratios
from lhopt_fused.actions import DEFAULT_ACTION_SPACE as SPACE
from lhopt_fused.ciao import LHOPT_START
from lhopt_fused.policy import (
    FEATURES,
    LearnedPolicy,
    NetworkShape,
    Observation,
    PolicyNetwork,
    RunObservation,
    policy_step,
)
from lhopt_fused.policy.decision import initial_policy_state
from lhopt_fused.types import HYPERPARAMETERS

AGREEMENT = 1e-5  # in the log multipliers; tests/tolerances.py holds the tests to their own
START = {name: float(LHOPT_START[name]) for name in HYPERPARAMETERS}
RUNNER = "runner, whole decision"
STATES = ("warm", "alternating", "cold")
BLOCK = 10  # calls to warm up, and as many that are timed
COLD_EVERY = 5  # rounds; it takes long to empty the caches
LARGEST_CACHE = 32 * 2**20  # bytes of a last-level cache that one core reaches

Calls = dict[str, Callable[[], object]]
Samples = dict[str, list[float]]


def observation() -> RunObservation:
    """An ordinary outer step in the middle of a run."""
    inner = torch.randn(13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, empty = list(START.values()), [float("nan")] * 3
    return RunObservation(inner.tolist(), 1.5, 1.7, 0.5, 64, 0.1, 10.0, start, start, empty, empty)


def batched(one: RunObservation) -> Observation:
    """The same as a batch of one, for torch."""
    numbers = [torch.tensor([value], dtype=torch.float64) for value in one]
    return Observation(*numbers[:3], torch.tensor([True]), *numbers[3:])


def contestants(hidden: int) -> Calls:
    """What is timed; raises AssertionError if runner and torch do not agree first."""
    torch.manual_seed(0)
    network = PolicyNetwork(NetworkShape(len(FEATURES), SPACE.head_sizes, hidden=hidden)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    policy = LearnedPolicy.from_network(
        network, name="random", action_space=SPACE, start_hyperparameters=START
    )
    one = observation()
    many, runner = batched(one), policy.start_run()
    start = initial_policy_state(network, torch.zeros(1, dtype=torch.int64))
    _, decision, features, _ = policy_step(network, SPACE, many, start)
    error = np.abs(runner.decide(one).shifts - decision.shifts[0].numpy()).max()
    assert error <= AGREEMENT, f"runner and torch differ by {error:.2e} in the log multipliers"
    return {
        RUNNER: lambda: runner.decide(one),
        "torch network alone": lambda: network(features, start.lstm),
        "torch, whole decision": lambda: policy_step(network, SPACE, many, start),
    }


def timed(call: Callable[[], object]) -> float:
    """Microseconds of one call."""
    begin = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - begin) / 1e3


def measure(calls: Calls, rounds: int) -> dict[str, Samples]:
    """Microseconds of every call by state of the caches; contestants take turns in every round."""
    swept = torch.zeros(2 * LARGEST_CACHE, dtype=torch.uint8)
    samples: dict[str, Samples] = {state: {name: [] for name in calls} for state in STATES}
    for index in range(rounds):
        names = list(calls)[index % len(calls) :] + list(calls)[: index % len(calls)]
        for name in names:
            block = [timed(calls[name]) for _ in range(2 * BLOCK)]
            samples["warm"][name].append(statistics.median(block[BLOCK:]))
        for name in names:
            samples["alternating"][name].append(timed(calls[name]))
        if index % COLD_EVERY == 0:
            for name in names:
                swept.add_(1)
                samples["cold"][name].append(timed(calls[name]))
    return samples


def rows_of(state: str, samples: Samples) -> Iterator[dict[str, Any]]:
    for name, values in samples.items():
        low, median, high = quartiles(values)
        ratio = quartiles(ratios(values, samples[RUNNER]))[1]
        yield {
            "variant": name,
            "caches": state,
            "median_us": median,
            "quartiles_us": [low, high],
            "ratio": ratio,
        }


def table_of(rows: Sequence[dict[str, Any]], hidden: int) -> Table:
    table = Table(title=f"One decision, {hidden} wide, one thread")
    for heading in ("caches", "variant", "median µs", "quartiles", "to runner"):
        table.add_column(heading, justify="left" if heading in ("caches", "variant") else "right")
    for row in rows:
        low, high = row["quartiles_us"]
        table.add_row(
            row["caches"],
            row["variant"],
            f"{row['median_us']:.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{row['ratio']:.1f}",
        )
    return table


def main(
    rounds: Annotated[int, typer.Option(min=10, help="Times that each gets its turn.")] = 300,
    hidden: Annotated[int, typer.Option(help="Width of the network.")] = 256,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Verify, then time one decision of the policy."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        samples = measure(contestants(hidden), rounds)
    rows = [row for state in STATES for row in rows_of(state, samples[state])]
    Console().print(table_of(rows, hidden))
    report.keep("decision", {"schema": 2, "hidden": hidden, "rows": rows}, folder=out)


if __name__ == "__main__":
    typer.run(main)
