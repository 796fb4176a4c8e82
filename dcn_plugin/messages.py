# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Parts of messages to people."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def got(name: object, known: Iterable[str]) -> str:
    """Says what was found instead, and what may have been meant.

    Args:
        name: what was found.
        known: what there is.
    """
    near = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"got {name!r}" + (f"; the nearest: {', '.join(near)}" if near else "")
