# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling and position-sensitive RoI pooling, plain and deformable (section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import (
    check_dims,
    check_pairs,
    check_same_device,
    empty_gradient,
    empty_output,
    in_onnx_export,
    pair,
    register_backward,
)
from ._onnx import export_roi_pool

"""
Shape shorthand in this module:

    N: images, C: output channels, H, W: size of the maps
    K: RoIs, P_h, P_w: bins, G_h, G_w: groups of score maps
    n: classes with separate offsets, part_h, part_w: spatial size of the offset tensor
"""

Size = int | Sequence[int]


def deform_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mode: str = "align",
) -> Tensor:
    """Deformable RoI pooling: average pooling of bins shifted by learned offsets (Eq. 6).

    Args:
        input: Tensor[N, C, H, W], contiguous or channels-last; the output has its format.
        boxes: Tensor[K, 5] (batch index, x1, y1, x2, y2) or, per image, Tensor[L, 4], in pixels
            of the image. Any floating dtype. Not differentiable.
        offset: Tensor[K, 2*n, P_h, P_w], relative to the box: a bin is shifted by gamma * offset *
            size of the box. Channel 2k shifts class k along x, channel 2k+1 along y; class k
            is the k-th block of C/n channels. None for plain average pooling.
        output_size: (P_h, P_w), or one number for both.
        spatial_scale: size of the maps relative to the image: 1/16 for features of stride 16.
        sampling_ratio: samples per bin along each axis; 0 takes about one per pixel ("msra": 4).
            Ignored by "bin".
        gamma: factor of the offsets.
        mode: sampling locations. "align": as RoIAlign, centred and clamped at the border; "bin":
            every pixel of a bin with integer borders, zero outside the map (Eq. 5-6); "msra": as
            the operator released by the authors.

    Returns:
        Tensor[K, C, P_h, P_w].

    Raises:
        ValueError: if a shape, size, device or batch index is not valid.
        TypeError: if a dtype is not valid.

    NaN in a box or offset gives NaN for that RoI or bin, but does not propagate to the gradient of
    `input`. A box with an infinite coordinate gives 0. On CUDA an invalid batch index gives NaN.
    Double backward is not supported.

    Example:
        >>> maps, boxes = torch.rand(1, 8, 32, 32), torch.tensor([[0, 10.0, 20.0, 200.0, 300.0]])
        >>> deform_roi_pool(maps, boxes, torch.zeros(1, 2, 7, 7), 7, spatial_scale=1 / 16).shape
        torch.Size([1, 8, 7, 7])
    """
    return deform_ps_roi_pool(
        input, boxes, offset, output_size, spatial_scale, sampling_ratio, gamma, mode, group_size=1
    )


def deform_ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    offset: Tensor | None,
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    gamma: float = 0.1,
    mode: str = "align",
    part_size: Size | None = None,
    group_size: Size | None = None,
) -> Tensor:
    """Deformable position-sensitive RoI pooling: each bin pools its score map.

    Bin (i, j) of output channel c reads score map
    (c * G_h + i * G_h // P_h) * G_w + j * G_w // P_w, and is shifted by the offset at part
    (i * part_h // P_h, j * part_w // P_w).

    Args:
        input: Tensor[N, C*G_h*G_w, H, W].
        boxes: as in `deform_roi_pool`.
        offset: Tensor[K, 2*n, part_h, part_w], as in `deform_roi_pool`; None for plain
            position-sensitive pooling.
        output_size: (P_h, P_w), or one number for both.
        spatial_scale: as in `deform_roi_pool`.
        sampling_ratio: as in `deform_roi_pool`.
        gamma: as in `deform_roi_pool`.
        mode: as in `deform_roi_pool`.
        part_size: (part_h, part_w), by default the output size.
        group_size: (G_h, G_w), by default the output size.

    Returns:
        Tensor[K, C, P_h, P_w].
    """
    boxes, size = join_boxes(boxes, input), pair(output_size)
    part = size if part_size is None else pair(part_size)
    group = size if group_size is None else pair(group_size)
    exporting = torch.compiler.is_compiling() and in_onnx_export()
    run = export_roi_pool if exporting else torch.ops.dcn_plugin.deform_roi_pool
    return run(input, boxes, offset, size, part, group, spatial_scale, sampling_ratio, gamma, mode)


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    mode: str = "align",
) -> Tensor:
    """Average RoI pooling (Eq. 5): `deform_roi_pool` without offsets."""
    return deform_roi_pool(
        input, boxes, None, output_size, spatial_scale, sampling_ratio, mode=mode
    )


