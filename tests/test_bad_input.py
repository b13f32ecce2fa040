"""What is refused, with what words, and that nothing is written then."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_params, set_grads, trajectory

from lhopt_fused import CIAO, AdamW, BackendUnavailableError, NonFiniteGradientError

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr": -1.0}, r"lr must be a number in \[0"),
        ({"lr": NAN}, "lr must be a number"),
        ({"lr": INF}, "lr must be a number"),
        ({"lr": "fast"}, "lr must be a number"),
        ({"ombeta1": 0.0}, r"ombeta1 must be a number in \(0, 1\]"),
        ({"ombeta2": 1.5}, "ombeta2 must be a number"),
        ({"epsilon": -1e-8}, "epsilon must be a number"),
        ({"weight_decay": NAN}, "weight_decay must be a number"),
        ({"denominator_norm": 3}, "denominator_norm must be None, 2 or 'inf'"),
        ({"group_clip_grad_norm": 0.0}, "group_clip_grad_norm must be a number"),
        ({"grad_clip_ombeta": 2.0}, "grad_clip_ombeta must be a number"),
        ({"lamb_power": 2.0}, "lamb_power must be a number"),
        ({"lamb_min_trust": 2.0, "lamb_max_trust": 1.0}, "lamb_max_trust must be a number"),
        ({"lamb_update_norm_ombeta": -0.1}, "lamb_update_norm_ombeta must be a number"),
        ({"scale_grad_norm_by_rolling_max": True}, "needs group_clip_grad_norm"),
        (
            {"group_clip_grad_norm": 1.0, "group_clip_grad_z_score": 1.0},
            "exclude one another",
        ),
        ({"trust": "late"}, "trust must be 'exact' or 'delayed'"),
        ({"inner_feature_frequency": -1}, "inner_feature_frequency must be"),
        ({"inner_feature_frequency": 1.5}, "inner_feature_frequency must be"),
        ({"backend": "gpu"}, "backend must be one of"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
    ],
)
def test_hyperparameters(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CIAO(make_params(), **keywords)


@pytest.mark.parametrize("betas", [(1.0, 0.9), (0.9, -0.1), (0.9,), 0.9, (NAN, 0.9)])
def test_betas(betas: Any) -> None:
    with pytest.raises(ValueError, match="betas must be two numbers"):
        AdamW(make_params(), betas=betas)


def _expanded() -> torch.Tensor:
    return torch.nn.Parameter(torch.zeros(1, 3).expand(4, 3))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: [{"params": []}], ValueError, "has no parameters"),
        (lambda: [torch.zeros(3, dtype=torch.complex64)], TypeError, "must be float16"),
        (lambda: [torch.zeros(3, dtype=torch.int64)], TypeError, "must be float16"),
        (lambda: [torch.zeros(3).to_sparse()], TypeError, "must be a dense tensor"),
        (lambda: [_expanded()], ValueError, "elements that share memory"),
        (lambda: make_params(shapes=[(3,)]) * 2, ValueError, "parameters 0 and 1 share memory"),
    ],
)
@pytest.mark.parametrize("build", [CIAO, AdamW])
def test_parameters(
    build: Any, params: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build(params())


def test_parameters_that_share_memory() -> None:
    base = torch.zeros(10)
    overlapping = [torch.nn.Parameter(base[:6]), torch.nn.Parameter(base[4:])]
    with pytest.raises(ValueError, match="parameters 0 and 1 share memory"):
        AdamW(overlapping)
    interleaved = [torch.nn.Parameter(base[::2]), torch.nn.Parameter(base[1::2])]
    optimizer = AdamW(interleaved)
    for param in interleaved:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert bool((base < 0).all())


def test_a_tensor_in_two_groups() -> None:
    params = make_params()
    optimizer = AdamW(params)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": params[:1]})
    assert len(optimizer.param_groups) == 1


def unchanged_by(optimizer: Any, params: list[torch.nn.Parameter], error: Any, match: str) -> None:
    """A step raises and leaves parameters and state as they are."""
    before = [p.detach().clone() for p in params]
    state = [
        {k: v.clone() for k, v in optimizer.state[p].items()} if p in optimizer.state else {}
        for p in params
    ]
    with pytest.raises(error, match=match):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    for param, kept in zip(params, state, strict=True):
        held = optimizer.state.get(param, {})
        assert held.keys() == kept.keys()
        assert all(torch.equal(held[k], v) for k, v in kept.items())


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradients(backend: Any, started: bool) -> None:
    params = make_params(shapes=[(4, 3), (5,)])
    optimizer = AdamW(params, backend=backend)
    set_grads(params, 0)
    if started:
        optimizer.step()
    params[1].grad = torch.ones(5).to_sparse()
    unchanged_by(optimizer, params, TypeError, "gradient of parameter 1 .* must be dense")
    if started:
        params[1].grad = None
        params[1].data = torch.zeros(5, dtype=torch.complex64)
        unchanged_by(optimizer, params, TypeError, "must be float16")


@pytest.mark.parametrize("name", ["lr", "ombeta2", "group_clip_grad_norm"])
def test_hyperparameters_set_later(name: str) -> None:
    params = make_params()
    optimizer = CIAO.lhopt(params)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    optimizer.param_groups[0][name] = NAN
    unchanged_by(optimizer, params, ValueError, f"{name} must be a number")


def test_backends_that_cannot_step_these_tensors() -> None:
    params = make_params(torch.float64)
    optimizer = AdamW(params, backend="cpu")
    set_grads(params, 0)
    unchanged_by(optimizer, params, ValueError, 'backend="reference"')
    assert AdamW(params).backend == "reference"
    assert AdamW(make_params()).backend == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_backend_that_is_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    params = make_params()
    optimizer = AdamW(params, backend="triton")
    set_grads(params, 0)
    unchanged_by(optimizer, params, (BackendUnavailableError, ValueError), "CUDA|triton")


def test_state_of_another_model() -> None:
    params, other = make_params(shapes=[(3,)]), make_params(shapes=[(4,)])
    optimizer = AdamW(params, lr=0.5)
    for _ in trajectory(optimizer, params, 1):
        pass
    saved = optimizer.state_dict()
    second = AdamW(other)
    with pytest.raises(ValueError, match="saved from another model"):
        second.load_state_dict(saved)
    newer = {**saved, "lhopt_fused": {**saved["lhopt_fused"], "version": 99}}
    with pytest.raises(ValueError, match="version 99"):
        AdamW(params).load_state_dict(newer)
    wider = AdamW(make_params(shapes=[(3,), (2,)]))
    with pytest.raises(ValueError, match=r"lacks the parameters \[1\] and has \[\]"):
        wider.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"lacks the parameters \[\] and has \[1\]"):
        optimizer.load_state_dict(wider.state_dict())
    assert not second.state
    assert second.param_groups[0]["lr"] == 1e-3


# ---------------------------------------------------------------------- NaN and inf


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("build", [AdamW, CIAO.lhopt])
def test_a_nonfinite_gradient_skips_the_step(
    build: Any, backend: Any, dtype: torch.dtype, bad: float
) -> None:
    params, clean = make_params(dtype), make_params(dtype)
    optimizer = build(params, backend=backend, inner_feature_frequency=1)
    expected = build(clean, backend=backend, inner_feature_frequency=1)
    for step in range(4):
        set_grads(params, step)
        set_grads(clean, step)
        if step == 2:
            assert params[6].grad is not None
            params[6].grad[-1, -1] = bad
            with pytest.warns(RuntimeWarning, match="NaN or inf; the step was skipped"):
                optimizer.step()
            assert optimizer.statistics()["grad_nonfinite"].tolist() == [0, 0, 0, 0, 0, 0, 1]
            assert optimizer.statistics()["taken"].sum() == 0
            optimizer.step()  # a second one is counted without another warning
            continue
        optimizer.step()
        expected.step()
    assert optimizer.skipped_steps == 2
    assert all(torch.equal(p, q) for p, q in zip(params, clean, strict=True))
    assert str(optimizer.pop_inner_features()) == str(expected.pop_inner_features())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_mask_leaves_out_just_the_elements(backend: Any) -> None:
    (param,) = make_params(shapes=[(6, 7)])
    optimizer = AdamW([param], backend=backend, nonfinite="mask")
    set_grads([param], 0)
    optimizer.step()
    before = param.detach().clone()
    moments = {name: optimizer.state[param][name].clone() for name in ("exp_avg", "exp_avg_sq")}
    set_grads([param], 1)
    assert param.grad is not None
    param.grad[2, 3] = NAN
    param.grad[4, 4] = INF
    with pytest.warns(RuntimeWarning, match="its elements were left out"):
        optimizer.step()
    left = torch.zeros(6, 7, dtype=torch.bool)
    left[2, 3] = left[4, 4] = True
    assert torch.equal(param[left], before[left])
    assert not bool((param == before)[~left].any())
    for name, value in moments.items():
        assert torch.equal(optimizer.state[param][name][left], value[left])
    assert optimizer.skipped_steps == 1
    assert optimizer.statistics()["taken"].item() == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_raise_stops_before_anything_is_written(backend: Any) -> None:
    params = make_params()
    optimizer = CIAO.lhopt(params, backend=backend, nonfinite="raise")
    for _ in trajectory(optimizer, params, 2):
        pass
    assert params[0].grad is not None
    params[0].grad[0, 0] = NAN
    unchanged_by(optimizer, params, NonFiniteGradientError, "parameters and state are unchanged")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_huge_finite_gradients_are_not_nonfinite(backend: Any) -> None:
    params = make_params(shapes=[(40,)])
    optimizer = CIAO.lhopt(params, backend=backend)
    params[0].grad = torch.full((40,), 3e25)  # its square is infinite in float32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert bool(torch.isfinite(params[0]).all())
