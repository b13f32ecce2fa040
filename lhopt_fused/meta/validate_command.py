"""The command ``lhopt meta-validate``: a policy beside AdamW and the hand control, in a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer
from rich.console import Console
from rich.table import Table

from lhopt_fused.meta.evaluate import (
    OPPONENTS,
    Result,
    by_family,
    evaluate,
    heldout_settings,
    new_settings,
    shares,
    trained_config,
    write_results,
)
from lhopt_fused.meta.workers import LocalWorkers
from lhopt_fused.policy import LearnedPolicy, load_policy

__all__ = ["meta_validate"]

TrustName = Literal["exact", "delayed"]


def meta_validate(
    policy: Annotated[str, typer.Argument(help="A built-in policy, or a policy file.")] = "default",
    settings: Annotated[int, typer.Option(min=1, help="Batches of new tasks.")] = 60,
    tasks: Annotated[int, typer.Option(min=1, help="Tasks in each.")] = 6,
    heldout: Annotated[int, typer.Option(help="Tasks of each held-out family and length.")] = 2,
    trust: Annotated[
        str | None, typer.Option(help="Trust ratios: exact or delayed; else as it was trained.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("meta-validation"),
    data_dir: Annotated[Path | None, typer.Option(help="More data for the tasks.")] = None,
) -> None:
    """Play a policy on tasks that it never saw and say how often it ends below AdamW."""
    found = load_policy(policy)
    if not isinstance(found, LearnedPolicy):
        raise typer.BadParameter(f"{policy} is a rule; only learned policies can be validated")
    if trust not in (None, *get_args(TrustName)):
        raise typer.BadParameter(f"--trust is {trust}, expected exact or delayed")
    kind = cast(TrustName | None, trust)
    config, _ = trained_config(found)
    parts = {"new tasks": new_settings(config, settings, tasks)}
    if heldout:
        parts["held-out families"] = heldout_settings(heldout)
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    with LocalWorkers(workers) as pool:
        for name, chosen in parts.items():
            results = evaluate(found, chosen, pool, out, trust=kind, data_dir=data_dir)
            console.print(_table(name, results))
            file = out / f"{found.name}-{name.replace(' ', '-')}.json"
            write_results(results, file, {"policy": found.name, "commit": found.commit})
    console.print(f"written to {out}/")


def _table(title: str, results: Sequence[Result]) -> Table:
    """Shares of the tasks won, by family and in all, with bootstrap 95 % intervals."""
    table = Table(title=f"Share of {title} on which the policy ends below")
    for heading in ("family", "tasks", *OPPONENTS):
        table.add_column(heading, justify="left" if heading == "family" else "right")
    groups = by_family(results)
    for name, group in [*groups.items(), ("all", list(results))]:
        won = shares(group)
        count = next(iter(won.values())).tasks
        table.add_row(name, str(count), *(str(won[opponent]) for opponent in OPPONENTS))
    table.caption = "; ".join(f"{name}: {meaning}" for name, meaning in OPPONENTS.items())
    return table
