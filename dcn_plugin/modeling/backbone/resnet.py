# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's ResNet with deformable convolutions in its last blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import (
    BasicStem,
    BottleneckBlock,
    CNNBlockBase,
    ResNet,
)

from .deform_block import DeformBasicBlock, DeformBottleneckBlock, DilatedBasicBlock
from .reduced import ReducedResNet
from .settings import (
    blocks_per_stage,
    check_features,
    deformable_blocks,
    offset_settings,
    stage_layout,
)

# Blocks of res2, res3, res4 and res5.
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC = (18, 34)  # depths with two 3x3 convolutions to a block


@BACKBONE_REGISTRY.register()
def build_deform_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet whose last blocks are deformable.

    Args:
        cfg: with MODEL.RESNETS.DEFORM_LAST, BLOCKS, REDUCED_CHANNELS and REDUCED_NORM, and
            Detectron2's own keys of MODEL.RESNETS.
        input_shape: of the images.

    Returns:
        Detectron2's ResNet; features and weights have its names. `reduced` is one more feature.

    Raises:
        ValueError: if a key's value does not fit; the message names the key.
    """
    resnets = cfg.MODEL.RESNETS
    check_features(resnets)
    blocks = _blocks_per_stage(resnets)
    deformable = deformable_blocks(resnets, blocks, f"a ResNet-{resnets.DEPTH}")
    offsets = offset_settings(resnets, deformable, [_channels(resnets, i)[1] for i in range(4)])
    stem = BasicStem(
        in_channels=input_shape.channels,
        out_channels=resnets.STEM_OUT_CHANNELS,
        norm=resnets.NORM,
    )
    in_channels = resnets.STEM_OUT_CHANNELS
    stages = []
    for index in range(4):
        stages.append(
            _make_stage(resnets, index, in_channels, blocks[index], deformable[index], offsets)
        )
        in_channels = stages[-1][-1].out_channels
    return ReducedResNet(
        stem,
        stages,
        out_features=resnets.OUT_FEATURES,
        reduced_channels=resnets.REDUCED_CHANNELS,
        reduced_norm=resnets.REDUCED_NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


@BACKBONE_REGISTRY.register()
def build_deform_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a feature pyramid on a ResNet whose last blocks are deformable.

    Args:
        cfg: with the keys of `build_deform_resnet_backbone`, and Detectron2's MODEL.FPN. The
            authors' five deformable layers are DEFORM_LAST [0, 1, 1, 3].
        input_shape: of the images.

    Returns:
        Detectron2's FPN, with one level more by max-pooling.

    Raises:
        ValueError: if a key's value does not fit; the message names the key.
    """
    if cfg.MODEL.RESNETS.RES5_DILATION != 1:
        raise ValueError(
            "MODEL.RESNETS.RES5_DILATION must be 1 under a feature pyramid, whose res5 has stride "
            f"32, got {cfg.MODEL.RESNETS.RES5_DILATION}"
        )
    return FPN(
        bottom_up=build_deform_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def _blocks_per_stage(resnets: CfgNode) -> Sequence[int]:
    depth = resnets.DEPTH
    if depth not in BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH must be one of {sorted(BLOCKS)}, got {depth}")
    if depth in BASIC:
        for key, needed in (
            ("RES2_OUT_CHANNELS", resnets.STEM_OUT_CHANNELS),
            ("NUM_GROUPS", 1),
        ):
            if resnets[key] != needed:
                raise ValueError(
                    f"MODEL.RESNETS.{key} must be {needed} at depth {depth}, got {resnets[key]}"
                )
    return blocks_per_stage(resnets, BLOCKS[depth])


def _channels(resnets: CfgNode, index: int) -> tuple[int, int]:
    """Returns the channels of a stage, and those that its last 3x3 convolutions read."""
    out_channels = resnets.RES2_OUT_CHANNELS * 2**index
    if resnets.DEPTH in BASIC:
        return out_channels, out_channels
    return out_channels, resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**index


def _make_stage(
    resnets: CfgNode,
    index: int,
    in_channels: int,
    blocks: int,
    deformable: int,
    offsets: dict[str, Any],
) -> list[CNNBlockBase]:
    first_stride, dilation = stage_layout(resnets, index)
    out_channels, width = _channels(resnets, index)
    shared: dict[str, Any] = {"norm": resnets.NORM, "dilation": dilation}
    if resnets.DEPTH in BASIC:
        classes = (DilatedBasicBlock, DeformBasicBlock)
    else:
        classes = (BottleneckBlock, DeformBottleneckBlock)
        shared |= {
            "bottleneck_channels": width,
            "num_groups": resnets.NUM_GROUPS,
            "stride_in_1x1": resnets.STRIDE_IN_1X1,
        }
    stage: list[CNNBlockBase] = []
    for block_class, count, extra in zip(
        classes, (blocks - deformable, deformable), ({}, offsets), strict=True
    ):
        stage += ResNet.make_stage(
            block_class,
            count,
            in_channels=stage[-1].out_channels if stage else in_channels,
            out_channels=out_channels,
            stride_per_block=[1 if stage or i else first_stride for i in range(count)],
            **shared,
            **extra,
        )
    return stage
