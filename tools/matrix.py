#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Builds and tests the ops with several versions of PyTorch; prints a table.

    python tools/matrix.py [--torch 2.6.0 newest] [--detectron2 PATH] [--output build/matrix]

Each version of PyTorch is installed into an environment in the output folder, with what the tests
of the ops need: gigabytes of downloads, and minutes. The ops are compiled for the CPU in a copy of
the sources; with the last version also as for processors other than x86-64 (DCN_PORTABLE). With
--detectron2, the tests of the models run in the environment of `make setup` on the Detectron2 of a
checkout, which must be built in place.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_report import read_tests, table

ROOT = Path(__file__).resolve().parents[1]
NEWEST = "newest"  # the latest version that pip finds
VERSIONS = ("2.6.0", NEWEST)
# What the tests of the ops need beside PyTorch, in the versions of requirements.txt.
PACKAGES = ("setuptools", "wheel", "ninja", "numpy", "packaging", "pytest", "hypothesis")
SOURCES = (
    *("setup.py", "pyproject.toml", "README.md", "LICENSE"),
    *("csrc", "dcn_plugin", "tests", "tools"),
)
OPS_TESTS = (
    "tests/ops",
    "tests/layers",
    "tests/test_library.py",
    "tests/test_setup.py::TestToolchain",
)
VERSIONS_CODE = """
import platform, torch
print(f"Python {platform.python_version()}, PyTorch {torch.__version__}")
"""


class StepFailed(Exception):
    """A step returned an error; its output is in the log."""


class Matrix:
    """Runs the steps of all rows; their output goes to log.txt in the output folder."""

    def __init__(self, output: Path) -> None:
        """Empties the log.

        Args:
            output: folder of the log, the environments and the copies of the sources.
        """
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        self.log = output / "log.txt"
        self.log.write_text("")
        self.rows: list[tuple[str, str, str, int]] = []
        self.failed = False
        self.updated: set[str] = set()  # versions of PyTorch that were installed in this run

    def run(self, command: Sequence[object], folder: Path = ROOT, **variables: str) -> str:
        """Runs a command and returns its output; raises StepFailed if it fails."""
        words = [str(word) for word in command]
        print(f"$ {' '.join(words)}", flush=True)
        done = subprocess.run(
            words,
            cwd=folder,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with self.log.open("a") as log:
            log.write(f"$ {' '.join(words)}\n{done.stdout}\n")
        if done.returncode != 0:
            self.failed = True
            raise StepFailed(done.stdout)
        return done.stdout

    def test(self, python: Path, tests: Sequence[str], folder: Path, **variables: str) -> str:
        """Runs tests, and returns their counts; a failure is one of them."""
        pytest = [python, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "-m", "not slow", *tests]
        try:
            output = self.run(pytest, folder, OMP_NUM_THREADS="1", **variables)
        except StepFailed as error:
            output = str(error)
        return read_tests(output)[0]

    def add(self, environment: str, build: str, tests: str, start: float) -> None:
        """Adds a row to the table, and prints it."""
        self.rows.append((environment, build, tests, round(time.monotonic() - start)))
        print(*self.rows[-1], sep=" | ", flush=True)

    def test_ops(self, torch: str, portable: bool = False) -> None:
        """Installs a version of PyTorch, compiles the ops and tests them: one row."""
        start = time.monotonic()
        name = f"torch-{torch}{'-portable' if portable else ''}"
        build = "for processors other than x86-64" if portable else "for x86-64"
        environment = f"PyTorch {torch}"
        try:
            python = self.install(torch)
            environment = self.run([python, "-c", VERSIONS_CODE]).strip()
            folder = self.copy_sources(name)
            variables = {"FORCE_CPU": "1", "DCN_PORTABLE": str(int(portable))}
            self.run([python, "setup.py", "-q", "build_ext", "--inplace"], folder, **variables)
        except StepFailed:
            return self.add(environment, f"FAILED, {build}", "not run", start)
        return self.add(environment, build, self.test(python, OPS_TESTS, folder), start)

    def install(self, torch: str) -> Path:
        """Creates an environment with a version of PyTorch; returns its Python."""
        folder = self.output / f"venv-{torch}"
        python = folder / "bin" / "python"
        if not (folder / "done").exists() or (torch == NEWEST and torch not in self.updated):
            self.run([sys.executable, "-m", "venv", folder])
            lines = (ROOT / "requirements.txt").read_text().splitlines()
            pins = [line for line in lines if line.split("==")[0] in PACKAGES]
            version = ["-U", "torch"] if torch == NEWEST else [f"torch=={torch}"]
            self.run([python, "-m", "pip", "install", "-q", *version, *pins])
            (folder / "done").touch()
            self.updated.add(torch)
        return python

    def copy_sources(self, name: str) -> Path:
        """Copies what the build and the tests need, without this checkout's library."""
        folder = self.output / name
        for source in SOURCES:
            target = folder / source
            if (ROOT / source).is_dir():
                shutil.rmtree(target, ignore_errors=True)
                ignored = shutil.ignore_patterns("_C*.so", "_build_info.json", "__pycache__")
                shutil.copytree(ROOT / source, target, ignore=ignored)
            else:
                folder.mkdir(exist_ok=True)
                shutil.copy2(ROOT / source, target)
        return folder

    def test_models(self, detectron2: Path) -> None:
        """Runs the tests of the models on the Detectron2 of a checkout: one row."""
        start = time.monotonic()
        python = ROOT / ".venv" / "bin" / "python"
        variables = {"PYTHONPATH": str(detectron2)}
        environment = self.run([python, "-c", VERSIONS_CODE]).strip()
        git = ["git", "-C", str(detectron2), "log", "-1", "--format=%h of %cs"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        ignored = ("--ignore=tests/ops", "--ignore=tests/layers", "--ignore=tests/cuda_emulator")
        counts = self.test(python, ["tests", *ignored], ROOT, **variables)
        return self.add(
            f"{environment}, Detectron2 {commit or detectron2.name}",
            "of `make setup`",
            counts,
            start,
        )


def main() -> None:
    """Runs all rows and prints the table; the exit status is 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--torch",
        nargs="+",
        default=VERSIONS,
        metavar="VERSION",
        help="versions of PyTorch; default: 2.6.0 newest",
    )
    parser.add_argument("--detectron2", type=Path, help="a checkout of Detectron2, built in place")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "build" / "matrix",
        help="folder of the environments; default: build/matrix",
    )
    args = parser.parse_args()
    if args.detectron2 and not (args.detectron2 / "detectron2" / "__init__.py").exists():
        parser.error(f"--detectron2 must be a checkout of Detectron2, got {args.detectron2}")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output must be a folder, got {args.output}")
    matrix = Matrix(args.output.resolve())
    for torch in args.torch:
        matrix.test_ops(torch)
    matrix.test_ops(args.torch[-1], portable=True)
    if args.detectron2:
        matrix.test_models(args.detectron2.resolve())
    print(*table(("environment", "ops compiled", "tests", "seconds"), matrix.rows), sep="\n")
    print(f"The whole output is in {matrix.log}")
    sys.exit(1 if matrix.failed else 0)


if __name__ == "__main__":
    main()
