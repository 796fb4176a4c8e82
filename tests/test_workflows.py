# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The form of .github/workflows, as far as it can be checked without a runner."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = {path.stem: path for path in sorted((ROOT / ".github/workflows").glob("*.yml"))}
SHELL = re.compile("COMMAND|BEFORE")  # variables of cibuildwheel that contain shell code

names = pytest.mark.parametrize("name", WORKFLOWS)


def jobs(name: str) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(WORKFLOWS[name].read_text())["jobs"]


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in jobs(name).values() for step in job["steps"]]


@names
def test_jobs_end_and_may_only_read(name: str) -> None:
    assert yaml.safe_load(WORKFLOWS[name].read_text())["permissions"] == {"contents": "read"}
    job_names = [*jobs(name)]
    for job in jobs(name).values():
        assert job["timeout-minutes"] <= 60
        assert job.get("needs", job_names[0]) in job_names
    writing = [n for n, job in jobs(name).items() if "permissions" in job]
    assert writing == (["release"] if name == "wheels" else [])


@names
def test_actions_have_a_major_version(name: str) -> None:
    used = [step["uses"] for step in steps(name) if "uses" in step]
    assert used and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in used)


@names
def test_shell_code_is_valid(name: str) -> None:
    code = [step["run"] for step in steps(name) if "run" in step]
    code += [v for step in steps(name) for k, v in step.get("env", {}).items() if SHELL.search(k)]
    for script in code:
        assert "${{" not in script  # a name of a branch would become code; env is safe
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        for path in re.findall(r"(?<![\w./])(?:tests|tools)(?:/[\w./]+)?(?![\w.])", script):
            assert (ROOT / path).exists(), path


def test_the_versions_are_those_that_are_supported() -> None:
    ops = jobs("tests")["ops"]["strategy"]["matrix"]
    wheels, installed = (jobs("wheels")[n]["strategy"]["matrix"] for n in ("build", "test"))
    assert ops["torch"] == wheels["torch"] == installed["torch"]
    assert ops["torch"] == [f"2.{minor}" for minor in range(6, 6 + len(ops["torch"]))]
    assert installed["python"] == [ops["python"][0], ops["python"][-1]]
    assert f'"torch>={ops["torch"][0]}"' in (ROOT / "setup.py").read_text()
    assert f'requires-python = ">={ops["python"][0]}"' in (ROOT / "pyproject.toml").read_text()
