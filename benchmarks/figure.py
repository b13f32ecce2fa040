"""The picture beside the rows: times with their ratios, and a roofline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report import milliseconds

__all__ = ["draw", "spread"]

OURS: Final = "#1f6fb4"
PEER: Final = "#9aa3ab"
INK: Final = "#30363b"
MOVED_AT_LEAST: Final = 16  # bytes per element that every step reads
CACHE_BYTES: Final = 2**26
PROBE_STYLES: Final = {"copy": "-", "update": "--"}

Row = Mapping[str, Any]


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draw every workload of a results document: one line of two panels each."""
    workloads: dict[str, list[Row]] = {}
    for row in document["rows"]:
        workloads.setdefault(row["workload"], []).append(row)
    heights = [0.34 * len(rows) + 1.6 for rows in workloads.values()]
    figure = Figure(figsize=(13, sum(heights) + 0.7), layout="constrained")
    figure.suptitle(_title(document), fontsize=10, color=INK, x=0.01, ha="left")
    panels = figure.subplots(
        len(workloads), 2, squeeze=False, height_ratios=heights, width_ratios=[1.15, 1]
    )
    for (name, rows), (bars, roofline) in zip(workloads.items(), panels, strict=True):
        _draw_times(bars, rows)
        _draw_roofline(roofline, rows, document["bandwidth_gb_per_s"][name])
    figure.savefig(path, dpi=130)


def _title(document: Mapping[str, Any]) -> str:
    details = document["machine_details"]
    where = details.get("gpu") or f"{details['cpu']}, {document['threads']} threads"
    state = " + changes" if document["dirty"] else ""
    captured = ", captured in CUDA graphs" if document["captured"] else ""
    return (
        f"optimizer step{captured}: {where}, torch {document['versions']['torch']}, "
        f"commit {document['commit']}{state}, {document['date'][:10]}"
    )


def _color(row: Row) -> str:
    return OURS if row["ours"] else PEER


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    ordered = _fastest_first(rows)
    limit = _longest_bar(ordered)
    for place, row in enumerate(ordered):
        median, (low, high) = float(row["median_ms"]), row["quartiles_ms"]
        axes.barh(place, min(median, limit), color=_color(row), height=0.72)
        if median <= limit:
            axes.plot([low, min(high, limit)], [place, place], color=INK, linewidth=1)
        end = min(max(median, high), limit)
        axes.annotate(
            ("" if median <= limit else "...  ") + _times_text(row),
            (end, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
    names = [f"{row['label']}  {n}" for n, row in enumerate(ordered, start=1)]
    axes.set_yticks(range(len(ordered)), names, fontsize=8.5)
    axes.invert_yaxis()
    for tick, row in zip(axes.get_yticklabels(), ordered, strict=True):
        tick.set_color(OURS if row["ours"] else INK)
    axes.set_xlim(0, limit * 1.5)
    axes.set_xlabel("ms per step (median, quartiles)", fontsize=8.5)
    count = "1 tensor" if rows[0]["tensors"] == 1 else f"{rows[0]['tensors']:,} tensors"
    title = f"{rows[0]['workload_label']}: {count}, {rows[0]['elements'] / 1e6:,.1f}M elements"
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    _plain(axes)


def _longest_bar(rows: Sequence[Row]) -> float:
    """Bars are cut where unfused peers would leave no room to see the others apart."""
    peers = {row["peer"] for row in rows}
    fused = [row["quartiles_ms"][1] for row in rows if row["ours"] or row["variant"] in peers]
    longest = max(float(row["quartiles_ms"][1]) for row in rows)
    return min(longest, 1.6 * max(fused)) if fused else longest


def _times_text(row: Row) -> str:
    text = f"{milliseconds(float(row['median_ms']))} ms"
    if row["ratio"] is not None and row["peer"] != row["variant"]:
        text += f",  {row['ratio']:.2f} of {row['peer']}"
    return text


def _draw_roofline(axes: Axes, rows: Sequence[Row], bandwidth: Mapping[str, float]) -> None:
    """Bytes that the algorithm moves against the rate at which it moves them, numbered as bars."""
    if rows[0]["elements"] * MOVED_AT_LEAST < CACHE_BYTES:
        axes.set_axis_off()  # it all stays in a cache, and memory limits nothing
        return
    top = max(*bandwidth.values(), *(float(row["gb_per_s"]) for row in rows)) * 1.15
    right = max(float(row["bytes_per_element"]) for row in rows) + 10
    for probe, rate in bandwidth.items():
        axes.axhline(rate, color=INK, linewidth=1, linestyle=PROBE_STYLES[probe], zorder=0)
        above = rate == max(bandwidth.values())
        text = f"{probe} {rate:.1f} "
        axes.text(right, rate, text, fontsize=8, ha="right", va="bottom" if above else "top")
    numbers = {row["variant"]: n for n, row in enumerate(_fastest_first(rows), start=1)}
    for x in sorted({float(row["bytes_per_element"]) for row in rows}):
        column = sorted(
            (row for row in rows if row["bytes_per_element"] == x), key=lambda row: row["gb_per_s"]
        )
        places = spread([float(row["gb_per_s"]) for row in column], top * 0.045)
        for row, place in zip(column, places, strict=True):
            marker = "o" if row["ours"] else "s"
            axes.plot(x, row["gb_per_s"], marker, markersize=6, color=_color(row))
            axes.text(x + 1.3, place, str(numbers[row["variant"]]), fontsize=8, va="center")
    axes.set(xlim=(20, right), ylim=(0, top))
    axes.set_xlabel("bytes that the algorithm moves per element", fontsize=8.5)
    axes.set_ylabel("achieved GB/s", fontsize=8.5)
    axes.set_title("lines: bandwidth measured in the same run", fontsize=9, loc="left", color=INK)
    _plain(axes)


def _fastest_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: float(row["median_ms"]))


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places moved up as far as needed to lie ``gap`` apart."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    return moved


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8.5, colors=INK)
