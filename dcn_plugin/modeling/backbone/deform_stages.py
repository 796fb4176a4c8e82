# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Residual stages whose last blocks are deformable, and the config keys that describe them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet

from dcn_plugin.messages import UserError

from .reduced import REDUCED

FEATURES = ("stem", "res2", "res3", "res4", "res5", REDUCED)


def make_deform_stages(
    plain: type[CNNBlockBase],
    deformable: type[CNNBlockBase],
    *,
    in_channels: int,
    blocks: Sequence[int],
    deform_last: Sequence[int],
    modulated: bool,
    offset_groups: int,
    offset_channels: int,
    res5_dilation: int,
    out_features: Sequence[str] | None,
    block_args: Sequence[dict[str, Any]],
) -> list[list[CNNBlockBase]]:
    """Makes res2 to res5. A dilated res5 keeps the stride of res4, as in Detectron2.

    Args:
        plain: class of the blocks.
        deformable: class of the last blocks of a stage; it takes `modulated` and `offset_groups`.
        in_channels: channels of the stem.
        blocks: number of blocks in each stage.
        deform_last: number of deformable blocks at the end of each stage.
        modulated: whether deformable convolutions have a mask (DCNv2).
        offset_groups: number of offset groups.
        offset_channels: input channels of the narrowest deformable convolution of res2; each
            further stage has twice as many.
        res5_dilation: dilation of the 3x3 convolutions in res5.
        out_features: as in `ResNet`.
        block_args: further arguments of the blocks, for each stage.

    Raises:
        ValueError: if an argument is out of range. The message also names the config key.
    """
    if len(blocks) != 4 or any(not isinstance(n, int) or n < 1 for n in blocks):
        raise UserError(
            "blocks (MODEL.RESNETS.BLOCKS) must be four integers above 0, for res2 to res5, or "
            f"empty for the backbone's default, got {list(blocks)}"
        )
    if len(deform_last) != 4 or any(
        not 0 <= k <= n for k, n in zip(deform_last, blocks, strict=True)
    ):
        raise UserError(
            "deform_last (MODEL.RESNETS.DEFORM_LAST) must be four integers from 0 to the number of "
            f"blocks of each stage, {list(blocks)}, got {list(deform_last)}"
        )
    if res5_dilation < 1:
        raise UserError(
            "res5_dilation (MODEL.RESNETS.RES5_DILATION) must be at least 1 (1: stride 32, more: "
            f"stride 16), got {res5_dilation}"
        )
    for index in range(computed_stages(out_features), 4):
        if deform_last[index]:
            raise UserError(
                f"deform_last (MODEL.RESNETS.DEFORM_LAST) must be 0 for res{index + 2}, which "
                f"out_features (OUT_FEATURES) {list(out_features)} do not need, got "
                f"{list(deform_last)}"
            )
    stages: list[list[CNNBlockBase]] = []
    for index, (count, last) in enumerate(zip(blocks, deform_last, strict=True)):
        channels = offset_channels * 2**index
        if last and (offset_groups < 1 or channels % offset_groups != 0):
            raise UserError(
                "offset_groups (MODEL.RESNETS.DEFORM_NUM_GROUPS) must be a divisor of the "
                f"{channels} input channels of the deformable convolutions in res{index + 2}, got "
                f"{offset_groups}"
            )
        dilation = res5_dilation if index == 3 else 1
        first_stride = 1 if index == 0 or dilation > 1 else 2
        offsets = {"modulated": modulated, "offset_groups": offset_groups}
        stage: list[CNNBlockBase] = []
        for block_class, number, extra in ((plain, count - last, {}), (deformable, last, offsets)):
            stage += ResNet.make_stage(
                block_class,
                number,
                in_channels=stage[-1].out_channels if stage else in_channels,
                stride_per_block=[1 if stage or i else first_stride for i in range(number)],
                dilation=dilation,
                **block_args[index],
                **extra,
            )
        in_channels = stage[-1].out_channels
        stages.append(stage)
    return stages


def computed_stages(out_features: Sequence[str] | None) -> int:
    """Returns how many of res2 to res5 are needed for the features."""
    numbers = [FEATURES.index(name) if name in FEATURES else 4 for name in out_features or ["res5"]]
    return min(max(numbers), 4)


def arguments_from_config(
    cfg: CfgNode, input_shape: ShapeSpec, default_blocks: Sequence[int]
) -> dict[str, Any]:
    """Returns the arguments that `DeformResNet` and `AlignedInceptionResNet` share.

    Args:
        cfg: with every key of `add_dcn_config`.
        input_shape: shape of the images.
        default_blocks: number of blocks in each stage if MODEL.RESNETS.BLOCKS is empty.
    """
    resnets = cfg.MODEL.RESNETS
    blocks = resnets.BLOCKS or default_blocks
    if not resnets.OUT_FEATURES or set(resnets.OUT_FEATURES) - set(FEATURES):
        raise UserError(
            f"MODEL.RESNETS.OUT_FEATURES must be some of {FEATURES}, got {resnets.OUT_FEATURES}"
        )
    deform_last = list(resnets.DEFORM_LAST)
    for index in range(computed_stages(resnets.OUT_FEATURES)):
        if resnets.DEFORM_ON_PER_STAGE[index]:
            deform_last[index] = blocks[index]
    return {
        "blocks": blocks,
        "deform_last": deform_last,
        "modulated": resnets.DEFORM_MODULATED,
        "offset_groups": resnets.DEFORM_NUM_GROUPS,
        "res5_dilation": resnets.RES5_DILATION,
        "out_features": resnets.OUT_FEATURES,
        "in_channels": input_shape.channels,
        "stem_channels": resnets.STEM_OUT_CHANNELS,
        "res2_channels": resnets.RES2_OUT_CHANNELS,
        "norm": resnets.NORM,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
        "reduced_channels": resnets.REDUCED_CHANNELS,
        "reduced_norm": resnets.REDUCED_NORM,
        "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT,
    }
