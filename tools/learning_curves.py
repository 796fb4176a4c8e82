#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Draws a figure over the iterations of trainings, means over seeds with their spread.

    python tools/learning_curves.py --runs output/evidence/Shapes/ca_rpn_slim_plain \
        --runs output/evidence/Shapes/ca_rpn_slim_dconv3 --metric bbox/AP50 --output curves.png

Each --runs is a folder that tools/run_table.py left, with seed_1, seed_2, ...; several --metric are
drawn side by side, from the metrics.json of each seed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table.runs import METRICS, metrics_backwards

from dcn_plugin.files import atomic_write

Curve = dict[int, float]  # values by iteration


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, action="append", required=True, metavar="FOLDER", help="of a config")
    add("--metric", action="append", required=True, help="of metrics.json, such as bbox/AP50")
    add("--output", type=Path, required=True, help="PNG to write")
    return parser.parse_args(words)


def read_curves(folder: Path, metric: str) -> list[Curve]:
    """Reads a metric of each seed.

    Args:
        folder: of a config.
        metric: its name.

    Raises:
        ValueError: if there are no such numbers.
    """
    curves, known = [], set()
    for path in sorted(folder.glob(f"seed_*/{METRICS}")):
        rows = list(metrics_backwards(path.parent))[::-1]
        curve = {row["iteration"] + 1: row[metric] for row in rows if metric in row}
        known |= {name for row in rows for name in row}
        if curve:
            curves.append(curve)
    if not curves:
        said = f"it has {', '.join(sorted(known))}" if known else "it has no seed_*/metrics.json"
        raise ValueError(f"--metric must be one of {folder}, got {metric}; {said}")
    if not set.intersection(*(set(curve) for curve in curves)):
        raise ValueError(f"the seeds of {folder} have {metric} at no common iteration")
    return curves


def draw(axis: Axes, name: str, curves: list[Curve]) -> None:
    """Draws the mean of curves where all have a value, and the range that they span."""
    iterations = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[iteration] for iteration in iterations] for curve in curves])
    label = name if len(curves) == 1 else f"{name} ({len(curves)} seeds)"
    (line,) = axis.plot(iterations, values.mean(axis=0), marker=".", label=label)
    axis.fill_between(
        iterations, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15
    )


def main(words: list[str] | None = None) -> None:
    """Draws the curves."""
    args = parse_arguments(words)
    try:
        curves = {
            (metric, folder): read_curves(folder, metric)
            for metric in args.metric
            for folder in args.runs
        }
    except ValueError as error:
        sys.exit(f"learning_curves: {error}")
    columns = len(args.metric)
    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    for axis, metric in zip(axes[0], args.metric, strict=True):
        for folder in args.runs:
            twins = sum(other.name == folder.name for other in args.runs)
            draw(axis, folder.name if twins == 1 else str(folder), curves[metric, folder])
        axis.set_xlabel("iterations")
        axis.set_title(metric)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    print(f"{args.output}: {', '.join(args.metric)} of {len(args.runs)} configs")


if __name__ == "__main__":
    main()
