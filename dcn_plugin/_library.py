# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Loads the compiled library. Outside `ops`, which cannot be imported without the library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation -e ."

_PACKAGE = Path(__file__).resolve().parent


def build_info() -> dict[str, Any] | None:
    """Returns the record of the build, or None if the library was not built."""
    try:
        return json.loads((_PACKAGE / "_build_info.json").read_text())
    except FileNotFoundError:
        return None


def load() -> None:
    """Loads the ops into `torch.ops.dcn_plugin`.

    Raises:
        ImportError: if the library is missing or was built for another version of PyTorch.
    """
    # Not `import dcn_plugin._C`, which might find the library of another installation.
    libraries = sorted(_PACKAGE.glob("_C*.so"), key=lambda path: path.stat().st_mtime)
    if not libraries:
        raise ImportError(f"dcn_plugin: {_diagnosis()}")
    try:
        torch.ops.load_library(libraries[-1])
    except OSError as error:
        raise ImportError(f"dcn_plugin: {_diagnosis()} ({error})") from error


def _diagnosis() -> str:
    """Explains why the library cannot be loaded, and how to rebuild it."""
    info = build_info()
    if info is None:
        return f"the compiled ops are missing; build them in the repository: {REBUILD}"
    built_for = info.get("torch")
    if built_for != torch.__version__:
        return (
            f"the ops were compiled for PyTorch {built_for}, but this is {torch.__version__}; "
            f"rebuild them in the repository: {REBUILD}"
        )
    return f"the compiled ops cannot be loaded; rebuild them in the repository: {REBUILD}"
