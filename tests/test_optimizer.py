"""What an optimizer promises to its user: settings, schedules, measurements, odd tensors."""

from __future__ import annotations

import copy
import gc
import math
import pickle
from typing import Any

import pytest
import torch
from cases import CIAO_OPTIONS, make_params, set_grads, trajectory
from tolerances import STATISTICS, TRAJECTORY, assert_close

from lhopt_fused import CIAO, EXTRA_FEATURES, INNER_FEATURES, AdamW
from lhopt_fused.types import STATISTICS as COLUMNS

BACKENDS = ["reference", "cpu"]


def run(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: int) -> None:
    for _ in trajectory(optimizer, params, steps):
        pass


def test_lhopt_starts_where_the_paper_does() -> None:
    group = CIAO.lhopt(make_params()).param_groups[0]
    assert group["lr"] == 1e-3
    assert group["group_clip_grad_norm"] == 0.8
    assert group["denominator_norm"] == "inf"
    assert group["lamb_update_norm_ombeta"] == 0.05
    assert CIAO.lhopt(make_params(), lr=0.5).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("backend", BACKENDS)
def test_closure_is_called_with_gradients_on(backend: Any) -> None:
    (param,) = make_params(shapes=[(3,)])
    optimizer = AdamW([param], backend=backend)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    before = param.detach().square().sum().item()
    assert optimizer.step(closure) == pytest.approx(before)
    assert param.detach().square().sum().item() < before


@pytest.mark.parametrize("backend", BACKENDS)
def test_hyperparameters_change_between_steps(backend: Any) -> None:
    changed, constant = make_params(), make_params()
    ours = AdamW(changed, backend=backend)
    theirs = torch.optim.AdamW(constant)
    for step in range(6):
        for optimizer, params in ((ours, changed), (theirs, constant)):
            optimizer.param_groups[0]["lr"] = 0.001 * (step + 1)
            optimizer.param_groups[0]["weight_decay"] = 0.1 * step
            set_grads(params, step)
            optimizer.step()
    for param, expected in zip(changed, constant, strict=True):
        assert_close(param, expected, TRAJECTORY[torch.float32], 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_options_change_between_steps(backend: Any) -> None:
    params, fresh = make_params(), make_params()
    optimizer = CIAO(params, backend=backend)
    optimizer.param_groups[0].update(denominator_norm="inf", group_clip_grad_norm=0.5)
    expected = CIAO(fresh, denominator_norm="inf", group_clip_grad_norm=0.5, backend=backend)
    run(optimizer, params, 3)
    run(expected, fresh, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))
    optimizer.param_groups[0]["group_clip_grad_norm"] = None  # another kind of step, same state
    run(optimizer, params, 1)


def test_a_learning_rate_tensor_is_read_at_every_step() -> None:
    params, fresh = make_params(), make_params()
    lr = torch.tensor(0.001)
    optimizer, expected = AdamW(params, lr=lr), AdamW(fresh, lr=0.001)
    for step in range(4):
        for one, its in ((optimizer, params), (expected, fresh)):
            set_grads(its, step)
            one.step()
        lr.mul_(1.5)
        expected.param_groups[0]["lr"] = float(lr)
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_clip_and_step_apart(backend: Any) -> None:
    together, apart = make_params(), make_params()
    groups = [{"params": together[:3], "lr": 0.01}, {"params": together[3:], "ombeta1": 0.3}]
    optimizer = CIAO.lhopt(groups, backend=backend)
    separate = [
        CIAO.lhopt(apart[:3], lr=0.01, backend=backend),
        CIAO.lhopt(apart[3:], ombeta1=0.3, backend=backend),
    ]
    for step in range(9):
        set_grads(together, step)
        set_grads(apart, step)
        for one in (optimizer, *separate):
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(together, apart, strict=True))


# ---------------------------------------------------------------------- measurements


@pytest.mark.parametrize("backend", BACKENDS)
def test_features_are_means_over_tensors_groups_and_steps(backend: Any) -> None:
    params = make_params(shapes=[(4, 6), (7,), (3, 2)])
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = CIAO.lhopt(groups, backend=backend, inner_feature_frequency=1)
    expected = []
    for step in range(20):  # more than the ring of statistics holds
        set_grads(params, step)
        optimizer.step()
        s = optimizer.statistics()
        cosine = s["grad_dot_update"] / (s["grad_sq"].sqrt() * s["update_sq"].sqrt())
        taken = s["taken"].bool()
        means = [cosine[:2][taken[:2]].mean(), cosine[2:][taken[2:]].mean()]
        expected.append(torch.stack(means).mean())
    features = optimizer.pop_inner_features()
    assert tuple(features) == INNER_FEATURES
    mean = float(torch.stack(expected).mean())
    assert features["cosine_similarity_grad_update"] == pytest.approx(mean, rel=1e-12)


