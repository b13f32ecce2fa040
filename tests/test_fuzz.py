"""A slice of the random combinations in ``fuzz.py``, on every run of the tests."""

from __future__ import annotations

import fuzz
import pytest


def test_a_slice_agrees_with_the_reference() -> None:
    assert fuzz.failures(seed=1, numbers=range(60)) == {}


def test_a_wrong_learning_rate_is_seen() -> None:
    seen = fuzz.failures(seed=1, numbers=range(40), spoilt=1.05)
    drawn = {number: fuzz.drawn(1, number) for number in range(40)}
    moving = {
        number
        for number, c in drawn.items()
        if c.dtype.itemsize >= 4  # 16 bits may not show it
        and max(c.gradients["missing"], c.gradients["nonfinite"]) == 0
        and any(0 not in shape for shape in c.shapes)
    }
    assert len(moving) >= 5
    assert moving <= seen.keys()


def test_a_failure_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--seed", "3", "--combinations", "9"])
    monkeypatch.setattr("fuzz.failures", lambda seed, numbers: {numbers[7]: "lr: off by 1"})
    assert fuzz.main() == 1
    assert "off by 1\nagain: PYTHONPATH=tests python -m fuzz --seed 3 --only 7\n8 of 9" in (
        capsys.readouterr().out
    )
