"""Optimizers with moments and masters in few bits: memory, checkpoints, scaling, and learning."""

from __future__ import annotations

import gc
import io
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from cases import make_params, set_grads
from policy.samples import random_policy
from tolerances import LOW_PRECISION_LOSS, OPTIMUM, SPLIT

from lhopt_fused import CIAO, LHOPT, AdamW
from lhopt_fused.kernels import formats

SHAPES = ((64, 128), (33, 7), (128,), (20, 4, 64))
WAYS: dict[str, dict[str, Any]] = {
    "int8 split8": {"moments": "int8", "master_weights": "split8"},
    "int8": {"moments": "int8"},
    "bfloat16 split16": {"moments": "bfloat16", "master_weights": "split16"},
    "int8 stochastic": {"moments": "int8", "rounding": "stochastic"},
    "float32": {"master_weights": True},
}
BACKENDS = ["reference", "cpu"]


def train(optimizer: Any, params: list[torch.nn.Parameter], first: int, steps: int) -> None:
    for step in range(first, first + steps):
        set_grads(params, step)
        optimizer.step()


def state_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters and all of their state, in order."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found += [p.detach(), *(value for _, value in sorted(optimizer.state[p].items()))]
    return found


def are_equal(first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> bool:
    pairs = zip(state_of(first), state_of(second), strict=True)
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("int8 split8", 2 + 2 + 1 + 2 * (1 + 2 / 64)),
        ("int8", 2 + 2 + 2 * (1 + 2 / 64)),
        ("bfloat16 split16", 2 + 2 + 2 + 2 * 2),
        ("float32", 2 + 2 + 4 + 2 * 4),
    ],
)
def test_bytes_of_an_element(way: str, expected: float) -> None:
    """Of a matrix, its gradient and its state; what a tensor has once is not counted."""
    param = make_params(torch.bfloat16, ((256, 512),))[0]
    optimizer = AdamW([param], **WAYS[way])
    train(optimizer, [param], 0, 1)
    assert param.grad is not None
    tensors = [param, param.grad, *(x for x in optimizer.state[param].values() if x.dim())]
    assert sum(x.nbytes for x in tensors) / param.numel() == expected
    assert sum(x.nbytes for x in optimizer.state[param].values() if not x.dim()) < 100


def test_which_tensors_take_eight_bits() -> None:
    params = make_params(torch.bfloat16, ((64, 128), (33, 128), (64, 32), (8192,), (100, 100)))
    optimizer = AdamW(params, moments="int8")
    train(optimizer, params, 0, 1)
    found = [optimizer.state[p]["exp_avg"].dtype == torch.int8 for p in params]
    assert found == [True, True, False, False, False]
    doubles = make_params(torch.float64, ((64, 128),))
    optimizer = AdamW(doubles, moments="int8")
    train(optimizer, doubles, 0, 1)
    assert optimizer.state[doubles[0]]["exp_avg"].dtype == torch.float64


def test_frozen_parameters_take_nothing_until_they_are_trained() -> None:
    """Also in a checkpoint, and in what it is loaded into."""
    params = make_params(torch.bfloat16, ((64, 128),) * 4)
    trained = params[2:]
    for param in params[:2]:
        param.requires_grad_(False)
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, lr=0.01, **WAYS["int8 split8"])
    train(optimizer, trained, 0, 3)
    assert all(map(torch.equal, params[:2], before[:2]))
    assert list(optimizer.state) == trained
    saved = optimizer.state_dict()
    assert sorted(saved["state"]) == [2, 3]

    copies = [torch.nn.Parameter(p.detach().clone(), p.requires_grad) for p in params]
    resumed = AdamW(copies, lr=0.01)
    resumed.load_state_dict(saved)
    for one, own in ((optimizer, params), (resumed, copies)):
        own[1].requires_grad_(True)
        train(one, own[1:], 3, 3)
        assert list(one.state) == [*own[2:], own[1]]
        assert one.state[own[1]]["exp_avg"].dtype == torch.int8
        assert one.state[own[1]]["step"] == 3
    assert all(map(torch.equal, params, copies))
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[1], before[1])


