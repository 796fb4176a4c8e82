# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The layers of the project: which module may import which, in Python and in C++."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dcn_plugin"
CSRC = ROOT / "csrc"

# Parts of dcn_plugin that may import Detectron2, and all that the lower layers may import.
UPPER = {"__init__", "modeling", "data", "evaluation", "engine", "config", "compat"}
ALLOWED = {
    "ops": {"torch", "dcn_plugin.ops", "dcn_plugin._library"},
    "layers": {"torch", "dcn_plugin.ops", "dcn_plugin.layers"},
    "integrations": {"torch", "torchvision", "dcn_plugin.ops", "dcn_plugin.integrations"},
    # Only `dcn_plugin.onnx.ops` imports onnxscript.
    "onnx": {"torch", "onnxscript", "dcn_plugin.ops", "dcn_plugin.onnx"},
    # Works without Detectron2, on torchvision's models; fvcore counts FLOPs.
    "analysis": {
        *("torch", "numpy", "matplotlib", "cv2", "fvcore"),
        *("dcn_plugin.ops", "dcn_plugin.layers", "dcn_plugin.analysis"),
        *("dcn_plugin.files", "dcn_plugin.messages"),
    },
}
# What the folders of csrc may include, as prefixes.
INCLUDES = {
    "math": ("math/", "<std>"),
    "ops": ("math/", "ops/", "<std>", "ATen/", "c10/", "torch/"),
    "cpu": ("math/", "ops/", "cpu/", "<std>", "ATen/", "c10/", "torch/"),
    "cuda": ("math/", "ops/", "cuda/", "<std>", "ATen/", "c10/", "torch/", "cuda", "cub/"),
}


def python_files():
    files = [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py")]
    return sorted([*files, *(ROOT / "tests").rglob("*.py")])


def cpp_files():
    return sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh", ".cpp", ".cu"))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(tree, at_import_only=False):
    """Yields the nodes of a module, without `if TYPE_CHECKING` blocks."""
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node):
            continue
        if at_import_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        yield from statements(node, at_import_only)


def imports(path, at_import_only=False):
    """Returns the absolute names of the modules that a file imports."""
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    found = set()
    for node in statements(ast.parse(path.read_text()), at_import_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import module` imports the module, `from module import name` does not.
            found |= {submodule(name, alias.name) for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {a.value for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def submodule(package, name):
    path = ROOT.joinpath(*package.split("."), name)
    return f"{package}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else package


def layer(path):
    """Returns the folder or module of dcn_plugin that a file belongs to, else its top folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if len(parts) == 1:
        return "root"
    return parts[1] if parts[0] == "dcn_plugin" else parts[0]


def by_path(path):
    return str(path.relative_to(ROOT))


package_files = pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=by_path)


def within(name, packages):
    return any(name == p or name.startswith(p + ".") for p in packages)


@package_files
def test_lower_layers_import_only_what_is_allowed(path):
    allowed = ALLOWED.get(layer(path))
    if allowed is not None:
        wrong = {
            name
            for name in imports(path)
            if name.partition(".")[0] not in sys.stdlib_module_names and not within(name, allowed)
        }
        assert not wrong


@package_files
def test_only_upper_layers_import_detectron2(path):
    # env.py reports why Detectron2 cannot be imported: test_env.py.
    if layer(path) not in UPPER and path.name != "env.py":
        theirs = {"detectron2", "fvcore", "iopath"} - ALLOWED.get(layer(path), set())
        assert not {n for n in imports(path) if within(n, theirs)}


@pytest.mark.parametrize("path", python_files(), ids=by_path)
def test_analysis_tools_and_tests_are_not_imported_from_below(path):
    if layer(path) not in ("analysis", "tests", "tools", "root"):
        assert not {n for n in imports(path) if within(n, ("dcn_plugin.analysis",))}
    if layer(path) != "tests":
        assert not {n for n in imports(path) if within(n, ("tests",))}
    if layer(path) not in ("tests", "tools", "root"):
        assert not {n for n in imports(path) if within(n, ("train_net", "tools"))}


# Their errors are for programmers, for argparse, or caught where they are raised.
OTHER_ERRORS = {
    *("dcn_plugin/data/shapes/sets.py", "dcn_plugin/modeling/export.py"),
    *("tools/benchmark.py", "tools/cuda_report.py"),
}
REPORTED = {"engine", "data", "evaluation", "modeling", "analysis", "tools", "root"}


@pytest.mark.parametrize("path", python_files(), ids=by_path)
def test_errors_for_users_are_user_errors(path):
    """`exit_on_error` prints these alone without a traceback."""
    if layer(path) in REPORTED and by_path(path) not in OTHER_ERRORS:
        raised = {
            node.exc.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Raise)
            and isinstance(node.exc, ast.Call)
            and isinstance(node.exc.func, ast.Name)
        }
        assert not raised & {"ValueError", "OSError", "FileNotFoundError", "ModuleNotFoundError"}


def test_the_package_has_no_import_cycles():
    files = {module_name(p): p for p in PACKAGE.rglob("*.py")}
    graph = {
        name: {n for n in imports(path, at_import_only=True) if n in files and n != name}
        for name, path in files.items()
    }
    # Allowed: `from .part import x` in a package's __init__. A cycle: `from . import x` in a part.
    done: set[str] = set()

    def visit(name, trail):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])


def included(path):
    """Returns the headers that a C++ file includes; those of the standard library as <std>."""
    names = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)
    return {name if "/" in name or "." in name else "<std>" for name in names}


cpp = pytest.mark.parametrize("path", cpp_files(), ids=by_path)


@cpp
def test_cpp_includes_follow_the_layers(path):
    allowed = INCLUDES.get(path.relative_to(CSRC).parts[0])
    if allowed is not None:
        assert not {name for name in included(path) if not name.startswith(allowed)}


@cpp
def test_conv_and_roi_do_not_include_each_other(path):
    parts = (*path.relative_to(CSRC).parts, "")
    other = {"conv": "roi", "roi": "conv"}.get(parts[1])
    assert not {name for name in included(path) if name.startswith(f"{parts[0]}/{other}/")}


@cpp
def test_no_ifdef_for_cuda(path):
    if path != CSRC / "math" / "macros.h":
        conditions = re.findall(r"^\s*#\s*(?:el)?if.*$", path.read_text(), re.MULTILINE)
        if path.suffix in (".cu", ".cuh"):  # device code may test for the architecture
            conditions = [c.replace("__CUDA_ARCH__", "") for c in conditions]
        assert not [c for c in conditions if re.search("CUDA|HIP|NVCC", c)]


@cpp
def test_only_cuda_sources_include_cuda_headers(path):
    if path.relative_to(CSRC).parts[0] in ("math", "ops", "cpu") and path.name != "macros.h":
        assert not {n for n in included(path) if re.search("cuda", n, re.IGNORECASE)}


@pytest.mark.parametrize("path", [*python_files(), *cpp_files()], ids=by_path)
def test_files_have_a_licence_header(path):
    head = path.read_text()[:200]
    if not head:
        return  # an empty __init__.py
    assert "SPDX-License-Identifier: Apache-2.0" in head
    assert "Copyright (c) dcn_plugin contributors" in head
