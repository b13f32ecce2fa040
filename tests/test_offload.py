"""Steps in host memory: the ordinary ones, bit for bit, whatever happens between them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import DEVICES, SHAPES, make_params, set_grads
from distributed.launch import run_ranks
from policy.samples import random_policy

from lhopt_fused import LHOPT, AdamW, GradientRelease, HostOffload, NonFiniteGradientError
from lhopt_fused.offload import _Copy

STEPS = 9

Params = Sequence[torch.nn.Parameter]
Run = list[Any]


def tuned(params: Any, registers: bool = False, **keywords: Any) -> LHOPT:
    """LHOPT under a policy that decides every third step."""
    policy = random_policy(0, registers=registers)
    count = 3 if registers else 0
    return LHOPT(params, STEPS, outer_steps=3, policy=policy, restart_registers=count, **keywords)


UNCLIPPED: dict[str, Any] = {
    "nonfinite": "mask",
    "group_clip_grad_norm": None,
    "scale_grad_norm_by_rolling_max": False,
}
BUILT: dict[str, tuple[torch.dtype, Callable[[Any], Any]]] = {
    "adamw": (torch.float32, lambda params: AdamW(params, lr=0.01, keep_grad_signs=True)),
    "masters": (torch.bfloat16, lambda params: AdamW(params, lr=0.01, master_weights=True)),
    "few bits": (
        torch.bfloat16,
        lambda params: AdamW(params, lr=0.01, moments="int8", master_weights="split8"),
    ),
    "stochastic": (torch.bfloat16, lambda params: AdamW(params, lr=0.01, rounding="stochastic")),
    "lhopt": (torch.float32, tuned),
    "registers": (torch.float32, lambda params: tuned(params, registers=True)),
    "one by one": (torch.float32, lambda params: AdamW(params, lr=0.01, nonfinite="mask")),
    "buckets": (torch.float32, lambda params: tuned(params, registers=True, **UNCLIPPED)),
}
BUCKET_BYTES = {"one by one": 1, "buckets": 5_000}
"""Of those whose gradients are released, beside what is not in host memory and is not."""


def made(name: str, params: Any, on_host: bool, **keywords: Any) -> Any:
    """The optimizer itself, or in host memory."""
    build = BUILT[name][1]

    def released(groups: Any) -> Any:
        optimizer = build(groups)
        if name in BUCKET_BYTES:
            GradientRelease(optimizer, BUCKET_BYTES[name])
        return optimizer

    return HostOffload(params, released, **keywords) if on_host else build(params)


def backward(params: Params, step: int, factor: float = 1.0) -> torch.Tensor:
    """Accumulate the gradients of :func:`cases.set_grads`, on any device exactly those."""
    like = [torch.empty_like(p, device="cpu") for p in params]
    set_grads(like, step, scale=factor)
    terms = [
        (param * given.grad.to(param.device)).sum().float()
        for param, given in zip(params, like, strict=True)
        if given.grad is not None
    ]
    loss = torch.stack(terms).sum()
    loss.backward()
    return torch.tensor(1.0 / (1 + step))  # the same on every device


def state_of(optimizer: Any, params: Params) -> Run:
    """What a run has reached: everything that can be compared, in plain numbers."""
    inner = getattr(optimizer, "optimizer", optimizer)
    seen: Run = [p.detach().double().tolist() for p in params]
    for param in params:
        state = optimizer.state.get(param, {})
        seen += [(name, state[name].double().tolist()) for name in sorted(state)]
    history = repr(getattr(inner, "history", None))
    return [*seen, history, inner.skipped_steps, optimizer.param_groups[0]["lr"]]


def trained(
    name: str,
    device: str | None,
    loop: Callable[[Any, Params, int], None] | None = None,
    **keywords: Any,
) -> Run:
    """A run after each of its steps; on no device, with the optimizer itself."""
    params = make_params(BUILT[name][0], (*SHAPES, (64, 128)), device=device or "cpu")
    optimizer = made(name, params, device is not None, **keywords)
    seen: Run = []
    for step in range(STEPS):
        (loop or ordinary)(optimizer, params, step)
        seen.append(state_of(optimizer, params))
    inner = getattr(optimizer, "optimizer", optimizer)
    statistics = {name: values.tolist() for name, values in inner.statistics().items()}
    return [*seen, repr(statistics), repr(inner.pop_inner_features(extra=True))]


def ordinary(optimizer: Any, params: Params, step: int) -> None:
    loss = backward(params, step)
    if not isinstance(getattr(optimizer, "optimizer", optimizer), AdamW):
        optimizer.observe(train_loss=loss)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("in_backward", [True, False])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BUILT)
def test_it_is_the_optimizer_itself(name: str, device: str, in_backward: bool) -> None:
    assert trained(name, device, in_backward=in_backward) == trained(name, None)


def late(fetch: Callable[[_Copy, torch.Tensor], None]) -> Any:
    """Gradients that are those of one step before."""
    before: dict[_Copy, torch.Tensor] = {}

    def fetch_grad(self: _Copy, grad: torch.Tensor) -> None:
        fetch(self, grad)
        assert self._grad is not None
        now = self._grad.clone()
        self._grad.copy_(before.get(self, now))
        before[self] = now

    return fetch_grad


@pytest.mark.parametrize("name", ["adamw", "lhopt", "buckets"])
def test_gradients_of_one_step_earlier_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Copy, "fetch_grad", late(_Copy.fetch_grad))
    assert trained(name, "cpu") != trained(name, None)


@pytest.mark.parametrize("name", ["adamw", "buckets"])
def test_parameters_that_do_not_come_back_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    send = _Copy.send
    monkeypatch.setattr(_Copy, "send", lambda self: self.host.numel() == 40 or send(self))
    assert trained(name, "cpu") != trained(name, None)


# ---------------------------------------------------------------------- between backward and step


def accumulates(optimizer: Any, params: Params, step: int) -> None:
    for part in range(3):
        backward(params, 3 * step + part)
    optimizer.step()
    optimizer.zero_grad(set_to_none=step % 2 == 0)


def clips(optimizer: Any, params: Params, step: int) -> None:
    backward(params, step)
    if params[0].is_cuda:  # where norms add up otherwise
        torch.nn.utils.clip_grad_value_(params, 0.5)
    else:
        torch.nn.utils.clip_grad_norm_(params, 0.5)
    optimizer.step()
    optimizer.zero_grad()


def sets_by_hand(optimizer: Any, params: Params, step: int) -> None:
    backward(params, step)
    with torch.no_grad():
        params[0].grad = params[0] / (1 + step)  # another tensor
        params[1].grad = None if step % 2 else params[1].grad
        params[2].grad.view(-1)[1:].mul_(-2)
    optimizer.step()
    for param in params:
        param.grad = None


def writes_parameters(optimizer: Any, params: Params, step: int) -> None:
    backward(params, step)
    with torch.no_grad():
        params[step % 3].clamp_(-0.4, 0.4)
    if step == 4:
        params[3].data = params[3].data + 1  # in memory of its own
    optimizer.step()
    optimizer.zero_grad()


def leaves_out(optimizer: Any, params: Params, step: int) -> None:
    """Gradients that are not stepped, and steps without any."""
    backward(params, step)
    if step % 3 == 1:
        for param in params:
            param.grad = None
    if step % 3 != 2:
        optimizer.step()
    optimizer.zero_grad()


LOOPS = (accumulates, clips, sets_by_hand, writes_parameters, leaves_out)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "one by one"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_takes_what_is_there(loop: Any, name: str, device: str) -> None:
    if device == "cpu" or loop is not clips:
        assert trained(name, device, loop) == trained(name, None, loop)
    else:
        assert trained(name, device, loop) == trained(name, device, loop, in_backward=False)


@pytest.mark.parametrize("loop", [accumulates, clips, sets_by_hand])
def test_what_has_come_too_early_shows(loop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, expected = _Copy.fetch_grad, trained("adamw", None, loop)
    monkeypatch.setattr(_Copy, "has_come", lambda self, grad: self._source is not None)
    monkeypatch.setattr(
        _Copy, "fetch_grad", lambda self, grad: self._source is not None or fetch(self, grad)
    )
    assert trained("adamw", "cpu", loop) != expected


@pytest.mark.parametrize("is_clipped", [True, False])
@pytest.mark.parametrize("is_unscaled", [True, False])
@pytest.mark.parametrize("name", ["adamw", "one by one"])
def test_under_a_grad_scaler(name: str, is_unscaled: bool, is_clipped: bool) -> None:
    """A power of two as its factor rounds nothing; overflows are left out."""

    def scaled(optimizer: Any, params: Params, step: int) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        scaler.scale(torch.ones(()))  # the first call makes the scale
        backward(params, step, 2.0**8)
        if step == 2:
            params[0].grad[0, 0] = torch.inf
        if is_unscaled:
            scaler.unscale_(optimizer)
        if is_clipped:
            torch.nn.utils.clip_grad_norm_(params, 0.5)
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == (2.0**7 if step == 2 else 2.0**8)
        optimizer.zero_grad()

    assert trained(name, "cpu", scaled) == trained(name, None, scaled)


def test_float16_gradients_under_a_grad_scaler_are_refused() -> None:
    """As without this, where torch refuses them."""
    params = make_params(torch.float16)
    optimizer = HostOffload(params, AdamW)
    before = [p.detach().clone() for p in params]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(backward(params, 0))
    with pytest.raises(ValueError, match="is float16, which has no room"):
        scaler.step(optimizer)
    assert all(map(torch.equal, params, before))


# ---------------------------------------------------------------------- interfaces of loops


def test_schedulers_move_the_learning_rate() -> None:
    def runs(is_on_host: bool) -> Run:
        params = make_params()
        optimizer = made("adamw", params, is_on_host)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            ordinary(optimizer, params, step)
            schedule.step()
        assert schedule.get_last_lr() == [0.01 / 5]
        return state_of(optimizer, params)

    assert runs(True) == runs(False)


def test_hyperparameters_set_here_outlast_skipped_steps_and_new_groups() -> None:
    params = make_params()
    optimizer = HostOffload(params[:3], AdamW)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    optimizer.param_groups[0]["lr"] = 0.25
    backward(params[:3], 0, torch.inf)
    scaler.step(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.25
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.add_param_group({"params": params[3:]})
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    saved = optimizer.state_dict()["param_groups"][0]
    assert (saved["lr"], saved["weight_decay"]) == (0.25, 0.5)


def test_groups_by_name_and_parameters_that_join() -> None:
    def runs(is_on_host: bool) -> Run:
        params = make_params()
        params[2].requires_grad_(False)
        named = [(f"p{index}", param) for index, param in enumerate(params)]
        groups = [{"params": named[:2], "lr": 0.1}, {"params": named[2:4], "weight_decay": 0.0}]
        optimizer: Any = HostOffload(groups, AdamW) if is_on_host else AdamW(groups)
        for step in range(6):
            if step == 2:
                params[2].requires_grad_(True)
            if step == 3:
                optimizer.add_param_group({"params": named[4:], "lr": 0.02})
            mine = params if step >= 3 else params[:4]
            ordinary(optimizer, [p for p in mine if p.requires_grad], step)
        names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
        return [*state_of(optimizer, params), names]

    assert runs(True) == runs(False)


def test_compiled_loops_and_gradients_of_another_dtype() -> None:
    def runs(is_on_host: bool, is_compiled: bool) -> Run:
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3, dtype=torch.bfloat16)
        for param in model.parameters():
            if hasattr(param, "grad_dtype"):  # else they are of that of their parameter
                param.grad_dtype = torch.float32
        optimizer = made("lhopt", model.parameters(), is_on_host)

        def train(x: torch.Tensor) -> None:
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        step = torch.compile(train, backend="eager") if is_compiled else train
        for number in range(STEPS):
            step(torch.full((4, 5), 1.0 + number, dtype=torch.bfloat16))
        return state_of(optimizer, list(model.parameters()))

    expected = runs(False, is_compiled=False)
    assert runs(True, is_compiled=False) == expected
    assert runs(True, is_compiled=True) == expected


def test_a_group_that_is_refused_leaves_everything_as_it_was() -> None:
    params = make_params()
    optimizer = HostOffload(params[:3], AdamW)
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": params[3:], "lr": -1.0})
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(params[0].detach()[1:])]})
    assert len(optimizer.param_groups) == len(optimizer.optimizer.param_groups) == 1
    ordinary(optimizer, params, 0)
    optimizer.add_param_group({"params": params[3:]})


@pytest.mark.parametrize("device", DEVICES)
def test_closures_and_what_looks_at_the_model(device: str) -> None:
    """Evaluation and callbacks see the parameters that the step has reached."""

    def runs(is_on_host: bool) -> Run:
        params = make_params(device=device if is_on_host else "cpu")
        seen: Run = []

        def build(groups: Any) -> LHOPT:
            return tuned(groups, registers=True, eval_fn=evaluate, callback=look)

        def evaluate() -> float:
            return float(params[0].cpu().double().square().sum())

        def look(_: Any) -> None:
            seen.append(evaluate())

        optimizer: Any = HostOffload(params, build) if is_on_host else build(params)
        for step in range(STEPS):
            loss = optimizer.step(lambda step=step: backward(params, step))
            seen.append([float(loss), *state_of(optimizer, params)])
            optimizer.zero_grad()
        return seen

    expected = runs(False)
    assert runs(True) == expected
    assert "eval_loss=" in expected[-1][-3]
    assert "eval_loss=None" not in expected[-1][-3]


@pytest.mark.parametrize("nonfinite", ["skip", "mask", "raise"])
def test_gradients_that_are_not_finite(nonfinite: Any) -> None:
    def runs(is_on_host: bool) -> Run:
        params = make_params()
        build: Any = lambda groups: AdamW(groups, nonfinite=nonfinite)  # noqa: E731
        optimizer = HostOffload(params, build) if is_on_host else build(params)
        seen: Run = []
        for step in range(4):
            backward(params, step)
            if step == 1:
                params[0].grad[2, 2] = torch.nan
            try:
                optimizer.step()
            except NonFiniteGradientError as error:
                seen.append(str(error))
            optimizer.zero_grad()
            seen.append(state_of(optimizer, params))
        return seen

    with nullcontext() if nonfinite == "raise" else pytest.warns(RuntimeWarning):
        assert runs(True) == runs(False)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("name", ["adamw", "masters", "few bits", "registers"])
def test_a_checkpoint_is_that_of_the_optimizer(name: str, first: bool, second: bool) -> None:
    def go_on(optimizer: Any, params: Params, begin: int, end: int) -> Run:
        for step in range(begin, end):
            ordinary(optimizer, params, step)
        return state_of(optimizer, params)

    dtype = BUILT[name][0]
    params = make_params(dtype, (*SHAPES, (64, 128)))
    optimizer = made(name, params, first)
    go_on(optimizer, params, 0, 5)
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], buffer)
    expected = go_on(optimizer, params, 5, STEPS)

    buffer.seek(0)
    saved, values = torch.load(buffer, weights_only=True)
    resumed = make_params(dtype, (*SHAPES, (64, 128)), seed=1)
    other = made(name, resumed, second)
    other.load_state_dict(saved)
    with torch.no_grad():  # as a module does that loads its own, be it after that
        for param, value in zip(resumed, values, strict=True):
            param.copy_(value)
    assert go_on(other, resumed, 5, STEPS) == expected


def test_through_torchs_distributed_checkpoint() -> None:
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def begun(seed: int) -> tuple[torch.nn.Module, HostOffload]:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        return model, made("adamw", model.parameters(), True)

    def go_on(model: torch.nn.Module, optimizer: HostOffload, first: int) -> Run:
        for step in range(first, first + 3):
            ordinary(optimizer, list(model.parameters()), step)
        return state_of(optimizer, list(model.parameters()))

    model, optimizer = begun(0)
    go_on(model, optimizer, 0)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other, resumed = begun(1)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved)
    assert go_on(other, resumed, 3) == go_on(model, optimizer, 3)


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize("device", DEVICES)
def test_copies_are_pinned_and_begin_with_the_backward_pass(device: str) -> None:
    params = make_params(device=device)
    optimizer = HostOffload(params, AdamW)
    backward(params, 0)
    for param, held in optimizer._copies.items():
        assert held._grad is not None
        assert not held.host.is_cuda
        assert held.host.is_pinned() == held._grad.is_pinned() == (device == "cuda")
        assert held.has_come(param.grad)


def test_gradients_come_once_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[_Copy] = []
    fetch = _Copy.fetch_grad
    monkeypatch.setattr(
        _Copy, "fetch_grad", lambda self, grad: fetched.append(self) or fetch(self, grad)
    )
    params = make_params()
    optimizer = HostOffload(params, AdamW)
    backward(params, 0)
    assert len(fetched) == len(set(fetched)) == len(params)
    optimizer.step()
    assert len(fetched) == len(params)
    optimizer.remove()
    backward(params, 0)
    assert len(fetched) == len(params)
    optimizer.step()
    assert len(fetched) == 2 * len(params)


def test_what_stays_behind_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters without a gradient, but for those that a register brings."""
    params = make_params()
    optimizer = HostOffload(params, BUILT["registers"][1])
    backward(params, 0)
    optimizer.step()
    optimizer.optimizer.save_register(0)
    kept = [p.detach().clone() for p in params]
    backward(params, 1)
    optimizer.step()
    optimizer.zero_grad()
    versions = [p._version for p in params]
    backward(params[:2], 2)
    optimizer.step()
    assert [p._version - v for p, v in zip(params, versions, strict=True)] == [1, 1, *5 * [0]]
    optimizer.zero_grad()
    optimizer.optimizer.load_register(0)
    optimizer.step()
    assert all(map(torch.equal, params, kept))


