"""The store: nothing lost, nothing counted twice, and nothing of another version taken."""

from __future__ import annotations

import math
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.toys import fill_disk

from lhopt_fused.evaluation.rows import Circumstances, Row, StoreError, machine
from lhopt_fused.evaluation.run import CurvePoint, RunResult, RunSpec
from lhopt_fused.evaluation.store import Merged, Store

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
    parameters=123,
)


def made(seed: int, **changes: object) -> Row:
    """A row of elsewhere."""
    result = replace(RESULT, **changes)  # type: ignore[arg-type]
    return Row(seed + 1, replace(SPEC, seed=seed), HERE, result, "another machine")


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
    assert row.machine == machine() != ""


def test_curves_are_kept_to_six_digits_and_results_whole(path: Path) -> None:
    long = 1 / 3
    curve = [CurvePoint(10**9, long, long, long)]
    Store(path).add(SPEC, HERE, replace(RESULT, curve=curve, trajectory=[[long]]))
    (row,) = Store(path).rows()
    assert row.result.curve == [CurvePoint(10**9, 0.333333, 0.333333, 0.333333)]
    assert row.result.trajectory == [[0.333333]]
    assert (row.result.report_loss, row.result.metrics["accuracy"]) == (long, 0.1 + 0.2)


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


def test_many_make_one_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            path = tmp_path / str(attempt) / "runs.sqlite"
            assert [store.rows() for store in pool.map(Store, [path] * 8)] == [[]] * 8


def test_stores_are_merged(tmp_path: Path) -> None:
    mine = Store(tmp_path / "mine")
    for seed in (0, 1):
        mine.add(replace(SPEC, seed=seed), HERE, RESULT)
    theirs = [made(1, report_loss=9.0), made(2)]
    assert mine.merge(theirs, tmp_path) == Merged(new=1, known=1, different=1)
    assert mine.merge(theirs, tmp_path) == Merged(new=0, known=2, different=1)
    rows = mine.rows()
    assert [(row.id, row.spec.seed) for row in rows] == [(1, 0), (2, 1), (3, 2)]
    assert [row.machine for row in rows] == [machine(), machine(), "another machine"]
    assert rows[1].result.report_loss == 1 / 3


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (HERE._replace(data="xyz"), "with data xyz, and rows .* with abc"),
        (HERE._replace(versions='{"torch": "3"}'), "with torch 3, and rows .* with 2"),
        (HERE._replace(versions='{"protocol": "9", "torch": "2"}'), "with protocol 9"),
    ],
)
def test_what_cannot_be_compared_is_refused_whole(
    path: Path, other: Circumstances, problem: str
) -> None:
    store = Store(path)
    store.add(SPEC, HERE, RESULT)
    rows = [made(1), replace(made(2), circumstances=other)]
    with pytest.raises(StoreError, match=rf"others: row 3, of toy, was made {problem}"):
        store.merge(rows, Path("others"))
    assert len(store.rows()) == 1
    with pytest.raises(StoreError, match=r"nothing was taken over"):
        Store(path.parent / "empty").merge(rows, Path("others"))
    for row in (made(1), replace(made(2), circumstances=other._replace(device="GPU"))):
        assert store.merge([row], Path("others")).new == 1


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
    before = table.read_bytes(), future.read_bytes()
    with pytest.raises(StoreError, match="format 0, expected 2"):
        Store(table)
    with pytest.raises(StoreError, match="format 7, expected 2: it was written by another version"):
        Store(future)
    assert (table.read_bytes(), future.read_bytes()) == before
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
    long = replace(RESULT, trajectory=[[0.5] * 9] * 5000)
    with monkeypatch.context() as patch:
        fill_disk(patch)
        with pytest.raises(StoreError, match="disk is full"):
            store.add(replace(SPEC, seed=1), HERE, long)
        with pytest.raises(StoreError, match="disk is full"):
            store.merge([made(2), replace(made(3), result=long)], path)
        assert [row.spec.seed for row in Store(path).rows()] == [0]
    assert store.add(replace(SPEC, seed=1), HERE, long)
