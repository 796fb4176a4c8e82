#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Builds, tests, checks and times the CUDA kernels on a machine with a GPU, without a network.

    python tools/gpu_check.py [--wheels DIR] [--output DIR] [--minutes 9]

It uses the Python that runs it, which has PyTorch; Detectron2 is not needed. Every stage prints one
line; report.md, report.json and log.txt in the output folder are written after every stage. Without
a GPU it runs `make emulate` if there is .venv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

import toolchain
from gpu_report import (
    markdown,
    read_benchmark,
    read_build,
    read_emulator,
    read_probe,
    read_sanitizer,
    read_tests,
)

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_check"
SITE, TRITON_CACHE = BUILD / "site", BUILD / "triton"
VENV = ROOT / ".venv"
# Seconds of 9 minutes, in the order of the stages. What a stage leaves is shared by the later ones.
SECONDS = {
    "wheels": 30, "environment": 20, "build": 150, "CUDA tests": 110, "memcheck": 40,
    "racecheck": 20, "initcheck": 40, "deformops": 20, "benchmark conv": 80, "benchmark roi": 30,
}  # fmt: skip
# Tools of compute-sanitizer, and which calls they run: racecheck a few, since it looks at shared
# memory only, and no kernel uses any (tools/cuda_report.py).
SANITIZERS = {"memcheck": "", "racecheck": "wide-torch.float32", "initcheck": ""}
PACKAGES = ("torch", "torchvision", "triton", "deformops", "mmcv", "pytest", "hypothesis", "numpy")
GRACE = 5  # seconds between interrupting and killing a stage
# deformops compiles its kernels for each shape: too many for all shapes.
CONV_MATCH = "res"


@dataclass
class Result:
    """What a stage did. `measured` depends on the stage."""

    name: str
    status: str  # "ok", "FAILED" or "skipped"
    seconds: float = 0.0
    detail: str = ""
    measured: dict[str, Any] = field(default_factory=dict)
    log_end: str = ""

    @property
    def line(self) -> str:
        """Returns the line of the stage."""
        return f"{self.name:<16}{self.seconds:6.1f} s  {self.status:<8} {self.detail}".rstrip()


@dataclass(frozen=True)
class Stage:
    """The commands of a stage, all of which run, and how their output is read.

    `read` returns the line's detail and what was measured; it may get the start of an output only.
    "missing" among what was measured: the output has no result, so the stage failed.
    """

    name: str
    commands: list[list[str]]
    read: Callable[[str], tuple[str, dict[str, Any]]]
    variables: dict[str, str] = field(default_factory=dict)