# ---------------------------------------------------------------------- refused


def test_other_optimizers_and_parameters_are_refused() -> None:
    params = make_params()
    with pytest.raises(TypeError, match="an optimizer of lhopt_fused, got SGD"):
        HostOffload(params, torch.optim.SGD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got one tensor"):
        HostOffload(params[0], AdamW)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share memory"):
        HostOffload([params[0], torch.nn.Parameter(params[0].detach()[1:])], AdamW)
    with pytest.raises(ValueError, match="all on the CPU; got"):
        HostOffload([params[0], torch.nn.Parameter(torch.zeros(3, device="meta"))], AdamW)
    with pytest.raises(TypeError, match="can only optimize Tensors"):
        HostOffload(["weight"], AdamW)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="empty parameter list"):
        HostOffload([], AdamW)


def test_what_cannot_be_copied_or_observed_is_refused() -> None:
    optimizer = HostOffload(make_params(), AdamW)
    with pytest.raises(TypeError, match=r"load its state_dict\(\)"):
        copy.deepcopy(optimizer)
    with pytest.raises(TypeError, match="AdamW has no policy"):
        optimizer.observe(train_loss=1.0)


def test_a_model_that_has_been_cast_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = HostOffload(model.parameters(), AdamW)
    model.double()
    with pytest.raises(ValueError, match=r"parameter 0 was .*float32.*, and is now .*float64"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = HostOffload(table.parameters(), AdamW)
    before = table.weight.detach().clone()
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="must be dense"):
        optimizer.step()
    assert torch.equal(table.weight, before)


def on_ranks(rank: int, ranks: int) -> str:
    """The error that each of several ranks gets."""
    try:
        HostOffload(make_params(), AdamW)
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_are_refused() -> None:
    assert all("CPUOffloadPolicy" in said for said in run_ranks(on_ranks, 2))


def test_order_of_arrival_is_that_of_the_backward_pass() -> None:
    params = make_params()
    optimizer = HostOffload(params, AdamW)
    x = torch.ones(())
    for param in params:
        x = x + (param * x).sum()
    x.backward()
    places = [list(optimizer._copies.values()).index(held) for held in optimizer._arriving]
    assert sorted(places) == list(range(len(params)))
    assert all(later < earlier for earlier, later in pairwise(places))
