# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Prints versions, devices and the compiled ops for a bug report: `python -m dcn_plugin.env`.

It works without Detectron2, and if the compiled ops are missing or do not load.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch

Row = tuple[str, str]

# Module, label, distribution (None: the version is in the module).
PACKAGES = (
    ("torchvision", "torchvision", "torchvision"),
    ("detectron2", "Detectron2", "detectron2"),
    ("numpy", "NumPy", "numpy"),
    ("PIL", "Pillow", "pillow"),
    ("cv2", "OpenCV", None),
    ("pycocotools", "pycocotools", "pycocotools"),
)


def load_library_module() -> ModuleType:
    """Returns `dcn_plugin.ops._library`; its package cannot be imported without compiled ops."""
    path = Path(__file__).resolve().parent / "ops" / "_library.py"
    spec = importlib.util.spec_from_file_location("dcn_plugin_library", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package_version(module: str, distribution: str | None) -> str:
    """Returns the version of a package, or why it cannot be imported."""
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return "not installed"
        return f"broken: {error}"
    except Exception as error:  # the report continues whatever an import raises
        return f"broken: {type(error).__name__}: {error}"
    try:
        found = version(distribution) if distribution else None
    except PackageNotFoundError:
        found = None
    return found or getattr(loaded, "__version__", "unknown version")


def versions() -> list[Row]:
    """Returns the versions of Python, PyTorch and the packages."""
    rows = [("Python", f"{platform.python_version()} ({sys.executable})"), ("System", system())]
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    rows.append(("PyTorch", f"{torch.__version__}, {cuda}"))
    rows += [(label, package_version(module, name)) for module, label, name in PACKAGES]
    return rows


def system() -> str:
    """Returns the name of the operating system."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.machine()}"


def devices() -> list[Row]:
    """Returns the CPU and the GPUs."""
    try:
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        model = None
    capability = torch.backends.cpu.get_cpu_capability()
    rows = [
        ("CPU", f"{model[1] if model else platform.processor() or 'unknown'}, {capability}"),
        ("Threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors"),
    ]
    if not torch.cuda.is_available():
        return [*rows, ("GPU", "none that PyTorch can use")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        rows.append((f"GPU {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {memory}"))
    return rows


def compiled(library: ModuleType) -> list[Row]:
    """Returns the record of the build."""
    info = library.build_info()
    if info is None:
        return [("Compiled", f"not yet, or the build was interrupted; run `{library.REBUILD}`")]
    rows = [("Compiled", f"dcn_plugin {info['version']} for PyTorch {info['torch']}")]
    rows.append(("Compiler", str(info["compiler"])))
    if info["cuda"]:
        archs = " ".join(info["arch_list"])
        rows.append(("CUDA kernels", f"compiled with CUDA {info['cuda']} for {archs}"))
    else:
        rows.append(("CUDA kernels", f"not compiled: {info['no_cuda_reason']}"))
    if info["sanitize"]:
        rows.append(("Sanitizers", str(info["sanitize"])))
    return rows


def loaded(library: ModuleType) -> list[Row]:
    """Loads the library; returns how many ops it registered, and for which devices."""
    try:
        library.load()
    except ImportError as error:
        return [("Library", f"does not load: {error}")]
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dcn_plugin::")]
    counts = []
    for device in ("CPU", "CUDA"):
        kernels = [torch._C._dispatch_has_kernel_for_dispatch_key(name, device) for name in names]
        counts.append(f"{sum(kernels)} with {device} kernels" if any(kernels) else f"no {device}")
    return [("Library", f"loads: {len(names)} ops, {', '.join(counts)}")]


def report() -> str:
    """Returns the whole report."""
    library = load_library_module()
    rows = [*versions(), *devices(), *compiled(library), *loaded(library)]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


if __name__ == "__main__":
    print(report())