class Check:
    """A run: its deadline, its output folder and the results so far."""

    def __init__(self, output: Path, minutes: float) -> None:
        """Starts the clock and an empty log."""
        self.output = output
        self.deadline = time.monotonic() + 60 * minutes
        self.planned = list(SECONDS)
        self.results: dict[str, Result] = {}
        output.mkdir(parents=True, exist_ok=True)
        self.log = output / "log.txt"
        self.log.write_text("")

    def ok(self, name: str) -> bool:
        """Returns whether a stage succeeded."""
        return name in self.results and self.results[name].status == "ok"

    def measured(self, name: str) -> dict[str, Any]:
        """Returns what a stage measured."""
        return self.results[name].measured

    def limit(self, name: str) -> float:
        """Returns the seconds a stage may take: its share of the time that is left."""
        later = self.planned[self.planned.index(name) :]
        share = SECONDS[name] / sum(SECONDS[other] for other in later)
        return max(0.0, self.deadline - GRACE - time.monotonic()) * share

    def skip(self, name: str, reason: str) -> None:
        """Records that a stage does not run."""
        self.add(Result(name, "skipped", detail=reason))

    def run(self, stage: Stage) -> None:
        """Runs a stage and records what it measured, also if it fails or runs out of time."""
        start, limit = time.monotonic(), self.limit(stage.name)
        before, codes = self.log.stat().st_size, []
        for command in stage.commands:
            left = start + limit - time.monotonic()
            codes.append(run_command(command, self.log, left, stage.variables))
        lines = self.log.read_bytes()[before:].decode(errors="replace").splitlines()
        text = "\n".join(line for line in lines if line and not line.startswith("$ "))
        try:
            detail, measured = stage.read(text)
        except Exception as error:  # an output of a form that we do not know
            detail, measured = f"output not understood: {error!r}", {"missing": True}
        problems = [f"exit status {code}" for code in codes if code][:1]
        if None in codes:
            problems = [f"out of time after {limit:.0f} s"]
        status = "FAILED" if measured.pop("missing", False) or problems else "ok"
        if "skip" in measured:
            status, problems = "skipped", []
        end = "\n".join(text.splitlines()[-30:]) if status == "FAILED" else ""
        detail = "; ".join([*problems, detail] if detail else problems)
        seconds = time.monotonic() - start
        self.add(Result(stage.name, status, round(seconds, 1), detail, measured, end))

    def add(self, result: Result) -> None:
        """Prints a result, and writes the reports so far."""
        self.results[result.name] = result
        print(result.line, flush=True)
        missing = [name for name in SECONDS if name not in self.results]
        results = [asdict(result) for result in self.results.values()]
        report = {"ok": not self.failed and not missing, "not_run": missing, "stages": results}
        (self.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        (self.output / "report.md").write_text(markdown(report))

    @property
    def failed(self) -> list[str]:
        """Returns the names of the stages that failed."""
        return [result.name for result in self.results.values() if result.status == "FAILED"]


def start_command(command: list[str], log: Path, variables: dict[str, str]) -> subprocess.Popen:
    """Starts a command in a process group of its own; its output is appended to the log."""
    paths = [str(SITE), str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
    shared = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(TRITON_CACHE),
    }
    with log.open("a") as file:
        print(f"\n$ {' '.join(command)}", file=file, flush=True)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **shared, **variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell that started this script in the background had it ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def run_command(
    command: list[str], log: Path, seconds: float, variables: dict[str, str]
) -> int | None:
    """Runs a command; returns its exit status, or None if it ran out of time."""
    process = start_command(command, log, variables)
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return None
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a command and its children: first with SIGINT, so that pytest prints what it has."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def probe() -> str:
    """Returns what the machine has, as JSON. Runs in a process of its own: drivers may hang."""
    import torch

    toolkit, gpu = toolchain.find_toolkit(), torch.cuda.is_available()
    query = "--query-gpu=name,driver_version,memory.total,memory.free,power.limit,clocks.max.sm"
    candidates = [shutil.which("compute-sanitizer")]
    if toolkit:
        candidates += [str(toolkit.home / "bin" / "compute-sanitizer")]
        candidates += [str(toolkit.home / "compute-sanitizer" / "compute-sanitizer")]
    packages = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    found = {
        "gpu": torch.cuda.get_device_name(0) if gpu else None,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)) if gpu else None,
        "python": sys.version.split()[0],
        "PyTorch's CUDA": torch.version.cuda,
        "nvcc": toolkit.version if toolkit else None,
        "compute-sanitizer": next((c for c in candidates if c and os.access(c, os.X_OK)), None),
        "xdist": util.find_spec("xdist") is not None,
        "nvidia-smi": toolchain.command_output("nvidia-smi", query, "--format=csv").strip(),
        **packages,
    }
    return json.dumps(found)


def run_wheels(check: Check, wheels: Path | None) -> None:
    """Installs each wheel into a folder of our own: one that does not fit leaves the others."""
    shutil.rmtree(SITE, ignore_errors=True)
    if wheels is None:
        return check.skip("wheels", "no --wheels")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    pip += ["--disable-pip-version-check", "--find-links", str(wheels), "--target", str(SITE)]
    files = sorted(wheels.glob("*.whl"))
    commands = [[*pip, str(path)] for path in files]
    check.run(Stage("wheels", commands, lambda text: (f"{len(files)} wheels", {})))


def run_environment(check: Check) -> None:
    """Looks for the GPU, PyTorch and the tools."""
    command = [sys.executable, "-c", "import gpu_check; print(gpu_check.probe())"]
    check.run(Stage("environment", [command], read_probe))


def run_without_gpu(check: Check) -> None:
    """Runs the tests in the emulator, unless `make emulate` would create .venv from the network."""
    reason = "no GPU" if check.ok("environment") else "PyTorch does not work"
    check.planned = ["CUDA tests"]
    # Also if PYTHON names another one, for which make would create .venv again.
    variables = {"MAKEFLAGS": "", "PYTHON": str(VENV / "bin" / "python")}
    for name in list(SECONDS)[2:]:
        if name == "CUDA tests" and check.ok("environment") and VENV.exists():
            check.run(Stage(name, [["make", "emulate"]], read_emulator, variables))
        elif name == "CUDA tests" and check.ok("environment"):
            check.skip(name, f"{reason}, and no .venv: `make emulate` would create it")
        else:
            check.skip(name, reason)


