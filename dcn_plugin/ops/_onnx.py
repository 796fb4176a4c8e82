# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The ops as nodes of an ONNX model, while `torch.onnx.export` captures it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._common import check_channels, emits_onnx_nodes
from ._roi_pool_decomposition import check_can_decompose, decompose_deform_roi_pool


def deform_conv_node(
    input: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    mask: Tensor | None,
    shape: list[int],
) -> Tensor:
    """Returns the output of an ONNX DeformConv, with the arguments of the op.

    Args:
        input: as in `deform_conv2d`, like the arguments that follow.
        offset: its dtype may differ from that of the input. DeformConv has one dtype for all, so
            the node then computes in float32 (float64 if one of them is float64).
        weight: as in `deform_conv2d`.
        bias: as in `deform_conv2d`.
        stride: (height, width).
        padding: (height, width).
        dilation: (height, width).
        mask: as in `deform_conv2d`.
        shape: of the output.
    """
    device = input.device.type
    if _autocasts(device):  # as the autocast kernel: offsets are not cast
        dtype = torch.get_autocast_dtype(device)
        input, weight = _autocast(input, dtype), _autocast(weight, dtype)
        bias, mask = _autocast(bias, dtype), _autocast(mask, dtype)
    check_channels(input, offset, weight, mask)
    kernel = weight.shape[2:]
    attributes = {
        "kernel_shape": list(kernel),
        "strides": stride,
        "pads": padding * 2,
        "dilations": dilation,
        "group": input.shape[1] // weight.shape[1],
        "offset_group": offset.shape[1] // (2 * kernel[0] * kernel[1]),
    }
    return _node("DeformConv", 19, input, (weight, offset, bias, mask), attributes, shape)


def export_roi_pool(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    part_size: list[int],
    group_size: list[int],
    spatial_scale: float,
    sampling_ratio: int,
    gamma: float,
    mode: str,
) -> Tensor:
    """Computes RoI pooling with standard operators: RoiAlign where possible, else ATen ops.

    Args:
        input: the arguments of the op.
        boxes: as above.
        offset: as above.
        output_size: as above.
        part_size: as above.
        group_size: as above.
        spatial_scale: as above.
        sampling_ratio: as above.
        gamma: as above.
        mode: as above.
    """
    check_can_decompose(mode, sampling_ratio)
    device = input.device.type
    if _autocasts(device):
        input = _autocast(input, torch.get_autocast_dtype(device))
    if offset is not None or group_size != [1, 1] or not emits_onnx_nodes():
        return decompose_deform_roi_pool(
            *(input, boxes, offset, output_size, part_size, group_size),
            *(spatial_scale, sampling_ratio, gamma, mode),
        )
    # Scaled here, in the dtype of the op's coordinates: the attribute spatial_scale is float32.
    coordinates = boxes.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    rois, images = coordinates[:, 1:] * spatial_scale, boxes[:, 0].long()
    attributes = {
        "coordinate_transformation_mode": "half_pixel",
        "mode": "avg",
        "output_height": output_size[0],
        "output_width": output_size[1],
        "sampling_ratio": sampling_ratio,
        "spatial_scale": 1.0,
    }
    shape = [boxes.shape[0], input.shape[1], *output_size]
    return _node("RoiAlign", 16, input, (rois, images), attributes, shape)


def _autocasts(device: str) -> bool:
    """Returns whether autocast is on; devices such as meta have none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _autocast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Casts to the autocast dtype; float64 is kept, as in autocast."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


def _node(
    op_type: str,
    version: int,
    input: Tensor,
    others: tuple[Tensor | None, ...],
    attributes: dict[str, Any],
    shape: list[int],
) -> Tensor:
    """Returns the output of an ONNX node whose floating inputs have one dtype.

    Args:
        op_type: name of the standard operator.
        version: opset that it needs, without bfloat16; that came with 22 for both operators.
        input: the output has its dtype.
        others: further inputs.
        attributes: of the node.
        shape: of the output.
    """
    tensors = [input, *others]
    dtypes = {t.dtype for t in tensors if t is not None and t.is_floating_point()}
    if len(dtypes) == 1:
        dtype = input.dtype
    else:
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    inputs = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors]
    output = torch.onnx.ops.symbolic(
        op_type,
        inputs,
        # Integers, where torch.export has symbols of fixed sizes.
        {k: int(v) if isinstance(v, torch.SymInt) else v for k, v in attributes.items()},
        dtype=dtype,
        shape=shape,
        version=22 if dtype == torch.bfloat16 else version,
    )
    return output.to(input.device, input.dtype)  # PyTorch puts it on the CPU
