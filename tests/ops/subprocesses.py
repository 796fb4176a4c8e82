# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Runs modules of this folder in subprocesses, so that a crash fails the test only."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_in_subprocess(module, device, *names, prefix=()):
    """Runs the cases with these names in `module`, or all cases."""
    command = [*prefix, sys.executable, "-m", module.__name__, device, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def run_under_memcheck(module):
    """Runs all cases of `module` on the GPU under compute-sanitizer."""
    memcheck = shutil.which("compute-sanitizer")
    if memcheck is None:
        pytest.skip("compute-sanitizer is not installed")
    prefix = (memcheck, "--tool", "memcheck", "--error-exitcode", "9")
    return run_in_subprocess(module, "cuda", prefix=prefix)
