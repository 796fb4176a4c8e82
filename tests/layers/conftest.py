# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Fixtures of the layers' tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def default_device(device: str) -> Iterator[str]:
    """Makes modules and tensors on every device in turn."""
    with torch.device(device):
        yield device
