# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The training runs behind a table: each is a process of train_net.py with its own OUTPUT_DIR."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dcn_plugin.messages import UserError

from .paper import Cell

ROOT = Path(__file__).resolve().parents[2]
RESULTS, METRICS, WEIGHTS = "results.json", "metrics.json", "model_final.pth"
OUTPUT, OPTIONS = "stdout.txt", "options.txt"
POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Run:
    """One config with one seed; `args` is the command line of run_table.py."""

    args: argparse.Namespace
    cell: Cell
    seed: int

    @property
    def folder(self) -> Path:
        """Returns the OUTPUT_DIR."""
        return self.args.output / self.cell.config / f"seed_{self.seed}"

    @property
    def name(self) -> str:
        """Returns the name for messages."""
        return f"{self.cell.config}, seed {self.seed}"

    def results(self) -> dict[str, Any] | None:
        """Returns the results of a finished run."""
        path = self.folder / RESULTS
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise UserError(
                f"{path} must be in JSON, got {error}: remove it, and the run is repeated"
            ) from error

    def evaluated_weights(self) -> Path | None:
        """Returns the weights to evaluate; None if the run trains."""
        if self.args.weights is not None:
            return self.args.weights / f"{self.cell.trained_by or self.cell.config}.pth"
        trained_by = self.cell.trained_by or (self.cell.config if self.args.eval_only else "")
        if not trained_by:
            return None
        return self.args.output / trained_by / f"seed_{self.seed}" / WEIGHTS

    def command(self) -> list[str]:
        """Returns the command line; training resumes where it was interrupted."""
        weights = self.evaluated_weights()
        config = ROOT / "configs" / f"{self.cell.config}.yaml"
        words = [sys.executable, str(ROOT / "train_net.py"), "--config-file", str(config)]
        words += ["--num-gpus", str(self.args.num_gpus)]
        if weights is not None:
            words += ["--eval-only"]
        elif not self.args.again:
            words += ["--resume"]
        words += [*self.args.opts, "OUTPUT_DIR", str(self.folder), "SEED", str(self.seed)]
        return words if weights is None else [*words, "MODEL.WEIGHTS", str(weights)]

    def execute(self, report_progress: Callable[[str], None]) -> str | None:
        """Runs train_net.py to its end.

        Args:
            report_progress: Is called with the progress as text.

        Returns:
            None, or the error in one line.
        """
        weights = self.evaluated_weights()
        if weights is not None and not weights.is_file():
            return f"there are no weights {weights}"
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / OUTPUT).open("a") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return "another process runs it"
            (self.folder / RESULTS).unlink(missing_ok=True)
            if self.args.again and weights is None:  # else new rows would be appended
                (self.folder / METRICS).unlink(missing_ok=True)
            (self.folder / OPTIONS).write_text(shlex.join(self.args.opts))
            return watch(
                self.command(),
                self.folder,
                output,
                lambda text: report_progress(f"{self.name}: {text}"),
            )

    def check_options(self) -> None:
        """Raises ValueError if the folder has results with other keys of the config."""
        path = self.folder / OPTIONS
        options = path.read_text() if path.is_file() else None
        if options not in (None, shlex.join(self.args.opts)):
            raise UserError(
                f"{self.folder} was run with {options or 'no keys'} at the end of the command: "
                "give the same, another --output, or --again"
            )


@contextlib.contextmanager
def started(command: Sequence[str], output: IO[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Starts a process, which is terminated if the block raises.

    A SIGTERM that arrives while Popen runs is handled after it: a handler that raises there would
    leave a process that nobody can terminate.
    """
    received = []
    handler = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
            try:
                signal.signal(signal.SIGTERM, handler)
                for number in received:
                    signal.raise_signal(number)
                yield process
            except BaseException:
                process.terminate()
                raise
    finally:
        signal.signal(signal.SIGTERM, handler)  # Popen failed


def watch(
    command: Sequence[str], folder: Path, output: IO[str], report_progress: Callable[[str], None]
) -> str | None:
    """Runs a command of train_net.py to its end.

    Args:
        command: The command line.
        folder: Its OUTPUT_DIR.
        output: A file in this folder for what it prints.
        report_progress: Is called with the progress as text.

    Returns:
        None, or the error in one line.
    """
    with started(command, output) as process:
        while process.poll() is None:
            report_progress(progress(folder))
            time.sleep(POLL_SECONDS)
    if process.returncode:
        return f"exit {process.returncode}: {last_line(Path(output.name))}"
    return None if (folder / RESULTS).is_file() else f"it wrote no {RESULTS}"


def plan_runs(args: argparse.Namespace, cells: Sequence[Cell]) -> list[Run]:
    """Returns the runs of all cells, each once; training comes before evaluation of its weights."""
    unique = {cell.config: cell for cell in cells}.values()
    ordered = sorted(unique, key=lambda cell: bool(cell.trained_by))
    return [Run(args, cell, seed) for seed in range(1, args.seeds + 1) for cell in ordered]


def metrics_backwards(folder: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a run's metrics.json, the last first.

    Skips a line that is still being written, and one that an interruption truncated.
    """
    path = folder / METRICS
    text = path.read_text(errors="replace") if path.is_file() else ""
    for line in reversed(text.rpartition("\n")[0].splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


def progress(folder: Path) -> str:
    """Describes the progress of a run from its metrics."""
    last = next(metrics_backwards(folder), None)
    if last is None:
        return "starting"
    text = f"iteration {last.get('iteration', 0)}"
    if "eta_seconds" in last:
        minutes = round(last["eta_seconds"] / 60)
        text += f", {minutes // 60} h {minutes % 60:02d} min left"
    return text


def last_line(path: Path) -> str:
    """Returns the last non-empty line of a file."""
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
