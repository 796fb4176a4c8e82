#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Runs the configs of one of the paper's tables, and writes the table with our figures in it.

    python tools/run_table.py --table 1 --output output/paper --num-gpus 8
    python tools/run_table.py --table 3 --output output/paper --only '*rfcn*' --seeds 3
    python tools/run_table.py --configs 'configs/Shapes/*_plain.yaml' --output output/shapes
    python tools/run_table.py --table 1 --output output/paper --report

Rows run one after the other. OUTPUT/<config>/seed_<n> gets what train_net.py leaves, OUTPUT gets
table_<n>.md and .csv after every row. Called again it goes on where it stopped: what is done stays,
a training that was interrupted is resumed, a row that failed is tried again; --again begins anew.
--eval-only tests the weights in these folders, --weights FOLDER those in
FOLDER/<config>.pth. Keys of the config can be set at the end of the line.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from glob import glob
from pathlib import Path

from table import report
from table.paper import TABLES, Cell, cells_of
from table.runs import ROOT, Plan, Run, plan_runs
from tqdm import tqdm

CONFIGS = ROOT / "configs"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", choices=[*TABLES, "5"], help="of the paper")
    which.add_argument("--configs", metavar="PATTERN", help="files below configs/, in quotes")
    add = parser.add_argument
    add("--only", metavar="PATTERN", default="*", help="configs whose name fits, in quotes")
    add("--output", type=Path, required=True, help="folder for all runs and the tables")
    add("--seeds", type=int, default=1, help="runs of each config, with SEED 1, 2, ...")
    add("--num-gpus", type=int, default=1, help="of each run")
    add("--eval-only", action="store_true", help="test the weights in the folders of the runs")
    add("--weights", type=Path, metavar="FOLDER", help="test FOLDER/<config>.pth")
    add("--again", action="store_true", help="run everything from the start, also what is done")
    add("--report", action="store_true", help="run nothing, write the tables of what is there")
    add("opts", nargs=argparse.REMAINDER, help="keys of the config and values")
    return parser.parse_args(words)


def choose_cells(args: argparse.Namespace) -> list[Cell]:
    """Returns the cells of the table that is asked for."""
    if args.table:
        cells = cells_of(args.table)
    else:
        paths = [Path(p) for p in sorted(glob(args.configs)) if not Path(p).stem.startswith("Base")]
        strange = [str(path) for path in paths if CONFIGS not in path.resolve().parents]
        if strange:
            raise ValueError(f"--configs must be files below {CONFIGS}, got {strange[0]}")
        names = [path.resolve().relative_to(CONFIGS).with_suffix("") for path in paths]
        cells = [Cell(name.name, str(name.parent), str(name), ()) for name in names]
    chosen = [cell for cell in cells if fnmatch(cell.config, args.only)]
    if not chosen:
        asked = args.configs or f"table {args.table}"
        raise ValueError(f"there is no config in {asked} that fits --only {args.only!r}")
    return chosen


def plan_of(args: argparse.Namespace) -> Plan:
    """Returns what all runs have in common."""
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {args.seeds}")
    return Plan(
        args.output,
        args.seeds,
        args.num_gpus,
        args.eval_only,
        args.weights,
        tuple(args.opts),
        args.again,
    )


def write_tables(
    title: str, cells: Sequence[Cell], runs: Sequence[Run], failed: dict[Run, str]
) -> str:
    """Writes both tables of what is done; returns the one in Markdown."""
    results: dict[str, list] = {}
    for run in runs:
        found = run.results()
        if found is not None:
            results.setdefault(run.cell.config, []).append(found)
    errors = {run.cell.config: error for run, error in failed.items()}
    figures = report.collect(cells, results, errors)
    text = report.markdown(figures)
    folder = runs[0].plan.output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{title}.md").write_text(text)
    (folder / f"{title}.csv").write_text(report.comma_separated(figures))
    return text


def refuse_other_options(runs: Sequence[Run]) -> None:
    """Checks that what is there was run with the same keys, so that a table is of one kind."""
    for run in runs:
        found = run.other_options()
        if found is not None:
            raise ValueError(
                f"{run.folder} was run with {found or 'no keys'} at the end of the line: give the "
                "same, another --output, or --again"
            )


def execute(title: str, cells: Sequence[Cell], runs: Sequence[Run]) -> dict[Run, str]:
    """Runs what is not done.

    Args:
        title: of the tables, which are written after each run.
        cells: of the table.
        runs: that it needs.

    Returns:
        what went wrong.
    """
    failed: dict[Run, str] = {}
    with tqdm(runs, unit="run") as bar:
        for run in bar:
            if run.plan.again or run.results() is None:
                error = run.execute(bar.set_description_str)
                if error is not None:
                    failed[run] = error
                    tqdm.write(f"{run.name} failed: {error}", file=sys.stderr)
                write_tables(title, cells, runs, failed)
    return failed


def main(words: list[str] | None = None) -> None:
    """Runs the rows and writes the tables; ends with 1 where a row failed."""
    args = parse_arguments(words)
    try:
        cells = choose_cells(args)
        runs = plan_runs(plan_of(args), cells)
        if not (args.report or args.again):
            refuse_other_options(runs)
    except ValueError as error:
        sys.exit(f"run_table: {error}")
    title = f"table_{args.table}" if args.table else "table"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run_table: ended; call it again to go on"))
    try:
        failed = {} if args.report else execute(title, cells, runs)
    except KeyboardInterrupt:
        sys.exit("run_table: interrupted; call it again to go on")
    print(write_tables(title, cells, runs, failed))
    print(f"{args.output / title}.md and .csv; {len(failed)} of {len(runs)} runs failed")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
