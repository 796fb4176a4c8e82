# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Atomic writes, and folders to write to."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, and renames it to `path` when that has succeeded."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def can_write(folder: Path) -> bool:
    """Returns whether a folder can be written to, or created."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def output_folder(text: str) -> Path:
    """Parses an option of `argparse` that names a folder to write to."""
    if not can_write(Path(text)):
        raise argparse.ArgumentTypeError(f"must be a folder that can be written to, got {text!r}")
    return Path(text)
