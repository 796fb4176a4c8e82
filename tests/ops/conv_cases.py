# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolutions to test: asymmetric in all sizes, so that swapped axes fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DIFFERENTIABLE = ("input", "offset", "weight", "bias", "mask")


@dataclass(frozen=True)
class ConvCase:
    """The sizes of a call. Neither number of groups divides the other."""

    batch: int = 2
    in_channels: int = 6
    out_channels: int = 4
    size: tuple[int, int] = (7, 6)
    kernel: tuple[int, int] = (3, 2)
    stride: tuple[int, int] = (2, 1)
    padding: tuple[int, int] = (1, 0)
    dilation: tuple[int, int] = (2, 1)
    groups: int = 2
    offset_groups: int = 3
    bias: bool = True
    mask: bool = True

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def out_size(self) -> tuple[int, int]:
        height, width = (
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride, strict=True
            )
        )
        return height, width

    @property
    def geometry(self) -> dict[str, tuple[int, int]]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}

    def draw(self, device: str = "cpu", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Returns random arguments: drawn in float64 and converted to `dtype`.

        Sampling locations reach beyond every border, and are at least 0.05 away from integers
        before the conversion.
        """
        kernel, out = self.kernel, self.out_size
        offsets = self.offset_groups * self.taps
        shape = (self.batch, 2 * offsets, *out)
        offset = torch.randint(-3, 3, shape) + 0.05 + 0.9 * torch.rand(shape, dtype=torch.float64)
        weight_shape = (self.out_channels, self.in_channels // self.groups, *kernel)
        drawn = {
            "input": torch.randn(self.batch, self.in_channels, *self.size, dtype=torch.float64),
            "offset": offset,
            "weight": torch.randn(weight_shape, dtype=torch.float64),
            "bias": torch.randn(self.out_channels, dtype=torch.float64) if self.bias else None,
            "mask": torch.rand(self.batch, offsets, *out, dtype=torch.float64)
            if self.mask
            else None,
        }
        call = {k: None if v is None else v.to(device, dtype) for k, v in drawn.items()}
        return {**call, **self.geometry}


ASYMMETRIC = ConvCase()
EMPTY = ConvCase(batch=0)
CASES = {
    "asymmetric": ASYMMETRIC,
    "no-bias": ConvCase(bias=False),
    "no-mask": ConvCase(mask=False),
    "neither": ConvCase(bias=False, mask=False),
    "batch-1": ConvCase(batch=1),
    "batch-33": ConvCase(batch=33, size=(5, 3), kernel=(2, 1), in_channels=6),
    "depthwise": ConvCase(groups=6, out_channels=12, offset_groups=2),
    "offset-group-per-channel": ConvCase(groups=1, offset_groups=6),
    "1x1": ConvCase(kernel=(1, 1), dilation=(1, 1), offset_groups=1),
    "one-column": ConvCase(size=(7, 1), kernel=(3, 1)),
    "wide-stride": ConvCase(stride=(1, 3), padding=(0, 2), dilation=(1, 2), kernel=(2, 3)),
}


def cast(call: dict[str, Any], dtype: torch.dtype, names: Sequence[str] = DIFFERENTIABLE) -> dict:
    """Converts the tensors with these names to another dtype."""
    return {k: v.to(dtype) if k in names and v is not None else v for k, v in call.items()}


def gradients(
    function: Callable[..., Tensor],
    call: dict[str, Any],
    grad_output: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs a function forward and backward.

    Returns:
        its output, and the gradient of every tensor argument by name. The default of `grad_output`
        is random and depends on the shape of the output only.
    """
    leaves = {k: v.detach().requires_grad_() for k, v in call.items() if isinstance(v, Tensor)}
    output = function(**{**call, **leaves})
    if grad_output is None:
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        grad_output = drawn.to(output.device, output.dtype)
    found = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return output.detach(), dict(zip(leaves, found, strict=True))
