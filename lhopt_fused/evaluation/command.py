"""The command ``lhopt eval``: options and messages around :class:`Campaign` and the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lhopt_fused.evaluation.files_command import export, merge, say_report
from lhopt_fused.evaluation.messages import bad_input, console, names, say

if TYPE_CHECKING:
    from lhopt_fused.evaluation.campaign import Campaign
    from lhopt_fused.evaluation.plan import Plan
    from lhopt_fused.evaluation.run import RunSpec
    from lhopt_fused.evaluation.store import Store

__all__ = ["eval_app"]

eval_app = typer.Typer(invoke_without_command=True)
eval_app.command()(export)
eval_app.command()(merge)


@eval_app.callback()
def evaluate(
    ctx: typer.Context,
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
    eval_loss: Annotated[
        bool,
        typer.Option(
            "--eval-loss",
            help="Show policies the loss on their split at each decision, which takes time.",
        ),
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each configuration; 3 if not given, 1 with --quick."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, with one thread each.")] = 2,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of data sets as their authors publish them.", exists=True),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results.")] = Path("lhopt-runs/eval"),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="A few configurations and budgets, and, of all tasks, the short ones."
        ),
    ] = False,
) -> None:
    """Train real tasks with many optimizers and say by how much LHOPT is faster, if it is.

    Stop it at any time: the same command goes on where it was.
    """
    if ctx.invoked_subcommand is not None:
        return
    with bad_input():
        from lhopt_fused.evaluation.exchange import STORE_NAME
        from lhopt_fused.evaluation.store import Store

        chosen = _plan(tasks, size, optimizers, policy or [], eval_loss, seeds, quick)
        store = Store(out / STORE_NAME)
        finished = _run(chosen, store, data_dir, device, workers)
        rows = [row for row in store.rows() if row.spec.task in chosen.tasks]
        say_report(rows, chosen.size, out)
    if not finished:
        say("Stopped: the same command goes on from here.")
        raise typer.Exit(130)


def _plan(
    tasks: str,
    size: str,
    optimizers: str,
    policies: Sequence[str],
    eval_loss: bool,
    seeds: int | None,
    quick: bool,
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
    from lhopt_fused.evaluation.tasks import SHORT, TASKS

    chosen = names("--optimizers", optimizers, list(CONTENDERS))
    played = (policies or [default_policy()]) if "lhopt" in chosen else []
    return Plan(
        tasks=list(SHORT) if quick and tasks == "all" else names("--tasks", tasks, list(TASKS)),
        size=names("--size", size, list(SIZES))[0],
        optimizers=chosen,
        policies=[policy_configuration(policy, eval_loss=eval_loss) for policy in played],
        seeds=seeds or (1 if quick else 3),
        quick=quick,
    )


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
    say(f"{name}: {len(specs)} runs, {done} of them in the store")
    columns = (
        *(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs ·"),
        ),
        *(TimeElapsedColumn(), TextColumn("elapsed ·"), TimeRemainingColumn(), TextColumn("left")),
    )
    with Progress(*columns, console=console, speed_estimate_period=3600) as progress:
        shown = progress.add_task(name, total=len(missing))

        def on_done(spec: RunSpec) -> None:
            progress.update(shown, advance=1, description=spec.task)

        return campaign.run(missing, on_done)
