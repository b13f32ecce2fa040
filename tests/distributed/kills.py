"""Training runs whose processes are killed at random moments, and begun again where they were.

``PYTHONPATH=tests python -m distributed.kills 50`` kills 50 times and compares every run that ends
with one that nothing happened to, bit for bit: parameters, moments, what the policy remembers and
has decided. The outcome goes to ``benchmarks/results``.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from distributed.launch import Launched, run_ranks
from distributed.training import (
    STEPS,
    load,
    make_model,
    make_optimizer,
    reached,
    save,
    sharded,
    train,
)

from benchmarks import report

RANKS = 2


def to_the_end(rank: int, ranks: int, folder: str) -> str:
    """Go on from the newest checkpoint, save after every step; the bits of what is reached."""
    model = sharded(make_model(), ranks)
    optimizer = make_optimizer(model)
    saved = [int(path.name) for path in Path(folder).iterdir() if path.name.isdigit()]
    first = max(saved, default=0)
    if first > 0:
        load(model, optimizer, Path(folder) / str(first))
    for step in range(first, STEPS):
        train(model, optimizer, step, step + 1, slice(8))
        save(model, optimizer, Path(folder) / str(step + 1))
    return str(reached(model, optimizer)["bits"])


@dataclass(frozen=True)
class Survival:
    """What has come of runs that were killed.

    Attributes:
        kills: how many times a run at work was killed.
        ended: runs that have got to the end.
        equal: of these, those that have reached the bits of one that nothing happened to.
    """

    kills: int
    ended: int
    equal: int


def survive(kills: int, seed: int) -> Survival:
    """Run, kill at random moments and run again, until that many kills have hit a run at work."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        expected = run_ranks(to_the_end, RANKS, folder)
    longest = time.monotonic() - start
    chance, done, ended, equal = random.Random(seed), 0, 0, 0
    while done < kills or not ended:
        with tempfile.TemporaryDirectory() as folder:
            outcomes: list[tuple[bool, str]] = []
            while not outcomes or not all(is_good for is_good, _ in outcomes):
                launched = Launched(to_the_end, RANKS, folder)
                if done < kills:
                    time.sleep(chance.uniform(0.0, longest))
                    launched.kill(chance.randrange(RANKS))
                outcomes = launched.outcomes()
                done += any(not is_good for is_good, _ in outcomes)
        ended += 1
        equal += [said for _, said in outcomes] == expected
    return Survival(done, ended, equal)


if __name__ == "__main__":
    SURVIVAL = survive(int(sys.argv[1]), seed=0)
    print(f"{SURVIVAL}: all as in a run without kills: {SURVIVAL.ended == SURVIVAL.equal}")
    report.keep("kills", {"ranks": RANKS, "seed": 0, **asdict(SURVIVAL)})
    sys.exit(SURVIVAL.ended != SURVIVAL.equal)