@pytest.mark.parametrize("way", WAYS)
def test_saving_and_loading_again_keeps_nothing_alive(way: str) -> None:
    params = make_params(torch.bfloat16, SHAPES)
    optimizer = AdamW(params, **WAYS[way])

    def through_a_file(first: int) -> list[weakref.ref[torch.Tensor]]:
        train(optimizer, params, first, 1)
        held = [x for p in params for x in optimizer.state[p].values()]
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        buffer.seek(0)
        optimizer.load_state_dict(torch.load(buffer, weights_only=True))
        return list(map(weakref.ref, held))

    replaced = through_a_file(0)
    train(optimizer, params, 1, 1)
    gc.collect()
    assert len(replaced) >= 5 * len(params)
    assert all(old() is None for old in replaced)


# ------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_resumed_run_is_the_same_bits(backend: Any, way: str) -> None:
    """Also into an optimizer that was built with other settings: the checkpoint brings them."""
    params = make_params(torch.bfloat16, SHAPES)
    optimizer = CIAO.lhopt(params, backend=backend, **WAYS[way])
    train(optimizer, params, 0, 3)
    buffer = io.BytesIO()
    torch.save([optimizer.state_dict(), [p.detach() for p in params]], buffer)
    train(optimizer, params, 3, 3)

    buffer.seek(0)
    saved, values = torch.load(buffer, weights_only=True)
    resumed = [torch.nn.Parameter(value) for value in values]
    second = CIAO.lhopt(resumed, backend=backend)
    second.load_state_dict(saved)
    assert second.state[resumed[0]]["exp_avg"].dtype == saved["state"][0]["exp_avg"].dtype
    train(second, resumed, 3, 3)
    assert are_equal(optimizer, second)


def test_a_checkpoint_of_torch_is_converted() -> None:
    params, plain = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    theirs = torch.optim.AdamW(plain, lr=0.01)
    train(theirs, plain, 0, 4)
    ours = AdamW(params, lr=0.01, moments="int8")
    ours.load_state_dict(theirs.state_dict())
    set_grads(params, 4)
    for group in ours.param_groups:
        group["lr"] = 0.0
    ours.step()
    state, expected = ours.state[params[0]], theirs.state[plain[0]]
    assert state["exp_avg"].dtype == torch.int8
    grad = params[0].grad
    assert grad is not None
    exact = 0.9 * expected["exp_avg"] + 0.1 * grad
    kept = formats.decode(state["exp_avg"], state["exp_avg_scale"])
    largest = exact.abs().view(-1, formats.BLOCK).amax(1).repeat_interleave(formats.BLOCK)
    assert bool(((kept - exact).abs() <= largest.view_as(exact) * 5 / 127).all())


def with_settings(saved: dict[str, Any], **settings: Any) -> dict[str, Any]:
    saved["lhopt_fused"] |= settings
    for group in saved["param_groups"]:
        group.pop("lhopt_fused", None)
    return saved


@pytest.mark.parametrize("master_weights", [True, "split16", "split8"])
def test_masters_become_one_another(master_weights: Any) -> None:
    """What one kind of master holds, another takes over as far as it can."""
    for start in (True, "split16", "split8"):
        params = make_params(torch.bfloat16, SHAPES)
        optimizer = AdamW(params, lr=1e-4, master_weights=start)
        train(optimizer, params, 0, 3)
        before = master_of(optimizer, params[0])
        optimizer.load_state_dict(
            with_settings(optimizer.state_dict(), master_weights=master_weights, moments="bfloat16")
        )
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        train(optimizer, params, 3, 1)
        after = master_of(optimizer, params[0])
        spacing = 2.0 ** (before.abs().log2().floor() - 7)
        limit = 2.0**-8 if "split8" in (start, master_weights) else 0.0
        assert bool(((after - before).abs() <= limit * spacing).all())
        assert not torch.equal(params[0].float(), before)
        assert optimizer.state[params[0]]["exp_avg"].dtype == torch.bfloat16