def ps_roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    mode: str = "align",
    group_size: Size | None = None,
) -> Tensor:
    """Position-sensitive average RoI pooling: `deform_ps_roi_pool` without offsets."""
    return deform_ps_roi_pool(
        input,
        boxes,
        None,
        output_size,
        spatial_scale,
        sampling_ratio,
        mode=mode,
        group_size=group_size,
    )


def join_boxes(boxes: Tensor | Sequence[Tensor], input: Tensor) -> Tensor:
    """Returns the boxes on `input` as Tensor[K, 5]; an index in a list becomes the batch index."""
    if isinstance(boxes, Tensor):
        return boxes
    for value in (input, *boxes) if isinstance(boxes, (list, tuple)) else (boxes,):
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
            raise TypeError(
                "deform_roi_pool: input must be a tensor, and boxes a tensor or a list of tensors, "
                f"none of them sparse or nested, got {type(value).__name__} of layout "
                f"{getattr(value, 'layout', None)}"
            )
    if input.dim() and len(boxes) > len(input):
        raise ValueError(
            f"deform_roi_pool: a list of boxes must have a tensor per image, {len(input)}, got "
            f"{len(boxes)}, the last one for batch index {len(boxes) - 1}"
        )
    rows = []
    for index, image_boxes in enumerate(boxes):
        if image_boxes.dim() != 2 or image_boxes.shape[1] != 4:
            raise ValueError(
                "deform_roi_pool: boxes in a list must be tensors of four columns "
                f"(x1, y1, x2, y2), got shape {tuple(image_boxes.shape)} at index {index}"
            )
        if image_boxes.itemsize < 4:  # bfloat16 represents integers up to 256 only
            image_boxes = image_boxes.float()
        rows.append(torch.cat([torch.full_like(image_boxes[:, :1], index), image_boxes], dim=1))
    if not rows:
        raise ValueError("deform_roi_pool: a list of boxes must have a tensor per image, got none")
    return torch.cat(rows)


@torch.library.register_fake("dcn_plugin::deform_roi_pool")
def _fake(
    input: Tensor,
    boxes: Tensor,
    offset: Tensor | None,
    output_size: list[int],
    part_size: list[int],
    group_size: list[int],
    *settings: Any,
) -> Tensor:
    op = "deform_roi_pool"
    check_dims(op, 4, input=input)
    if offset is not None:
        check_dims(op, 4, offset=offset)
    check_dims(op, 2, boxes=boxes)
    check_same_device(op, input, boxes=boxes, offset=offset)
    check_pairs(op, 1, output_size=output_size, part_size=part_size, group_size=group_size)
    channels = input.shape[1] // (group_size[0] * group_size[1])
    return empty_output(input, boxes.shape[0], channels, *output_size)


@torch.library.register_fake("dcn_plugin::_deform_roi_pool_backward")
def _fake_backward(
    grad_output: Tensor,
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
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    check_same_device("deform_roi_pool", input, grad_output=grad_output, boxes=boxes, offset=offset)
    return (
        empty_gradient(input, output_mask[0], input),
        empty_gradient(offset, output_mask[1], boxes),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, boxes, offset, *ctx.settings = inputs
    ctx.save_for_backward(input, boxes, offset)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    grad_input, grad_offset = torch.ops.dcn_plugin._deform_roi_pool_backward(
        grad_output, *ctx.saved_tensors, *ctx.settings, output_mask
    )
    return (
        grad_input if output_mask[0] else None,
        None,
        grad_offset if output_mask[1] else None,
        *[None] * len(ctx.settings),
    )


register_backward("deform_roi_pool", _backward, _setup_context)
