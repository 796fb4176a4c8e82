# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Loads the compiled library. Outside `ops`, which cannot be imported without the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation -e ."
COMPILE_FROM_CLONE = "pip install --no-build-isolation ."

_PACKAGE = Path(__file__).resolve().parent


def build_info() -> dict[str, Any] | None:
    """Returns the record of the build, or None if the library was not built."""
    try:
        info = json.loads((_PACKAGE / "_build_info.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return info if isinstance(info, dict) and "torch" in info else None


def load() -> None:
    """Loads the ops into `torch.ops.dcn_plugin`.

    Raises:
        ImportError: if the library is missing or was built for another version of PyTorch.
    """
    # Not `import dcn_plugin._C`, which might find the library of another installation.
    libraries = sorted(_PACKAGE.glob("_C*.so"), key=lambda path: path.stat().st_mtime)
    info = build_info()
    # PyTorch's C++ interface changes with the minor version: a library may load, and crash later.
    if not libraries or info is None or _minor(info["torch"]) != _minor(torch.__version__):
        raise ImportError(f"dcn_plugin: {_diagnosis(info)}")
    try:
        torch.ops.load_library(libraries[-1])
    except OSError as error:
        raise ImportError(f"dcn_plugin: {_diagnosis(info)} ({error})") from error


def _minor(version: str) -> str:
    """Returns the major and minor version of PyTorch, such as "2.11"."""
    return ".".join(version.split(".")[:2])


def _diagnosis(info: dict[str, Any] | None) -> str:
    """Explains why the library cannot be loaded, and which command helps."""
    if info is None:
        return (
            "the compiled ops are missing, or their build was interrupted; build them in the "
            f"repository: {REBUILD}"
        )
    built_for, running = info["torch"], str(torch.__version__)
    if built_for == running:
        problem = "the compiled ops cannot be loaded"
    else:
        problem = f"the ops were compiled for PyTorch {built_for}, but this is {running}"
    if not info.get("wheel"):
        return f"{problem}; rebuild them in the repository: {REBUILD}"
    remedies = [f"install a wheel of dcn_plugin for PyTorch {running}"]
    if _minor(built_for) != _minor(running):
        remedies.append(f"the PyTorch of this wheel: pip install 'torch=={_minor(built_for)}.*'")
    remedies.append(f"compile the ops in a clone of dcn_plugin: {COMPILE_FROM_CLONE}")
    return f"{problem}; {', or '.join(remedies)}"
