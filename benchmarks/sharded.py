"""What statistics cost where ranks share a model: FSDP2 on processes of this machine.

``python -m benchmarks.sharded``: a GPT under ``fully_shard`` is trained by the same optimizer with
statistics and without, which take turns step by step. What is verified first: statistics change no
bit of the parameters, and they are those of an optimizer over the whole model. Timed are the whole
training step and ``optimizer.step()`` in it; of all ranks, the slowest counts.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks import report
from benchmarks.gate import GateError, compare_features
from benchmarks.timing import quartiles, ratios, rotated, wait
from lhopt_fused import CIAO, AdamW
from lhopt_fused.demo.model import GPT, GPTConfig
from lhopt_fused.optimizer import MeasuredOptimizer

OPTIMIZERS: Final[dict[str, Callable[..., MeasuredOptimizer]]] = {
    "adamw": lambda params, **keywords: AdamW(params, 1e-4, **keywords),
    "lhopt-exact": lambda params, **keywords: CIAO.lhopt(params, lr=1e-4, **keywords),
    "lhopt-delayed": lambda params, **keywords: CIAO.lhopt(
        params, lr=1e-4, trust="delayed", **keywords
    ),
}
WAYS: Final[dict[str, int | None]] = {"without": 0, "with": None}
"""``inner_feature_frequency`` of each; the first is the measure."""
GATE_SHAPE: Final = GPTConfig(context=16, width=36, layers=2, vocabulary=67)
GATE_STEPS: Final = 3
WARM_UP: Final = 3  # untimed steps


@dataclass(frozen=True)
class Plan:
    """What every rank does."""

    device: str
    ranks: int
    rounds: int
    batch: int
    model: GPTConfig
    optimizers: tuple[str, ...]
    threads: int


class Training:
    """A GPT under FSDP2 and its optimizer."""

    def __init__(self, plan: Plan, model: GPTConfig, name: str, frequency: int | None) -> None:
        self._plan, self._vocabulary, self._length = plan, model.vocabulary, model.context + 1
        self.model = GPT(model).to(plan.device)
        mesh = init_device_mesh(plan.device, (plan.ranks,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.params = list(self.model.parameters())
        build = OPTIMIZERS[name]
        self.optimizer = build(self.params, inner_feature_frequency=frequency)

    def backward(self, step: int) -> None:
        """Gradients of this rank's share of a batch."""
        draws = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        shape = self._plan.batch, self._length
        windows = torch.randint(self._vocabulary, shape, generator=draws)
        self.optimizer.zero_grad()
        self.model.loss(windows.to(self._plan.device)).backward()

    def messages(self, step: int) -> int:
        """What the optimizer sends in a step."""
        self.backward(step)
        with CommDebugMode() as sent:
            self.optimizer.step()
        return int(sent.get_total_counts())

    def timed(self, step: int) -> tuple[float, float]:
        """Milliseconds of a training step, and of the optimizer's in it, on this rank."""
        wait()
        dist.barrier()
        begin = time.perf_counter_ns()
        self.backward(step)
        wait()
        middle = time.perf_counter_ns()
        self.optimizer.step()
        wait()
        end = time.perf_counter_ns()
        return (end - begin) / 1e6, (end - middle) / 1e6


def check(plan: Plan, name: str) -> None:
    """See that statistics change nothing, and are those of whole tensors.

    Raises:
        GateError: they do, or are not.
    """
    without, measured = (Training(plan, GATE_SHAPE, name, way) for way in WAYS.values())
    wholes = [torch.nn.Parameter(p.detach().full_tensor().clone()) for p in measured.params]
    alone = OPTIMIZERS[name](wholes, inner_feature_frequency=None, process_group=None)
    for step in range(GATE_STEPS):
        for training in (without, measured):
            training.backward(step)
        for whole, param in zip(wholes, measured.params, strict=True):
            whole.grad = param.grad.full_tensor()
        for optimizer in (without.optimizer, measured.optimizer, alone):
            optimizer.step()
    for index, (x, y) in enumerate(zip(without.params, measured.params, strict=True)):
        if not torch.equal(x.to_local(), y.to_local()):
            raise GateError(f"{name}: statistics have changed parameter {index}")
    both = (of.pop_inner_features(extra=True) for of in (measured.optimizer, alone))
    compare_features(*both, of=f"{name}: ")


