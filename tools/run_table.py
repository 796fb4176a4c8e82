#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Runs the configs of one of the paper's tables, and writes the table with our results beside it.

    python tools/run_table.py --table 1 --output output/paper --num-gpus 8
    python tools/run_table.py --table 3 --output output/paper --only '*rfcn*' --seeds 3
    python tools/run_table.py --configs 'configs/Shapes/*_plain.yaml' --output output/shapes
    python tools/run_table.py --table 1 --output output/paper --report

The configs run one after the other, each with OUTPUT_DIR OUTPUT/<config>/seed_<n>. table_<n>.md and
.csv in OUTPUT are updated after each. If called again, finished runs are kept, interrupted training
is resumed and failed runs are repeated; --again starts from scratch. --eval-only evaluates the
weights in these folders, --weights FOLDER those in FOLDER/<config>.pth. Keys of the config can be
set at the end of the command line.
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
from table.runs import ROOT, Run, plan_runs
from tqdm import tqdm

from dcn_plugin.files import output_folder
from dcn_plugin.messages import UserError, exit_on_error

CONFIGS = ROOT / "configs"


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--table", choices=[*TABLES, "5"], help="number in the paper")
    which.add_argument("--configs", metavar="PATTERN", help="files below configs/ (quoted)")
    add = parser.add_argument
    add("--only", metavar="PATTERN", default="*", help="only configs whose name matches (quoted)")
    add("--output", type=output_folder, required=True, help="folder for all runs and the tables")
    add("--seeds", type=int, default=1, help="number of runs per config, with SEED 1, 2, ...")
    add("--num-gpus", type=int, default=1, help="per run")
    add("--eval-only", action="store_true", help="evaluate the weights in the output folders")
    add("--weights", type=Path, metavar="FOLDER", help="evaluate FOLDER/<config>.pth")
    add("--again", action="store_true", help="repeat finished runs from scratch")
    add("--report", action="store_true", help="only write the tables of the finished runs")
    add("opts", nargs=argparse.REMAINDER, help="keys and values of the config")
    return parser.parse_args(words)


def choose_cells(args: argparse.Namespace) -> list[Cell]:
    """Returns the cells of the requested table."""
    if args.table:
        cells = cells_of(args.table)
    else:
        paths = [Path(p) for p in sorted(glob(args.configs)) if not Path(p).stem.startswith("Base")]
        outside = [str(path) for path in paths if CONFIGS not in path.resolve().parents]
        if outside:
            raise UserError(f"--configs must be files below {CONFIGS}, got {outside[0]}")
        names = [path.resolve().relative_to(CONFIGS).with_suffix("") for path in paths]
        cells = [Cell(name.name, str(name.parent), str(name), ()) for name in names]
    chosen = [cell for cell in cells if fnmatch(cell.config, args.only)]
    if not chosen:
        requested = args.configs or f"table {args.table}"
        raise UserError(f"no config in {requested} matches --only {args.only!r}")
    return chosen


def write_tables(
    path: Path, cells: Sequence[Cell], runs: Sequence[Run], failed: dict[str, str]
) -> str:
    """Writes the results of all finished runs; returns the table in Markdown."""
    results: dict[str, list] = {}
    for run in runs:
        finished = run.results()
        if finished is not None:
            results.setdefault(run.cell.config, []).append(finished)
    entries = report.collect(cells, results, failed)
    text = report.markdown(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text(text)
    path.with_suffix(".csv").write_text(report.comma_separated(entries))
    return text


@exit_on_error("run_table")
def main(words: list[str] | None = None) -> None:
    """Runs the configs and writes the tables; exits with 1 if a run failed."""
    args = parse_arguments(words)
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    cells = choose_cells(args)
    runs = plan_runs(args, cells)
    if not (args.report or args.again):
        for run in runs:
            run.check_options()
    path = args.output / (f"table_{args.table}" if args.table else "table")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("run_table: terminated; run again to resume"))
    pending = [] if args.report else [r for r in runs if args.again or r.results() is None]
    failed: dict[str, str] = {}
    failures = 0
    try:
        for run in (bar := tqdm(pending, unit="run")):
            error = run.execute(bar.set_description_str)
            if error is not None:
                failures += 1
                failed[run.cell.config] = error
                tqdm.write(f"{run.name} failed: {error}", file=sys.stderr)
            write_tables(path, cells, runs, failed)
    except KeyboardInterrupt:
        sys.exit("run_table: interrupted; run again to resume")
    print(write_tables(path, cells, runs, failed))
    print(f"{path}.md and .csv; {failures} of {len(runs)} runs failed")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
