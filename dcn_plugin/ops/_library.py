# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Loads the compiled library, and says what to do where that fails."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

REBUILD = "pip install --no-build-isolation -e ."

_BUILD_INFO = Path(__file__).resolve().parent.parent / "_build_info.json"


def build_info() -> dict[str, Any] | None:
    """Returns what the build recorded of itself, or None where nothing was built."""
    try:
        return json.loads(_BUILD_INFO.read_text())
    except FileNotFoundError:
        return None


def load() -> None:
    """Loads the ops into `torch.ops.dcn_plugin`.

    Raises:
        ImportError: if the library is missing or was built for another PyTorch.
    """
    spec = importlib.util.find_spec("dcn_plugin._C")
    if spec is None or spec.origin is None:
        raise ImportError(f"dcn_plugin: {_diagnosis()}")
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:
        raise ImportError(f"dcn_plugin: {_diagnosis()} ({error})") from error


def _diagnosis() -> str:
    info = build_info()
    if info is None:
        return f"the compiled ops are missing; build them in the project's folder: {REBUILD}"
    built_for = info.get("torch")
    if built_for != torch.__version__:
        return (
            f"the ops were compiled for PyTorch {built_for}, but this is {torch.__version__}; "
            f"rebuild them in the project's folder: {REBUILD}"
        )
    return f"the compiled ops do not load; rebuild them in the project's folder: {REBUILD}"
