# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The runs behind a table: each is a process of train_net.py with a folder of its own."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from .paper import Cell

ROOT = Path(__file__).resolve().parents[2]
RESULTS, METRICS, WEIGHTS = "results.json", "metrics.json", "model_final.pth"
OUTPUT, OPTIONS = "stdout.txt", "options.txt"
LOOK = 1.0  # seconds between two looks at a run


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    output: Path
    seeds: int = 1
    num_gpus: int = 1
    eval_only: bool = False
    weights: Path | None = None
    options: tuple[str, ...] = ()
    again: bool = False


@dataclass(frozen=True)
class Run:
    """One config with one seed."""

    plan: Plan
    cell: Cell
    seed: int

    @property
    def folder(self) -> Path:
        """Where it leaves everything."""
        return self.plan.output / self.cell.config / f"seed_{self.seed}"

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.cell.config}, seed {self.seed}"

    def results(self) -> dict[str, Any] | None:
        """Returns what it found, if it is done."""
        path = self.folder / RESULTS
        return json.loads(path.read_text()) if path.is_file() else None

    def tested_weights(self) -> Path | None:
        """Returns the weights to test, None where there is a training."""
        if self.plan.weights is not None:
            return self.plan.weights / f"{self.cell.trained_by or self.cell.config}.pth"
        trained_by = self.cell.trained_by or (self.cell.config if self.plan.eval_only else "")
        if not trained_by:
            return None
        return self.plan.output / trained_by / f"seed_{self.seed}" / WEIGHTS

    def command(self) -> list[str]:
        """Returns the command line; a training goes on where it was left."""
        weights = self.tested_weights()
        config = ROOT / "configs" / f"{self.cell.config}.yaml"
        words = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config)]
        words += ["--num-gpus", str(self.plan.num_gpus)]
        if weights is not None:
            words += ["--eval-only"]
        elif not self.plan.again:
            words += ["--resume"]
        words += [*self.plan.options, "OUTPUT_DIR", str(self.folder), "SEED", str(self.seed)]
        return words if weights is None else [*words, "MODEL.WEIGHTS", str(weights)]

    def execute(self, tell: Callable[[str], None]) -> str | None:
        """Runs it to its end.

        Args:
            tell: is called with where it is.

        Returns:
            None, or in one line what went wrong.
        """
        weights = self.tested_weights()
        if weights is not None and not weights.is_file():
            return f"there are no weights {weights}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / OUTPUT).open("a") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "another process runs it"
            (self.folder / RESULTS).unlink(missing_ok=True)
            if self.plan.again and weights is None:  # else it would be added to
                (self.folder / METRICS).unlink(missing_ok=True)
            (self.folder / OPTIONS).write_text(shlex.join(self.plan.options))
            return watch(
                self.command(), self.folder, output, lambda said: tell(f"{self.name}: {said}")
            )

    def other_options(self) -> str | None:
        """Returns the options that what is in the folder was run with, if they are others."""
        path = self.folder / OPTIONS
        found = path.read_text() if path.is_file() else shlex.join(self.plan.options)
        return None if found == shlex.join(self.plan.options) else found


def watch(
    command: Sequence[str], folder: Path, output: IO[str], tell: Callable[[str], None]
) -> str | None:
    """Runs train_net.py to its end.

    Args:
        command: line of it.
        folder: its OUTPUT_DIR.
        output: what it prints, a file of this folder.
        tell: is called with where it is.

    Returns:
        None, or in one line what went wrong.
    """
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            while process.poll() is None:
                tell(progress(folder))
                time.sleep(LOOK)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        return f"exit {process.returncode}: {last_line(Path(output.name))}"
    return None if (folder / RESULTS).is_file() else f"it left no {RESULTS}"


def plan_runs(plan: Plan, cells: Sequence[Cell]) -> list[Run]:
    """Returns the runs that cells need, each once; trainings come before what tests them."""
    unique = {cell.config: cell for cell in cells}.values()
    ordered = sorted(unique, key=lambda cell: bool(cell.trained_by))
    return [Run(plan, cell, seed) for seed in range(1, plan.seeds + 1) for cell in ordered]


def metrics_backwards(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the metrics that a training wrote, the last first.

    A line that is being written is left out, and one that a kill has cut.
    """
    path = folder / METRICS
    text = path.read_text() if path.is_file() else ""
    for line in reversed(text.rpartition("\n")[0].splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def progress(folder: Path) -> str:
    """Says how far a training is, by the metrics that it writes."""
    last = next(metrics_backwards(folder), None)
    if last is None:
        return "starts"
    said = f"iteration {last.get('iteration', 0)}"
    if "eta_seconds" in last:
        minutes = round(last["eta_seconds"] / 60)
        said += f", {minutes // 60} h {minutes % 60:02d} min left"
    return said


def last_line(path: Path) -> str:
    """Returns the last line of a file that says something."""
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")
