"""A step in host memory beside what it is made of: the step itself, and the copy back.

``python -m benchmarks.offload --device cuda``: AdamW over bfloat16 parameters. Verify that
:class:`HostOffload` takes the very steps, then time four things in turn, each until the device is
done:

- cpu step: the step alone, over as many parameters in host memory;
- copy back: all parameters from pinned host memory to the device;
- offload: ``HostOffload.step()`` after a backward pass during which its gradients came;
- offload, released: the same with a ``GradientRelease``, whose buckets are stepped while others are
  copied.

The goals: offload takes no longer than the first two together; released, no longer than 1.1 times
the slower of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import machine, report
from benchmarks.registry import Run, Shape, select
from benchmarks.timing import Contestant, Sample, Series, interleave, quartiles, wait
from benchmarks.workloads import WORKLOADS
from lhopt_fused import AdamW, GradientRelease, HostOffload

GOALS: Final[dict[str, tuple[Callable[[float, float], float], str, float]]] = {
    "offload": (lambda step, copy: step + copy, "both together", 1.0),
    "offload, released": (max, "the slower", 1.1),
}
"""What a variant is divided by, in words, and what the ratio is to be at most."""
STATE_BYTES: Final = 12  # in host memory of each element: copy, gradient, two float32 moments

DRAWN: Final = 2**16  # numbers, which are repeated to fill a tensor

Params = list[torch.nn.Parameter]


@dataclass(frozen=True)
class Prepared:
    """Something to be timed, and what is done before it and is not."""

    prepare: Callable[[], object]
    step: Callable[[], object]

    def __call__(self) -> None:
        self.prepare()
        self.step()


def sample(call: Callable[[], object], steps: int) -> Sample:
    """Time ``steps`` steps of a :class:`Prepared`, each until the device is done."""
    assert isinstance(call, Prepared)
    passed = host = 0
    for _ in range(steps):
        call.prepare()
        wait()
        begin = time.perf_counter_ns()
        call.step()
        host += time.perf_counter_ns() - begin
        wait()
        passed += time.perf_counter_ns() - begin
    return Sample(passed / 1e6 / steps, host / 1e6 / steps)


def make_params(shapes: Sequence[Shape], device: str) -> tuple[Params, list[torch.Tensor]]:
    """Parameters and gradients, the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: Shape, scale: float) -> torch.Tensor:
        count = torch.Size(shape).numel()
        few = torch.randn(min(count, DRAWN), generator=generator).mul_(scale)
        few = few.to(device, torch.bfloat16)
        return few.repeat(-(-count // len(few)))[:count].view(shape)

    params = [torch.nn.Parameter(draw(shape, 0.02)) for shape in shapes]
    return params, [draw(shape, 1e-3) for shape in shapes]


def adamw(params: Any, lr: float = 1e-6) -> AdamW:
    return AdamW(params, lr, nonfinite="mask")


def released(params: Any, lr: float = 1e-6) -> AdamW:
    optimizer = adamw(params, lr)
    GradientRelease(optimizer)
    return optimizer


def backward(params: Params, grads: list[torch.Tensor]) -> None:
    """As a backward pass that comes to these gradients, one after the other."""
    for param in params:
        param.grad = None
    torch.autograd.backward(params[::-1], grads[::-1])


def check(shapes: Sequence[Shape], device: str) -> None:
    """See that steps in host memory are those of the optimizer itself, bit for bit.

    Raises:
        AssertionError: they are not.
    """
    expected, grads = make_params(shapes, "cpu")
    optimizer = adamw(expected, 1e-2)
    for _ in range(3):
        backward(expected, grads)
        optimizer.step()
    for name, build in {"offload": adamw, "offload, released": released}.items():
        params, on_device = make_params(shapes, device)
        offload = HostOffload(params, lambda groups, build=build: build(groups, 1e-2))
        for _ in range(3):
            backward(params, on_device)
            offload.step()
        equal = all(map(torch.equal, (p.detach().cpu() for p in params), expected))
        assert equal, f"{name}: other parameters than those of the optimizer itself"


def contestants(shapes: Sequence[Shape], device: str) -> list[Contestant]:
    """What is timed, each over parameters of its own."""

    def cpu_step() -> Run:
        host, host_grads = make_params(shapes, "cpu")
        optimizer = adamw(host)
        for param, grad in zip(host, host_grads, strict=True):
            param.grad = grad
        return Run(Prepared(lambda: None, optimizer.step), optimizer)

    def copy_back() -> Run:
        params, _ = make_params(shapes, device)
        sources = [
            torch.empty_like(param, device="cpu", pin_memory=param.is_cuda).copy_(param.detach())
            for param in params
        ]

        def copy() -> None:
            with torch.no_grad():
                for param, source in zip(params, sources, strict=True):
                    param.copy_(source, non_blocking=True)

        return Run(Prepared(lambda: None, copy))

    def offload(build: Callable[[Any], AdamW]) -> Run:
        params, grads = make_params(shapes, device)
        optimizer = HostOffload(params, build)
        return Run(Prepared(lambda: backward(params, grads), optimizer.step), optimizer)

    return [
        Contestant("cpu step", cpu_step),
        Contestant("copy back", copy_back),
        Contestant("offload", lambda: offload(adamw)),
        Contestant("offload, released", lambda: offload(released)),
    ]


def rows_of(series: dict[str, Series]) -> list[dict[str, Any]]:
    """One row for each, ratios taken round by round.

    Raises:
        RuntimeError: one of them has failed.
    """
    for name, found in series.items():
        if found.failure is not None:
            raise RuntimeError(f"{name}: {found.failure}")
    ms = {name: [s.ms for s in found.samples] for name, found in series.items()}
    rows = []
    for name, values in ms.items():
        low, median, high = quartiles(values)
        row = {"variant": name, "median_ms": median, "quartiles_ms": [low, high]}
        if name in GOALS:
            bound, words, goal = GOALS[name]
            bounds = map(bound, ms["cpu step"], ms["copy back"])
            ratio = quartiles([value / of for value, of in zip(values, bounds, strict=True)])[1]
            row |= {"ratio": ratio, "to": words, "goal": goal}
        rows.append(row)
    return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("variant", "median ms", "ratio", "to", "goal"):
        table.add_column(heading, justify="left" if heading in ("variant", "to") else "right")
    for row in rows:
        cells = [row["variant"], report.milliseconds(row["median_ms"])]
        if "goal" in row:
            cells += [f"{row['ratio']:.2f}", row["to"], f"{row['goal']:.1f}"]
        table.add_row(*cells)
    return table


def main(
    device: Annotated[str, typer.Option(help="Where the parameters are: cpu or cuda.")] = "cuda",
    workload: Annotated[str | None, typer.Option(help="Of benchmarks.run.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each.")] = 9,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: checks the command.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Verify steps in host memory, then time them beside what they are made of."""
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"--device {device}: torch finds none here; use --device cpu")
    (chosen,) = select(
        WORKLOADS, workload or ("gpt2-xl" if device == "cuda" else "gpt2-small"), "workload"
    )
    check(chosen.gate_shapes, device)
    shapes = chosen.on(device, quick=quick)
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    fits = 3 * STATE_BYTES * elements < 0.7 * machine.memory()[1]
    rows = rows_of(interleave(contestants(shapes, device), rounds, sample, stays=fits))
    title = f"{chosen.label}, {elements / 1e6:.1f}M bfloat16 parameters, AdamW in host memory"
    Console().print(table_of(rows, title))
    sizes = {"workload": chosen.name, "tensors": len(shapes), "elements": elements, "quick": quick}
    threads = {"threads": torch.get_num_threads(), "rounds": rounds}
    found = {"schema": 1, **sizes, **threads, "rows": rows}
    report.keep("offload", found, torch.device(device), out)


if __name__ == "__main__":
    typer.run(main)
