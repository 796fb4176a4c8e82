# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Helpers shared by the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

HAS_ONNX_OPS = hasattr(torch.onnx, "ops")  # missing in PyTorch 2.6


def pair(value: int | Sequence[int]) -> list[int]:
    """Returns (height, width); a single integer is used for both."""
    return list(value) if isinstance(value, (tuple, list)) else [value, value]


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """Returns channels-last only if the tensor is not contiguous too, as the kernels do."""
    if not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def check_same_device(op: str, input: Tensor, **others: Tensor | None) -> None:
    """Checks devices in a fake kernel, which also runs if only some tensors are on meta."""
    for name, tensor in others.items():
        if tensor is not None and tensor.device != input.device:
            raise ValueError(
                f"{op}: {name} must be on the input's device {input.device}, got {tensor.device}"
            )


def check_dims(op: str, dim: int, **tensors: Tensor) -> None:
    """Checks in a fake kernel that these are tensors with `dim` dimensions."""
    for name, tensor in tensors.items():
        if tensor is None:  # what PyTorch makes of None depends on the device
            raise TypeError(f"{op}: {name} must be a tensor, got None")
        if tensor.dim() != dim:
            raise ValueError(
                f"{op}: {name} must have {dim} dimensions, got shape {tuple(tensor.shape)}"
            )


def check_pairs(op: str, minimum: int, **pairs: Sequence[int]) -> None:
    """Checks in a fake kernel that each is (height, width), both at least `minimum`."""
    maximum = torch.iinfo(torch.int32).max
    for name, values in pairs.items():
        # Symbols are left to the kernel.
        numbers = [value for value in values if isinstance(value, int)]
        if len(values) != 2 or any(not minimum <= number <= maximum for number in numbers):
            raise ValueError(
                f"{op}: {name} must be two integers (height, width) from {minimum} to {maximum}, "
                f"got {list(values)}"
            )


def check_channels(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None) -> None:
    """Checks channels and dtypes where no kernel runs: in fake kernels and exports.

    Sizes of maps are left to the kernel, since in a traced program they may be unrelated symbols.
    """
    channels, group_in, taps = input.shape[1], weight.shape[1], weight.shape[2] * weight.shape[3]
    if channels % group_in != 0 or weight.shape[0] % (channels // group_in) != 0:
        raise ValueError(
            f"deform_conv2d: weight.size(1) must divide the input's channels, and the groups that "
            f"follow must divide weight.size(0), got {channels} channels and {tuple(weight.shape)}"
        )
    groups = offset.shape[1] // (2 * taps)
    if groups == 0 or offset.shape[1] != 2 * groups * taps or channels % groups != 0:
        raise ValueError(
            f"deform_conv2d: offset must have 2 * offset_groups * {taps} taps channels, with "
            f"offset_groups a divisor of the {channels} input channels, got {offset.shape[1]}"
        )
    if mask is not None and mask.shape[1] != groups * taps:
        raise ValueError(
            f"deform_conv2d: mask must have {groups * taps} channels, one per tap and offset "
            f"group, got {mask.shape[1]}"
        )
    if weight.dtype != input.dtype or not input.is_floating_point():
        raise TypeError(
            "deform_conv2d: input and weight must have one floating dtype, got "
            f"{input.dtype} and {weight.dtype}"
        )


def empty_output(input: Tensor, *size: int) -> Tensor:
    """Allocates an output of an op with the dtype, device and memory format of its input."""
    memory_format = memory_format_of(input)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format)


def empty_gradient(tensor: Tensor | None, needed: bool, like: Tensor) -> Tensor:
    """Allocates the gradient of `tensor`, or an empty tensor if it is not needed."""
    if tensor is None or not needed:
        return (like if tensor is None else tensor).new_empty(0)
    return torch.empty_like(tensor, memory_format=memory_format_of(tensor))


def emits_onnx_nodes() -> bool:
    """Returns whether `torch.onnx.export` is capturing a model, and can insert ONNX nodes.

    Evaluates to False under Dynamo, so with torch.export(strict=True) too, which cannot trace them.
    """
    # is_compiling() first: it costs a twentieth of is_in_onnx_export().
    return torch.compiler.is_compiling() and HAS_ONNX_OPS and torch.onnx.is_in_onnx_export()


def in_onnx_export() -> bool:
    """Returns whether `torch.onnx.export` is capturing a model, under Dynamo too."""
    return HAS_ONNX_OPS and torch.onnx.is_in_onnx_export()


# What torch.compiler.assume_constant_result does; the decorator itself imports Dynamo and SymPy.
in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def register_backward(
    op: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Registers the backward of an op, and errors for double backward and for MPS tensors."""

    def no_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(
            f"{op}: double backward is not supported; "
            "call backward() or autograd.grad() without create_graph=True"
        )

    def no_mps_kernel(*args: Any) -> NoReturn:
        raise NotImplementedError(
            f"{op}: there are kernels for CPU and CUDA only, and a tensor is on MPS; "
            "move the tensors (and the module) to the CPU with .cpu()"
        )

    torch.library.impl(f"dcn_plugin::{op}", "mps")(no_mps_kernel)
    register = torch.library.register_autograd
    register(f"dcn_plugin::{op}", backward, setup_context=setup_context)
    register(f"dcn_plugin::_{op}_backward", no_double_backward)
