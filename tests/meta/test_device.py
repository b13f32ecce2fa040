"""Episodes keep to one device, seen without a GPU: tensors on the device ``meta`` hold no numbers,
and refuse to be mixed with others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from meta.runs import small

from lhopt_fused.meta import inner
from lhopt_fused.meta.config import START_HYPERPARAMETERS
from lhopt_fused.meta.control import control_grid
from lhopt_fused.meta.demonstrations import ScheduleTeacher, demonstrate
from lhopt_fused.meta.episode import EpisodeBatch
from lhopt_fused.meta.jobs import make_critic, make_network
from lhopt_fused.meta.ppo import Episodes
from lhopt_fused.meta.rollout import collect, play
from lhopt_fused.meta.setting import Setting
from lhopt_fused.types import StepLayout

CONFIG = small()


class Still:
    """A backend that steps nothing, but looks where everything is."""

    def __init__(self, layout: StepLayout) -> None:
        self.layout = layout

    def step(self, grads: Sequence[torch.Tensor], statistics: torch.Tensor | None = None) -> None:
        layout = self.layout
        tables = [layout.scalars, layout.group_state, layout.tensor_state, layout.skipped_steps]
        for tensor in (*grads, *layout.params, *layout.exp_avgs, *layout.exp_avg_sqs, *tables):
            assert tensor.device.type == "meta"


@pytest.fixture(autouse=True)
def without_numbers(monkeypatch) -> None:
    """What asks for a number gets yes, or is left out."""
    monkeypatch.setattr(inner, "resolve_backend", lambda *_: "still")
    monkeypatch.setattr(inner, "get_backend", lambda _, layout: Still(layout))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda _: True)
    monkeypatch.setattr(Episodes, "__post_init__", lambda _: None)
    torch.use_deterministic_algorithms(False)  # a median's index may vary on a GPU, not its value


def fresh(family: str, baseline: str | None = None) -> EpisodeBatch:
    return EpisodeBatch(
        Setting(family, 3, 2, 2, 8, 4),
        CONFIG.policy.settings(START_HYPERPARAMETERS),
        CONFIG.policy.action_space,
        noise=CONFIG.noise,
        hidden_eval=0.5,
        baseline=baseline,
        device="meta",
    )


@pytest.mark.parametrize("family", ["quadratic", "clusters"])
def test_all_that_workers_do_stays_on_the_device(family):
    network, critic = (make(CONFIG).to("meta").eval() for make in (make_network, make_critic))
    for baseline in ("adamw", "tuned"):
        episodes = collect(fresh(family, baseline), network, critic, version=0)
        assert {tensor.device.type for tensor in episodes.to_tensors().values()} == {"meta"}
    outcome = play(fresh(family), network)
    assert {tensor.device.type for tensor in outcome} == {"meta"}
    shown = demonstrate(fresh(family), ScheduleTeacher(np.ones((2, len(control_grid())))), 0.1)
    assert {tensor.device.type for tensor in shown} == {"meta"}


def test_what_comes_from_elsewhere_is_noticed():
    batch = fresh("quadratic")
    batch.advance()
    with pytest.raises(RuntimeError, match="device"):
        batch.act(torch.zeros(4, 8, dtype=torch.float64), torch.zeros(4, dtype=torch.int64))