def run_with_gpu(check: Check) -> None:
    """Builds, and runs what needs the build."""
    python, machine = sys.executable, check.measured("environment")
    # The build replaces the library of .venv, maybe for another PyTorch: make setup will compile.
    (VENV / ".setup" / "ops.done").unlink(missing_ok=True)
    build = [python, "setup.py", "build_ext", "--inplace"]
    check.run(Stage("build", [build], read_build, {"FORCE_CUDA": "1"}))
    if not check.ok("build"):
        for name in list(SECONDS)[3:]:
            check.skip(name, "the build failed")
        return
    compiling = None
    if machine.get("deformops"):
        command = ["nice", python, "-m", "bench.precompile", CONV_MATCH]
        compiling = start_command(command, check.output / "deformops.txt", {})
    try:
        run_tests(check, machine)
        run_sanitizers(check, machine)
        wait_for_deformops(check, compiling)
    finally:
        if compiling:
            end(compiling)
    run_benchmarks(check)


def run_tests(check: Check, machine: dict[str, Any]) -> None:
    """Runs the tests of the CUDA kernels, in parallel if pytest-xdist is there."""
    pytest = [sys.executable, "-m", "pytest", "-vv", "--continue-on-collection-errors"]
    pytest += ["-p", "no:cacheprovider", *(["-n", "6"] if machine.get("xdist") else [])]
    command = [*pytest, "-m", "cuda and not slow", "tests/ops", "tests/layers"]
    check.run(Stage("CUDA tests", [command], read_tests, {"OMP_NUM_THREADS": "1"}))


def run_sanitizers(check: Check, machine: dict[str, Any]) -> None:
    """Runs the same calls, or some of them, under each tool of compute-sanitizer."""
    for tool, match in SANITIZERS.items():
        if not machine.get("compute-sanitizer"):
            check.skip(tool, "compute-sanitizer is not installed")
            continue
        command = [machine["compute-sanitizer"], "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "tests.ops.sanitizer_calls", "cuda", match]
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has bounds of its own
        check.run(Stage(tool, [command], read_sanitizer, variables))


def wait_for_deformops(check: Check, compiling: subprocess.Popen | None) -> None:
    """Waits for the kernels of deformops, which were compiled beside tests and sanitizers."""
    if compiling is None:
        return check.skip("deformops", "not installed")
    start, code = time.monotonic(), None
    with suppress(subprocess.TimeoutExpired):
        code = compiling.wait(check.limit("deformops"))
    text = (check.output / "deformops.txt").read_text()
    status = "ok" if code == 0 else "FAILED"
    detail = {None: "out of time", 0: "kernels compiled"}.get(code, f"exit status {code}")
    tail = "" if code == 0 else "\n".join(text.splitlines()[-30:])
    seconds = round(time.monotonic() - start, 1)
    check.add(Result("deformops", status, seconds, detail, log_end=tail))


def run_benchmarks(check: Check) -> None:
    """Times our ops and those of other libraries, also from CUDA graphs."""
    for path in TRITON_CACHE.rglob("*.autotune.json"):  # disturbed timings, see bench.precompile
        path.unlink()
    # deformops would compile for minutes within the benchmark.
    without = [] if check.ok("deformops") else ["--without", "deformops"]
    for kind, options in {"conv": ["--match", CONV_MATCH, *without], "roi": []}.items():
        path = check.output / f"{kind}.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, "tools/benchmark.py", "--device", "cuda", "--only", kind]
        command += ["--seconds", "0.3", "--json", str(path), *options]
        check.run(Stage(f"benchmark {kind}", [command], lambda _, p=path: read_benchmark(p)))


def main(arguments: list[str] | None = None) -> None:
    """Runs all stages; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install beforehand")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or BUILD))
    parser.add_argument("--minutes", type=float, default=9.0, help="for all stages together")
    options = parser.parse_args(arguments)
    if options.wheels and not options.wheels.is_dir():
        parser.error(f"--wheels: {options.wheels} is not a folder")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_check: terminated"))
    check = Check(options.output.resolve(), options.minutes)
    run_wheels(check, options.wheels and options.wheels.resolve())
    run_environment(check)
    (run_with_gpu if check.measured("environment").get("gpu") else run_without_gpu)(check)
    print(f"The report is {check.output / 'report.md'}")
    if check.failed:
        sys.exit(f"gpu_check: failed: {', '.join(check.failed)}")


if __name__ == "__main__":
    main()
