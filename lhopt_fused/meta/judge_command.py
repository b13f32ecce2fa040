"""The commands ``lhopt meta-validate`` and ``lhopt meta-ablate``: tables of what policies win."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from lhopt_fused.meta.command import Overrides, bad_input

if TYPE_CHECKING:
    from lhopt_fused.meta.ablate import Ablation, Interval
    from lhopt_fused.meta.evaluate import Result
    from lhopt_fused.meta.workers import LocalWorkers
    from lhopt_fused.policy import LearnedPolicy

__all__ = ["meta_ablate", "meta_validate"]

_console = Console(highlight=False)


TrustName = Literal["exact", "delayed"]
_Settings = Annotated[int, typer.Option(min=1, help="Batches of new tasks.")]
_Tasks = Annotated[int, typer.Option(min=1, help="Tasks in each.")]
_Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
_DataDir = Annotated[
    Path | None,
    typer.Option(help="More data for the tasks, as it was given to meta-train.", exists=True),
]


def meta_validate(
    policy: Annotated[str, typer.Argument(help="A built-in policy, or a policy file.")] = "default",
    settings: _Settings = 60,
    tasks: _Tasks = 6,
    heldout: Annotated[int, typer.Option(help="Tasks of each held-out family and length.")] = 2,
    trust: Annotated[
        TrustName | None, typer.Option(help="Trust ratios; else those that the policy wants.")
    ] = None,
    hidden_eval: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of runs without an eval loss; else as in training."),
    ] = None,
    workers: _Workers = 2,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("meta-validation"),
    data_dir: _DataDir = None,
) -> None:
    """Play a policy on tasks that it never saw, and say how often it ends below AdamW."""
    with bad_input(ValueError, OSError):
        from lhopt_fused.meta.evaluate import (
            evaluate,
            heldout_settings,
            new_settings,
            trained_config,
            write_results,
        )

        found = _learned(policy)
        config, _ = trained_config(found)
        parts = {"new tasks": new_settings(config, settings, tasks)}
        if heldout:
            parts["held-out families"] = heldout_settings(heldout)
        out.mkdir(parents=True, exist_ok=True)
        with _pool(workers) as pool:
            for name, chosen in parts.items():
                results = evaluate(
                    found,
                    chosen,
                    pool,
                    out,
                    trust=trust,
                    hidden_eval=hidden_eval,
                    data_dir=data_dir,
                )
                _console.print(_share_table(name, results))
                file = out / f"{found.name}-{name.replace(' ', '-')}.json"
                about = {
                    "policy": found.name,
                    "commit": found.commit,
                    "trust": trust,
                    "hidden_eval": hidden_eval,
                }
                write_results(results, file, about)
    _console.print(f"written to {out}/")


def meta_ablate(
    config: Annotated[
        str, typer.Argument(help="As for meta-train; its updates are those of each.")
    ] = "ablation",
    only: Annotated[
        list[str] | None, typer.Option(help="Names of ablations; all of them if not given.")
    ] = None,
    settings: _Settings = 40,
    tasks: _Tasks = 6,
    workers: _Workers = 2,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("lhopt-runs/ablations"),
    data_dir: _DataDir = None,
    override: Overrides = None,
) -> None:
    """Train policies without one thing at a time, and say what each is worth.

    Run it again to go on where it was."""
    with bad_input(ValueError, OSError):
        import torch

        from lhopt_fused.meta.ablate import ABLATIONS, ablate
        from lhopt_fused.meta.config import load_config
        from lhopt_fused.meta.evaluate import write_results
        from lhopt_fused.meta.figure import draw_ablations

        torch.set_num_threads(1)
        chosen = load_config(config, override or [])
        names = only or list(ABLATIONS)
        with _pool(workers) as pool:
            ablations = ablate(
                chosen, names, out, pool, settings=settings, tasks=tasks, data_dir=data_dir
            )
            done = list(track(ablations, "ablations", len(names), console=_console))
        _console.print(_ablation_table(done))
        picture = out / "ablations.png"
        draw_ablations(picture, _ablation_panels(done))
        for ablation in done:
            about = {"ablation": ablation.name, "episodes": ablation.episodes}
            write_results(ablation.results, ablation.folder / "results.json", about)
    _console.print(f"Picture: {picture}")


def _learned(policy: str) -> LearnedPolicy:
    """Raises ValueError for a rule, which was trained on nothing."""
    from lhopt_fused.policy import LearnedPolicy, load_policy

    found = load_policy(policy)
    if not isinstance(found, LearnedPolicy):
        raise ValueError(f"{policy} is a rule; only learned policies can be validated")
    return found


def _pool(count: int) -> LocalWorkers:
    from lhopt_fused.meta.workers import LocalWorkers

    return LocalWorkers(count)


def _share_table(title: str, results: Sequence[Result]) -> Table:
    """Shares of the tasks won, by family and in all, with bootstrap 95 % intervals."""
    import numpy as np

    from lhopt_fused.meta.evaluate import OPPONENTS, YARDSTICKS, by_family, shares

    table = Table(title=f"Share of {title} on which the policy ends below")
    table.add_column("family", no_wrap=True)
    for heading in ("tasks", *OPPONENTS, "log speed-up"):
        table.add_column(heading, justify="right")
    groups = {**by_family(results), "all": list(results)}
    for name in YARDSTICKS:
        groups[f"({name})"] = [result.yardsticks[name] for result in results]
    for name, group in groups.items():
        won = shares(group)
        count = next(iter(won.values())).tasks
        reward = np.concatenate([result.reward for result in group]).mean()
        share_of = (str(won[opponent]) for opponent in OPPONENTS)
        table.add_row(name, str(count), *share_of, f"{reward:+.2f}")
    meanings = [f"{name}: {meaning}" for name, meaning in OPPONENTS.items()]
    table.caption = "; ".join([*meanings, "in brackets: all, with that one in its place"])
    return table


def _ablation_panels(done: Sequence[Ablation]) -> dict[str, dict[str, Interval]]:
    """Rewards, and where the whole is among them also the changes."""
    title = "log speed-up over tuned AdamW on new tasks, with bootstrap 95 % intervals"
    panels = {title: {ablation.name: ablation.reward() for ablation in done}}
    whole = _whole(done)
    if whole is not None:
        changes = {x.name: x.change(whole) for x in done if x is not whole}
        panels[f"beyond that of {whole.name!r}, task by task"] = changes
    return panels


def _whole(done: Sequence[Ablation]) -> Ablation | None:
    from lhopt_fused.meta.ablate import WHOLE

    return next((ablation for ablation in done if ablation.name == WHOLE), None)


def _ablation_table(done: Sequence[Ablation]) -> Table:
    """Mean rewards and shares won, with bootstrap 95 % intervals."""
    from lhopt_fused.meta.evaluate import OPPONENTS, shares

    whole = _whole(done)
    table = Table(title="What each part of the training is worth")
    table.add_column("ablation", no_wrap=True)
    for heading in ("episodes", "log speed-up", "change", *OPPONENTS):
        table.add_column(heading, justify="right")
    for ablation in done:
        won = shares(ablation.results)
        table.add_row(
            ablation.name,
            f"{ablation.episodes:,}",
            str(ablation.reward()),
            "" if whole is None or whole is ablation else str(ablation.change(whole)),
            *(str(won[opponent]) for opponent in OPPONENTS),
        )
    if whole is not None:
        table.caption = f"change: beyond the log speed-up of {whole.name!r}, task by task"
    return table
