"""The command ``lhopt eval``: options and messages around :class:`Campaign` and the report."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from lhopt_fused.evaluation.campaign import Campaign
    from lhopt_fused.evaluation.plan import Plan
    from lhopt_fused.evaluation.run import RunSpec
    from lhopt_fused.evaluation.store import Store
    from lhopt_fused.evaluation.summary import Overall

__all__ = ["evaluate"]

_console = Console(highlight=False)
_errors = Console(highlight=False, stderr=True)
_STORE = "runs.sqlite"
Name = TypeVar("Name", bound=str)


def evaluate(
    tasks: Annotated[str, typer.Option(help="Names with commas between; or all.")] = "all",
    size: Annotated[str, typer.Option(help="small for CPUs, full for a GPU.")] = "small",
    optimizers: Annotated[str, typer.Option(help="Names with commas between; or all.")] = "all",
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="Of lhopt: a built-in policy or a policy file, its default if not given; repeat "
            "for several."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each configuration.")] = 3,
    workers: Annotated[int, typer.Option(min=1, help="Processes, with one thread each.")] = 2,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of data sets as their authors publish them.", exists=True),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("lhopt-runs/eval"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool, typer.Option("--quick", help="A few configurations and budgets only.")
    ] = False,
    merge: Annotated[
        list[Path] | None, typer.Option(help="Take over the runs of another store.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; write the report again.")
    ] = False,
) -> None:
    """Train real tasks with many optimizers and say by how much LHOPT is faster, if it is.

    Stop it at any time: the same command goes on where it was.
    """
    with _bad_input():
        from lhopt_fused.evaluation.store import Store

        chosen = _plan(tasks, size, optimizers, policy or [], seeds, quick)
        store = Store(out / _STORE, create=not report_only)
        if merge:
            _say(f"{store.merge(merge)} runs taken over")
        finished = True
        if not report_only:
            finished = _run(chosen, store, data_dir, device, workers)
        _report(store, chosen, out)
    if not finished:
        _say("Stopped: the same command goes on from here.")
        raise typer.Exit(130)


def _plan(
    tasks: str, size: str, optimizers: str, policies: Sequence[str], seeds: int, quick: bool
) -> Plan:
    """What is to be run.

    Raises:
        ValueError, FileNotFoundError: an option names what there is not.
    """
    from lhopt_fused.evaluation.optimizers import (
        CONTENDERS,
        default_policy,
        policy_configuration,
    )
    from lhopt_fused.evaluation.plan import Plan
    from lhopt_fused.evaluation.task import SIZES
    from lhopt_fused.evaluation.tasks import TASKS

    names = _names("--optimizers", optimizers, list(CONTENDERS))
    played = (policies or [default_policy()]) if "lhopt" in names else []
    return Plan(
        tasks=_names("--tasks", tasks, list(TASKS)),
        size=_names("--size", size, list(SIZES))[0],
        optimizers=names,
        policies=[policy_configuration(policy) for policy in played],
        seeds=seeds,
        quick=quick,
    )


def _names(option: str, given: str, known: list[Name]) -> list[Name]:
    """The names in an option.

    Raises:
        ValueError: one of them is unknown.
    """
    if given == "all":
        return known
    wanted = [name.strip() for name in given.split(",")]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{option}: {unknown[0]!r} is none of {', '.join(known)}")
    return [name for name in known if name in wanted]


def _run(plan: Plan, store: Store, data_dir: Path | None, device: str, workers: int) -> bool:
    """Both stages; whether all is done."""
    import torch

    from lhopt_fused.evaluation.campaign import Campaign
    from lhopt_fused.stopping import stoppable

    if device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device is {device}, but torch finds no GPU here; use cpu")
    torch.set_num_threads(1)
    with stoppable() as stop:
        campaign = Campaign(store, data_dir, device, workers, stop)
        if not _stage(campaign, "configurations", plan.first_stage()):
            return False
        return _stage(campaign, "budgets", plan.second_stage(campaign.known(plan)))


def _stage(campaign: Campaign, name: str, specs: Sequence[RunSpec]) -> bool:
    """Do what is missing, under a bar that says how long it takes."""
    missing = campaign.missing(specs)
    done = len(specs) - len(missing)
    _say(f"{name}: {len(specs)} runs, {done} of them in the store")
    columns = (
        *(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs ·"),
        ),
        *(TimeElapsedColumn(), TextColumn("elapsed ·"), TimeRemainingColumn(), TextColumn("left")),
    )
    with Progress(*columns, console=_console, speed_estimate_period=3600) as progress:
        shown = progress.add_task(name, total=len(missing))

        def on_done(spec: RunSpec) -> None:
            progress.update(shown, advance=1, description=spec.task)

        return campaign.run(missing, on_done)


def _report(store: Store, plan: Plan, out: Path) -> None:
    from lhopt_fused.evaluation.report import OVERALL_HEADINGS, overall_cells, write_report

    rows = [row for row in store.rows() if row.spec.task in plan.tasks]
    results: list[Overall] = write_report(rows, plan.size, out)
    if not results:
        _say(f"There are no runs of these tasks of size {plan.size} in {store.path} yet")
        return
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(OVERALL_HEADINGS):
        table.add_column(heading, justify="left" if index == 0 else "right")
    for result in results:
        table.add_row(*overall_cells(result))
    _console.print(table)
    _say(f"Report: {out / 'report.md'}")


@contextlib.contextmanager
def _bad_input() -> Iterator[None]:
    """Turn what a user can put right into a message and exit code 2."""
    from lhopt_fused.evaluation.campaign import WorkerDiedError
    from lhopt_fused.evaluation.optimizers import ContenderError
    from lhopt_fused.evaluation.store import StoreError
    from lhopt_fused.evaluation.task import DataError

    known = (DataError, ContenderError, StoreError, WorkerDiedError, ValueError, OSError)
    try:
        yield
    except known as error:
        _errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _say(message: str) -> None:
    """Print a message as it is: paths may hold what looks like markup."""
    _console.print(message, markup=False, soft_wrap=True)
