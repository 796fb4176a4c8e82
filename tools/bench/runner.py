# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Measures the cases one by one, prints the rows and saves them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict

from dcn_plugin.files import atomic_write

from . import agreement, cases, machine, memory, nets, table
from .cases import ONNX_RUNTIME, ConvCase, Rival, RoiCase, Setting
from .timing import Times, measure

Case = ConvCase | RoiCase | nets.Net


class Runner:
    """A run of the benchmark."""

    def __init__(
        self, options: argparse.Namespace, ask: memory.Ask | None, say: Callable[[str], None]
    ) -> None:
        """Starts without measurements.

        Args:
            options: The command line.
            ask: Measures memory on the CPU; not needed on a GPU.
            say: Prints a line.
        """
        self.options = options
        self.ask = ask
        self.say = say
        self.environment = machine.environment()
        self.peaks: dict[tuple[str, int], machine.Peak] = {}
        self.rows: list[table.Row] = []
        self.problems: list[agreement.Problem] = []

    def begin(self) -> None:
        """Prints the environment and the table header, and measures the GEMM peaks."""
        width = max(map(len, self.environment))
        for name, value in self.environment.items():
            self.say(f"{name:<{width}}  {value}")
        if "conv" in self.options.kinds:
            self.measure_peaks()
        self.say(f"\n{table.LEGEND}\n\n{table.heads()}")
        self.save()

    def measure_peaks(self) -> None:
        """Measures the GEMM peak for each dtype and number of threads."""
        device = self.options.device
        size = machine.QUICK_SIZE if self.options.quick else machine.SIZES[device]
        seconds = min(1.0, self.options.seconds)
        self.say("\nGEMM peak, of large matrices")
        for threads in self.options.threads:
            for dtype in self.options.dtypes:
                peak = machine.gemm_peak(Setting(device, dtype, threads), size, seconds)
                if peak is not None:
                    self.peaks[dtype, threads] = peak
                    self.say(f"  {table.peak_line(peak)}")

    def run(self, case: Case, setting: Setting) -> None:
        """Measures one case in all directions."""
        self.say(f"\n{table.title(case.name, setting)}")
        setting.apply()
        if isinstance(case, nets.Net):
            self.run_net(case, setting)
        else:
            self.run_op(case, setting)

    def run_op(self, case: ConvCase | RoiCase, setting: Setting) -> None:
        """Compares the results of an op's implementations, and measures times and then memory."""
        calls = case.rivals(setting)
        calls = {r: c for r, c in calls.items() if r.name not in self.options.without}
        differences, problems = agreement.compare(calls, case.name, setting)
        for problem in problems:
            self.say(f"  {problem.line}; not timed")
            calls.pop(problem.rival)
        self.problems += problems
        for direction in cases.DIRECTIONS:
            functions = {
                r: c.timed(direction) for r, c in calls.items() if direction in c.directions
            }
            times = measure(functions, setting.device, self.options.seconds)
            workspaces = {}
            for rival in [r for r, measured in times.items() if measured is not None]:
                if setting.device == "cuda":
                    workspaces[rival] = memory.cuda_workspace(calls[rival], direction)
                elif rival.name != ONNX_RUNTIME:  # which keeps its memory from run to run
                    workspaces[rival] = self.ask(case, setting, rival, direction)
            context = table.Context(
                case.kind,
                case.name,
                direction,
                setting,
                case.flop(setting.batch, direction),
                self.peaks.get((setting.dtype, setting.threads)),
                differences=differences,
            )
            self.add(context, times, workspaces)

    def run_net(self, net: nets.Net, setting: Setting) -> None:
        """Measures inference and a training step of a model."""
        for direction in (nets.INFERENCE, nets.TRAINING):
            functions = nets.functions_of(net, setting.device, direction)
            times = measure(functions, setting.device, self.options.seconds, graphs=False)
            # The paper reports the forward pass.
            paper = net.paper_times_plain if direction == nets.INFERENCE else None
            context = table.Context(net.kind, net.name, direction, setting, paper_times_plain=paper)
            self.add(context, times, {})

    def add(
        self,
        context: table.Context,
        times: dict[Rival, Times | None],
        workspaces: dict[Rival, float | None],
    ) -> None:
        """Prints and saves the rows of one direction."""
        rows = table.make_rows(context, times, workspaces, self.rows)
        for row in rows:
            self.say(table.line(row))
        self.rows += rows
        self.save()

    def end(self) -> None:
        """Prints the geometric means over the layers."""
        for line in table.mean_lines(table.geometric_means(self.rows)):
            self.say(line)

    def save(self) -> None:
        """Writes all rows so far, since a long run may be interrupted."""
        path = self.options.json
        if path is None:
            return
        content = {
            "environment": self.environment,
            "options": {k: v for k, v in vars(self.options).items() if k != "json"},
            "gemm_peaks": [asdict(peak) for peak in self.peaks.values()],
            "problems": [problem.line for problem in self.problems],
            "rows": [asdict(row) for row in self.rows],
            "geometric_means": [asdict(mean) for mean in table.geometric_means(self.rows)],
        }
        with atomic_write(path) as new:  # the file is whole whenever the run is ended
            new.write_text(json.dumps(content, indent=1) + "\n")
