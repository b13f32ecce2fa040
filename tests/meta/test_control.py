"""The hand control: fixed schedules."""

from __future__ import annotations

import pytest

from lhopt_fused.meta.control import HandControl


def test_some_schedules_are_still_after_a_part_of_the_run():
    for name, share in (("quarter", 1 / 4), ("sixteenth", 1 / 16)):
        control = HandControl(0.1, name)
        assert control.learning_rate(share / 2) == pytest.approx(0.05)
        assert control.learning_rate(share) == control.learning_rate(1.0) == pytest.approx(1e-4)
