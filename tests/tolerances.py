# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Tolerances per dtype, in units of its eps."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.devices import kernels_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# Largest error, in eps of the dtype, relative to the largest value of the tensor.
#
# float64, float32: coordinates below 16 lose 4 bits compared with offsets below 1. Sums of about
# 100 products (SUMMED) with varying signs, in another order than in the reference, lose less.
# float16, bfloat16: accumulated in float32, so the result is rounded once (half an eps). On CUDA,
# and on CPUs with bfloat16 instructions, the columns are rounded too: half an eps per term. On the
# CPU the signs of the terms vary enough that this is negligible in sums; on CUDA the terms may be
# twice the largest sum.
_EPS = {
    "cpu": {torch.float64: 16, torch.float32: 16, torch.float16: 1, torch.bfloat16: 1},
    "cuda": {torch.float64: 16, torch.float32: 16, torch.float16: 4, torch.bfloat16: 4},
}
SUMMED = 100


def tolerance(dtype: torch.dtype, device: str = "cpu") -> float:
    """Returns the tolerance relative to the largest value of a tensor."""
    return _EPS[kernels_of(device)][dtype] * torch.finfo(dtype).eps


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest error divided by the largest expected value; NaN if any value is NaN."""
    if expected.numel() == 0:
        return 0.0
    expected = expected.detach().double().cpu()
    scale = expected.abs().max()
    error = (actual.detach().double().cpu() - expected).abs().max()
    return (error / scale if scale > 0 else error).item()


def assert_near(actual: Tensor, expected: Tensor, name: str = "", allowed: float | None = None):
    """Compares a result with a float64 reference, with the tolerance of its dtype."""
    assert actual.shape == expected.shape, name
    if allowed is None:
        allowed = tolerance(actual.dtype, actual.device.type)
    error = relative_error(actual, expected)
    assert error <= allowed, f"{name}: error {error:.3g} is more than {allowed:.3g}"
