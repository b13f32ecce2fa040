"""Inner tasks: each a pure function of its own seed, apart from its neighbours, and learnable."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

import pytest
import torch
from tolerances import TASK_LOSS, assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from lhopt_fused.meta.tasks import (
    FAMILIES,
    HELDOUT,
    PRIVILEGED,
    PRIVILEGED_NAMES,
    TaskBatch,
    TaskFamily,
)
from lhopt_fused.meta.tasks.quadratic import QuadraticTasks
from lhopt_fused.meta.tasks.seeded import task_seeds

FAMILY_TYPES: Mapping[str, type[TaskFamily]] = {**FAMILIES, **HELDOUT}
ALL = sorted(FAMILY_TYPES)
ARCHITECTURES = [(name, seed) for name in ALL for seed in range(1 if name in HELDOUT else 4)]
SPLITS: tuple[Literal["eval", "report"], ...] = ("eval", "report")

Params = dict[str, torch.Tensor]


@cache
def batch(name: str, seed: int = 0, runs: int = 6) -> TaskBatch:
    return FAMILY_TYPES[name]().sample(seed, runs)


def gradients(tasks: TaskBatch, params: Params, step: int) -> tuple[torch.Tensor, Params]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in params.items()}
    loss = tasks.train_loss(leaves, step)
    grads = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return loss.detach(), dict(zip(leaves, grads, strict=True))


def descend(tasks: TaskBatch, steps: int, lr: float) -> tuple[Params, torch.Tensor]:
    """Parameters after ``steps`` of gradient descent, and the training losses, ``[steps, R]``."""
    params, losses = tasks.init(), []
    for step in range(steps):
        loss, grads = gradients(tasks, params, step)
        losses.append(loss)
        params = {name: tensor - lr * grads[name] for name, tensor in params.items()}
    return params, torch.stack(losses)


@pytest.mark.parametrize("name", ALL)
def test_shapes(name: str) -> None:
    tasks = batch(name)
    params = tasks.init()
    assert tasks.family == name
    assert tasks.runs == 6
    assert params
    assert all(tensor.shape[0] == 6 for tensor in params.values())
    assert all(tensor.dtype == torch.float32 for tensor in params.values())
    loss, grads = gradients(tasks, params, 0)
    assert loss.shape == (6,)
    assert loss.dtype == torch.float32
    assert all(bool(grad.isfinite().all()) for grad in grads.values())
    for split in SPLITS:
        held_out = tasks.eval_loss(params, split)
        assert held_out.shape == (6,)
        assert bool((held_out > 0).all())
        assert bool(held_out.isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_counts(name: str) -> None:
    tasks = batch(name)
    # the start of a hinge loss or a dead unit may have no gradient: any of a few steps will do
    seen: dict[str, torch.Tensor] = {}
    for step in range(3):
        for key, grad in gradients(tasks, tasks.init(), step)[1].items():
            seen[key] = seen.get(key, torch.zeros(())) + grad.abs().sum()
    assert all(float(total) > 0 for total in seen.values()), seen


@pytest.mark.parametrize("name", ALL)
def test_equal_seeds_give_equal_tasks(name: str) -> None:
    again = FAMILY_TYPES[name]().sample(0, 6)
    first, second = descend(batch(name), 3, 0.05), descend(again, 3, 0.05)
    assert torch.equal(first[1], second[1])
    assert all(torch.equal(first[0][key], second[0][key]) for key in first[0])


@pytest.mark.parametrize("name", ALL)
def test_seeds_and_steps_differ(name: str) -> None:
    tasks = batch(name)
    params = tasks.init()
    assert not torch.equal(tasks.train_loss(params, 0), tasks.train_loss(params, 1))
    assert not torch.equal(tasks.train_loss(params, 0), tasks.train_loss(params, 64))
    assert tasks.eval_loss(params, "report").unique().numel() == 6  # each task has its own data


@pytest.mark.parametrize("name", ALL)
def test_minibatches_do_not_depend_on_the_order_of_asking(name: str) -> None:
    tasks = batch(name)
    params = tasks.init()
    forwards = [tasks.train_loss(params, step) for step in (3, 70, 200)]
    backwards = [tasks.train_loss(params, step) for step in (200, 70, 3)]
    assert all(torch.equal(a, b) for a, b in zip(forwards, backwards[::-1], strict=True))


@pytest.mark.parametrize(("name", "seed"), ARCHITECTURES)
def test_a_task_is_the_same_wherever_it_stands(name: str, seed: int) -> None:
    tasks, index = batch(name, seed), torch.tensor([4, 0, 0, 5, 2])
    chosen = tasks.select(index)
    assert chosen.runs == 5
    before, after = descend(tasks, 4, 5e-3), descend(chosen, 4, 5e-3)
    assert_close(after[1], before[1][:, index], TASK_LOSS, before[1][:, index].abs().max())
    for split in SPLITS:
        expected = tasks.eval_loss(before[0], split)[index]
        assert_close(chosen.eval_loss(after[0], split), expected, TASK_LOSS, expected.abs().max())
    assert torch.equal(chosen.describe(), tasks.describe()[index])
    with pytest.raises(AssertionError):  # another order is another trajectory
        assert_close(after[1], before[1][:, :5], TASK_LOSS, before[1].abs().max())


@pytest.mark.parametrize("name", ALL)
def test_tasks_begun_again_are_the_same_tasks(name: str) -> None:
    tasks, index = batch(name), torch.tensor([3, 1])
    params, again = tasks.init(), tasks.again(1)
    for split in SPLITS:
        assert torch.equal(again.eval_loss(params, split), tasks.eval_loss(params, split))
    assert torch.equal(again.describe(), tasks.describe())
    firsts = [t.train_loss(params, 0) for t in (tasks, again, tasks.again(2), tasks.again(1))]
    assert torch.equal(firsts[1], firsts[3])
    assert all(not torch.equal(firsts[0], first) for first in firsts[1:])
    assert not torch.equal(firsts[1], firsts[2])
    chosen = tasks.select(index).again(1)
    some = {key: tensor[index] for key, tensor in params.items()}
    expected = firsts[1][index]
    assert_close(chosen.train_loss(some, 0), expected, TASK_LOSS, expected.abs().max())


@pytest.mark.parametrize("name", ALL)
def test_a_larger_batch_begins_with_a_smaller_one(name: str) -> None:
    tasks, larger = batch(name), batch(name, runs=9)
    losses = descend(tasks, 2, 0.05)[1]
    assert_close(descend(larger, 2, 0.05)[1][:, :6], losses, TASK_LOSS, losses.abs().max())


def check_apart(tasks: TaskBatch, bad: float) -> None:
    """Parameters of ``bad`` numbers in one task change nothing in the others."""
    params = tasks.init()
    for tensor in params.values():
        tensor[2] = bad
    others = torch.tensor([0, 1, 3, 4, 5])
    loss, grads = gradients(tasks, params, 0)
    clean_loss, clean_grads = gradients(tasks, tasks.init(), 0)
    assert not bool(loss[2].isfinite())
    assert_close(loss[others], clean_loss[others], TASK_LOSS, clean_loss.abs().max())
    for key, grad in grads.items():
        clean = clean_grads[key][others]
        assert_close(grad[others], clean, TASK_LOSS, clean.abs().max())
    assert bool(tasks.eval_loss(params, "eval")[others].isfinite().all())


@pytest.mark.parametrize(("name", "seed"), ARCHITECTURES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_task_stays_alone(name: str, seed: int, bad: float) -> None:
    check_apart(batch(name, seed), bad)


class Leaking(QuadraticTasks):
    """Tasks that see a little of one another."""

    def train_loss(self, params: Mapping[str, torch.Tensor], step: int) -> torch.Tensor:
        loss = super().train_loss(params, step)
        return loss + 1e-3 * loss.roll(1)


def test_tasks_that_leak_are_caught() -> None:
    leaking = Leaking(task_seeds(0, 6, "cpu"), {"x": (8,)})
    with pytest.raises(AssertionError, match="NaN in different places"):
        check_apart(leaking, float("nan"))
    check_apart(QuadraticTasks(task_seeds(0, 6, "cpu"), {"x": (8,)}), float("nan"))


@pytest.mark.parametrize(("name", "seed"), ARCHITECTURES)
def test_evaluation_has_no_randomness(name: str, seed: int) -> None:
    tasks = batch(name, seed)
    params = tasks.init()
    before = [tasks.eval_loss(params, split) for split in SPLITS]
    tasks.train_loss(params, 5)
    after = [tasks.eval_loss(params, split) for split in SPLITS]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(before[0], before[1])  # the splits are not the same


@pytest.mark.parametrize("name", ALL)
def test_descriptions_are_finite_and_of_one_length(name: str) -> None:
    for seed in range(3):
        table = batch(name, seed).describe()
        assert table.shape == (6, PRIVILEGED) == (6, len(PRIVILEGED_NAMES))
        assert table.dtype == torch.float32
        assert bool(table.isfinite().all())
        parameters = sum(tensor[0].numel() for tensor in batch(name, seed).init().values())
        column = table[:, PRIVILEGED_NAMES.index("log_parameters")]
        assert bool((column.exp().round() == parameters).all())


@pytest.mark.parametrize("name", ALL)
def test_most_tasks_are_learnable(name: str) -> None:
    """120 steps of Adam bring the training loss of most tasks down by a tenth and more."""
    better = []
    for seed in range(2 if name in HELDOUT else 4):
        tasks = batch(name, seed)
        params = {key: tensor.requires_grad_() for key, tensor in tasks.init().items()}
        optimizer = torch.optim.Adam(params.values(), lr=1e-2)
        losses = []
        for step in range(120):
            loss = tasks.train_loss(params, step)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())
        better.append(torch.stack(losses[-10:]).mean(0) < 0.9 * torch.stack(losses[:5]).mean(0))
    assert float(torch.cat(better).float().mean()) >= 0.6


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("seed", "runs"), [(-1, 2), (2**63, 2), (0, 0)])
def test_bad_seeds_and_sizes_are_named(name: str, seed: int, runs: int) -> None:
    with pytest.raises(ValueError, match=r"(seed|runs) is"):
        FAMILY_TYPES[name]().sample(seed, runs)


class NoSynchronisation(TorchDispatchMode):
    """Refuses what makes a host wait for its device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> torch.Tensor:
        waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
        assert func.name() not in waits, func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "seed"), ARCHITECTURES)
def test_a_step_waits_for_no_device(name: str, seed: int) -> None:
    tasks = batch(name, seed)
    params = {key: tensor.requires_grad_() for key, tensor in tasks.init().items()}
    with NoSynchronisation():
        tasks.train_loss(params, 1000).sum().backward()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            params[min(params)].sum().item()
