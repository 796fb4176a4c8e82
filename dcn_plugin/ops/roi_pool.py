# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling and position-sensitive RoI pooling, plain and deformable (section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._common import (
    check_same_device,
    empty_gradient,
    memory_format_of,
    pair,
    refuse_double_backward,
)

"""
Shape shorthand in this module:

    N: images, C: output channels, H, W: size of the maps
    K: RoIs, P_h, P_w: bins, G_h, G_w: groups of score maps
    n: classes with offsets of their own, part_h, part_w: cells of an offset plane
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
    """Averages each bin of each box, moved by learnt offsets (Eq. 6).

    Args:
        input: Tensor[N, C, H, W], contiguous or channels-last; the output has its format.
        boxes: Tensor[K, 5] (batch index, x1, y1, x2, y2) or, per image, Tensor[L, 4], in pixels
            of the image. Of any floating dtype. They get no gradient.
        offset: Tensor[K, 2*n, P_h, P_w], relative to the box: a bin moves by gamma times offset
            times the size of the box. Plane 2k moves class k along x, plane 2k+1 along y; class k
            is the k-th block of C/n channels. None is plain average pooling.
        output_size: (P_h, P_w), or one number for both.
        spatial_scale: of the maps relative to the image, 1/16 for features of stride 16.
        sampling_ratio: samples per bin along each axis; 0 takes about one per pixel ("msra": 4).
            "bin" reads every pixel and does not ask.
        gamma: what offsets are multiplied by.
        mode: where a bin samples. "align" as RoIAlign does, centred and clamped at the border;
            "bin" every pixel of a bin with whole borders, zero outside the map (Eq. 5-6); "msra"
            as the operator that the authors released.

    Returns:
        Tensor[K, C, P_h, P_w].

    Raises:
        ValueError: if a shape, size, device or batch index does not fit; the message names it.
        TypeError: if a dtype does not fit.

    NaN in a box or offset gives NaN there, and reaches no pixel's gradient; a box with an infinite
    coordinate gives 0. On CUDA a batch index that does not fit gives NaN. There is no double
    backward.

    Example:
        >>> maps, boxes = torch.rand(1, 8, 32, 32), torch.tensor([[0, 10.0, 20.0, 200.0, 300.0]])
        >>> deform_roi_pool(maps, boxes, torch.zeros(1, 2, 7, 7), 7, spatial_scale=1 / 16).shape
        torch.Size([1, 8, 7, 7])
    """
    size = pair(output_size)
    return torch.ops.dcn_plugin.deform_roi_pool(
        input,
        join_boxes(boxes),
        offset,
        size,
        size,
        [1, 1],
        spatial_scale,
        sampling_ratio,
        gamma,
        mode,
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
    """Averages each bin on score maps of its own, moved by learnt offsets.

    Bin (i, j) of output channel c reads score map
    (c * G_h + i * G_h // P_h) * G_w + j * G_w // P_w, and is moved by the offset at part
    (i * part_h // P_h, j * part_w // P_w).

    Args:
        input: Tensor[N, C*G_h*G_w, H, W].
        boxes: as in `deform_roi_pool`.
        offset: Tensor[K, 2*n, part_h, part_w], as in `deform_roi_pool`; None is plain
            position-sensitive pooling.
        output_size: (P_h, P_w), or one number for both.
        spatial_scale: as in `deform_roi_pool`.
        sampling_ratio: likewise.
        gamma: likewise.
        mode: likewise.
        part_size: (part_h, part_w), by default the output size.
        group_size: (G_h, G_w), by default the output size.

    Returns:
        Tensor[K, C, P_h, P_w].
    """
    size = pair(output_size)
    return torch.ops.dcn_plugin.deform_roi_pool(
        input,
        join_boxes(boxes),
        offset,
        size,
        size if part_size is None else pair(part_size),
        size if group_size is None else pair(group_size),
        spatial_scale,
        sampling_ratio,
        gamma,
        mode,
    )


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: Size,
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    mode: str = "align",
) -> Tensor:
    """Averages each bin of each box (Eq. 5): `deform_roi_pool` without offsets."""
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
    """Averages each bin on score maps of its own: `deform_ps_roi_pool` without offsets."""
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


def join_boxes(boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """Returns boxes as Tensor[K, 5]; those of a list get their place in it as batch index."""
    if isinstance(boxes, Tensor):
        return boxes
    for place, of_image in enumerate(boxes):
        if of_image.dim() != 2 or of_image.shape[1] != 4:
            raise ValueError(
                "deform_roi_pool: boxes in a list must be tensors of four columns "
                f"(x1, y1, x2, y2), got shape {tuple(of_image.shape)} at place {place}"
            )
    if not boxes:
        raise ValueError("deform_roi_pool: a list of boxes must have a tensor per image, got none")
    rows = [
        torch.cat([torch.full_like(of_image[:, :1], place), of_image], dim=1)
        for place, of_image in enumerate(_with_room_for_indices(boxes))
    ]
    return torch.cat(rows)


def _with_room_for_indices(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Returns half-precision boxes as float32: bfloat16 counts images up to 256 only."""
    return [of_image.float() if of_image.itemsize < 4 else of_image for of_image in boxes]


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
    check_same_device("deform_roi_pool", input, boxes=boxes, offset=offset)
    channels = input.shape[1] // (group_size[0] * group_size[1])
    return torch.empty(
        (boxes.shape[0], channels, *output_size),
        dtype=input.dtype,
        device=input.device,
        memory_format=memory_format_of(input),
    )


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
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    return (
        empty_gradient(input, wanted[0], input),
        empty_gradient(offset, wanted[1], boxes),
    )


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, boxes, offset, *ctx.settings = inputs
    ctx.save_for_backward(input, boxes, offset)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    grad_input, grad_offset = torch.ops.dcn_plugin._deform_roi_pool_backward(
        grad_output, *ctx.saved_tensors, *ctx.settings, wanted
    )
    return (
        grad_input if wanted[0] else None,
        None,
        grad_offset if wanted[1] else None,
        *[None] * len(ctx.settings),
    )


torch.library.register_autograd(
    "dcn_plugin::deform_roi_pool", _backward, setup_context=_setup_context
)
torch.library.register_autograd(
    "dcn_plugin::_deform_roi_pool_backward", refuse_double_backward("deform_roi_pool")
)
