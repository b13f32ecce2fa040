"""Where tensors are: the look in C++ and the one in Python see the same, and steps follow."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import device_of, make_params, set_grads, with_triton

from lhopt_fused import _C, CIAO, AdamW
from lhopt_fused.layout import DenseViews
from lhopt_fused.placement import ExchangePlacement, Placement, PythonPlacement, Sight, place

CAPSULE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
KINDS: dict[str, type[Placement]] = {"python": PythonPlacement}
if CAPSULE is not None:  # torch 2.10
    KINDS["exchange"] = ExchangePlacement

Params = list[torch.nn.Parameter]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Placement]:
    """What optimizers look their tensors up with in the test."""
    if request.param == "python":
        hide_exchange(monkeypatch)
    return KINDS[request.param]


def hide_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch one from before 2.10."""
    monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)


def bound(params: Params) -> tuple[Placement, list[dict[str, Any]], list[dict[str, Any]]]:
    """A placement of parameters, their states, and a param group of them."""
    exp_avgs = [torch.zeros_like(p) for p in params]
    states = [{"step": 0.0, "exp_avg": m, "exp_avg_sq": m} for m in exp_avgs]
    placement = place(list(params), DenseViews(params), states, exp_avgs)
    return placement, states, [{"params": list(params)}]


# ---------------------------------------------------------------------- one look


def test_says_where_gradients_are(kind: type[Placement]) -> None:
    params = make_params(shapes=[(3, 4), (5,), (0, 2), (), (2,), (2,)])
    params[4].data, params[5].data = params[4].data.bfloat16(), params[5].data.half()
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad = None
    placement, _, groups = bound(params)
    assert type(placement) is kind
    assert placement.look(groups) == Sight.READY
    grads = placement.gradients
    assert all(x is p.grad for x, p in zip(grads.tensors, params, strict=True))
    pointers = [0 if p.grad is None else p.grad.data_ptr() for p in params]
    assert grads.addresses.tolist() == pointers
    assert grads.dtypes.tolist() == [0, -1, 0, 0, 1, 2]
    params[1].grad, params[3].grad = torch.ones(5), torch.tensor(1.0)
    assert placement.look(groups) == Sight.READY
    assert grads.addresses.tolist() == [p.grad.data_ptr() for p in params if p.grad is not None]
    assert grads.dtypes.tolist() == [0, 0, 0, 0, 1, 2]
    placement.let_go()
    assert grads.tensors == [None] * 6


def test_strides_that_do_not_matter_are_ready(kind: type[Placement]) -> None:
    params = make_params(shapes=[(4, 3, 1, 1), (1, 5), (0, 3)])
    placement, _, groups = bound(params)
    params[0].grad = torch.empty_strided((4, 3, 1, 1), (3, 1, 3, 3)).zero_()
    params[1].grad = torch.empty_strided((1, 5), (1, 1)).zero_()
    params[2].grad = torch.empty_strided((0, 3), (7, 2))
    assert placement.look(groups) == Sight.READY


class Tagged(torch.Tensor):
    """A subclass that might mean anything."""


@pytest.mark.parametrize(
    "grad",
    [
        torch.ones(3, 4).to_sparse(),
        torch.ones(4, 3).t(),
        torch.ones(3, 8)[:, ::2],
        torch.ones(3, 1).expand(3, 4),
        torch.ones(3, 4).as_subclass(Tagged),
    ],
    ids=["sparse", "transposed", "gapped", "expanded", "subclass"],
)
def test_gradients_that_have_to_be_checked_or_copied(
    kind: type[Placement], grad: torch.Tensor
) -> None:
    params = make_params(shapes=[(5,), (3, 4)])
    placement, _, groups = bound(params)
    params[0].grad = torch.ones(5)
    assert placement.look(groups) == Sight.READY
    params[1].grad = grad
    for _ in range(2):
        assert placement.look(groups) == Sight.UNFIT
    params[1].grad = torch.ones(3, 4)
    assert placement.look(groups) == Sight.READY


def test_a_gradient_of_another_dtype_than_any_backend_reads(kind: type[Placement]) -> None:
    (param,) = make_params(torch.float64, shapes=[(3,)])
    placement, _, groups = bound([param])
    assert placement.look(groups) == Sight.READY
    param.grad = torch.ones_like(param)
    assert placement.look(groups) == Sight.UNFIT


def move(params: Params, *_: Any) -> None:
    params[1].data = params[1].data.clone()


def swap(params: Params, *_: Any) -> None:
    params[0], params[1] = params[1], params[0]


def drop(params: Params, *_: Any) -> None:
    del params[1]


def take_moment(_: Params, states: list[dict[str, Any]]) -> None:
    del states[1]["exp_avg"]


def replace_moment(_: Params, states: list[dict[str, Any]]) -> None:
    states[1]["exp_avg"] = states[1]["exp_avg"].clone()


def train_another(params: Params, *_: Any) -> None:
    another = torch.nn.Parameter(torch.ones(2))
    another.grad = torch.ones(2)
    params.insert(1, another)


