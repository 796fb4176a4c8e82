# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Parts of error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def got(name: object, known: Iterable[str]) -> str:
    """Returns "got <name>", with the nearest known names.

    Args:
        name: a value that is not allowed.
        known: the values that are.
    """
    return f"got {name!r}{nearest(name, known)}"


def nearest(name: object, known: Iterable[str]) -> str:
    """Returns "; the nearest: <names>", or nothing if no known name is similar."""
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"; the nearest: {', '.join(near)}" if near else ""
