# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A table of the paper with our figures beside it, in Markdown and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .paper import Cell

NOT_RUN, NO_FIGURES = "not run", "no figures"
# Of configs that are not in the paper, as far as they are found.
USUAL = ("bbox/AP", "bbox/AP50", "bbox/AP70", "bbox_TTA/AP50", "bbox_TTA/AP70", "sem_seg/mIoU")


@dataclass(frozen=True)
class Figure:
    """One number of a table, ours over all seeds."""

    cell: Cell
    metric: str
    paper: float | None
    released: float | None
    ours: tuple[float, ...]
    state: str  # empty where there are figures

    def said(self) -> str:
        """Returns our figure as it stands in a table."""
        if self.state:
            return self.state
        mean = f"{statistics.fmean(self.ours):.1f}"
        return f"{mean} ± {statistics.stdev(self.ours):.1f}" if len(self.ours) > 1 else mean


def collect(
    cells: Sequence[Cell],
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    failed: Mapping[str, str],
) -> list[Figure]:
    """Puts the paper's figures and ours together.

    Args:
        cells: of the table.
        results: by config, of each seed that is done.
        failed: by config, what went wrong.

    Returns:
        the figures in the order of the cells.
    """
    figures = []
    for cell in cells:
        found = [flat(result) for result in results.get(cell.config, ())]
        state = f"failed: {failed[cell.config]}" if cell.config in failed else NOT_RUN
        metrics = cell.metrics or [m for m in USUAL if any(m in f for f in found)] or USUAL[:1]
        for number, metric in enumerate(metrics):
            ours = tuple(f[metric] for f in found if metric in f)
            figures.append(
                Figure(
                    cell,
                    metric,
                    cell.paper[number] if cell.paper else None,
                    cell.released[number] if cell.released else None,
                    ours,
                    "" if ours else NO_FIGURES if found else state,
                )
            )
    return figures


def flat(results: Mapping[str, Any]) -> dict[str, float]:
    """Returns numbers by "task/metric", of one data set."""
    return {
        f"{task}/{metric}": float(value)
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if not isinstance(value, Mapping)
    }


def markdown(figures: Sequence[Figure]) -> str:
    """Returns one line for each cell: its figures side by side."""
    lines = [
        "| network | | figures | paper | authors' release | ours |",
        "|---|---|---|---|---|---|",
    ]
    for cell in dict.fromkeys(figure.cell for figure in figures):
        mine = [figure for figure in figures if figure.cell == cell]
        names = " / ".join(figure.metric.partition("/")[2] for figure in mine)
        states = {figure.state for figure in mine}
        ours = states.pop() if len(states) == 1 and mine[0].state else slashed(mine)
        paper = numbers([figure.paper for figure in mine])
        released = numbers([figure.released for figure in mine])
        lines.append(f"| {cell.column} | {cell.row} | {names} | {paper} | {released} | {ours} |")
    return "\n".join(lines) + "\n"


def slashed(figures: Sequence[Figure]) -> str:
    """Returns our figures side by side."""
    return " / ".join(figure.said() for figure in figures)


def numbers(values: Sequence[float | None]) -> str:
    """Returns numbers side by side, nothing where there are none."""
    return " / ".join(f"{value:.1f}" for value in values if value is not None)


def comma_separated(figures: Sequence[Figure]) -> str:
    """Returns one line for each figure, with the mean and spread over the seeds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    heads = "network row config metric paper released ours spread seeds state"
    writer.writerow(heads.split())
    for figure in figures:
        mean = statistics.fmean(figure.ours) if figure.ours else None
        spread = statistics.stdev(figure.ours) if len(figure.ours) > 1 else None
        cell, known = figure.cell, (figure.paper, figure.released, mean, spread)
        texts = ["" if value is None else f"{value:.4g}" for value in known]
        row = [cell.column, cell.row, cell.config, figure.metric, *texts, len(figure.ours)]
        writer.writerow([*row, figure.state or "run"])
    return text.getvalue()
