"""What the integrations share, and what they say where their library is missing."""

from __future__ import annotations

import importlib
import sys

import pytest
from cases import make_params, set_grads

from lhopt_fused import LHOPT
from lhopt_fused.integrations import PolicyLR
from lhopt_fused.integrations.common import check_one_hand_on_lr, decides_at


@pytest.mark.parametrize(
    ("module", "library"), [("huggingface", "transformers"), ("lightning", "lightning")]
)
def test_a_missing_library_is_named_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, module: str, library: str
) -> None:
    name = f"lhopt_fused.integrations.{module}"
    for loaded in (library, "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, loaded, None)
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'lhopt-fused\[{module}\]'"):
        importlib.import_module(name)


def test_policy_lr_leaves_the_learning_rate_to_the_policy() -> None:
    params, plain = make_params(), make_params()
    optimizer, alone = LHOPT(params, 20, outer_steps=4), LHOPT(plain, 20, outer_steps=4)
    schedule = PolicyLR(optimizer)
    check_one_hand_on_lr(optimizer, schedule, "")
    for step in range(20):
        for each, own in ((optimizer, params), (alone, plain)):
            set_grads(own, step)
            each.step()
        schedule.step()
        assert schedule.get_last_lr() == [alone.param_groups[0]["lr"]]
    assert repr(optimizer.history) == repr(alone.history)


@pytest.mark.parametrize(("total", "outer"), [(20, 5), (17, 5), (100, 7), (3, 3), (5, 1)])
def test_decisions_are_foreseen(total: int, outer: int) -> None:
    params = make_params(shapes=[(3, 3)])
    optimizer = LHOPT(params, total, outer_steps=outer)
    for step in range(total):
        set_grads(params, step)
        optimizer.step()
    foreseen = [step for step in range(1, total + 1) if decides_at(optimizer, step)]
    assert foreseen == [step.inner_step for step in optimizer.history]
