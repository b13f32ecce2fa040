"""From samples to rows: medians, ratios, bandwidth; as JSON and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import PROBES, results_folder, stamp
from benchmarks.registry import Shape, Variant, Workload, mean_bytes
from benchmarks.timing import Series, quartiles, ratios

__all__ = [
    "bandwidths",
    "keep",
    "make_rows",
    "milliseconds",
    "print_notes",
    "print_rows",
    "write_json",
]

CPU: Final = torch.device("cpu")

Row = dict[str, Any]


def bandwidths(series: Mapping[str, Series], elements: int) -> dict[str, float]:
    """Median GB/s of each memory probe that was timed."""
    return {
        name: gigabytes_per_second(
            count * elements, quartiles([s.ms for s in series[name].samples])[1]
        )
        for name, count in PROBES.items()
    }


def gigabytes_per_second(moved: float, ms: float) -> float:
    """10^9 bytes in a second."""
    return moved / (ms * 1e6)


def make_rows(
    workload: Workload,
    shapes: Sequence[Shape],
    variants: Iterable[Variant],
    series: Mapping[str, Series],
    bandwidth: Mapping[str, float],
) -> list[Row]:
    """One row for each variant that was timed to the end."""
    return [
        {
            "workload": workload.name,
            "workload_label": workload.label,
            "variant": variant.name,
            "label": variant.label,
            "ours": variant.ours,
            "tensors": len(shapes),
            "elements": sum(map(math.prod, shapes)),
            "dtype": str(variant.dtype).removeprefix("torch."),
            **_times(variant, series),
            **_traffic(variant, shapes, series[variant.name], bandwidth),
        }
        for variant in variants
        if series[variant.name].failure is None
    ]


def milliseconds(value: float) -> str:
    """Three digits, never an exponent for what takes seconds."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _times(variant: Variant, series: Mapping[str, Series]) -> Row:
    own = [s.ms for s in series[variant.name].samples]
    low, median, high = quartiles(own)
    peer = series.get(variant.peer)
    row: Row = {
        "median_ms": median,
        "quartiles_ms": [low, high],
        "host_median_ms": quartiles([s.host_ms for s in series[variant.name].samples])[1],
        "rounds": len(own),
        "peer": variant.peer,
        "ratio": None,
        "ratio_quartiles": None,
    }
    if peer is not None and peer.failure is None:
        low, median, high = quartiles(ratios(own, [s.ms for s in peer.samples]))
        row |= {"ratio": median, "ratio_quartiles": [low, high]}
    return row


def _traffic(
    variant: Variant, shapes: Sequence[Shape], series: Series, bandwidth: Mapping[str, float]
) -> Row:
    elements = sum(map(math.prod, shapes))
    per_element = mean_bytes(variant.bytes_per_element, shapes)
    median = quartiles([s.ms for s in series.samples])[1]
    achieved = gigabytes_per_second(per_element * elements, median)
    return {
        "bytes_per_element": round(per_element, 3),
        "cached_bytes_per_element": variant.cached_bytes_per_element,
        "gb_per_s": achieved,
        **{f"share_of_{name}": achieved / peak for name, peak in bandwidth.items()},
        "state_bytes_per_element": series.state_bytes / elements or None,
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """One JSON document, its folder made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


def keep(
    suite: str,
    found: Mapping[str, Any],
    device: torch.device = CPU,
    folder: Path | None = None,
) -> None:
    """Write what a suite has found, stamped, under its name and commit.

    Args:
        suite: its name.
        found: what stands beside the stamp.
        device: what it was found on.
        folder: of results; None for that of the machine.
    """
    report = {**stamp(suite, device), **found}
    dirty = "-dirty" if report["dirty"] else ""
    path = (folder or results_folder(device)) / f"{suite}-{report['commit']}{dirty}.json"
    write_json(path, report)


def print_rows(
    console: Console, title: str, rows: Sequence[Row], bandwidth: Mapping[str, float], *, host: bool
) -> None:
    """A table of one workload's rows; ``host`` adds the time that ``step()`` took to return."""
    probed = ", ".join(f"{name} {rate:.1f} GB/s" for name, rate in bandwidth.items())
    table = Table(title=f"{title}\nmeasured bandwidth: {probed}", title_justify="left")
    table.add_column("variant", no_wrap=True)
    headings = [
        "median ms",
        "quartiles",
        "ratio",
        "to peer",
        "B/elem",
        "GB/s",
        "of copy",
        "of update",
    ]
    for heading in [*headings, *(["host µs"] if host else [])]:
        table.add_column(heading, justify="left" if heading == "to peer" else "right")
    for row in rows:
        low, high = row["quartiles_ms"]
        cells = [
            row["label"],
            milliseconds(row["median_ms"]),
            f"{milliseconds(low)}-{milliseconds(high)}",
            "" if row["ratio"] is None else f"{row['ratio']:.2f}",
            "" if row["ratio"] is None else row["peer"],
            f"{row['bytes_per_element']:.0f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['share_of_copy']:.0%}",
            f"{row['share_of_update']:.0%}",
            *([f"{row['host_median_ms'] * 1e3:.0f}"] if host else []),
        ]
        table.add_row(*cells, style="bold" if row["ours"] else None)
    console.print(table)


def print_notes(console: Console, heading: str, notes: Sequence[Row]) -> None:
    """What was not timed, or refused, and why; a line for each variant and reason."""
    workloads: dict[tuple[str, str], list[str]] = {}
    for note in notes:
        workloads.setdefault((note["variant"], note["reason"]), []).append(note["workload"])
    for (variant, reason), names in workloads.items():
        console.print(
            f"{variant}: {heading} ({', '.join(names)}): {reason}", markup=False, highlight=False
        )
