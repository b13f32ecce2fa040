"""Whether a GPT learns alike with its optimizer's numbers in few bits.

``python -m benchmarks.precision``: the GPT of ``lhopt demo`` under AdamW, with the same batches in
each way to keep parameters and state, from several seeds. A way is within the noise of seeds where
its mean held-out loss is as near to that of float32 as two seeds of float32 are to one another,
which is said of every point where losses are taken, and of the end. ``bf16`` alone, without any
master, shows what is lost there.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.table import Table

import lhopt_fused
from benchmarks import report
from lhopt_fused.demo.model import GPT, GPTConfig
from lhopt_fused.demo.text import Text, read_topics
from lhopt_fused.schedules import SCHEDULES

WAYS: Final[dict[str, tuple[torch.dtype, dict[str, Any]]]] = {
    "float32": (torch.float32, {}),
    "bf16, fp32 master": (torch.bfloat16, {"master_weights": True}),
    "bf16, split16, bf16 moments": (
        torch.bfloat16,
        {"master_weights": "split16", "moments": "bfloat16"},
    ),
    "bf16, split8, int8 moments": (
        torch.bfloat16,
        {"master_weights": "split8", "moments": "int8"},
    ),
    "bf16": (torch.bfloat16, {}),
}
"""Dtype of the parameters, and how the optimizer keeps its numbers; the first is the measure."""
BATCH: Final = 16
POINTS: Final = 20
EVAL_WINDOWS: Final = 64
WARMUP: Final = 0.1  # share of the steps


def curve(way: str, seed: int, steps: int, model: GPTConfig, text: Text, lr: float) -> list[float]:
    """Held-out losses in nats per byte, at ``POINTS`` evenly spaced steps or fewer."""
    dtype, keywords = WAYS[way]
    network = GPT(model, seed).to(dtype)
    optimizer = lhopt_fused.AdamW(network.parameters(), lr, inner_feature_frequency=0, **keywords)
    generator = torch.Generator().manual_seed(seed)
    windows = text.eval_windows(model.context, EVAL_WINDOWS)
    every = max(1, steps // POINTS)
    losses = []
    for step in range(steps):
        progress = step / steps
        factor = min(1.0, (progress + 1 / steps) / WARMUP) * SCHEDULES["cosine"](progress)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.zero_grad()
        network.loss(text.batch(BATCH, model.context, generator)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % every == 0:
            with torch.no_grad():
                judged = copy.deepcopy(network).float()  # bfloat16 would round the loss to 1 / 128
                losses.append(float(judged.loss(windows)))
    return losses


def rows_of(curves: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """By way: its curves, and how far its mean is from float32's beside the spread of seeds.

    Args:
        curves: by way, the losses ``[seeds][points]``.
    """
    measure = curves[next(iter(WAYS))]
    spreads = [max(of_seeds) - min(of_seeds) for of_seeds in zip(*measure, strict=True)]
    centre = [statistics.fmean(of_seeds) for of_seeds in zip(*measure, strict=True)]
    rows = []
    for way, found in curves.items():
        means = [statistics.fmean(of_seeds) for of_seeds in zip(*found, strict=True)]
        distances = [abs(mean - of_float32) for mean, of_float32 in zip(means, centre, strict=True)]
        within = [d <= spread for d, spread in zip(distances, spreads, strict=True)]
        rows.append(
            {
                "way": way,
                "losses": found,
                "final_loss": means[-1],
                "final_distance": distances[-1],
                "final_spread_of_seeds": spreads[-1],
                "share_of_points_within_spread": statistics.fmean(within),
                "largest_distance": max(distances),
            }
        )
    return rows


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in ("way", "final loss", "from float32", "spread of seeds", "points within"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['final_loss']:.4f}",
            f"{row['final_distance']:.4f}",
            f"{row['final_spread_of_seeds']:.4f}",
            f"{row['share_of_points_within_spread']:.0%}",
        )
    return table


def main(
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run.")] = 2000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way.")] = 3,
    lr: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 3e-3,
    width: Annotated[int, typer.Option(help="Of the GPT.")] = 128,
    layers: Annotated[int, typer.Option(help="Of the GPT.")] = 4,
    context: Annotated[int, typer.Option(help="Bytes that it sees.")] = 128,
    out: Annotated[Path | None, typer.Option(help="Folder of the results.")] = None,
) -> None:
    """Train the same GPT with float32 and with fewer bits, and say how far losses are apart."""
    model = GPTConfig(context=context, width=width, layers=layers)
    text = Text.split(read_topics(), 0.1, context)
    curves: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for seed in range(seeds):
        for way, found in curves.items():
            found.append(curve(way, seed, steps, model, text, lr))
            Console().print(f"seed {seed}, {way}: {found[-1][-1]:.4f}")
    rows = rows_of(curves)
    Console().print(table_of(rows, f"{steps} steps of a GPT, {seeds} seeds, nats per byte"))
    settings = {"steps": steps, "seeds": seeds, "lr": lr, "model": vars(model), "batch": BATCH}
    report.keep("precision", {"schema": 1, **settings, "rows": rows}, folder=out)


if __name__ == "__main__":
    typer.run(main)