@pytest.mark.parametrize(
    "change",
    [move, swap, drop, take_moment, replace_moment, train_another],
    ids=lambda f: f.__name__,
)
def test_what_is_bound_has_changed(kind: type[Placement], change: Callable[..., None]) -> None:
    params = make_params(shapes=[(3,), (3,), (4,)])
    placement, states, groups = bound(params)
    set_grads(params, 0)
    assert placement.look(groups) == Sight.READY
    change(groups[0]["params"], states)
    assert placement.look(groups) == Sight.UNBOUND
    assert placement.gradients.tensors.count(None) in (0, 3)  # all, of the look before, or none


def test_parameters_without_gradient_may_stand_beside(kind: type[Placement]) -> None:
    params = make_params(shapes=[(3,), (4,), (5,)])
    placement, _, groups = bound([params[1]])
    groups = [{"params": [params[0]]}, {"params": params[1:]}]
    params[1].grad = torch.ones(4)
    assert placement.look(groups) == Sight.READY
    params[2].grad = torch.ones(5)
    assert placement.look(groups) == Sight.UNBOUND


@pytest.mark.skipif(CAPSULE is None, reason="the look in Python sees no more than addresses")
def test_the_exchange_sees_another_form_at_the_same_address() -> None:
    params = make_params(shapes=[(3, 4)])
    placement, _, groups = bound(params)
    start = params[0].data
    for other in (start.view(4, 3), start.view(torch.bfloat16), start.view(12)):
        params[0].data = other
        assert params[0].data_ptr() == start.data_ptr()
        assert placement.look(groups) == Sight.UNBOUND
    params[0].data = start
    assert placement.look(groups) == Sight.READY


class Parameter(torch.nn.Parameter):
    """Parameters of another kind."""


class Loud(torch.nn.Parameter):
    """A parameter that cannot say what its gradient is."""

    @property
    def grad(self) -> torch.Tensor:  # type: ignore[override]
        raise LookupError("no gradient here")


def test_subclasses_are_looked_up_in_python() -> None:
    placement, _, groups = bound([Parameter(torch.ones(3))])
    assert type(placement) is PythonPlacement
    assert placement.look(groups) == Sight.READY


def test_errors_of_tensors_come_through(kind: type[Placement]) -> None:
    params = make_params(shapes=[(3,)])
    placement, _, groups = bound(params)
    groups[0]["params"].append(Loud(torch.ones(3)))
    with pytest.raises(LookupError, match="no gradient here"):
        placement.look(groups)


# ---------------------------------------------------------------------- steps


def train(optimizer: Any, params: Params) -> list[torch.Tensor]:
    """Steps with everything that moves between them; all parameters and moments at the end."""
    for step in range(12):
        set_grads(params, step)  # new tensors every time, one missing every fifth
        if step == 2:
            params[0].data = params[0].data.clone()
        if step == 4:
            state = optimizer.state[params[2]]
            state["exp_avg"] = state["exp_avg"].clone()
        if step in (5, 6, 9):  # in another memory order
            grad = params[2].grad
            assert grad is not None
            params[2].grad = grad.transpose(0, -1).contiguous().transpose(0, -1)
        if step == 7:
            for param in params[3:]:
                param.grad = None
        if step == 8:
            params[0].requires_grad_(False)
            params[0].grad = None
        optimizer.step()
        optimizer.zero_grad()
    moments = [optimizer.state[p]["exp_avg"] for p in params]
    return [x.detach().clone() for x in (*params, *moments)]


def run(
    backend: str, build: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, kind: str
) -> list[torch.Tensor]:
    params = make_params(dtype, device=device_of(backend))
    with monkeypatch.context() as patch:
        if kind == "python":
            hide_exchange(patch)
        optimizer = build(params, backend=backend, inner_feature_frequency=1)
        reached = train(optimizer, params)
        assert type(optimizer._run.placement) is KINDS[kind]
    return reached


