# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""`python -m dcn_plugin.env`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from dcn_plugin import env


def test_reports_versions_devices_and_the_build() -> None:
    printed = env.report()
    for word in ("Python", torch.__version__, "torchvision", "Detectron2", "CPU", "Compiled"):
        assert word in printed
    assert "Library" in printed.splitlines()[-1]


def test_a_missing_package_is_reported() -> None:
    assert env.package_version("no_such_package", None) == "not installed"


def test_works_without_compiled_ops(tmp_path) -> None:
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(Path(env.__file__).parent, tmp_path / "dcn_plugin", ignore=built)
    for name in ("detectron2", "torchvision", "cv2", "pycocotools"):  # not installed, and so quick
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError(name={name!r})\n")
    command = [sys.executable, "-m", "dcn_plugin.env"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "does not load" in done.stdout
    assert done.stdout.count("not installed") == 4
    assert "pip install --no-build-isolation -e ." in done.stdout


def test_works_if_the_library_does_not_load(monkeypatch) -> None:
    library = env.load_library_module()

    def fail() -> None:
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(library, "load", fail)
    assert "undefined symbol" in env.loaded(library)[0][1]