def master_of(optimizer: Any, param: torch.Tensor) -> torch.Tensor:
    state = optimizer.state[param]
    if "master_param" in state:
        assert "master_correction" not in state
        return torch.as_tensor(state["master_param"]).clone()
    return formats.join_master(param.detach(), state["master_correction"])


@pytest.mark.parametrize("way", ["int8 split8", "bfloat16 split16"])
def test_without_them_all_is_float32_again(way: str) -> None:
    params = make_params(torch.bfloat16, SHAPES)
    optimizer = AdamW(params, **WAYS[way])
    train(optimizer, params, 0, 3)
    state = optimizer.state[params[0]]
    expected = formats.decode(state["exp_avg"], state.get("exp_avg_scale"))
    optimizer.load_state_dict(
        with_settings(optimizer.state_dict(), master_weights=False, moments="float32")
    )
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state[params[0]]
    assert {key for key, value in state.items() if value.dim()} == {"exp_avg", "exp_avg_sq"}
    assert torch.allclose(state["exp_avg"], 0.9 * expected, rtol=1e-6, atol=0)


def test_another_memory_order_is_converted() -> None:
    """Codes lie in blocks of memory; where they come in another order, numbers are what counts."""
    params = make_params(torch.bfloat16, ((64, 128),))
    turned = [torch.nn.Parameter(params[0].detach().t().clone().t())]
    optimizers = [AdamW(p, moments="int8", backend="reference") for p in (params, turned)]
    train(optimizers[0], params, 0, 2)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    turned[0].grad = torch.zeros_like(turned[0])
    optimizers[1].step()
    states = [o.state[p[0]] for o, p in zip(optimizers, (params, turned), strict=True)]
    first, second = (formats.decode(s["exp_avg"], s["exp_avg_scale"]) for s in states)
    limit = 0.05 * first.abs().max()
    assert bool((second - 0.9 * first).abs().max() <= limit)
    assert bool((second.flip(0) - 0.9 * first).abs().max() > limit)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("exp_avg_scale"), "its scales, 'exp_avg_scale', are missing"),
        (
            lambda state: state.update(exp_avg_scale=torch.ones(64, 3, dtype=torch.bfloat16)),
            r"state 'exp_avg_scale' .* has shape \(64, 3\)",
        ),
        (
            lambda state: state.update(exp_avg_sq_scale=torch.ones(64, 2)),
            r"'exp_avg_sq_scale', are torch.float32 \(64, 2\)",
        ),
    ],
)
def test_damaged_state_is_refused(damage: Any, message: str) -> None:
    params = make_params(torch.bfloat16, SHAPES)
    optimizer = AdamW(params, moments="int8")
    train(optimizer, params, 0, 1)
    saved = optimizer.state_dict()
    damage(saved["state"][0])
    before = [p.detach().clone() for p in params]
    second = AdamW(params, moments="int8")

    def resume() -> None:
        second.load_state_dict(saved)
        train(second, params, 1, 1)

    with pytest.raises(ValueError, match=message):
        resume()
    assert all(map(torch.equal, before, params))


@pytest.mark.parametrize("master_weights", ["split8", "split16"])
def test_float16_has_no_split_masters(master_weights: Any) -> None:
    params = make_params(torch.float16, SHAPES)
    with pytest.raises(TypeError, match=r"params'\]\[0\] is float16.*master_weights=True"):
        AdamW(params, master_weights=master_weights)


def test_restart_registers_hold_all_of_it() -> None:
    params = make_params(torch.bfloat16, SHAPES)
    policy = random_policy(0)
    keywords = {"policy": policy, "restart_registers": 3, **WAYS["int8 split8"]}
    optimizer = LHOPT(params, 100, outer_steps=1, **keywords)
    train(optimizer, params, 0, 2)
    optimizer.save_register(0)
    held = [x.clone() for x in state_of(optimizer)]
    train(optimizer, params, 2, 2)
    assert not all(map(torch.equal, held, state_of(optimizer)))
    optimizer.load_register(0)
    assert all(map(torch.equal, held, state_of(optimizer)))


# ------------------------------------------------------------------ gradients with NaN, scaling


