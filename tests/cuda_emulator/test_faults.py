# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The emulator reports deliberate faults, each under its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.cuda_emulator.faults import FAULTS
from tests.cuda_emulator.library import ROOT

pytestmark = pytest.mark.skipif(
    "DCN_CUDA_FAULTS" not in os.environ,
    reason="make emulate builds the copy with the faults, and sets DCN_CUDA_FAULTS",
)


@pytest.fixture(scope="module")
def reports() -> dict[str, str]:
    command = [sys.executable, "-m", "tests.cuda_emulator.faults", "run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_without_a_fault_nothing_is_reported(reports: dict[str, str]) -> None:
    assert reports[""] == ""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported_under_its_name(name: str, reports: dict[str, str]) -> None:
    print(f"\n{name}:\n    {reports[name]}")
    assert reports[name].startswith(f"cuda_emulator: {FAULTS[name].report} (")
    assert "_kernel<" in reports[name] and "DCN_EMULATOR_SEED=" in reports[name]
