"""Teachers: what can be expected of each schedule, from what a policy sees."""

from __future__ import annotations

import pytest
import torch
from tolerances import TEACHER, assert_close

from lhopt_fused.meta.teacher import expected_worth, teacher_weights

BATCHES = torch.arange(60).repeat_interleave(4)
SCHEDULES = 3


def tasks() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of tasks, what schedules promise there, and what they gave, with much chance."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(BATCHES), 5, generator=generator)
    promised = torch.stack([features[:, 0], -features[:, 0], torch.full((len(BATCHES),), -0.2)])
    chance = torch.randn(SCHEDULES, len(BATCHES), generator=generator)
    return features, promised, promised + chance


def gained(chosen: torch.Tensor, promised: torch.Tensor) -> float:
    """Mean of what was promised where one schedule is chosen on each task."""
    return promised.gather(0, chosen[None]).mean().item()


def test_what_is_expected_is_better_than_hindsight_and_than_any_one_schedule():
    features, promised, rewards = tasks()
    most = gained(promised.argmax(0), promised)
    expected = expected_worth(features, rewards, BATCHES)
    assert expected.dtype == torch.float64
    assert expected.shape == promised.shape
    gain = gained(expected.argmax(0), promised)
    assert gain > 0.85 * most
    assert gain > gained(rewards.argmax(0), promised) + 0.1 * most
    assert gain > promised.mean(1).max().item() + 0.5 * most


def test_from_features_that_say_nothing_nothing_is_learned():
    features, promised, rewards = tasks()
    other = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(1))]
    expected = expected_worth(other, rewards, BATCHES)
    most = gained(promised.argmax(0), promised)
    assert gained(expected.argmax(0), promised) < 0.4 * most


def test_no_task_teaches_itself():
    features, _, rewards = tasks()
    expected = expected_worth(features, rewards, BATCHES)
    first = BATCHES == 0
    changed = rewards.clone()
    changed[:, first] += 3.0
    again = expected_worth(features, changed, BATCHES)
    assert torch.equal(again[:, first], expected[:, first])
    assert not torch.equal(again[:, BATCHES == 1], expected[:, BATCHES == 1])


def test_the_seed_decides_and_no_random_number_is_used_up():
    features, _, rewards = tasks()
    torch.manual_seed(5)
    following = torch.rand(3)
    torch.manual_seed(5)
    one = expected_worth(features, rewards, BATCHES, seed=1)
    assert torch.equal(torch.rand(3), following)
    assert torch.equal(one, expected_worth(features, rewards, BATCHES, seed=1))
    assert not torch.equal(one, expected_worth(features, rewards, BATCHES, seed=2))


def test_tasks_of_one_batch_cannot_teach_one_another():
    features, _, rewards = tasks()
    with pytest.raises(ValueError, match="tasks of one batch only: expected two at least"):
        expected_worth(features, rewards, torch.zeros_like(BATCHES))


def test_a_feature_that_never_varies_is_of_no_account():
    features, _, rewards = tasks()
    features[:, 1] = 7.0
    assert expected_worth(features, rewards, BATCHES).isfinite().all()


def test_weights_are_a_softmax_of_what_is_expected():
    expected = torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    weights = teacher_weights(expected, 0.25)
    falling = torch.tensor([[-2.0, 0.0], [0.0, -2.0]], dtype=torch.float64).exp()
    wanted = falling / falling.sum(1, keepdim=True)
    assert_close(weights, wanted, TEACHER, wanted)
    with pytest.raises(AssertionError):
        assert_close(teacher_weights(expected, 0.26), wanted, TEACHER, wanted)
