#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Plots metrics over the iterations of training runs: the mean over seeds, and their range.

    python tools/learning_curves.py --runs output/evidence/Shapes/ca_rpn_slim_plain \\
        --runs output/evidence/Shapes/ca_rpn_slim_dconv3 --metric bbox/AP50 --output curves.png

Each --runs is a folder written by tools/run_table.py, with seed_1, seed_2, ...; each --metric, read
from the metrics.json of each seed, gets a plot of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from table.runs import METRICS, metrics_backwards

from dcn_plugin.files import atomic_write
from dcn_plugin.messages import UserError, exit_on_error

Curve = dict[int, float]  # values by iteration


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--runs",
        type=Path,
        action="append",
        required=True,
        metavar="FOLDER",
        help="the seeds of a config",
    )
    add("--metric", action="append", required=True, help="name in metrics.json")
    add("--output", type=Path, required=True, help="PNG file")
    return parser.parse_args(words)


def read_curves(folder: Path, metric: str) -> list[Curve]:
    """Reads a metric of each seed; ValueError if no seed has it, or no iteration is common."""
    curves, known = [], set()
    for path in sorted(folder.glob(f"seed_*/{METRICS}")):
        rows = list(metrics_backwards(path.parent))[::-1]
        try:
            curve = {row["iteration"] + 1: float(row[metric]) for row in rows if metric in row}
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} must have rows with numbers as iteration and {metric}: {error!r}"
            ) from error
        known |= {name for row in rows for name in row}
        if curve:
            curves.append(curve)
    if not known:
        raise UserError(f"--runs must be a folder with seed_*/{METRICS}, got {folder}")
    if not curves:
        has = ", ".join(sorted(known))
        raise UserError(f"--metric must be one of {folder}, got {metric}; it has {has}")
    if not set.intersection(*map(set, curves)):
        raise UserError(f"the seeds of {folder} have {metric} at no common iteration")
    return curves


def plot(axis: Axes, label: str, curves: list[Curve]) -> None:
    """Plots mean and range of the curves at their common iterations."""
    iterations = sorted(set.intersection(*map(set, curves)))
    values = np.array([[curve[iteration] for iteration in iterations] for curve in curves])
    if len(curves) > 1:
        label += f" ({len(curves)} seeds)"
    (line,) = axis.plot(iterations, values.mean(axis=0), marker=".", label=label)
    axis.fill_between(
        iterations, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15
    )


@exit_on_error("learning_curves")
def main(words: list[str] | None = None) -> None:
    """Plots the curves."""
    args = parse_arguments(words)
    columns = len(args.metric)
    figure = Figure(figsize=(5.5 * columns, 4), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    names = [folder.name for folder in args.runs]
    for axis, metric in zip(axes[0], args.metric, strict=True):
        for folder in args.runs:
            label = folder.name if names.count(folder.name) == 1 else str(folder)
            plot(axis, label, read_curves(folder, metric))
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
