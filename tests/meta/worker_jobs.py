"""Jobs for workers of any kind: picklable, and they note each time that they are run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Square:
    """The square of a number; ``deaths`` times it takes its process with it instead.

    Attributes:
        number: of the job.
        folder: where a file per job gets a byte whenever it begins.
        deaths: how often it kills its process.
    """

    number: int
    folder: Path
    deaths: int = 0

    def __call__(self) -> int:
        begun = self.folder / str(self.number)
        with begun.open("ab") as file:
            file.write(b".")
        if begun.stat().st_size <= self.deaths:
            self.wait_for_another()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.number**2

    def wait_for_another(self) -> None:
        """So that it dies while others run."""
        wait_until(lambda: len(list(self.folder.iterdir())) >= 2)


@dataclass(frozen=True)
class Hold:
    """The square of a number, once there is a file ``go`` beside the folder.

    Beside it, a file named after the process is left too.
    """

    number: int
    folder: Path

    def __call__(self) -> int:
        number = Square(self.number, self.folder)()
        (self.folder.parent / f"process-{os.getpid()}").touch()
        wait_until((self.folder.parent / "go").exists)
        return number


@dataclass(frozen=True)
class Fail:
    """Raises."""

    def __call__(self) -> int:
        raise KeyError("what went wrong")


def wait_until(condition: Callable[[], bool]) -> None:
    """Give up after a time that is long enough for any machine."""
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def begun(folder: Path) -> dict[int, int]:
    """How often each job was begun."""
    return {int(path.name): path.stat().st_size for path in folder.iterdir()}
