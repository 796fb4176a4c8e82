# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""PyTorch's deterministic algorithms, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(on: bool = True) -> Iterator[None]:
    """Switches them on, without filling new tensors.

    The filling would write all memory that a kernel should write, and so hide from
    compute-sanitizer and from the emulator what it leaves unwritten.
    """
    settings = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
