"""Gradient release: the ordinary step, element by element, with few gradients alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import DEVICES
from distributed.launch import run_ranks
from policy.samples import random_policy

from lhopt_fused import CIAO, LHOPT, AdamW, GradientRelease

STEPS = 9
BUCKETS = (1, 5_000, 2**30)
"""Each tensor on its own, a few at a time, all of them at the end."""

LAMB = {"lamb_power": 1.0, "lamb_min_trust": 1e-3, "lamb_update_norm_ombeta": 0.05}
BUILT: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda params: AdamW(params, lr=0.01, nonfinite="mask", keep_grad_signs=True),
    "stochastic": lambda params: AdamW(params, lr=0.01, nonfinite="mask", rounding="stochastic"),
    "few bits": lambda params: AdamW(
        params, lr=0.01, nonfinite="mask", moments="int8", master_weights="split8"
    ),
    "reference": lambda params: CIAO(params, nonfinite="mask", backend="reference", **LAMB),
    "delayed": lambda params: CIAO(
        params, nonfinite="mask", denominator_norm="inf", trust="delayed", **LAMB
    ),
    "lhopt": lambda params: LHOPT(
        params,
        STEPS,
        outer_steps=3,
        policy=random_policy(0, registers=False),
        nonfinite="mask",
        group_clip_grad_norm=None,
        scale_grad_norm_by_rolling_max=False,
        inner_feature_frequency=2,
    ),
}


def make_model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.nn.Sequential:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(20, 32), torch.nn.Tanh(), torch.nn.LayerNorm(32)]
    hidden = [layer for _ in range(6) for layer in (torch.nn.Linear(32, 32), torch.nn.Tanh())]
    return torch.nn.Sequential(*layers, *hidden, torch.nn.Linear(32, 4)).to(device, dtype)


def backward(model: torch.nn.Module, step: int, spoil: bool = False) -> torch.Tensor:
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))
    loss = model(x.to(next(model.parameters()))).square().mean() * (1 + step)
    if spoil:  # in the gradient of every tensor
        loss = loss * torch.inf
    loss.backward()
    return loss.detach()


def trained(name: str, bucket_bytes: int | None, device: str = "cpu") -> list[Any]:
    """All that can be compared of a run, released or not."""
    dtype = torch.bfloat16 if name in ("stochastic", "few bits") else torch.float32
    model = make_model(dtype, device)
    optimizer = BUILT[name](model.parameters())
    if bucket_bytes is not None:
        GradientRelease(optimizer, bucket_bytes)
    seen: list[Any] = []
    for step in range(STEPS):
        loss = backward(model, step)
        if name == "lhopt":
            optimizer.observe(train_loss=loss)
        optimizer.step()
        optimizer.zero_grad()
        seen.append({k: v.tolist() for k, v in optimizer.statistics().items()})
    seen.append(optimizer.pop_inner_features(extra=True))
    seen.append(repr(getattr(optimizer, "history", None)))
    params = list(model.parameters())
    tensors = [p.detach() for p in params]
    tensors += [x for p in params for x in optimizer.state[p].values()]
    return [*(t.double().tolist() for t in tensors), *map(repr, seen)]


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BUILT)
def test_it_is_the_ordinary_step(name: str, device: str, bucket_bytes: int) -> None:
    assert trained(name, bucket_bytes, device) == trained(name, None, device)


def test_a_bucket_that_is_left_out_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = GradientRelease._step_gradients

    def sometimes(self: GradientRelease, run: Any, grads: Any) -> None:
        if len(self._stepped) != 4:
            whole(self, run, grads)

    monkeypatch.setattr(GradientRelease, "_step_gradients", sometimes)
    assert trained("adamw", 1) != trained("adamw", None)


@pytest.mark.parametrize("bucket_bytes", [1, 5_000])
@pytest.mark.parametrize("device", DEVICES)
def test_few_gradients_are_alive(device: str, bucket_bytes: int) -> None:
    model = make_model(device=device)
    params = list(model.parameters())
    optimizer = BUILT["adamw"](params)
    alive: list[int] = []

    def look(param: torch.Tensor) -> None:
        alive.append(sum(p.grad.nbytes for p in params if p.grad is not None))

    for param in params:  # before the release takes the gradient
        param.register_post_accumulate_grad_hook(look)
    backward(model, 0)
    optimizer.step()
    optimizer.zero_grad()
    ordinary = max(alive)
    alive.clear()
    GradientRelease(optimizer, bucket_bytes)
    for step in range(2):
        backward(model, step)
        assert all(p.grad is None for p in params) or bucket_bytes > 1
        optimizer.step()
        assert all(p.grad is None for p in params)
    largest = max(p.nbytes for p in params)
    assert max(alive) < bucket_bytes + largest
    assert ordinary == sum(p.nbytes for p in params) > 2 * max(alive)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_are_not_finite_count_once_a_step(device: str) -> None:
    model = make_model(device=device)
    optimizer = BUILT["adamw"](model.parameters())
    GradientRelease(optimizer, 1)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0, spoil=True)
    with pytest.warns(RuntimeWarning, match="its elements were left out"):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_steps_without_gradients_and_late_parameters(device: str) -> None:
    both = []
    for is_released in (True, False):
        model = make_model(device=device)
        optimizer = BUILT["adamw"](model.parameters())
        if is_released:
            GradientRelease(optimizer, 1)
        optimizer.step()  # nothing is there yet
        for step in range(4):
            if step == 2:
                optimizer.step()
            backward(model[:3] if step == 0 else model, step)  # most have none at first
            optimizer.step()
            optimizer.zero_grad()
        both.append([p.detach().tolist() for p in model.parameters()])
    assert both[0] == both[1]


@pytest.mark.parametrize("bucket_bytes", BUCKETS)
@pytest.mark.parametrize("device", DEVICES)
def test_tied_and_frozen_parameters(device: str, bucket_bytes: int) -> None:
    """Weights in two places get one gradient and one step; frozen ones get neither, nor state."""

    def run(is_released: bool) -> list[Any]:
        torch.manual_seed(0)
        table, out = torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32)
        out.weight = table.weight
        model = torch.nn.Sequential(table, torch.nn.Linear(16, 16), out).to(device)
        model[1].weight.requires_grad_(False)
        frozen = model[1].weight.clone()
        optimizer = BUILT["adamw"](model.parameters())
        if is_released:
            GradientRelease(optimizer, bucket_bytes)
        for step in range(3):
            tokens = torch.arange(8, device=device).add(step).view(2, 4)
            model(tokens).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.state[table.weight]["step"] == 3
        assert torch.equal(model[1].weight, frozen)
        assert model[1].weight not in optimizer.state
        return [p.tolist() for p in model.parameters()]

    assert run(True) == run(False)


def test_removed_it_is_over() -> None:
    model = make_model()
    optimizer = BUILT["adamw"](model.parameters())
    GradientRelease(optimizer, 1).remove()
    backward(model, 0)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


# ---------------------------------------------------------------------- refused

REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "clip": (CIAO.lhopt, "clipping by the norm of all gradients"),
    "skip": (AdamW, r"nonfinite='skip' looks at all gradients .* pass nonfinite=\"mask\""),
    "raise": (lambda params: AdamW(params, nonfinite="raise"), "nonfinite='raise'"),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_need_all_gradients_are_refused(
    build: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GradientRelease(build(make_model().parameters()))


def test_clipping_that_is_set_later_is_refused() -> None:
    model = make_model()
    optimizer = CIAO(model.parameters(), nonfinite="mask")
    GradientRelease(optimizer)
    optimizer.param_groups[0]["group_clip_grad_norm"] = 1.0
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="clipping by the norm"):
        backward(model, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_parameters_that_join_later_are_refused() -> None:
    model = make_model()
    optimizer = BUILT["adamw"](model[0].parameters())
    GradientRelease(optimizer)
    optimizer.add_param_group({"params": list(model[-1].parameters())})
    with pytest.raises(ValueError, match="make another one"):
        backward(model, 0)


def test_accumulated_gradients_are_refused() -> None:
    model = make_model()
    GradientRelease(BUILT["adamw"](model.parameters()))
    backward(model, 0)
    with pytest.raises(RuntimeError, match="a second gradient before step"):
        backward(model, 1)


def test_a_grad_scaler_is_refused() -> None:
    model = make_model()
    optimizer = BUILT["adamw"](model.parameters())
    GradientRelease(optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(torch.ones(2, 20)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler scales gradients"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    ("what", "error"), [("sgd", TypeError), (0, ValueError), (True, ValueError)]
)
def test_other_arguments_are_refused(what: Any, error: type[Exception]) -> None:
    params = list(make_model().parameters())
    optimizer = torch.optim.SGD(params) if what == "sgd" else BUILT["adamw"](params)
    with pytest.raises(error):
        GradientRelease(optimizer, *([] if what == "sgd" else [what]))


def on_ranks(rank: int, ranks: int) -> str:
    """The error that each of several ranks gets."""
    try:
        GradientRelease(BUILT["adamw"](make_model().parameters()))
    except ValueError as error:
        return str(error)
    return ""


def test_ranks_are_refused() -> None:
    assert all("on a single rank" in said for said in run_ranks(on_ranks, 2))
