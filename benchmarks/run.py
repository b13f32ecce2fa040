"""The command: ``python -m benchmarks.run --suite step --device cpu``."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console

from benchmarks import machine, report
from benchmarks.capture import CapturedStep
from benchmarks.figure import draw
from benchmarks.gate import GateError, check
from benchmarks.registry import Run, Settings, Shape, Unavailable, Variant, Workload, select
from benchmarks.timing import Contestant, Series, interleave, sample_cpu, sample_cuda
from benchmarks.variants import PEER_PACKAGES, VARIANTS
from benchmarks.workloads import WORKLOADS
from lhopt_fused.kernels import BackendName

__all__ = ["app", "measure"]

TIMED_LR: Final = 1e-6
"""So small that thousands of timed steps leave parameters as they are; lr does not cost time."""
NEVER_CLIPS: Final = 1e9  # clip_grad_norm_ multiplies all the same, by 1, and gradients last
MEMORY_SHARE: Final = 0.7  # of what is free: more, and variants are built one after the other
LOG_WIDTH: Final = 130
PROBE_ELEMENTS: Final = {"cpu": 2**26, "cuda": 2**28}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Suite(str, Enum):
    """What is measured."""

    step = "step"


class Device(str, Enum):
    """Where it is measured."""

    cpu = "cpu"
    cuda = "cuda"


class Backend(str, Enum):
    """Which backend our variants use."""

    auto = "auto"
    reference = "reference"
    cpu = "cpu"
    triton = "triton"


@dataclass(frozen=True)
class Plan:
    """What a run of the suite does."""

    device: torch.device
    variants: Sequence[Variant]
    workloads: Sequence[Workload]
    rounds: int
    quick: bool = False
    captured: bool = False
    backend: BackendName = "auto"
    named: bool = False  # the variants were asked for by name


@dataclass
class Outcome:
    """What a run of the suite found."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    bandwidth: dict[str, dict[str, float]] = field(default_factory=dict)
    not_timed: list[dict[str, str]] = field(default_factory=list)
    refused: list[dict[str, str]] = field(default_factory=list)


def admit(plan: Plan, workload: Workload, variant: Variant) -> None:
    """Let a variant pass that runs here and does what it says.

    Raises:
        Unavailable: it is not to be timed here; the message says why.
        GateError: its steps are not those of its definition, or one of ours does not run at all.
    """
    device = plan.device.type
    if device not in variant.devices:
        raise Unavailable(f"not for {device} tensors")
    if device in variant.on_request and not plan.named:
        raise Unavailable(f"only where --variants names it: {variant.on_request_reason}")
    if plan.captured and not variant.capturable:
        raise Unavailable("its step cannot be captured in a CUDA graph")
    settings = Settings(0.0, 0.0, plan.backend, plan.captured)
    try:
        check(variant, workload.gate_shapes, plan.device, settings)
    except (Unavailable, GateError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise (GateError if variant.ours else Unavailable)(reason) from error


def measure(plan: Plan, console: Console) -> Outcome:
    """Verify and time every variant on every workload, printing a table for each."""
    outcome = Outcome()
    for workload in plan.workloads:
        admitted = []
        for variant in plan.variants:
            note = {"workload": workload.name, "variant": variant.name}
            with console.status(f"{workload.label}: verifying {variant.label}"):
                try:
                    admit(plan, workload, variant)
                    admitted.append(variant)
                except Unavailable as error:
                    outcome.not_timed.append({**note, "reason": str(error)})
                except GateError as error:
                    outcome.refused.append({**note, "reason": str(error)})
        if admitted:
            with console.status(f"{workload.label}: timing {len(admitted)} variants"):
                series, probe_elements = _time(plan, workload, admitted)
            _collect(plan, workload, admitted, series, probe_elements, outcome, console)
    return outcome


def _time(
    plan: Plan, workload: Workload, variants: Sequence[Variant]
) -> tuple[dict[str, Series], int]:
    shapes = workload.on(plan.device.type, quick=plan.quick)
    dtypes = {variant.dtype for variant in variants}
    params = {dtype: _make_params(shapes, plan.device, dtype) for dtype in dtypes}
    settings = Settings(TIMED_LR, NEVER_CLIPS, plan.backend, plan.captured)
    probe_elements = 2**20 if plan.quick else PROBE_ELEMENTS[plan.device.type]
    steps = workload.steps_per_sample.get(plan.device.type, 1)
    contestants = [
        *machine.probes(plan.device, probe_elements),
        *(_contestant(v, params[v.dtype], settings, steps) for v in variants),
    ]
    series = interleave(
        contestants,
        plan.rounds,
        sample_cuda if plan.device.type == "cuda" else sample_cpu,
        stays=_fits(plan.device, shapes, len(variants)),
        lead=workload.lead_steps,
    )
    return series, probe_elements


def _make_params(
    shapes: Sequence[Shape], device: torch.device, dtype: torch.dtype
) -> list[torch.nn.Parameter]:
    """Parameters with gradients, all normal at the scales of a model in training."""
    torch.manual_seed(0)
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, device=device).mul_(0.02).to(dtype))
        param.grad = torch.randn_like(param).mul_(1e-3)
        params.append(param)
    return params


