# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's ResNet with deformable convolutions in its last blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.messages import UserError

from .deform_block import DeformBasicBlock, DeformBottleneckBlock, DilatedBasicBlock
from .deform_stages import arguments_from_config, make_deform_stages
from .reduced import ReducedResNet

# Number of blocks in res2 to res5.
BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BASIC_DEPTHS = (18, 34)  # made of blocks with two 3x3 convolutions


class DeformResNet(ReducedResNet):
    """Detectron2's `ResNet` whose last blocks are deformable.

    Features and weights have Detectron2's names. `reduced` is an additional feature, see
    `ReducedResNet`.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        deform_last: Sequence[int] = (0, 0, 0, 0),
        modulated: bool = False,
        offset_groups: int = 1,
        res5_dilation: int = 1,
        out_features: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        in_channels: int = 3,
        stem_channels: int = 64,
        res2_channels: int | None = None,
        num_groups: int = 1,
        width_per_group: int = 64,
        norm: str = "BN",
        stride_in_1x1: bool = True,
        reduced_channels: int = 1024,
        reduced_norm: str = "",
        num_classes: int | None = None,
        freeze_at: int = 0,
    ) -> None:
        """Builds the backbone.

        Args:
            depth: 18, 34, 50, 101 or 152.
            deform_last: number of blocks at the end of res2, res3, res4 and res5 whose 3x3
                convolution is deformable (in a basic block the second one).
            modulated: whether deformable convolutions have a mask (DCNv2).
            offset_groups: number of offset groups.
            res5_dilation: dilation of the 3x3 convolutions in res5; above 1, res5 has stride 16.
            out_features: names of `stem`, `res2` to `res5` and `reduced`; None: the last stage.
            blocks: number of blocks in each stage; None: those of the depth.
            in_channels: channels of the images.
            stem_channels: channels of the stem.
            res2_channels: channels of res2; None: 256, or `stem_channels` for depths 18 and 34.
                Each further stage has twice as many.
            num_groups: groups of the 3x3 convolutions (ResNeXt).
            width_per_group: channels of each group in res2.
            norm: Detectron2's name of the normalization.
            stride_in_1x1: whether the first 1x1 convolution of a bottleneck block has the stride.
            reduced_channels: as in `ReducedResNet`.
            reduced_norm: as in `ReducedResNet`.
            num_classes: as in `ResNet`.
            freeze_at: as in `ResNet`.

        Raises:
            ValueError: if an argument is out of range.
        """
        basic = depth in BASIC_DEPTHS
        if res2_channels is None:
            res2_channels = stem_channels if basic else 256
        if basic and (res2_channels != stem_channels or num_groups != 1):
            raise UserError(
                "res2_channels (MODEL.RESNETS.RES2_OUT_CHANNELS) must be stem_channels "
                f"({stem_channels}) and num_groups (MODEL.RESNETS.NUM_GROUPS) must be 1 at depth "
                f"{depth}, got {res2_channels} and {num_groups}"
            )
        width = res2_channels if basic else num_groups * width_per_group
        block_args: list[dict[str, Any]] = [
            {"out_channels": res2_channels * 2**index, "norm": norm} for index in range(4)
        ]
        if not basic:
            for index, args in enumerate(block_args):
                args["bottleneck_channels"] = width * 2**index
                args["num_groups"] = num_groups
                args["stride_in_1x1"] = stride_in_1x1
        stem = BasicStem(in_channels, stem_channels, norm)  # first, as in Detectron2: seeds
        stages = make_deform_stages(
            DilatedBasicBlock if basic else BottleneckBlock,
            DeformBasicBlock if basic else DeformBottleneckBlock,
            in_channels=stem_channels,
            blocks=blocks or blocks_of_depth(depth),
            deform_last=deform_last,
            modulated=modulated,
            offset_groups=offset_groups,
            offset_channels=width,
            res5_dilation=res5_dilation,
            out_features=out_features,
            block_args=block_args,
        )
        super().__init__(
            stem,
            stages,
            out_features=out_features,
            reduced_channels=reduced_channels,
            reduced_norm=reduced_norm,
            num_classes=num_classes,
            freeze_at=freeze_at,
        )


def blocks_of_depth(depth: int) -> tuple[int, ...]:
    """Returns the number of blocks in res2 to res5."""
    if depth not in BLOCKS:
        raise UserError(f"depth (MODEL.RESNETS.DEPTH) must be one of {sorted(BLOCKS)}, got {depth}")
    return BLOCKS[depth]


@BACKBONE_REGISTRY.register()
def build_deform_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DeformResNet:
    """Builds a `DeformResNet` from a config.

    Args:
        cfg: Detectron2's keys of MODEL.RESNETS, and DEFORM_LAST, BLOCKS, REDUCED_CHANNELS and
            REDUCED_NORM.
        input_shape: shape of the images.

    Raises:
        ValueError: if the value of a key is out of range; the message names the key.
    """
    cfg = with_dcn_defaults(cfg)
    resnets = cfg.MODEL.RESNETS
    return DeformResNet(
        resnets.DEPTH,
        num_groups=resnets.NUM_GROUPS,
        width_per_group=resnets.WIDTH_PER_GROUP,
        **arguments_from_config(cfg, input_shape, blocks_of_depth(resnets.DEPTH)),
    )


@BACKBONE_REGISTRY.register()
def build_deform_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a feature pyramid on a `DeformResNet`, with p6 by max-pooling.

    Args:
        cfg: the keys of `build_deform_resnet_backbone`, and MODEL.FPN.
        input_shape: shape of the images.
    """
    return _build_fpn(cfg, build_deform_resnet_backbone(cfg, input_shape), LastLevelMaxPool())


@BACKBONE_REGISTRY.register()
def build_retinanet_deform_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Builds a feature pyramid on a `DeformResNet`, with p6 and p7 by convolutions on res5.

    Args:
        cfg: the keys of `build_deform_resnet_backbone`, and MODEL.FPN.
        input_shape: shape of the images.
    """
    bottom_up = build_deform_resnet_backbone(cfg, input_shape)
    in_channels = bottom_up.output_shape()["res5"].channels
    return _build_fpn(cfg, bottom_up, LastLevelP6P7(in_channels, cfg.MODEL.FPN.OUT_CHANNELS))


def _build_fpn(cfg: CfgNode, bottom_up: DeformResNet, top_block: nn.Module) -> FPN:
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
