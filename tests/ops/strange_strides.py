# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Tensors that lie in memory as users' tensors do: with holes, transposed, cut out, expanded."""

from __future__ import annotations

import torch


def holes(tensor):
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def transposed(tensor, axis=0, other=-1):
    swapped = tensor.transpose(axis, other).clone(memory_format=torch.contiguous_format)
    return swapped.transpose(axis, other)


def offcut(tensor):
    return torch.nn.functional.pad(tensor, [1, 2] * min(tensor.dim(), 2))[
        (..., *[slice(1, -2)] * min(tensor.dim(), 2))
    ]


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


def grad_outputs(shape):
    """grad_output as autograd makes it, and as strange as a contiguous tensor can be."""
    drawn = torch.randn(shape, dtype=torch.float64)
    yield "expanded scalar", torch.ones((), dtype=torch.float64).expand(shape)
    yield "expanded over channels", drawn[:, :1].expand(shape)
    yield "channels-last", drawn.contiguous(memory_format=torch.channels_last)
    for axes in [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]:
        yield f"transposed {axes}", transposed(drawn, *axes)
    yield "every other", drawn.repeat_interleave(2, dim=2)[:, :, ::2]
