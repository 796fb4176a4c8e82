# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Tensors with unusual strides: with gaps, transposed, sliced, expanded."""

from __future__ import annotations

import torch


def gaps(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def transposed(tensor, axis=0, other=-1):
    swapped = tensor.transpose(axis, other).clone(memory_format=torch.contiguous_format)
    return swapped.transpose(axis, other)


def sliced(tensor):
    return torch.nn.functional.pad(tensor, [1, 2] * min(tensor.dim(), 2))[
        (..., *[slice(1, -2)] * min(tensor.dim(), 2))
    ]


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


def grad_outputs(shape, dtype, device):
    """Yields grad_output as autograd creates it, and contiguous tensors with unusual strides."""
    drawn = torch.randn(shape, dtype=torch.float64).to(device, dtype)
    yield "expanded scalar", torch.ones((), dtype=dtype, device=device).expand(shape)
    yield "expanded over channels", drawn[:, :1].expand(shape)
    for axes in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        yield f"transposed {axes}", transposed(drawn, *axes)
    yield "every other", drawn.repeat_interleave(2, dim=2)[:, :, ::2]
    for layout in (torch.contiguous_format, torch.channels_last):
        packed = drawn.clone(memory_format=layout)
        yield f"{layout}", packed
        for stride in (0, 1, 100):  # at axes of size 1, whose stride does not count for contiguity
            axes = zip(packed.shape, packed.stride(), strict=True)
            strides = [stride if size == 1 else kept for size, kept in axes]
            yield f"{layout}, stride {stride}", packed.as_strided(packed.shape, strides)
