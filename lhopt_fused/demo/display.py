"""What a run shows on the terminal: the live view and the final table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from lhopt_fused.demo.record import Summary, latest
from lhopt_fused.demo.run import Training

__all__ = ["LiveView", "final_table"]

_LIVE_COLUMNS: Final = {
    "train_loss": "train\nloss",
    "eval_loss": "eval\nloss",
    "optimizer_ms": "ms per\noptimizer\nstep",
    "log_adam_update_norm_over_param_norm": "log update\n/ param",
    "log_noise_scale": "log noise\nscale",
    "cosine_similarity_grad_momentum": "cos grad,\nmomentum",
    "did_grad_clip": "share\nclipped",
}


def _number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


class LiveView:
    """A progress bar over all of ``trainings``, with their latest measurements below it."""

    def __init__(self, console: Console, trainings: Sequence[Training]) -> None:
        self._trainings = trainings
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps ·"),
            TimeElapsedColumn(),
            TextColumn("elapsed ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task(
            "training", total=trainings[0].config.steps, completed=trainings[0].step
        )
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> LiveView:
        self._live.__enter__()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._live.__exit__(error_type, error, traceback)
        self._live.console.line(1 if self._live.console.is_terminal else 2)

    def update(self) -> None:
        """Take up the steps done since the last call."""
        self._progress.update(self._task, completed=self._trainings[-1].step)

    def _render(self) -> Group:
        return Group(self._progress, self._measurements())

    def _measurements(self) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False)
        table.add_column("optimizer", vertical="bottom")
        for title in _LIVE_COLUMNS.values():
            table.add_column(title, justify="right", vertical="bottom")
        for training in self._trainings:
            values = (latest(training.rows, column) for column in _LIVE_COLUMNS)
            table.add_row(training.name, *map(_number, values))
        return table


def final_table(trainings: Sequence[Training]) -> Table:
    """One line for each of ``trainings``, with the numbers it is judged by."""
    title = f"After {trainings[0].step:,} steps (losses in nats per byte)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("optimizer", no_wrap=True)
    for title in (
        "peak\nlr",
        "train\nloss",
        "eval\nloss",
        "eval bits\nper byte",
        "ms per\noptimizer step",
        "share of\nstep time",
    ):
        table.add_column(title, justify="right", no_wrap=True)
    for training in trainings:
        summary = Summary(training.rows)
        table.add_row(
            training.name,
            f"{training.config.lr:g}",
            _number(summary.train_loss),
            _number(summary.eval_loss),
            _number(summary.bits_per_byte),
            _number(summary.optimizer_ms, 2),
            "-" if math.isnan(summary.optimizer_share) else f"{summary.optimizer_share:.1%}",
        )
    return table
