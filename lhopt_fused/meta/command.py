"""The command ``lhopt meta-train``: options and messages around :class:`MetaTraining`."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console

from lhopt_fused.stopping import Stopped, StopRequest, stoppable

if TYPE_CHECKING:
    from lhopt_fused.meta.config import MetaConfig
    from lhopt_fused.meta.display import TrainingView, WatchedWorkers
    from lhopt_fused.meta.train import MetaTraining, Update
    from lhopt_fused.meta.workers import Workers

__all__ = ["Overrides", "bad_input", "meta_train"]

_console = Console(highlight=False)
_errors = Console(highlight=False, stderr=True)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, such as tasks.longest=512."),
]

_EXTRA: Final = ("dacite", "gymnasium", "sklearn", "tensorboard", "tomli")


def meta_train(
    config: Annotated[
        str, typer.Argument(help="tiny, cpu, gpu, cluster, ablation, or a TOML file like those.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the run; lhopt-runs/meta-NAME if not given."),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Train for this long, over all runs of the command.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that run episodes.")] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run episodes on a Ray cluster: its address, 'auto' for the one that this machine "
            "is part of, 'local' for a new one on this machine.",
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="More data for the tasks: images/CLASS/*.png (or .jpg), text/*.txt, or both.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    override: Overrides = None,
) -> None:
    """Learn a policy. Stop it at any time: the same command goes on where it was."""
    changes = list(override or [])
    changes += [f"minutes={minutes}"] if minutes is not None else []
    changes += [f"workers={workers}"] if workers is not None else []
    with contextlib.ExitStack() as stack:
        with bad_input(ValueError, OSError):
            chosen = _load_config(config, changes)
            folder = out if out is not None else Path("lhopt-runs") / f"meta-{chosen.name}"
            record = _prepare(stack, chosen, folder, ray, data_dir)
        with bad_input(FileNotFoundError):
            finished = _train(record)
    if not finished:
        raise typer.Exit(130)


def _load_config(config: str, changes: list[str]) -> MetaConfig:
    """The configuration, if this machine has its device.

    Raises:
        ValueError, OSError: it is not there, not right, or there is no such device.
    """
    import torch

    from lhopt_fused.meta.config import load_config

    chosen = load_config(config, changes)
    if chosen.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {chosen.device!r} in configuration {config!r}, but torch finds no GPU "
            "here; use --set 'device=\"cpu\"' or another configuration"
        )
    return chosen


def _prepare(
    stack: contextlib.ExitStack,
    config: MetaConfig,
    folder: Path,
    ray: str | None,
    data_dir: Path | None,
) -> _Record:
    """All that a run needs, to be closed by the stack.

    Raises:
        ModuleNotFoundError: of what the extra brings.
        ValueError: the folder holds the run of another configuration.
        OSError: the folder cannot be written, or there is no cluster at the address.
    """
    import torch

    from lhopt_fused.meta.display import TrainingView, WatchedWorkers
    from lhopt_fused.meta.train import MetaTraining

    torch.set_num_threads(1)
    workers = stack.enter_context(contextlib.closing(_workers(config, ray)))
    stop = stack.enter_context(stoppable())
    view = TrainingView(_console, config)
    watched = WatchedWorkers(workers, view, stop)
    training = MetaTraining(config, folder, watched, data_dir=data_dir, commit=_commit())
    return stack.enter_context(contextlib.closing(_Record(training, watched, view, stop)))


def _train(record: _Record) -> bool:
    """Run until the end or until asked to stop; whether the end was reached."""
    training = record.training
    _say_where(training)
    try:
        with record.view.shown():
            policy = training.run(record.update, record.draw)
    except Stopped:
        if not training.updates:
            _say("Stopped before the first update: the same command begins again.")
            return False
        training.save()
        record.draw()
        _say("Stopped and saved: the same command goes on from here.")
        return False
    _say(f"Policy: {policy}\nPicture: {record.picture}\nTensorBoard: {record.board}")
    return True


def _commit() -> str:
    """Of the checkout that this is run from; empty where it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()


def _workers(config: MetaConfig, ray: str | None) -> Workers:
    from lhopt_fused.meta.workers import LocalWorkers, RayWorkers

    if ray is None:
        return LocalWorkers(config.workers)
    return RayWorkers(ray, gpus=0.0 if config.device == "cpu" else 1.0)


def _say_where(training: MetaTraining) -> None:
    config = training.config
    _say(
        f"Meta-training {config.name!r} in {training.folder}: until {config.minutes:g} minutes or "
        f"{config.updates:,} updates of {config.episodes:,} episodes are done, seed {config.seed}, "
        f"on {config.device}"
    )
    if training.updates:
        _say(
            f"Going on after update {training.updates:,}, {training.episodes:,} episodes and "
            f"{training.seconds / 60:.1f} minutes"
        )


@dataclass
class _Record:
    """What is written beside the checkpoints: TensorBoard and the picture."""

    training: MetaTraining
    watched: WatchedWorkers
    view: TrainingView
    stop: StopRequest

    def __post_init__(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board = self.training.folder / "tensorboard"
        self.picture = self.training.folder / "training.png"
        after = self.training.episodes + 1
        self._writer: Any = SummaryWriter(str(self.board), purge_step=after)

    def update(self, update: Update) -> None:
        """Take up an update; raises Stopped where the user wants to stop."""
        scalars = {"reward": update.reward}
        scalars |= {f"ppo/{name}": value for name, value in update.metrics.items()}
        if update.report is not None:
            plain = update.report.to_plain()
            scalars |= {f"validation/{name}": value for name, value in plain.items()}
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, update.episodes)
        self.view.update(update)
        if self.stop.is_set:
            raise Stopped

    def draw(self) -> None:
        """Bring the picture up to date."""
        from lhopt_fused.meta.figure import draw_training, read_log

        training = self.training
        draw_training(
            self.picture,
            read_log(training.log),
            self.watched.played,
            training.control,
            training.start,
            title=f"Meta-training {training.config.name!r}: {training.updates:,} updates, "
            f"{training.episodes:,} episodes, {training.seconds / 60:.0f} minutes",
        )
        self._writer.flush()

    def close(self) -> None:
        """Finish the TensorBoard files."""
        self._writer.close()


@contextlib.contextmanager
def bad_input(*kinds: type[Exception]) -> Iterator[None]:
    """Turn what a user can put right, a missing package or ``kinds``, into exit code 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        hint = ": pip install 'lhopt-fused[meta]'" if name in _EXTRA else ""
        _errors.print(f"Error: {error}{hint}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except kinds as error:
        _errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _say(message: str) -> None:
    """Print ``message`` as it is: paths may hold what looks like markup, and must not be broken."""
    _console.print(message, markup=False, soft_wrap=True)
