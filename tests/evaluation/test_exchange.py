"""Rows as text: the same there and back, merged once, and refused where they cannot be read."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.test_store import HERE, RESULT, SPEC, made
from typer.testing import CliRunner

from lhopt_fused.cli import app
from lhopt_fused.evaluation.exchange import read_rows, rows_text
from lhopt_fused.evaluation.rows import StoreError, json_text
from lhopt_fused.evaluation.store import Store
from lhopt_fused.evaluation.task import SIZES


def invoke(*arguments: str | Path) -> tuple[int, str]:
    found = CliRunner().invoke(app, list(map(str, arguments)))
    return found.exit_code, " ".join(found.output.split())


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Two runs, in the folder ``one``."""
    store = Store(tmp_path / "one" / "runs.sqlite")
    for seed in (0, 1):
        store.add(replace(SPEC, seed=seed), HERE, RESULT)
    return store


def test_text_is_strict_json_with_a_line_for_each_row(store: Store) -> None:
    header, *lines = rows_text(store.rows()).splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(header)["format"] == 2
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [record["id"] for record in records] == [1, 2]
    assert records[0]["eval_loss"] == "inf"
    assert records[0]["curve"]["train_loss"] == [None, 2.5]
    assert records[0]["report_loss"] == 1 / 3


def test_numbers_of_json() -> None:
    text = json_text({"b": [math.nan, -math.inf], "a": (1, 0.1)})
    assert text == '{"a":[1,0.1],"b":[null,"-inf"]}'


def test_rows_come_back_from_text_as_from_the_store(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_text(store.rows()))
    assert repr(read_rows(path)) == repr(store.rows())
    assert repr(read_rows(store.path)) == repr(read_rows(store.path.parent)) == repr(store.rows())


def test_an_export_is_merged_once(store: Store, tmp_path: Path) -> None:
    text, target = tmp_path / "results" / "rows.jsonl", tmp_path / "two" / "runs.sqlite"
    code, output = invoke("eval", "export", store.path, text)
    assert (code, output) == (0, f"2 rows in {text}")
    code, output = invoke("eval", "merge", target, text, store.path.parent)
    assert code == 0
    assert f"{text}: 2 runs taken over, 0 were there already" in output
    assert "0 runs taken over, 2 were there already" in output
    assert "another loss" not in output
    assert repr(Store(target).rows()) == repr(store.rows())
    again = tmp_path / "again.jsonl"
    invoke("eval", "export", target, again)
    assert again.read_bytes() == text.read_bytes()


def test_two_machines_may_differ_in_the_last_digit(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(rows_text([made(0, report_loss=0.3333), made(5)]))
    code, output = invoke("eval", "merge", store.path, path)
    assert code == 0
    assert "1 runs taken over, 1 were there already 1 of these have another loss" in output


def test_an_export_is_of_what_can_be_compared(store: Store, tmp_path: Path) -> None:
    store.add(SPEC, HERE._replace(versions='{"torch":"3"}'), RESULT)
    path = tmp_path / "rows.jsonl"
    code, output = invoke("eval", "export", store.path, path)
    assert (code, len(read_rows(path))) == (0, 1)
    assert "2 rows of other data or versions than the last of their task are left out" in output
    code, output = invoke("eval", "merge", tmp_path / "new", path)
    assert code == 0


def test_other_versions_are_refused_with_both_named(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    other = HERE._replace(versions='{"torch":"3"}')
    path.write_text(rows_text([made(4), replace(made(5), circumstances=other)]))
    code, output = invoke("eval", "merge", store.path, path)
    assert code == 2
    assert "row 6, of toy, was made with torch 3, and rows" in output
    assert len(store.rows()) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "begins with ''; expected a store or a file of `lhopt eval export`"),
        ("task,loss\n", "begins with 'task,loss'"),
        ("[1]\n", "begins with"),
        ('{"what":"lhopt-fused evaluation rows","format":1}\n', "rows of format 1, expected 2"),
        ("HEADER\n{}\n", r"line 2 is damaged \(KeyError: 'id'\)"),
        ("HEADER\nROW\nROW\n", "two rows of one id; merge the files"),
        ("HEADER\nHALF", "line 2 is damaged"),
    ],
)
def test_text_that_is_something_else(text: str, problem: str, tmp_path: Path) -> None:
    header, row = rows_text([made(0)]).splitlines()
    path = tmp_path / "rows.jsonl"
    path.write_text(text.replace("HEADER", header).replace("ROW", row).replace("HALF", row[:90]))
    with pytest.raises(StoreError, match=problem):
        read_rows(path)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    for arguments in (
        ("report", tmp_path / "none"),
        ("report", tmp_path),
        ("eval", "export", tmp_path, tmp_path / "out"),
        ("eval", "merge", tmp_path / "new", tmp_path / "none"),
    ):
        code, output = invoke(*arguments)
        assert code == 2
        assert "cannot be read" in output
        assert "expected a store, a folder with runs.sqlite, or a file of" in output
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_text_is_that_of_the_store(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "text" / "rows.jsonl"
    assert "no runs of these tasks of size small" in invoke("report", store.path)[1]
    store.add(replace(SPEC, budget=1.0), HERE, RESULT)
    invoke("eval", "export", store.path, path)
    assert invoke("report", store.path.parent)[0] == 0
    assert invoke("report", path)[0] == 0
    for name in ("report.html", "report.md", "rows.jsonl", "pictures/toy_steps.png"):
        assert (path.parent / name).read_bytes() == (store.path.parent / name).read_bytes()


def test_each_size_has_a_report(store: Store, tmp_path: Path) -> None:
    for size in SIZES:
        store.add(replace(SPEC, size=size, budget=1.0), HERE, RESULT)
    assert invoke("report", store.path, "--out", tmp_path / "out")[0] == 0
    assert {path.parent.name for path in tmp_path.rglob("out/*/report.html")} == {"small", "full"}
    code, output = invoke("report", store.path, "--tasks", "chess")
    assert (code, output) == (2, "Error: --tasks: 'chess' is none of toy")
    code, output = invoke("report", store.path, "--size", "full", "--out", tmp_path / "one")
    assert (tmp_path / "one" / "report.html").exists()
