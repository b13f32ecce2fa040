"""Training runs whose processes are killed at random moments, and begun again where they were.

``PYTHONPATH=tests python -m distributed.kills 50`` kills 50 times and compares every run that ends
with one that nothing happened to, bit for bit.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
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
    bits: str = reached(model, optimizer)["bits"]
    return bits


def survive(kills: int, seed: int) -> tuple[int, bool]:
    """Run until that many kills have hit a run at work.

    Returns:
        The number of runs that have ended, and whether all of them have reached the bits of one
        that nothing happened to.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        expected = set(run_ranks(to_the_end, RANKS, folder))
    longest = time.monotonic() - start
    chance, ended, done = random.Random(seed), [], 0
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
            ended += [bits for _, bits in outcomes]
    return len(ended) // RANKS, set(ended) == expected


if __name__ == "__main__":
    KILLS = int(sys.argv[1])
    RUNS, ARE_EQUAL = survive(KILLS, seed=0)
    print(f"{KILLS} kills, {RUNS} runs to the end, all bits as in a run without: {ARE_EQUAL}")
    sys.exit(not ARE_EQUAL)