@pytest.mark.parametrize("backend", BACKENDS)
def test_skipped_steps_leave_every_bit(backend: Any) -> None:
    params = make_params(torch.bfloat16, SHAPES)
    optimizer = CIAO.lhopt(params, backend=backend, **WAYS["int8 split8"])
    train(optimizer, params, 0, 2)
    before = [x.clone() for x in state_of(optimizer)]
    set_grads(params, 2)
    assert params[2].grad is not None
    params[2].grad[5] = torch.nan
    with pytest.warns(RuntimeWarning, match="NaN or inf"):
        optimizer.step()
    assert all(map(torch.equal, before, state_of(optimizer)))


def test_under_a_gradient_scaler() -> None:
    """Scaled by a power of two and unscaled once: the same bits, steps with inf left out."""
    reached = []
    for scale in (1.0, 2.0**10):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        optimizer = AdamW(model.parameters(), lr=0.01, moments="int8")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
        for step in range(4):
            optimizer.zero_grad()
            inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
            if step == 2:
                inputs[3, 4] = torch.inf
            scaler.scale(model(inputs).square().mean()).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        reached.append(optimizer)
        assert optimizer.state[model.weight]["step"] == 3
    assert are_equal(*reached)


# ------------------------------------------------------------------ steps


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_gradients_leave_zero_moments(backend: Any, way: str) -> None:
    """Dithering makes nothing out of nothing; weights change by their decay alone."""
    for weight_decay in (0.0, 0.5):
        params = make_params(torch.bfloat16, SHAPES)
        before = [p.detach().clone() for p in params]
        optimizer = AdamW(params, lr=0.1, weight_decay=weight_decay, backend=backend, **WAYS[way])
        for _ in range(5):
            for param in params:
                param.grad = torch.zeros_like(param)
            optimizer.step()
        for param, start in zip(params, before, strict=True):
            state = optimizer.state[param]
            assert not any(bool(state[name].any()) for name in ("exp_avg", "exp_avg_sq"))
            assert torch.equal(param, start) == (weight_decay == 0)
            assert bool((param.abs() <= start.abs()).all())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_step_descends(backend: Any, way: str) -> None:
    """On one batch with a small learning rate, and every moment goes on moving."""
    generator = torch.Generator().manual_seed(0)
    weights, inputs, target = (
        torch.randn(64, 64, generator=generator).bfloat16() for _ in range(3)
    )
    param = torch.nn.Parameter(weights)
    optimizer = AdamW([param], lr=1e-3, weight_decay=0.0, backend=backend, **WAYS[way])
    losses, moments = [], []
    for _ in range(10):
        loss = ((inputs @ param).float() - target.float()).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = optimizer.state[param]
        moments.append(
            [
                formats.decode(state[name], state.get(f"{name}_scale")).clone()
                for name in ("exp_avg", "exp_avg_sq")
            ]
        )
    assert all(after < before for before, after in pairwise(losses))
    for before, after in pairwise(moments):
        assert not any(map(torch.equal, before, after))


