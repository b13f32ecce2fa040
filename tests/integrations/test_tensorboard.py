"""LHOPT's history in the real TensorBoard: every number of every outer step, as it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from cases import make_params, set_grads
from policy.samples import random_policy

from lhopt_fused import LHOPT
from lhopt_fused.actions import REGISTER_CHOICES
from lhopt_fused.history import OuterStep, tensorboard_callback, write_tensorboard

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("default"),  # the library's own are none of ours
]

Scalars = dict[tuple[str, int], float]


def written(folder: Path) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }


def expected(history: list[OuterStep]) -> Scalars:
    return {
        (f"lhopt/{name}", step.inner_step): value
        for step in history
        for name, value in [
            *step.scalars().items(),
            ("register", REGISTER_CHOICES.index(step.register)),
        ]
    }


def same(left: Scalars, right: Scalars) -> bool:
    """TensorBoard keeps float32."""
    return left.keys() == right.keys() and all(
        math.isclose(left[key], right[key], rel_tol=1e-6, abs_tol=1e-30)
        or (math.isnan(left[key]) and math.isnan(right[key]))
        for key in left
    )


def test_a_run_is_written_as_it_goes_and_afterwards(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    params = make_params()
    live = SummaryWriter(tmp_path / "live")
    optimizer = LHOPT(
        params,
        24,
        outer_steps=8,
        policy=random_policy(3),
        restart_registers=3,
        sample=True,
        callback=tensorboard_callback(live),
    )
    for step in range(24):
        set_grads(params, step)
        if step > 3:  # NaN in the first outer steps
            optimizer.observe(train_loss=1.0 / step, eval_loss=2.0 if step > 12 else None)
        optimizer.step()
    live.close()
    with SummaryWriter(tmp_path / "after") as after:
        write_tensorboard(optimizer.history, after)
    assert len(optimizer.history) == 8
    for folder in ("live", "after"):
        assert same(written(tmp_path / folder), expected(optimizer.history))
    assert not same(written(tmp_path / "live"), expected(optimizer.history[1:]))