@pytest.mark.parametrize("build", [AdamW, CIAO.lhopt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["cpu", *with_triton()])
def test_steps_are_the_references_however_tensors_are_found(
    backend: str, dtype: torch.dtype, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tolerances import TRAJECTORY, assert_close

    runs = [run(backend, build, dtype, monkeypatch, kind) for kind in KINDS]
    expected = run("reference", build, dtype, monkeypatch, "python")
    for x, *others, y in zip(*runs, expected, strict=True):
        assert all(torch.equal(x, z) for z in others)
        scale = float(y.double().abs().max()) if y.numel() else 0.0
        assert_close(x.cpu(), y, TRAJECTORY[dtype], max(scale, 1.0))


def test_a_look_that_misses_moved_gradients_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would say of a placement that believes nothing has moved."""
    expected = run("cpu", AdamW, torch.float32, monkeypatch, "python")
    kept = torch.ones(33, 129)  # where the last parameter's gradient was, and still is
    look = PythonPlacement.look

    def stale(self: PythonPlacement, groups: list[dict[str, Any]]) -> int:
        sight = look(self, groups)
        self.gradients.addresses[-1] = kept.data_ptr()
        return sight

    monkeypatch.setattr(PythonPlacement, "look", stale)
    reached = run("cpu", AdamW, torch.float32, monkeypatch, "python")
    same = [torch.equal(x, y) for x, y in zip(reached, expected, strict=True)]
    assert same.count(False) == 2  # a parameter and its moment


def test_bad_gradients_are_refused_before_anything_is_written(kind: type[Placement]) -> None:
    params = make_params(shapes=[(4, 3), (5,)])
    optimizer = AdamW(params)
    set_grads(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    params[1].grad = torch.ones(5).to_sparse()
    with pytest.raises(TypeError, match=r"gradient of parameter 1 .* must be dense"):
        optimizer.step()
    params[1].data = torch.zeros(6)
    params[1].grad = torch.ones(6)
    with pytest.raises(ValueError, match=r"state 'exp_avg' has shape \(5,\)"):
        optimizer.step()
    assert torch.equal(params[0], before[0])
    assert not params[1].any()


def test_gradients_are_freed_after_the_step(kind: type[Placement]) -> None:
    (param,) = make_params(shapes=[(4,)])
    optimizer = AdamW([param])
    for _ in range(2):
        grad = torch.ones(4)
        gone = weakref.ref(grad)
        param.grad = grad
        optimizer.step()
        optimizer.zero_grad()
        del grad
        assert gone() is None


def test_an_optimizer_that_its_parameters_hold_is_freed(kind: type[Placement]) -> None:
    (param,) = make_params(shapes=[(4,)])
    optimizer = AdamW([param])
    set_grads([param], 0)
    optimizer.step()
    param.optimizer = optimizer
    gone = weakref.ref(optimizer)
    del optimizer, param
    gc.collect()
    assert gone() is None


# ---------------------------------------------------------------------- the boundary

new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = (
    ctypes.py_object,
    [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
)
NAME = b"dlpack_exchange_api"


class Exchange(ctypes.Structure):
    """DLPackExchangeAPI, with functions that are never called."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("previous", ctypes.c_void_p),
        ("functions", ctypes.c_void_p * 5),
    )

    @classmethod
    def of(cls, major: int, previous: Exchange | None = None, *, can_view: bool = True) -> Exchange:
        pointer = None if previous is None else ctypes.addressof(previous)
        return cls(major, 3, pointer, (1, 1, 1, int(can_view), 1))

    def known(self, name: bytes = NAME) -> bool:
        return _C.knows_exchange(new_capsule(ctypes.addressof(self), name, None))


def test_only_exchanges_of_a_known_version_are_used() -> None:
    known = Exchange.of(1)
    assert known.known()
    assert Exchange.of(3, Exchange.of(2, known)).known()
    assert not Exchange.of(2).known()
    assert not Exchange.of(1, can_view=False).known()
    assert not known.known(b"dltensor")
    for other in (None, ctypes.addressof(known)):
        assert not _C.knows_exchange(other)


@pytest.mark.skipif(CAPSULE is None, reason="needs torch 2.10")
def test_the_extension_checks_lists() -> None:
    params = make_params(shapes=[(3,), (4,)])
    exp_avgs = [torch.zeros_like(p) for p in params]
    states = [{"exp_avg": m} for m in exp_avgs]
    arguments: dict[str, Any] = {
        "capsule": CAPSULE,
        "types": (torch.Tensor, torch.nn.Parameter),
        "params": params,
        "views": [p.detach() for p in params],
    }
    for wrong, error, message in (
        ({"capsule": None}, ValueError, "holds no DLPack exchange"),
        ({"views": []}, ValueError, "views has 0 entries for 2 parameters"),
        ({"views": [torch.zeros(1, 1)] * 2}, ValueError, "not of its parameter's shape"),
        ({"params": [1, 2]}, TypeError, "not a plain dense tensor"),
        ({"params": [p.to("meta") for p in params]}, TypeError, "not a plain dense tensor"),
        ({"types": (torch.Tensor, 3)}, TypeError, "types must be types"),
        ({"types": (torch.Tensor, Loud)}, TypeError, "one and the same attribute grad"),
    ):
        with pytest.raises(error, match=message):
            _C.Placement(**{**arguments, **wrong})
    placement = _C.Placement(**arguments)
    lists: list[list[Any]] = [params, states, exp_avgs, [None, None]]
    groups = [{"params": params}]
    assert placement.look(groups, *lists) == Sight.READY
    for index, name in enumerate(("params", "states", "exp_avgs", "grads")):
        short = [x[:1] if i == index else x for i, x in enumerate(lists)]
        with pytest.raises(ValueError, match=f"{name} has 1 entries for 2 parameters"):
            placement.look(groups, *short)
    with pytest.raises(TypeError, match="states must be dicts"):
        placement.look(groups, params, [None, None], exp_avgs, [None, None])
    with pytest.raises(KeyError, match="params"):
        placement.look([{}], *lists)
    with pytest.raises(ValueError, match="read-only"):
        placement.addresses[0] = 1
    assert placement.dtypes.dtype == np.int8