@pytest.mark.parametrize("way", [way for way in WAYS if way != "int8 stochastic"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_stepped_as_if_alone(backend: Any, way: str) -> None:
    """Each with its own numbers, bit for bit; random bits alone depend on a tensor's place."""
    rates = {"lr": 0.01, "betas": (0.8, 0.9)}, {"lr": 0.001, "weight_decay": 0.3}
    together = [make_params(torch.bfloat16, SHAPES, seed=seed) for seed in range(2)]
    apart = [make_params(torch.bfloat16, SHAPES, seed=seed) for seed in range(2)]
    groups = [{"params": p, **numbers} for p, numbers in zip(together, rates, strict=True)]
    keywords: dict[str, Any] = {"backend": backend, **WAYS[way]}
    one = AdamW(groups, **keywords)
    alone: list[Any] = [AdamW(p, **r, **keywords) for p, r in zip(apart, rates, strict=True)]
    for step in range(5):
        for mine in (*together, *apart):
            set_grads(mine, step)
        for optimizer in (one, *alone):
            optimizer.step()
    expected = [x for optimizer in alone for x in state_of(optimizer)]
    assert all(map(torch.equal, state_of(one), expected))
    others = make_params(torch.bfloat16, SHAPES)
    train(AdamW(others, **rates[1], **keywords), others, 0, 5)
    assert not torch.equal(others[0], together[0][0])


@pytest.mark.parametrize("start", ["binades", "random"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_bits_of_a_master_lose_less(backend: Any, start: str) -> None:
    """Against float32 with the same moments; from numbers on both sides of powers of two too."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor([1.0, 1.9921875, 2.0, 3.984375, 0.5, 0.99609375, -1.0, -1.9921875])
    first = torch.randn(64, 128, generator=generator).bfloat16()
    if start == "binades":
        chosen = torch.randint(len(edges), first.shape, generator=generator)
        first = edges[chosen].bfloat16()
    grad = (first.float().abs() * torch.randn(first.shape, generator=generator)).bfloat16()

    def moved(dtype: torch.dtype, master_weights: Any) -> torch.Tensor:
        param = torch.nn.Parameter(first.to(dtype, copy=True))
        kept = {"moments": "int8", "master_weights": master_weights, "backend": backend}
        optimizer = AdamW([param], lr=1e-3, weight_decay=0.0, **kept)
        for _ in range(30):
            param.grad = grad.to(dtype)
            optimizer.step()
        reached = master_of(optimizer, param) if master_weights else param.detach()
        return reached.double() - first.double()

    exact = moved(torch.float32, False)
    none, eight, sixteen = (
        float((moved(torch.bfloat16, kind) - exact).abs().sum() / exact.abs().sum())
        for kind in (False, "split8", "split16")
    )
    assert sixteen <= SPLIT[torch.int16].relative
    assert sixteen < eight < 0.1 * none


# ------------------------------------------------------------------ learning


def loss_after(dtype: torch.dtype, steps: int = 120, **keywords: Any) -> float:
    """A small network that learns another one; the mean loss of the last 20 steps."""
    torch.manual_seed(0)
    teacher = torch.nn.Linear(64, 64)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64)
    ).to(dtype)
    optimizer = AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.99), backend="cpu", **keywords)
    losses = []
    for step in range(steps):
        inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        wide = inputs * torch.logspace(-2, 0, 64)
        loss = (model(wide.to(dtype)).float() - teacher(wide).detach()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / 20


def test_learns_as_in_float32() -> None:
    """Twins that lose small updates, or small second moments, do not."""
    expected = loss_after(torch.float32)
    limit = LOW_PRECISION_LOSS.relative * expected
    for way in ("int8 split8", "bfloat16 split16", "float32"):
        assert abs(loss_after(torch.bfloat16, **WAYS[way]) - expected) <= limit
    assert abs(loss_after(torch.bfloat16) - expected) > limit


def distance_from_optimum(dtype: torch.dtype, steps: int = 300, **keywords: Any) -> float:
    """Of linear weights that are learned from 256 exact answers, relative to the right ones."""
    generator = torch.Generator().manual_seed(0)
    inputs, weights = (torch.randn(n, 64, generator=generator) for n in (256, 64))
    param = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = AdamW([param], lr=0.03, betas=(0.9, 0.99), weight_decay=0.0, **keywords)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        loss = ((inputs.to(dtype) @ param).float() - inputs @ weights / 2).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    reached = master_of(optimizer, param) if "master_weights" in keywords else param.detach()
    return float((reached.double() - weights.double() / 2).norm() / (weights / 2).norm())


@pytest.mark.parametrize("way", [way for way in WAYS if way != "int8"])
def test_reaches_the_optimum(way: str) -> None:
    assert distance_from_optimum(torch.bfloat16, **WAYS[way]) <= OPTIMUM.relative


def test_without_masters_it_stays_further_away() -> None:
    assert distance_from_optimum(torch.float32) <= OPTIMUM.relative / 10
    assert distance_from_optimum(torch.bfloat16, **WAYS["int8"]) > 4 * OPTIMUM.relative
