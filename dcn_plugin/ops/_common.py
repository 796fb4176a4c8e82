# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What the ops share: pairs, memory formats, the refusal of double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor


def pair(value: int | Sequence[int]) -> list[int]:
    """Returns (height, width); one integer serves for both."""
    return list(value) if isinstance(value, (tuple, list)) else [value, value]


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Returns channels-last only where the strides leave no doubt, as the kernels do."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def check_same_device(op: str, input: Tensor, **others: Tensor | None) -> None:
    """Checks, in a fake, what kernels check too: tensors on meta bring real ones here."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{op}: {name} must be on the input's device {input.device}, got {tensor.device}"
            )


def empty_gradient(tensor: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    """Allocates what a backward op returns for `tensor`: empty where it is not wanted."""
    if tensor is None or not wanted:
        return (like if tensor is None else tensor).new_empty(0)
    return torch.empty_like(tensor, memory_format=memory_format_of(tensor))


def refuse_double_backward(name: str) -> Callable[..., NoReturn]:
    """Returns the backward formula of a backward op: there is none."""

    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"{name}: double backward is not supported; "
            "call backward() or autograd.grad() without create_graph=True"
        )

    return backward
