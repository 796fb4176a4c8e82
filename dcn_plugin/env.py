# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Prints versions, devices and the compiled ops for a bug report: `python -m dcn_plugin.env`.

It works without Detectron2, and if the compiled ops are missing or do not load.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import torch
from torch.utils.collect_env import get_pretty_env_info

from . import _library


def environment() -> str:
    """Returns the report of Detectron2, or that of PyTorch if Detectron2 cannot be imported."""
    try:
        from detectron2.utils.collect_env import collect_env_info

        return collect_env_info()
    except Exception as error:  # the report continues whatever an import raises
        problem = f"Detectron2 cannot be imported: {type(error).__name__}: {error}"
        return f"{problem}\n{get_pretty_env_info()}"


def compiled() -> list[tuple[str, str]]:
    """Returns the record of the build."""
    info = _library.build_info()
    if info is None:
        return [("Compiled", f"not yet, or the build was interrupted; run `{_library.REBUILD}`")]
    how = "in a wheel" if info.get("wheel") else "in place"
    rows = [("Compiled", f"dcn_plugin {info['version']} for PyTorch {info['torch']}, {how}")]
    rows.append(("Compiler", str(info["compiler"])))
    if info["cuda"]:
        archs = " ".join(info["arch_list"])
        rows.append(("CUDA kernels", f"compiled with CUDA {info['cuda']} for {archs}"))
    else:
        rows.append(("CUDA kernels", f"not compiled: {info['no_cuda_reason']}"))
    if info["sanitize"]:
        rows.append(("Sanitizers", str(info["sanitize"])))
    return rows


def loaded() -> list[tuple[str, str]]:
    """Loads the library; returns how many ops it registered, and for which devices."""
    try:
        _library.load()
    except ImportError as error:
        return [("Library", f"does not load: {error}")]
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("dcn_plugin::")]
    counts = []
    for device in ("CPU", "CUDA"):
        kernels = [torch._C._dispatch_has_kernel_for_dispatch_key(name, device) for name in names]
        counts.append(f"{sum(kernels)} with {device} kernels" if any(kernels) else f"no {device}")
    return [("Library", f"loads: {len(names)} ops, {', '.join(counts)}")]


def git_revision() -> str:
    """Returns the commit of this package, with "-dirty" if files have changed since."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"  # Git refuses the repositories of other users


def report() -> str:
    """Returns the whole report; what was compiled comes last."""
    rows = [*compiled(), *loaded()]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    return "\n".join([environment(), *lines])


if __name__ == "__main__":
    print(report())
