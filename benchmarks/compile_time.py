"""What the first step waits for: kernels compiled anew, and read from Triton's cache.

``python -m benchmarks.compile_time`` runs each in a process of its own and writes compile.json.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.machine import ROOT, versions
from benchmarks.registry import Settings, select
from benchmarks.report import write_json
from benchmarks.variants import VARIANTS
from benchmarks.workloads import WORKLOADS
from lhopt_fused.optimizer import MeasuredOptimizer

__all__ = ["app", "first_step"]

MEASURED = ("adamw-skip", "lhopt-exact")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def first_step(variant: str, device: str) -> float:
    """Seconds that the first step of a variant, on tensors of a small GPT-2, takes to compile."""
    (workload,) = select(WORKLOADS, "gpt2-small", "workload")
    params = [torch.nn.Parameter(torch.ones(s, device=device)) for s in workload.gate_shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    run = select(VARIANTS, variant, "variant")[0].build(params, Settings(1e-6, 1.0, "triton"))
    run.step()
    assert isinstance(run.optimizer, MeasuredOptimizer)
    return run.optimizer.compile_seconds


def _in_a_process(variant: str, device: str, cache: str) -> float:
    command = [sys.executable, "-m", "benchmarks.compile_time", "--device", device]
    printed = subprocess.run(
        [*command, "--only", variant],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": cache},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return float(printed.split()[-1])


@app.command()
def main(
    device: Annotated[str, typer.Option(help="Where the tensors are.")] = "cuda",
    only: Annotated[str | None, typer.Option(help="Print this variant's seconds.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the result.")] = Path(),
) -> None:
    """Measure what compiling costs the first step, with an empty cache and with a warm one."""
    if only is not None:
        print(first_step(only, device))
        return
    rows: list[dict[str, Any]] = []
    table = Table("variant", "cold s", "warm s", title="compiling, in the first step")
    for variant in MEASURED:
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (_in_a_process(variant, device, cache) for _ in range(2))
        rows.append({"variant": variant, "cold_seconds": cold, "warm_seconds": warm})
        table.add_row(variant, f"{cold:.2f}", f"{warm:.2f}")
    Console().print(table)
    write_json(out / "compile.json", {"versions": versions(()), "rows": rows})


if __name__ == "__main__":
    app()
