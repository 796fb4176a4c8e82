# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""`torch.library.opcheck` in half precision too."""

from __future__ import annotations

import inspect
from typing import Any

import torch

HAS_TOLERANCES = "atol" in inspect.signature(torch.library.opcheck).parameters
EXACT = ("test_schema", "test_autograd_registration", "test_faketensor")


def opcheck(op: Any, arguments: list[Any], dtype: torch.dtype) -> None:
    """Checks an op; in half precision, results compiled by AOT may differ by rounding.

    PyTorch 2.6 has no tolerances for that: there it is checked in float64 only.
    """
    if dtype == torch.float64:
        torch.library.opcheck(op, arguments)
    elif HAS_TOLERANCES:
        torch.library.opcheck(op, arguments, atol=0.1, rtol=0.02)
    else:
        torch.library.opcheck(op, arguments, test_utils=EXACT)
