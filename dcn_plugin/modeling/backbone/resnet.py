# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's ResNet with deformable convolutions in its last blocks."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import (
    BasicStem,
    BottleneckBlock,
    CNNBlockBase,
    ResNet,
)

from .deform_block import DeformBottleneckBlock

# Blocks of res2, res3, res4 and res5.
BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@BACKBONE_REGISTRY.register()
def build_deform_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds a ResNet whose last blocks are deformable.

    Args:
        cfg: with MODEL.RESNETS.DEFORM_LAST, and Detectron2's own keys of MODEL.RESNETS.
        input_shape: of the images.

    Returns:
        Detectron2's ResNet; features and weights have its names.

    Raises:
        ValueError: if a key's value does not fit; the message names the key.
    """
    resnets = cfg.MODEL.RESNETS
    stem = BasicStem(
        in_channels=input_shape.channels,
        out_channels=resnets.STEM_OUT_CHANNELS,
        norm=resnets.NORM,
    )
    blocks = _blocks_per_stage(resnets.DEPTH)
    deformable = _deformable_blocks(resnets, blocks)
    in_channels = resnets.STEM_OUT_CHANNELS
    stages = []
    for index in range(4):
        out_channels = resnets.RES2_OUT_CHANNELS * 2**index
        stages.append(
            _make_stage(resnets, index, in_channels, out_channels, blocks, deformable[index])
        )
        in_channels = out_channels
    return ResNet(
        stem,
        stages,
        out_features=resnets.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


def _blocks_per_stage(depth: int) -> Sequence[int]:
    if depth not in BLOCKS:
        raise ValueError(f"MODEL.RESNETS.DEPTH must be one of {sorted(BLOCKS)}, got {depth}")
    return BLOCKS[depth]


def _deformable_blocks(resnets: CfgNode, blocks: Sequence[int]) -> list[int]:
    """Returns how many blocks at the end of each stage are deformable."""
    last = list(resnets.DEFORM_LAST)
    if len(last) != 4 or any(not 0 <= k <= n for k, n in zip(last, blocks, strict=True)):
        raise ValueError(
            "MODEL.RESNETS.DEFORM_LAST must be four numbers from 0 to the blocks of res2 ... res5, "
            f"{list(blocks)} at depth {resnets.DEPTH}, got {last}"
        )
    whole = resnets.DEFORM_ON_PER_STAGE
    return [n if all_of_it else k for k, n, all_of_it in zip(last, blocks, whole, strict=True)]


def _make_stage(
    resnets: CfgNode,
    index: int,
    in_channels: int,
    out_channels: int,
    blocks: Sequence[int],
    deformable: int,
) -> list[CNNBlockBase]:
    dilation = resnets.RES5_DILATION if index == 3 else 1
    if dilation not in (1, 2):
        raise ValueError(f"MODEL.RESNETS.RES5_DILATION must be 1 or 2, got {dilation}")
    first_stride = 1 if index == 0 or dilation == 2 else 2
    shared = {
        "bottleneck_channels": resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP * 2**index,
        "num_groups": resnets.NUM_GROUPS,
        "norm": resnets.NORM,
        "stride_in_1x1": resnets.STRIDE_IN_1X1,
        "dilation": dilation,
    }
    deform = {
        "offset_groups": resnets.DEFORM_NUM_GROUPS,
        "modulated": resnets.DEFORM_MODULATED,
    }
    stage: list[CNNBlockBase] = []
    plain = blocks[index] - deformable
    for block_class, count, extra in (
        (BottleneckBlock, plain, {}),
        (DeformBottleneckBlock, deformable, deform),
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
