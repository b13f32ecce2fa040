"""A slice of the random combinations in ``fuzz.py``, on every run of the tests."""

from __future__ import annotations

import fuzz
import pytest


def test_a_slice_agrees_with_the_reference() -> None:
    assert fuzz.failures(seed=1, numbers=range(40)) == {}


def test_wrong_learning_rates_and_gradients_are_seen() -> None:
    """Where nothing may hide them: every gradient is there and taken as it is."""
    drawn = {number: fuzz.drawn(1, number) for number in range(100)}
    moving = {
        number: c
        for number, c in drawn.items()
        if max(c.gradients["missing"], c.gradients["nonfinite"]) == 0
        and not any("group_clip" in name for group in c.groups for name in group)
        and any(0 not in shape for shape in c.shapes)
    }
    few_bits = [number for number, c in moving.items() if c.keeps_fewer_bits]
    others = [number for number, c in moving.items() if not c.keeps_fewer_bits]
    chosen = few_bits[:8] + others[:4]
    assert len(chosen) == 12
    assert fuzz.failures(1, chosen, spoilt=1.05).keys() == set(chosen)


def test_a_failure_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["fuzz", "--seed", "3", "--combinations", "9"])
    monkeypatch.setattr("fuzz.failures", lambda seed, numbers, fast: {numbers[7]: "lr: off by 1"})
    assert fuzz.main() == 1
    said = capsys.readouterr().out
    assert "again: PYTHONPATH=tests python -m fuzz --backend auto --seed 3 --only 7\n8 of 9" in said
    assert "off by 1\n" in said
