"""The benchmarks' gate, their arithmetic, and one quick run; nothing here looks at times."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from distributed.launch import run_ranks
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import decision, figure, machine, offload, precision, report, run, sharded
from benchmarks.gate import GateError, check
from benchmarks.registry import Run, Settings, Unavailable, Variant, mean_bytes, select
from benchmarks.timing import Contestant, Sample, Series, interleave, quartiles, ratios, rotated
from benchmarks.variants import VARIANTS
from benchmarks.workloads import WORKLOADS, gpt2_shapes

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
BY_NAME = {variant.name: variant for variant in VARIANTS}
SETTINGS = Settings(lr=0.0, max_norm=0.0)
SHAPES = [(37, 29), (41,), (13, 5)]


def spoiled(variant: Variant, factor: float) -> Variant:
    """The same variant with another learning rate than it was told to use."""

    def build(params: list[torch.nn.Parameter], settings: Settings) -> Run:
        return variant.build(params, dataclasses.replace(settings, lr=settings.lr * factor))

    return dataclasses.replace(variant, build=build)


@pytest.mark.parametrize(
    "name", [v.name for v in VARIANTS if v.ours or v.name.startswith("torch-")]
)
def test_gate_lets_correct_steps_pass(name: str) -> None:
    check(BY_NAME[name], SHAPES, CPU, SETTINGS)


@pytest.mark.parametrize("name", ["adamw-skip", "lhopt-exact", "lhopt-delayed", "torch-fused"])
@pytest.mark.parametrize("factor", [1.01, 0.999])
def test_gate_refuses_a_wrong_learning_rate(name: str, factor: float) -> None:
    with pytest.raises(GateError, match="is off by"):
        check(spoiled(BY_NAME[name], factor), SHAPES, CPU, SETTINGS)


HALVES = [v.name for v in VARIANTS if v.dtype == torch.bfloat16 and "cpu" in v.devices]


@pytest.mark.parametrize("name", HALVES)
def test_gate_of_16_bit_parameters(name: str) -> None:
    """They are rounded in every step, so that only what is further off is seen."""
    check(BY_NAME[name], SHAPES, CPU, SETTINGS)
    with pytest.raises(GateError, match="is off by"):
        check(spoiled(BY_NAME[name], 1.2), SHAPES, CPU, SETTINGS)


def test_gate_refuses_missing_clipping() -> None:
    unclipped = dataclasses.replace(BY_NAME["torch-clip-fused"], build=BY_NAME["torch-fused"].build)
    with pytest.raises(GateError, match="is off by"):
        check(unclipped, SHAPES, CPU, SETTINGS)


def test_gate_refuses_missing_statistics() -> None:
    silent = dataclasses.replace(BY_NAME["adamw-mask"], build=BY_NAME["adamw-bare"].build)
    with pytest.raises(GateError, match=r"feature \w+ is nan"):
        check(silent, SHAPES, CPU, SETTINGS)


def test_gate_refuses_nan() -> None:
    def build(params: list[torch.nn.Parameter], settings: Settings) -> Run:
        def step() -> None:
            params[0].detach()[0] = torch.nan

        return Run(step)

    with pytest.raises(GateError, match="off by nan"):
        check(dataclasses.replace(BY_NAME["torch-fused"], build=build), SHAPES, CPU, SETTINGS)


def test_the_gpu_check_names_every_file_with_tests_for_a_gpu() -> None:
    script = (ROOT / "benchmarks/gpu_check.sh").read_text()
    for_gpus = re.compile(r"mark\.gpu|\bwith_triton\(|\bMARKS\b|\bworlds\b|\bDEVICES\b")
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tests").rglob("test_*.py")
        if path != Path(__file__) and for_gpus.search(path.read_text())
    }
    assert set(re.findall(r"^  (tests/\S+\.py)$", script, re.MULTILINE)) == found


def quick_plan(*variants: Variant) -> run.Plan:
    workload = next(w for w in WORKLOADS if w.name == "small-400")
    return run.Plan(CPU, variants, [workload], rounds=2, quick=True)


def test_refused_variant_is_not_timed_and_others_are() -> None:
    outcome = run.measure(
        quick_plan(spoiled(BY_NAME["adamw-skip"], 1.01), BY_NAME["torch-fused"]),
        Console(quiet=True),
    )
    assert [note["variant"] for note in outcome.refused] == ["adamw-skip"]
    assert [row["variant"] for row in outcome.rows] == ["torch-fused"]


def test_peers_that_cannot_run_are_listed_with_their_reason() -> None:
    def absent(params: list[torch.nn.Parameter], settings: Settings) -> Run:
        raise Unavailable("cannot import absent: not installed")

    peer = dataclasses.replace(BY_NAME["torch-fused"], name="absent", build=absent)
    outcome = run.measure(quick_plan(peer, BY_NAME["heavyball-adamw"]), Console(quiet=True))
    assert {note["variant"]: note["reason"] for note in outcome.not_timed} == {
        "absent": "cannot import absent: not installed",
        "heavyball-adamw": "only where --variants names it: "
        "compiles for a minute or more on every list of tensors",
    }
    assert not outcome.refused


def test_one_of_ours_that_cannot_run_is_refused() -> None:
    def broken(params: list[torch.nn.Parameter], settings: Settings) -> Run:
        raise RuntimeError("no such kernel")

    variant = dataclasses.replace(BY_NAME["adamw-skip"], build=broken)
    (note,) = run.measure(quick_plan(variant), Console(quiet=True)).refused
    assert note["reason"] == "RuntimeError: no such kernel"


def test_quick_run_writes_rows_and_a_picture(tmp_path: Path) -> None:
    names = "adamw-skip,lhopt-exact-every4,torch-fused,torch-clip-fused,flashoptim-adamw"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.run", "--suite", "step", "--quick"),
            *("--device", "cpu", "--rounds", "2", "--variants", names),
            *("--threads", "1", "--out", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    assert document["threads"] == 1
    assert document["versions"]["torch"] == version("torch")
    assert document["machine_details"]["cores"] >= 1
    assert set(document["bandwidth_gb_per_s"]) == {"one-large", "gpt2-small", "small-400"}
    assert len(document["rows"]) == 3 * 4
    assert {note["reason"] for note in document["not_timed"]} == {"not for cpu tensors"}
    assert document["refused"] == []
    for row in document["rows"]:
        assert row["commit"] == document["commit"]
        assert row["rounds"] == 2
        assert row["ratio"] > 0
        assert row["quartiles_ms"][0] <= row["median_ms"] <= row["quartiles_ms"][1]
        assert row["state_bytes_per_element"] == pytest.approx(8, rel=0.1)
        assert row["variant"] in names
        assert "copy" in done.stdout
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "adamv"], "no variant named adamv"),
        (["--workloads", "gpt5"], "no workload named gpt5"),
        (["--graph"], "add --device cuda"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(run.app, ["--quick", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


# ---------------------------------------------------------------------------------- arithmetic


def test_quartiles() -> None:
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([4.0, 1.0, 3.0, 2.0, 100.0]) == (2.0, 3.0, 4.0)
    assert quartiles([1.0, 2.0]) == (1.25, 1.5, 1.75)


def test_ratios_cancel_what_slows_a_round() -> None:
    assert ratios([1.0, 10.0, 3.0], [2.0, 20.0, 4.0]) == [0.5, 0.5, 0.75]


def series(*ms: float) -> Series:
    return Series([Sample(value, value) for value in ms])


def test_rows_by_hand() -> None:
    variant = dataclasses.replace(BY_NAME["lhopt-exact"], peer="torch-fused")
    (row,) = report.make_rows(
        WORKLOADS[0],
        [(1000, 1000), (1_000_000,)],  # half of the elements at 44 bytes, half at 32
        [variant],
        {
            "lhopt-exact": dataclasses.replace(series(2.0, 4.0, 3.0), state_bytes=16_000_000),
            "torch-fused": series(4.0, 4.0, 4.0),
        },
        {"copy": 50.0},
    )
    assert (row["median_ms"], row["quartiles_ms"]) == (3.0, [2.5, 3.5])
    assert (row["ratio"], row["ratio_quartiles"]) == (0.75, [0.625, 0.875])
    assert row["bytes_per_element"] == 38
    assert row["gb_per_s"] == pytest.approx(2e6 * 38 / 3e-3 / 1e9)
    assert row["share_of_copy"] == pytest.approx(2e6 * 38 / 3e-3 / 50e9)
    assert row["state_bytes_per_element"] == 8


def test_ratio_is_left_out_without_the_peer() -> None:
    (row,) = report.make_rows(
        WORKLOADS[0],
        [(10,)],
        [BY_NAME["adamw-skip"]],
        {"adamw-skip": series(1.0)},
        {"copy": 1.0},
    )
    assert row["ratio"] is None


def test_bandwidth_counts_reads_and_writes() -> None:
    found = report.bandwidths({"copy": series(1.0), "update": series(2.0)}, elements=10**6)
    assert found == {"copy": 8.0, "update": 6.0}


def test_mean_bytes() -> None:
    assert mean_bytes(lambda shape: len(shape), [(3,), (1, 1)]) == 1.25


def test_rounds_are_rotated_and_failures_end_one_series() -> None:
    order: list[str] = []

    def contestant(name: str, fails_at: int = 99) -> Contestant:
        calls = 0

        def step() -> None:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise MemoryError("too large")
            order.append(name)

        return Contestant(name, lambda: Run(step))

    def once(step: object, steps: int) -> Sample:
        assert callable(step)
        step()
        return Sample(1.0, 1.0)

    found = interleave([contestant("a"), contestant("b", fails_at=2)], 3, once, warm_up=0)
    assert order == ["a", "b", "a", "a"]
    assert len(found["a"].samples) == 3
    assert found["b"].failure == "MemoryError: too large"
    assert [c.name for c in rotated([contestant(n) for n in "abc"], 4)] == ["b", "c", "a"]


def test_what_does_not_stay_is_built_anew() -> None:
    built = 0

    def make() -> Run:
        nonlocal built
        built += 1
        return Run(lambda: None)

    def free(step: object, steps: int) -> Sample:
        return Sample(1.0, 1.0)

    interleave([Contestant("a", make)], 3, free)
    assert built == 1
    interleave([Contestant("a", make)], 3, free, stays=False)
    assert built == 4


def test_gpt2_small_has_its_148_tensors() -> None:
    shapes = gpt2_shapes(12, 768, 50257, 1024)
    assert len(shapes) == 148
    assert sum(torch.Size(shape).numel() for shape in shapes) == 124_439_808


def test_selection() -> None:
    assert [w.name for w in select(WORKLOADS, "small-400, one-large", "workload")] == [
        "small-400",
        "one-large",
    ]
    with pytest.raises(ValueError, match="there are one-large"):
        select(WORKLOADS, "huge", "workload")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu AMD EPYC 2 cores", "cpu-amd-epyc-2-cores"),
        ("cpu Intel(R) Xeon(R) CPU @ 2.20GHz 8 cores", "cpu-intel-xeon-8-cores"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
    ],
)
def test_slug(name: str, expected: str) -> None:
    assert machine.slug(name) == expected


def test_labels_are_spread() -> None:
    assert figure.spread([1.0, 1.1, 5.0], 0.5) == [1.0, 1.5, 5.0]


@torch.inference_mode()
def test_a_decision_is_timed_in_every_state_of_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "LARGEST_CACHE", 2**10)
    calls = decision.contestants(16)
    samples = decision.measure(calls, 10)
    rows = [row for state in decision.STATES for row in decision.rows_of(state, samples[state])]
    assert [row["variant"] for row in rows] == [*calls] * len(decision.STATES)
    assert all(len(values) == 10 for values in samples["warm"].values())
    assert all(row["ratio"] == 1.0 for row in rows if row["variant"] == decision.RUNNER)
    monkeypatch.setattr(decision, "AGREEMENT", 0.0)
    with pytest.raises(AssertionError, match="runner and torch differ by"):
        decision.contestants(16)


def invoke(command: Any, *options: str) -> Any:
    """The document that a command has written into the folder after ``--out``."""
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    (path,) = Path(options[-1]).glob("*.json")
    return json.loads(path.read_text())


def test_precision_compares_ways_with_the_spread_of_seeds(tmp_path: Path) -> None:
    sizes = ("--width", "32", "--layers", "1", "--context", "16")
    options = ("--steps", "4", "--seeds", "2", *sizes, "--out", str(tmp_path))
    document = invoke(precision.main, *options)
    assert [row["way"] for row in document["rows"]] == list(precision.WAYS)
    for row in document["rows"]:
        assert len(row["losses"]) == 2
        assert len(row["losses"][0]) == 4
    assert document["rows"][0]["final_distance"] == 0.0


def test_precision_counts_the_points_within_the_spread() -> None:
    curves = {way: [[3.0, 2.0], [3.2, 2.2]] for way in precision.WAYS}
    far = list(precision.WAYS)[-1]
    curves[far] = [[3.1, 2.5], [3.1, 2.5]]
    rows = {row["way"]: row for row in precision.rows_of(curves)}
    assert rows[far]["share_of_points_within_spread"] == 0.5
    assert rows[far]["final_distance"] == pytest.approx(0.4)
    assert rows["float32"]["share_of_points_within_spread"] == 1.0


def test_steps_in_host_memory_are_timed_beside_their_parts(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--quick", "--rounds", "2", "--out", str(tmp_path))
    rows = {row["variant"]: row for row in invoke(offload.main, *options)["rows"]}
    assert list(rows) == ["cpu step", "copy back", "offload", "offload, released"]
    assert [name for name, row in rows.items() if "ratio" in row] == list(offload.GOALS)


def test_ratios_of_steps_in_host_memory() -> None:
    ms = {"cpu step": 3.0, "copy back": 1.0, "offload": 8.0, "offload, released": 6.0}
    series = {name: Series([Sample(value, value)]) for name, value in ms.items()}
    assert [row.get("ratio") for row in offload.rows_of(series)] == [None, None, 2.0, 2.0]
    series["copy back"].failure = "OutOfMemoryError: none left"
    with pytest.raises(RuntimeError, match="copy back: OutOfMemoryError"):
        offload.rows_of(series)


def test_wrong_steps_in_host_memory_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "released", lambda params, lr: offload.adamw(params, 1.01 * lr))
    with pytest.raises(AssertionError, match="offload, released: other parameters"):
        offload.check([(3, 5)], "cpu")


def test_statistics_of_shards_are_timed_beside_none(tmp_path: Path) -> None:
    sizes = ("--width", "8", "--layers", "1", "--context", "4", "--batch", "1", "--rounds", "2")
    document = invoke(sharded.main, *sizes, "--optimizers", "lhopt-exact", "--out", str(tmp_path))
    rows = {row["statistics"]: row for row in document["rows"]}
    assert list(rows) == ["without", "with"]
    assert [row["messages"] for row in rows.values()] == [2, 2]
    assert rows["without"]["optimizer_more_of_step"] == 0.0


def test_what_statistics_of_shards_add_is_taken_round_by_round() -> None:
    rows = sharded.rows_of(
        {"without": [(10.0, 1.0), (20.0, 3.0)], "with": [(11.0, 2.0), (23.0, 6.0)]}
    )
    assert rows["with"]["optimizer_more_of_step"] == pytest.approx(0.125)
    assert rows["with"]["ratio"] == pytest.approx(1.125)
    assert rows["with"]["optimizer_ratio"] == 2.0


def gate_of_shards(rank: int, ranks: int) -> list[str]:
    """What the gate says of an optimizer and of two wrong ones."""
    plan = sharded.Plan("cpu", ranks, 2, 2, sharded.GATE_SHAPE, (), 1)
    right = sharded.OPTIMIZERS["adamw"]

    def other_moments(params: Any, **keywords: Any) -> Any:
        betas = (0.9, 0.999) if "process_group" in keywords else (0.8, 0.999)
        return right(params, betas=betas, **keywords)

    def other_rate(params: Any, **keywords: Any) -> Any:
        optimizer = right(params, **keywords)
        optimizer.param_groups[0]["lr"] *= 1.0 if keywords["inner_feature_frequency"] == 0 else 1.1
        return optimizer

    said = []
    for build in (right, other_moments, other_rate):
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(sharded.OPTIMIZERS, "adamw", build)
                sharded.check(plan, "adamw")
            said.append("")
        except GateError as error:
            said.append(str(error))
    return said


def test_wrong_statistics_of_shards_are_not_timed() -> None:
    for right, other_moments, other_rate in run_ranks(gate_of_shards, 2):
        assert right == ""
        assert re.fullmatch(r"adamw: feature \w+ is .*, expected .*", other_moments)
        assert other_rate == "adamw: statistics have changed parameter 0"
