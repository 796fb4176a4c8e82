# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Programs of this folder in processes of their own, so that a crash is seen as one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_alone(module, device, *names, prefix=()):
    """Runs the bad inputs of these names in `module`, all of them where none is named."""
    command = [*prefix, sys.executable, "-m", module.__name__, device, *names]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def run_under_memcheck(module):
    """Runs all bad inputs of `module` on the GPU under compute-sanitizer."""
    memcheck = shutil.which("compute-sanitizer")
    if memcheck is None:
        pytest.skip("needs compute-sanitizer, and there is none")
    prefix = (memcheck, "--tool", "memcheck", "--error-exitcode", "9")
    return run_alone(module, "cuda", prefix=prefix)
