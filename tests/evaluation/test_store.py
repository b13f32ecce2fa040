"""The store: nothing lost, nothing counted twice, and nothing of another version taken."""

from __future__ import annotations

import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from lhopt_fused.evaluation.run import CurvePoint, RunResult, RunSpec
from lhopt_fused.evaluation.store import Circumstances, Store, StoreError

SPEC = RunSpec("toy", "small", "adamw", {"lr": 1e-3, "schedule": "linear"}, seed=0, budget=0.71)
HERE = Circumstances("abc", '{"torch": "2"}', "cpu")
RESULT = RunResult(
    steps=9,
    report_loss=1 / 3,
    metrics={"accuracy": 0.1 + 0.2},
    eval_loss=math.inf,
    curve=[CurvePoint(0, 0.0, math.nan, math.inf), CurvePoint(9, 1e-9, 2.5, 1.0)],
    seconds=1.5,
    optimizer_seconds=0.25,
    trajectory=[[0.5, *[1e-3] * 7, math.nan]],
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "new" / "runs.sqlite"


def test_a_row_comes_back_as_it_was(path: Path) -> None:
    store = Store(path)
    assert store.add(SPEC, HERE, RESULT)
    (row,) = Store(path, create=False).rows()
    assert (row.id, row.spec, row.circumstances) == (1, SPEC, HERE)
    assert repr(row.result) == repr(replace(RESULT, curve=row.result.curve))
    assert list(map(repr, row.result.curve)) == list(map(repr, RESULT.curve))


def test_what_is_there_stays(path: Path) -> None:
    store = Store(path)
    assert (SPEC, HERE) not in store
    assert store.add(SPEC, HERE, RESULT)
    assert not store.add(SPEC, HERE, replace(RESULT, report_loss=0.0))
    assert (SPEC, HERE) in store
    assert [row.result.report_loss for row in store.rows()] == [1 / 3]


def test_order_of_hyperparameters_is_no_difference(path: Path) -> None:
    store = Store(path)
    store.add(SPEC, HERE, RESULT)
    turned = dict(reversed(SPEC.configuration.items()))
    assert (replace(SPEC, configuration=turned), HERE) in store


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, task="other"),
        replace(SPEC, size="full"),
        replace(SPEC, optimizer="ciao"),
        replace(SPEC, configuration={"lr": 1e-3, "schedule": "cosine"}),
        replace(SPEC, seed=1),
        replace(SPEC, budget=1.0),
        HERE._replace(data="abd"),
        HERE._replace(versions="{}"),
        HERE._replace(device="NVIDIA H100"),
    ],
)
def test_everything_that_matters_makes_another_row(
    path: Path, other: RunSpec | Circumstances
) -> None:
    store = Store(path)
    store.add(SPEC, HERE, RESULT)
    run = (other, HERE) if isinstance(other, RunSpec) else (SPEC, other)
    assert run not in store
    assert store.add(*run, RESULT)
    assert len(store.rows()) == 2


def test_many_write_at_once(path: Path) -> None:
    def write(worker: int) -> int:
        store = Store(path)
        return sum(store.add(replace(SPEC, seed=seed), HERE, RESULT) for seed in range(10))

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(write, range(4))) == 10
    assert sorted(row.spec.seed for row in Store(path).rows()) == list(range(10))


def test_stores_are_merged(tmp_path: Path) -> None:
    mine, theirs = Store(tmp_path / "mine"), Store(tmp_path / "theirs")
    for store, seeds in ((mine, (0, 1)), (theirs, (1, 2))):
        for seed in seeds:
            store.add(replace(SPEC, seed=seed), HERE, RESULT)
    assert mine.merge([theirs.path]) == 1
    assert mine.merge([theirs.path]) == 0
    assert [row.spec.seed for row in mine.rows()] == [0, 1, 2]


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    text, table, future = (tmp_path / name for name in ("text", "table", "future"))
    text.write_text("task,loss\n" * 1000)
    with sqlite3.connect(table) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    with sqlite3.connect(future) as connection:
        connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(StoreError, match="text cannot be used: file is not a database"):
        Store(text)
    with pytest.raises(StoreError, match="format 0, expected 1"):
        Store(table)
    with pytest.raises(StoreError, match="format 7, expected 1: it was written by another version"):
        Store(future)
    with pytest.raises(StoreError, match="there is no store"):
        Store(tmp_path / "none", create=False)
    assert not (tmp_path / "none").exists()


def test_a_damaged_row_is_named(path: Path) -> None:
    store = Store(path)
    store.add(SPEC, HERE, RESULT)
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE runs SET curve = '[[1'")
    connection.close()
    with pytest.raises(StoreError, match=r"row 1 of .* is damaged .* delete that row"):
        store.rows()


def test_a_full_disk_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(path)
    store.add(SPEC, HERE, RESULT)
    connect = sqlite3.connect

    def full(*arguments: object, **named: object) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*arguments, **named)  # type: ignore[call-overload]
        connection.execute("PRAGMA max_page_count = 1")
        return connection

    long = replace(RESULT, trajectory=[[0.5] * 9] * 5000)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", full)
        with pytest.raises(StoreError, match="disk is full"):
            store.add(replace(SPEC, seed=1), HERE, long)
    assert len(store.rows()) == 1
    assert store.add(replace(SPEC, seed=1), HERE, long)
