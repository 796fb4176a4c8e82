# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Lets a file be written so that an interruption leaves the old one or the new one.

    Args:
        path: where it is to be.

    Yields:
        where to write it.
    """
    half = path.with_suffix(".half")
    yield half
    half.replace(path)
