# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""`python -m dcn_plugin.env`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcn_plugin import _library, env

ROOT = Path(__file__).resolve().parents[1]


def test_reports_versions_and_the_build() -> None:
    pytest.importorskip("detectron2", reason="the report of versions is Detectron2's")
    printed = env.report()
    for word in ("Python", torch.__version__, "torchvision", "detectron2", "GPU", "Compiled"):
        assert word in printed
    assert "Library" in printed.splitlines()[-1]


@pytest.mark.parametrize(("wheel", "how"), [(True, "in a wheel"), (False, "in place")])
def test_reports_how_and_for_what_the_ops_were_compiled(wheel, how, monkeypatch) -> None:
    record = {"version": "0.2.0+torch2.11.cu130", "torch": "2.11.0+cu130", "compiler": "c++ 12"}
    record |= {"cuda": "13.0", "arch_list": ["8.0", "9.0+PTX"], "sanitize": None, "wheel": wheel}
    monkeypatch.setattr(_library, "build_info", lambda: record)
    assert env.compiled() == [
        ("Compiled", f"dcn_plugin 0.2.0+torch2.11.cu130 for PyTorch 2.11.0+cu130, {how}"),
        ("Compiler", "c++ 12"),
        ("CUDA kernels", "compiled with CUDA 13.0 for 8.0 9.0+PTX"),
    ]


def test_the_revision_is_the_commit_that_is_checked_out() -> None:
    def commit(name: str) -> str:
        command = ["git", "-C", str(ROOT), "rev-parse", f"{name}^{{commit}}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a Git repository")
    assert commit(env.git_revision().removesuffix("-dirty")) == commit("HEAD")


def test_works_without_compiled_ops_and_detectron2(tmp_path) -> None:
    built = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(Path(env.__file__).parent, tmp_path / "dcn_plugin", ignore=built)
    (tmp_path / "detectron2.py").write_text("raise ModuleNotFoundError(__name__)\n")
    command = [sys.executable, "-m", "dcn_plugin.env"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Detectron2 cannot be imported: ModuleNotFoundError: detectron2" in done.stdout
    assert f"PyTorch version: {torch.__version__}" in done.stdout
    assert "does not load" in done.stdout
    assert "pip install --no-build-isolation -e ." in done.stdout


def test_works_if_detectron2_is_broken(tmp_path, monkeypatch) -> None:
    (tmp_path / "detectron2.py").write_text("raise OSError('undefined symbol')\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(env, "get_pretty_env_info", lambda: "PyTorch version")
    first, second = env.environment().splitlines()
    assert first == "Detectron2 cannot be imported: OSError: undefined symbol"
    assert second == "PyTorch version"


def test_works_if_the_library_does_not_load(monkeypatch) -> None:
    def fail() -> None:
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(_library, "load", fail)
    assert "undefined symbol" in env.loaded()[0][1]