def test_features_are_taken_every_kth_step_of_an_outer_step() -> None:
    params = make_params()
    optimizer = CIAO.lhopt(params, inner_feature_frequency=3)

    def measured_steps() -> int:
        run = optimizer._run
        return 0 if run is None else int(run.features.folded_sums()[1].max())

    taken = []
    for step in range(8):
        set_grads(params, step)
        before = measured_steps()
        optimizer.step()
        taken.append(measured_steps() > before)
        if step == 4:
            optimizer.pop_inner_features()
    assert taken == [True, False, False, True, False, True, False, False]


def test_without_statistics_features_are_nan_and_statistics_an_error() -> None:
    params = make_params()
    optimizer = AdamW(params, inner_feature_frequency=0)
    run(optimizer, params, 3)
    assert all(math.isnan(value) for value in optimizer.pop_inner_features(extra=True).values())
    with pytest.raises(RuntimeError, match="no step has taken statistics"):
        optimizer.statistics()


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_are_the_sums_they_say(backend: Any) -> None:
    params = make_params()
    optimizer = AdamW(params, lr=0.01, backend=backend, keep_grad_signs=True)
    for step in range(4):  # the last one leaves the second tensor out
        before = [p.detach().double().clone() for p in params]
        momentum = [
            optimizer.state[p]["exp_avg"].double().clone() if step else None for p in params
        ]
        last = [p.grad for p in params]
        set_grads(params, step)
        optimizer.step()
    s = optimizer.statistics()
    assert tuple(s) == COLUMNS
    for i, (p, m) in enumerate(zip(params, momentum, strict=True)):
        if p.grad is None:
            assert s["taken"][i] == 0
            continue
        g, g_last = p.grad.double(), last[i]
        assert m is not None
        assert g_last is not None
        expected = {
            "taken": 1.0,
            "grad_sq": g.square().sum(),
            "param_sq": before[i].square().sum(),
            "grad_dot_param": (g * before[i]).sum(),
            "grad_dot_momentum": (g * m).sum(),
            "momentum_sq": m.square().sum(),
            "count_same_sign_momentum": ((g < 0) == (m < 0)).sum(),
            "count_same_sign_grad": ((g < 0) == (g_last < 0)).sum(),
            "count_gt_epsilon": (optimizer.state[p]["exp_avg_sq"] > 0).sum(),
        }
        for name, value in expected.items():
            norms = max(1.0, float(g.norm() * before[i].norm()))
            assert_close(s[name][i], torch.as_tensor(value), STATISTICS[p.dtype], norms)


def test_extra_features_see_agreement_between_steps() -> None:
    (param,) = make_params(shapes=[(64,)])
    optimizer = AdamW([param], keep_grad_signs=True)
    grad = torch.randn(64, generator=torch.Generator().manual_seed(1))
    for sign in (1, 1, -1):
        optimizer.pop_inner_features()
        param.grad = sign * grad
        optimizer.step()
        features = optimizer.pop_inner_features(extra=True)
        seen = [features[name] for name in EXTRA_FEATURES]
        if optimizer.state[param]["step"] == 1:
            assert all(math.isnan(value) for value in seen)
        else:
            assert seen == pytest.approx([sign, max(sign, 0), max(sign, 0)], abs=1e-6)


