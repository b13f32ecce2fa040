"""What meta-training shows on the terminal while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lhopt_fused.meta.config import MetaConfig
from lhopt_fused.meta.jobs import Demonstrate, FindReferences, Play, ScoreControls
from lhopt_fused.meta.setting import Setting
from lhopt_fused.meta.train import Update
from lhopt_fused.meta.workers import Pending, Workers
from lhopt_fused.stopping import Stopped, StopRequest

__all__ = ["Played", "TrainingView", "WatchedWorkers"]

_T = TypeVar("_T")

_PHASES: Final = {
    ScoreControls: "hand control",
    Demonstrate: "imitation",
    FindReferences: "what to beat",
    Play: "validation",
}
"""Jobs that are shown as a bar of their own."""

_BEFORE_PPO: Final = ("hand control", "imitation")
_VALIDATIONS_SHOWN: Final = 8

Played = list[tuple[Setting, NDArray[np.float64]]]
"""Settings, and the hyperparameters after each decision of a policy there, ``[R, D, 8]``."""


class TrainingView:
    """A bar for each phase, one for PPO with the time that is left, and the last validations."""

    def __init__(self, console: Console, config: MetaConfig) -> None:
        self._console, self._config = console, config
        self._phases = Progress(
            TextColumn("{task.description:13}"),
            BarColumn(20),
            MofNCompleteColumn(),
            console=console,
        )
        self._bars: dict[str, Any] = {}
        self._ppo = Progress(
            TextColumn(f"{'PPO':13}"),
            BarColumn(20),
            TextColumn("{task.fields[shown]}"),
            console=console,
        )
        self._ppo_bar = self._ppo.add_task("PPO", total=1.0, shown="", start=False)
        self._first: Update | None = None
        self._validated: list[Update] = []
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """On the terminal, for the time of a ``with`` block."""
        with self._live:
            yield
        self._console.line()

    def begin(self, phase: str, jobs: int) -> None:
        """Jobs of a phase have been handed out."""
        if phase in self._bars:
            self._phases.reset(self._bars[phase], total=jobs)
        else:
            self._bars[phase] = self._phases.add_task(phase, total=jobs)

    def advance(self, phase: str) -> None:
        """One of them is done."""
        self._phases.advance(self._bars[phase])

    def update(self, update: Update) -> None:
        """An update of PPO is done."""
        self._first = self._first or update
        left = self._seconds_left(update)
        done = update.seconds / max(update.seconds + left, 1e-9)
        shown = (
            f"{_duration(left)} left · update {update.index:,} · {update.episodes:,} episodes · "
            f"reward {update.reward:+.2f}"
        )
        self._ppo.start_task(self._ppo_bar)
        self._ppo.update(self._ppo_bar, completed=done, shown=shown)
        if update.report is not None:
            self._validated.append(update)
            if not self._console.is_terminal:
                self._console.print(self._validations([update]), f"{_duration(left)} left", "")

    def _seconds_left(self, update: Update) -> float:
        """Until the updates or the minutes are used up, whichever is first."""
        by_clock = 60 * self._config.minutes - update.seconds
        first = self._first
        if first is None or update.index == first.index:
            return max(by_clock, 0.0)
        pace = (update.seconds - first.seconds) / (update.index - first.index)
        return max(min(by_clock, pace * (self._config.updates - update.index)), 0.0)

    def _render(self) -> Group:
        bars = (self._phases, self._ppo)
        if not self._console.is_terminal:
            return Group(*bars)
        return Group(*bars, self._validations(self._validated[-_VALIDATIONS_SHOWN:]))

    def _validations(self, updates: Iterable[Update]) -> Table:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for title in (
            "update",
            "episodes",
            "reward on\nnew tasks",
            "hand\ncontrol's",
            "ends below\ndefault",
            "tuned\nAdamW",
            "hand\ncontrol",
        ):
            table.add_column(title, justify="right", vertical="bottom")
        for update in updates:
            report = update.report
            if report is not None:
                table.add_row(
                    f"{update.index:,}",
                    f"{update.episodes:,}",
                    f"{report.reward:+.2f}",
                    f"{report.control_reward:+.2f}",
                    f"{report.beats_default:.0%}",
                    f"{report.beats_tuned:.0%}",
                    f"{report.beats_control:.0%}",
                )
        return table


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


class WatchedWorkers:
    """Other workers, watched: a view sees phases pass, and what was played last is kept.

    Args:
        workers: who does the work.
        view: what is told.
        stop: where it is set, waiting for jobs of the phases before PPO raises
            :class:`lhopt_fused.stopping.Stopped`; nothing of them would be kept.

    Attributes:
        played: the last validation's settings and hyperparameters.
    """

    def __init__(self, workers: Workers, view: TrainingView, stop: StopRequest) -> None:
        self._workers, self._view, self._stop = workers, view, stop
        self.played: Played = []

    def start(self, jobs: Iterable[Callable[[], _T]]) -> Pending[_T]:
        """See :meth:`lhopt_fused.meta.workers.Workers.start`."""
        listed: list[Any] = list(jobs)
        pending: Pending[_T] = self._workers.start(listed)
        phase = _PHASES.get(type(listed[0])) if listed else None
        if phase is None:
            return pending
        self._view.begin(phase, len(listed))
        return _Watched(self, listed, pending, phase)

    def advance(self, phase: str) -> None:
        """A job of the phase is done."""
        self._view.advance(phase)
        if self._stop.is_set and phase in _BEFORE_PPO:
            raise Stopped

    def close(self) -> None:
        """See :meth:`lhopt_fused.meta.workers.Workers.close`."""
        self._workers.close()


class _Watched(Pending[_T]):
    def __init__(
        self, watched: WatchedWorkers, jobs: list[Any], pending: Pending[_T], phase: str
    ) -> None:
        self._watched, self._jobs, self._pending, self._phase = watched, jobs, pending, phase

    def results(self, on_result: Callable[[], None] | None = None) -> list[_T]:
        def tell() -> None:
            self._watched.advance(self._phase)
            if on_result is not None:
                on_result()

        found = self._pending.results(tell)
        if isinstance(self._jobs[0], Play):
            results: list[Any] = list(found)
            self._watched.played = [
                (job.setting, hyperparameters)
                for job, (_, hyperparameters) in zip(self._jobs, results, strict=True)
            ]
        return found