def measure(plan: Plan, name: str) -> list[dict[str, Any]]:
    """Rows of one optimizer, the same on every rank."""
    check(plan, name)
    trainings = {way: Training(plan, plan.model, name, WAYS[way]) for way in WAYS}
    for step in range(WARM_UP):
        for training in trainings.values():
            training.timed(step)
    samples: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for number in range(plan.rounds):
        for way in rotated(list(WAYS), number):
            samples[way].append(trainings[way].timed(WARM_UP + number))
    slowest = {way: _slowest(found, plan.device) for way, found in samples.items()}
    sent = {way: training.messages(0) for way, training in trainings.items()}
    return [
        {"optimizer": name, "statistics": way, "messages": sent[way], **row}
        for way, row in rows_of(slowest).items()
    ]


def _slowest(samples: Sequence[tuple[float, float]], device: str) -> list[tuple[float, float]]:
    """Of each sample, that of the slowest rank."""
    table = torch.tensor(samples, dtype=torch.float64, device=device)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return [(whole, own) for whole, own in table.tolist()]


def rows_of(samples: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, Any]]:
    """By way: medians, and what it takes more than the first way, round by round.

    Args:
        samples: by way, milliseconds of training steps and of the optimizer's in them.
    """
    first = samples[next(iter(WAYS))]
    rows = {}
    for way, found in samples.items():
        whole, own = zip(*found, strict=True)
        of_first, own_of_first = zip(*first, strict=True)
        more = [(x - y) / z for x, y, z in zip(own, own_of_first, of_first, strict=True)]
        rows[way] = {
            "median_ms": quartiles(whole)[1],
            "optimizer_median_ms": quartiles(own)[1],
            "ratio": quartiles(ratios(whole, of_first))[1],
            "optimizer_ratio": quartiles(ratios(own, own_of_first))[1],
            "optimizer_more_of_step": quartiles(more)[1],
        }
    return rows


def on_rank(rank: int, plan: Plan, folder: str) -> None:
    """Measure as one of the ranks; the first one writes the rows."""
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(plan.threads)
    if plan.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if plan.device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=plan.ranks,
    )
    rows = [row for name in plan.optimizers for row in measure(plan, name)]
    if rank == 0:
        (Path(folder) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()
    # Not by way of the interpreter's end: meshes keep the group alive, and a thread of it that lets
    # go of a tensor then asks for an interpreter that is gone, which aborts the process.
    os._exit(0)


def on_ranks(plan: Plan) -> list[dict[str, Any]]:
    """The rows that the ranks have come to."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(on_rank, (plan, folder), plan.ranks)  # type: ignore[no-untyped-call]
        rows: list[dict[str, Any]] = json.loads((Path(folder) / "rows.json").read_text())
    return rows


def table_of(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in (
        "optimizer",
        "statistics",
        "step ms",
        "ratio",
        "optimizer ms",
        "ratio",
        "of step",
    ):
        table.add_column(
            heading, justify="left" if heading in ("optimizer", "statistics") else "right"
        )
    table.add_column("messages", justify="right")
    for row in rows:
        table.add_row(
            row["optimizer"],
            row["statistics"],
            report.milliseconds(row["median_ms"]),
            f"{row['ratio']:.3f}",
            report.milliseconds(row["optimizer_median_ms"]),
            f"{row['optimizer_ratio']:.3f}",
            f"{row['optimizer_more_of_step']:+.2%}",
            str(row["messages"]),
        )
    return table


def main(
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL, a GPU each).")] = "cpu",
    ranks: Annotated[int, typer.Option(min=2, help="Processes.")] = 2,
    rounds: Annotated[int, typer.Option(min=2, help="Steps that are timed of each.")] = 51,
    optimizers: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(OPTIMIZERS),
    width: Annotated[int, typer.Option(help="Of the GPT.")] = 256,
    layers: Annotated[int, typer.Option(help="Of the GPT.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens that it sees.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences on each rank.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Verify, then time training steps under FSDP2 with statistics and without."""
    if device == "cuda" and torch.cuda.device_count() < ranks:
        raise typer.BadParameter(
            f"--ranks {ranks} takes a GPU each, and torch finds {torch.cuda.device_count()}"
        )
    names = tuple(optimizers.split(","))
    if unknown := [name for name in names if name not in OPTIMIZERS]:
        raise typer.BadParameter(f"--optimizers has {unknown}; there are {list(OPTIMIZERS)}")
    model = GPTConfig(context=context, width=width, layers=layers)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    plan = Plan(device, ranks, rounds, batch, model, names, threads)
    rows = on_ranks(plan)
    Console(width=110).print(table_of(rows, f"A GPT of width {width} under FSDP2, {ranks} ranks"))
    found = {"schema": 1, **asdict(plan), "rows": rows}
    report.keep("sharded", found, torch.device(device), out)


if __name__ == "__main__":
    typer.run(main)