# ---------------------------------------------------------------------- tensors as they come


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_memory_order_just_works(backend: Any) -> None:
    base = torch.randn(6, 8, 5, generator=torch.Generator().manual_seed(2))
    layouts = {
        "transposed": base.clone().transpose(0, 2),
        "channels_last": base[None].clone().to(memory_format=torch.channels_last),
        "gapped": base.clone()[:, ::2],
        "offset": torch.cat([base.flatten(), torch.zeros(3)])[3:],
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(0.5),
    }
    odd = [torch.nn.Parameter(t) for t in layouts.values()]
    plain = [torch.nn.Parameter(t.detach().contiguous().clone()) for t in odd]
    for params in (odd, plain):
        optimizer = CIAO.lhopt(params, lr=0.01, backend=backend)
        for step in range(5):
            set_grads(params, step)
            optimizer.step()
    for (name, param), expected in zip(zip(layouts, odd, strict=True), plain, strict=True):
        assert_close(param, expected, TRAJECTORY[torch.float32], 3.0), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_may_move_and_join_late(backend: Any) -> None:
    params, still = make_params(), make_params()
    optimizer, expected = AdamW(params, backend=backend), AdamW(still, backend=backend)
    for step in range(6):
        for own, one in ((params, optimizer), (still, expected)):
            set_grads(own, step)
            if step < 2:
                own[0].grad = None  # its first gradient comes later
            if own is params and step == 3:
                own[2].data = own[2].data.clone()
                one.state[own[2]]["exp_avg"] = one.state[own[2]]["exp_avg"].clone()
            one.step()
    assert all(torch.equal(p, q) for p, q in zip(params, still, strict=True))


def test_frozen_parameters_get_no_state() -> None:
    params = make_params()
    params[0].requires_grad_(False)
    optimizer = AdamW(params)
    for param in params[1:]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert params[0] not in optimizer.state
    assert len(optimizer.state) == len(params) - 1
    assert optimizer.statistics()["taken"][0] == 0


@pytest.mark.parametrize("options", CIAO_OPTIONS.values(), ids=CIAO_OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_eight_bytes_a_parameter(dtype: torch.dtype, options: dict[str, Any]) -> None:
    (param,) = make_params(dtype, shapes=[(100, 1000)])
    optimizer = CIAO([param], **options)
    param.grad = torch.ones_like(param)
    optimizer.step()
    held = sum(value.nbytes for value in optimizer.state[param].values())
    assert 8 * param.numel() <= held <= 8 * param.numel() + 64


def test_a_step_allocates_nothing_after_the_first() -> None:
    params = make_params(shapes=[(256, 256)] * 8)
    optimizer = CIAO.lhopt(params, inner_feature_frequency=0)
    for param in params:
        param.grad = torch.ones_like(param)
    for _ in range(2):
        optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    allocated = [e.self_cpu_memory_usage for e in profile.key_averages()]
    assert max(allocated, default=0) <= 0


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", ["lhopt", "lhopt_delayed", "z_clip_decay_in_update"])
def test_resumes_bit_identically(
    tmp_path: Any, backend: Any, dtype: torch.dtype, options: str
) -> None:
    def build(params: list[torch.nn.Parameter]) -> CIAO:
        return CIAO(
            params,
            **CIAO_OPTIONS[options],
            backend=backend,
            inner_feature_frequency=2,
            keep_grad_signs=True,
        )

    params = make_params(dtype)
    optimizer = build(params)
    run(optimizer, params, 7)
    torch.save((params, optimizer.state_dict()), tmp_path / "run.pt")
    loaded, state = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed = build(loaded)
    resumed.load_state_dict(state)
    for one, own in ((optimizer, params), (resumed, loaded)):
        for _ in trajectory(one, own, 8, 7):
            pass
    assert all(torch.equal(p, q) for p, q in zip(params, loaded, strict=True))
    ours, theirs = (o.pop_inner_features(extra=True) for o in (optimizer, resumed))
    assert str(ours) == str(theirs)  # bit for bit, NaN included


def test_loaded_state_is_a_copy() -> None:
    params, other = make_params(), make_params()
    optimizer, second = AdamW(params), AdamW(other)
    run(optimizer, params, 2)
    second.load_state_dict(optimizer.state_dict())
    kept = optimizer.state[params[0]]["exp_avg"].clone()
    run(second, other, 2)
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], kept)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_their_own_way(duplicate: Any) -> None:
    params = make_params()
    optimizer = CIAO.lhopt(params)
    run(optimizer, params, 5)
    copied, own = duplicate((optimizer, params))
    run(optimizer, params, 3)
    before = [p.detach().clone() for p in params]
    run(copied, own, 3)
    assert all(torch.equal(p, q) for p, q in zip(params, own, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert str(copied.pop_inner_features()) == str(optimizer.pop_inner_features())


def test_an_optimizer_is_freed() -> None:
    import weakref

    params = make_params()
    optimizer = AdamW(params)
    run(optimizer, params, 2)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
