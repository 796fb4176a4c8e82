# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Loading the compiled library, and the errors if that fails."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dcn_plugin
from dcn_plugin import _library

PACKAGE = Path(dcn_plugin.__file__).parent
NO_DETECTRON2 = """
import sys

class Hides:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("detectron2", "fvcore", "iopath"):
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hides(finder) for finder in sys.meta_path]
"""


def run(code, folder=PACKAGE.parent):
    """Runs a program in a subprocess, with `folder` in its import path."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("modules", ["ops", "ops, layers"])
def test_imports_where_detectron2_is_not_installed(modules):
    result = run(
        NO_DETECTRON2 + f"from dcn_plugin import {modules}\n"
        "import torch\n"
        "x, w = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1)\n"
        "print(ops.deform_conv2d(x, torch.zeros(1, 2, 3, 3), w).sum().item())"
    )
    assert (result.returncode, result.stdout.strip()) == (0, "9.0"), result.stderr
    assert result.stderr == ""  # no warning


def test_ops_import_torch_and_nothing_heavier():
    result = run(
        NO_DETECTRON2 + "import torch\n"
        "before = set(sys.modules)\n"
        "from dcn_plugin import ops\n"
        "print(*sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    assert result.returncode == 0, result.stderr
    imported = set(result.stdout.split()) - set(sys.stdlib_module_names) - {"torch"}
    assert imported <= {"dcn_plugin"}


@pytest.fixture
def broken_package(tmp_path):
    """A copy of the Python files of `ops`, without the library."""
    shutil.copytree(PACKAGE / "ops", tmp_path / "dcn_plugin" / "ops")
    shutil.copy(PACKAGE / "_library.py", tmp_path / "dcn_plugin")
    (tmp_path / "dcn_plugin" / "__init__.py").touch()
    return tmp_path


def import_error(folder):
    result = run("from dcn_plugin import ops", folder)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: dcn_plugin: "), result.stderr
    return last


def test_missing_library(broken_package):
    message = import_error(broken_package)
    assert "compiled ops are missing" in message
    assert "pip install --no-build-isolation -e ." in message


def fake_build(folder, torch_version, **more):
    (folder / "dcn_plugin" / "_C.abi3.so").write_bytes(b"no library")
    info = json.dumps({"torch": torch_version, **more})
    (folder / "dcn_plugin" / "_build_info.json").write_text(info)


# What helps; the last one is the record of an older build.
REMEDIES = pytest.mark.parametrize(
    ("record", "remedy"),
    [
        ({"wheel": True}, "in a clone of dcn_plugin: pip install --no-build-isolation ."),
        ({"wheel": False}, "in the repository: pip install --no-build-isolation -e ."),
        ({}, "in the repository: pip install --no-build-isolation -e ."),
    ],
)


@REMEDIES
def test_library_for_another_pytorch_names_both_versions(broken_package, record, remedy):
    fake_build(broken_package, "1.2.3+cu001", **record)
    message = import_error(broken_package)
    assert "compiled for PyTorch 1.2.3+cu001" in message
    assert torch.__version__ in message
    assert message.endswith(remedy)
    assert ("pip install 'torch==1.2.*'" in message) == record.get("wheel", False)
    assert "(" not in message  # not even loaded


@REMEDIES
def test_library_that_cannot_be_loaded_reports_the_cause(broken_package, record, remedy):
    fake_build(broken_package, torch.__version__, **record)
    message = import_error(broken_package)
    assert "cannot be loaded" in message
    assert remedy in message
    assert "_C.abi3.so" in message  # the message of the loader


def test_wheel_for_other_gpus_does_not_ask_for_the_installed_pytorch(broken_package):
    built_for = f"{torch.__version__.partition('+')[0]}+cu001"
    fake_build(broken_package, built_for, wheel=True)
    message = import_error(broken_package)
    assert f"compiled for PyTorch {built_for}, but this is {torch.__version__}; " in message
    assert f"a wheel of dcn_plugin for PyTorch {torch.__version__}" in message
    assert "'torch==" not in message


def test_every_op_of_the_library_has_a_backward():
    _library.load()
    names = torch._C._dispatch_get_all_op_names()
    ours = {n.removeprefix("dcn_plugin::") for n in names if n.startswith("dcn_plugin::")}
    assert "deform_conv2d" in ours
    for name in ours:
        assert name.startswith("_") or f"_{name}_backward" in ours, name


@pytest.mark.parametrize("op", ["deform_conv2d", "deform_roi_pool"])
def test_mps_tensors_are_one_clear_error(op):
    kernel = getattr(torch.ops.dcn_plugin, op).default
    x, offset, weight = torch.ones(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 1, 1)
    geometry = ([1, 1], [0, 0], [1, 1], None)
    args = {
        "deform_conv2d": (x, offset, weight, None, *geometry),
        "deform_roi_pool": (x, torch.zeros(1, 5), None, *[[1, 1]] * 3, 1.0, 2, 0.1, "align"),
    }
    # As the dispatcher calls it for tensors on MPS, which there are on macOS only.
    mps = torch._C.DispatchKeySet(torch._C.DispatchKey.MPS)
    with pytest.raises(NotImplementedError, match=rf"^{op}: .* CPU and CUDA only.*\.cpu\(\)$"):
        kernel.redispatch(mps, *args[op])


def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").is_file()
