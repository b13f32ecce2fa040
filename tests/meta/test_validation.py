"""Validation: who wins, against what, found once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from meta.runs import Inline, small

from lhopt_fused.meta.baselines import adamw_grid, final_losses
from lhopt_fused.meta.config import START_HYPERPARAMETERS
from lhopt_fused.meta.control import HandControl
from lhopt_fused.meta.episode import sample_tasks
from lhopt_fused.meta.jobs import make_network, pack
from lhopt_fused.meta.validation import Validation

CONFIG = small()
CONTROL = HandControl(0.03, "linear")
SETTINGS = [CONFIG.validation_tasks.draw(seed) for seed in range(2)]


def validation(
    folder: Path, workers: Inline, control: HandControl = CONTROL, start: float = 0.03
) -> Validation:
    begin = {**START_HYPERPARAMETERS, "lr": start}
    return Validation(CONFIG, SETTINGS, begin, control, workers, folder)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Validation:
    """With its references."""
    made = validation(tmp_path_factory.mktemp("references"), Inline())
    assert len(made.references) == 2
    return made


def test_the_hand_control_ties_with_itself(found):
    report = found.compare([other.control for other in found.references])
    assert report.beats_control == 0.5
    assert report.reward == report.control_reward
    assert report.tasks == 4


def test_who_loses_everywhere_wins_nothing(found):
    lost = found.compare([np.full(setting.runs, np.nan) for setting in SETTINGS])
    assert (lost.reward, lost.beats_default, lost.beats_tuned, lost.beats_control) == (-3, 0, 0, 0)
    won = found.compare([np.zeros(setting.runs) - 1e9 for setting in SETTINGS])
    assert (won.reward, won.beats_default, won.beats_tuned, won.beats_control) == (3, 1, 1, 1)


def test_the_default_ties_with_itself_and_the_best_of_the_grid_is_best(found):
    report = found.compare([other.default for other in found.references])
    assert report.beats_default == 0.5
    tuned = found.compare([other.tuned for other in found.references])
    assert tuned.beats_tuned == 0.5
    hindsight = found.compare([other.grid.min(0) for other in found.references])
    assert hindsight.beats_tuned >= 0.5
    assert hindsight.beats_default >= 0.5


def test_adamw_is_tuned_on_another_run_and_another_split(found):
    settings, schedules = adamw_grid()
    for setting, other in zip(SETTINGS, found.references, strict=True):
        tasks = sample_tasks(setting, "cpu", None).again(1)
        trial = final_losses(tasks, settings, schedules, setting.total_steps, split="eval")
        chosen = trial.argmin(0)
        assert other.tuned.tolist() == other.grid[chosen, np.arange(setting.runs)].tolist()


def test_references_are_found_once_and_kept(tmp_path):
    workers = Inline()
    first = validation(tmp_path, workers).references
    assert workers.counts["FindReferences"] == 2
    again = validation(tmp_path, workers).references
    assert workers.counts["FindReferences"] == 2
    for one, other in zip(first, again, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(one, other, strict=True))
    _ = validation(tmp_path, workers, HandControl(0.01, "cosine")).references
    assert workers.counts["FindReferences"] == 4


def test_a_policy_is_played_without_noise(found):
    torch.manual_seed(0)
    network = pack(make_network(CONFIG))
    losses = found.losses(network)
    assert [len(row) for row in losses] == [setting.runs for setting in SETTINGS]
    assert all(np.array_equal(x, y) for x, y in zip(losses, found.losses(network), strict=True))
    assert found.report(network) == found.compare(losses)
