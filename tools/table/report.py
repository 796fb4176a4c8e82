# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Tables of the paper's results beside ours, in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .paper import Cell

# Metrics of configs that are not in the paper; those that were evaluated are shown.
DEFAULT_METRICS = (
    *("bbox/AP", "bbox/AP50", "bbox/AP70", "bbox_TTA/AP50", "bbox_TTA/AP70"),
    "sem_seg/mIoU",
)


@dataclass(frozen=True)
class Entry:
    """One number of a table: ours over all seeds, beside the paper's and the release's."""

    cell: Cell
    metric: str
    paper: float | None
    released: float | None
    ours: tuple[float, ...]
    state: str  # "run", or why there is no number

    @property
    def mean(self) -> float | None:
        """Returns the mean over the seeds."""
        return statistics.fmean(self.ours) if self.ours else None

    @property
    def spread(self) -> float | None:
        """Returns the standard deviation over the seeds."""
        return statistics.stdev(self.ours) if len(self.ours) > 1 else None

    def __str__(self) -> str:
        """Formats our number."""
        if self.mean is None:
            return self.state
        return f"{self.mean:.1f}" + ("" if self.spread is None else f" ± {self.spread:.1f}")


def collect(
    cells: Sequence[Cell],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    failed: Mapping[str, str],
) -> list[Entry]:
    """Combines the paper's results and ours.

    Args:
        cells: The cells of the table.
        results: The results of each finished seed, by config.
        failed: The errors, by config.

    Returns:
        The entries in the order of the cells.
    """
    entries = []
    for cell in cells:
        runs = [flatten(result) for result in results.get(cell.config, ())]
        present = [m for m in DEFAULT_METRICS if any(m in run for run in runs)]
        if cell.config in failed:
            missing = f"failed: {failed[cell.config]}"
        else:
            missing = "no metrics" if runs else "not run"
        for number, metric in enumerate(cell.metrics or present or DEFAULT_METRICS[:1]):
            ours = tuple(run[metric] for run in runs if metric in run)
            paper = cell.paper[number] if cell.paper else None
            released = cell.released[number] if cell.released else None
            state = "run" if ours else missing
            entries.append(Entry(cell, metric, paper, released, ours, state))
    return entries


def flatten(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns the metrics of one data set by "task/metric"."""
    return {
        f"{task}/{metric}": math.nan if value is None else float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if not isinstance(value, Mapping)
    }


def markdown(entries: Sequence[Entry]) -> str:
    """Returns a table with one line per cell."""
    lines = ["| model | | metrics | paper | authors' release | ours |", "|---|---|---|---|---|---|"]
    for cell in dict.fromkeys(entry.cell for entry in entries):
        mine = [entry for entry in entries if entry.cell == cell]
        columns = (
            [entry.metric.partition("/")[2] for entry in mine],
            [f"{entry.paper:.1f}" for entry in mine if entry.paper is not None],
            [f"{entry.released:.1f}" for entry in mine if entry.released is not None],
            [str(entry) for entry in mine] if any(e.ours for e in mine) else [mine[0].state],
        )
        text = " | ".join(" / ".join(column) for column in columns)
        lines.append(f"| {cell.column} | {cell.row} | {text} |")
    return "\n".join(lines) + "\n"


def comma_separated(entries: Sequence[Entry]) -> str:
    """Returns a table with one line per metric, with mean and spread over the seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["network", "row", "config", "metric"]
    writer.writerow([*names, "paper", "released", "ours", "spread", "seeds", "state"])
    for entry in entries:
        cell, numbers = entry.cell, (entry.paper, entry.released, entry.mean, entry.spread)
        texts = ["" if number is None else f"{number:.4g}" for number in numbers]
        names = [cell.column, cell.row, cell.config, entry.metric]
        writer.writerow([*names, *texts, len(entry.ours), entry.state])
    return text.getvalue()
