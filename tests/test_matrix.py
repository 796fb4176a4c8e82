# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""tools/matrix.py: its steps, table and exit status, with commands that do not run."""

from __future__ import annotations

import sys
from pathlib import Path

import matrix
import pytest

VERSIONS = {"2.6.0": "Python 3.11.7, PyTorch 2.6.0", "newest": "Python 3.11.7, PyTorch 2.99.0"}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, str]]]:
    """Records the commands instead of running them; those that contain "-portable" fail."""
    seen = []

    def run(self: matrix.Matrix, command, folder=matrix.ROOT, **variables: str) -> str:
        text = " ".join(map(str, command))
        seen.append((text, variables))
        if "build_ext" in text and "portable" in str(folder):
            self.failed = True
            raise matrix.StepFailed("error")
        if "-c" in command:
            return next(v for k, v in VERSIONS.items() if f"venv-{k}" in text or ".venv" in text)
        return "tests/ops/test_a.py::test_b PASSED\ntests/ops/test_a.py::test_c SKIPPED (none)\n"

    def install(self: matrix.Matrix, torch: str) -> Path:
        return tmp_path / f"venv-{torch}" / "bin" / "python"

    monkeypatch.setattr(matrix.Matrix, "run", run)
    monkeypatch.setattr(matrix.Matrix, "install", install)
    return seen


def test_every_version_is_compiled_and_tested(commands, tmp_path, monkeypatch, capsys) -> None:
    checkout = tmp_path / "d2"
    (checkout / "detectron2").mkdir(parents=True)
    (checkout / "detectron2" / "__init__.py").touch()
    words = ["--output", tmp_path / "output", "--detectron2", checkout]
    monkeypatch.setattr(sys, "argv", ["matrix.py", *map(str, words)])
    with pytest.raises(SystemExit) as error:
        matrix.main()
    assert error.value.code == 1  # the build for other processors
    table = capsys.readouterr().out.partition("| environment |")[2].splitlines()
    assert [line.rpartition(" | ")[0] for line in table[2:6]] == [
        "| Python 3.11.7, PyTorch 2.6.0 | for x86-64 | 1 passed, 1 skipped",
        "| Python 3.11.7, PyTorch 2.99.0 | for x86-64 | 1 passed, 1 skipped",
        "| Python 3.11.7, PyTorch 2.99.0 | FAILED, for processors other than x86-64 | not run",
        "| Python 3.11.7, PyTorch 2.6.0, Detectron2 d2 | of `make setup` | 1 passed, 1 skipped",
    ]
    builds = [variables for text, variables in commands if "build_ext" in text]
    assert [build["DCN_PORTABLE"] for build in builds] == ["0", "0", "1"]
    text, variables = commands[-1]
    assert "--ignore=tests/ops" in text and variables["PYTHONPATH"] == str(checkout)
    copy = tmp_path / "output" / "torch-2.6.0"
    assert (copy / "csrc" / "library.cpp").exists() and not list(copy.glob("dcn_plugin/*.so"))


def test_a_folder_without_detectron2_is_an_error(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["matrix.py", "--detectron2", str(tmp_path)])
    with pytest.raises(SystemExit):
        matrix.main()
    assert f"must be a checkout of Detectron2, got {tmp_path}" in capsys.readouterr().err
