"""The inputs that torch tests its own AdamW with: ours gives the same, or says why it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import make_params, trajectory
from tolerances import TRAJECTORY, assert_close
from torch.testing._internal.common_optimizers import optim_db

from lhopt_fused import AdamW

STEPS = 8
INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
INPUTS = INFO.optim_inputs_func(device="cuda")  # those of "cpu", and the capturable ones
ERRORS = INFO.optim_error_inputs_func(device="cpu", dtype=torch.float32)
ACCEPTED = (
    "lr as Tensor doesn't work with foreach",
    "betas must be either both",
    "betas\\[0\\] as",
)
"""Errors of torch's implementations that have no meaning for ours."""


def named(inputs: list[Any]) -> list[str]:
    return [f"{index} {x.desc}" for index, x in enumerate(inputs)]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("kwargs", [x.kwargs for x in INPUTS], ids=named(INPUTS))
def test_same_as_torch_or_refused(backend: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("amsgrad"):
        with pytest.raises(ValueError, match=r"amsgrad=True is not supported"):
            AdamW(make_params(torch.float32), **kwargs, backend=backend)
        return
    params, peers = make_params(torch.float32), make_params(torch.float32)
    *_, reached = trajectory(AdamW(params, **kwargs, backend=backend), params, STEPS)
    theirs = {**kwargs, "capturable": False}  # a question of devices to torch
    *_, expected = trajectory(torch.optim.AdamW(peers, **theirs), peers, STEPS)
    *_, other = trajectory(torch.optim.AdamW(peers, **theirs), peers, STEPS)
    check(reached, expected)
    with pytest.raises(AssertionError):  # the peers have gone on
        check(reached, other)


def check(reached: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    scale = max(p.abs().max() for p in expected if p.numel())
    for mine, peer in zip(reached, expected, strict=True):
        assert_close(mine, peer, TRAJECTORY[torch.float32], scale)


@pytest.mark.parametrize("error", ERRORS, ids=named([e.optimizer_error_input for e in ERRORS]))
def test_what_torch_refuses(error: Any) -> None:
    given = error.optimizer_error_input
    params = make_params(torch.float32) if given.params is None else given.params
    if given.desc.startswith(ACCEPTED):
        AdamW(params, **given.kwargs)
    else:  # what torch warns of is an error here
        kind = ValueError if issubclass(error.error_type, Warning) else error.error_type
        with pytest.raises(kind):
            AdamW(params, **given.kwargs)