def _contestant(
    variant: Variant, params: list[torch.nn.Parameter], settings: Settings, steps: int
) -> Contestant:
    def make() -> Run:
        run = variant.build(params, settings)
        return Run(CapturedStep(run.step), run.optimizer) if settings.captured else run

    return Contestant(variant.name, make, steps=max(steps, variant.period))


def _fits(device: torch.device, shapes: Sequence[Shape], variants: int) -> bool:
    """Whether state of each variant, as two float32 moments, and temporaries for one fit beside
    each other."""
    needed = (2 * variants + 4) * 4 * sum(torch.Size(shape).numel() for shape in shapes)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else machine.memory()[1]
    return needed < MEMORY_SHARE * free


def _collect(
    plan: Plan,
    workload: Workload,
    variants: Sequence[Variant],
    series: dict[str, Series],
    probe_elements: int,
    outcome: Outcome,
    console: Console,
) -> None:
    shapes = workload.on(plan.device.type, quick=plan.quick)
    bandwidth = report.bandwidths(series, probe_elements)
    rows = report.make_rows(workload, shapes, variants, series, bandwidth)
    outcome.rows += rows
    outcome.bandwidth[workload.name] = bandwidth
    for variant in variants:
        if failure := series[variant.name].failure:
            notes = outcome.refused if variant.ours else outcome.not_timed
            notes.append({"workload": workload.name, "variant": variant.name, "reason": failure})
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    title = f"{workload.label}: {len(shapes)} tensors, {elements / 1e6:.1f}M elements"
    report.print_rows(console, title, rows, bandwidth, host=plan.device.type == "cuda")


def save(plan: Plan, outcome: Outcome, suite: str, folder: Path) -> Path:
    """Write the JSON document and the picture; returns the path of the document."""
    commit, dirty = machine.commit()
    slug = machine.device_slug(plan.device)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = machine.versions(PEER_PACKAGES)
    stamp = {"machine": slug, "commit": commit, "dirty": dirty, "date": date}
    document = {
        "schema": 1,
        "suite": suite,
        **stamp,
        "machine_details": machine.describe(plan.device),
        "versions": found,
        "threads": torch.get_num_threads(),
        "backend": plan.backend,
        "captured": plan.captured,
        "quick": plan.quick,
        "bandwidth_gb_per_s": outcome.bandwidth,
        "not_timed": outcome.not_timed,
        "refused": outcome.refused,
        "rows": [
            {**stamp, "torch": found["torch"], "captured": plan.captured, **row}
            for row in outcome.rows
        ],
    }
    name = commit + ("-dirty" if dirty else "") + ("-graph" if plan.captured else "")
    path = folder / f"{name}.json"
    report.write_json(path, document)
    if outcome.rows:
        draw(document, path.with_suffix(".png"))
    return path


def default_workloads(device: str, *, quick: bool) -> list[Workload]:
    """Those that are meant for a device type."""
    return [w for w in WORKLOADS if device in w.shapes or (quick and "cpu" in w.shapes)]


@app.command()
def main(
    suite: Annotated[Suite, typer.Option(help="What to measure.")] = Suite.step,
    device: Annotated[Device, typer.Option(help="Where to measure it.")] = Device.cpu,
    workloads: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    variants: Annotated[str | None, typer.Option(help="Names, separated by commas.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Samples of each variant.")] = 21,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch.")] = None,
    backend: Annotated[Backend, typer.Option(help="Backend of our variants.")] = Backend.auto,
    graph: Annotated[bool, typer.Option("--graph", help="Capture steps in CUDA graphs.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: checks the command.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Verify optimizer steps, then time them beside their peers.

    Ends with an error if a variant did not do what it says, or one of ours did not run.
    """
    if device is Device.cuda and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here; use --device cpu")
    if graph and device is not Device.cuda:
        raise typer.BadParameter("--graph captures CUDA graphs; add --device cuda")
    if threads is not None:
        torch.set_num_threads(threads)
    target = torch.device(device.value)
    try:
        plan = Plan(
            target,
            select(VARIANTS, variants, "variant"),
            select(WORKLOADS, workloads, "workload")
            if workloads
            else default_workloads(device.value, quick=quick),
            rounds,
            quick,
            graph,
            backend.value,
            named=variants is not None,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)  # a log shows whole tables
    outcome = measure(plan, console)
    report.print_notes(console, "not timed", outcome.not_timed)
    report.print_notes(console, "REFUSED", outcome.refused)
    folder = out or machine.results_folder(target)
    path = save(plan, outcome, suite.value, folder)
    console.print(f"written: {path}", soft_wrap=True)
    if outcome.refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
