# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Aligned-Inception-ResNet, plain or deformable (appendix B)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import CNNBlockBase, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from .inception_block import Activation, DeformInceptionResidualBlock, InceptionResidualBlock
from .reduced import ReducedResNet
from .settings import (
    blocks_per_stage,
    check_features,
    deformable_blocks,
    offset_settings,
    stage_layout,
)

BLOCKS = (3, 4, 23, 3)  # of res2, res3, res4 and res5: table 6 calls them conv2 ... conv5
STRIDES = (1, 2, 2, 2)


class AlignedInceptionResNet(ReducedResNet):
    """The network of table 6, on Detectron2's `ResNet`.

    Every kernel is padded by as much on either side, so that the receptive field of cell i of a
    feature of stride s is centred on pixel s * i. Each stage ends with norm and ReLU, with which
    the next would otherwise begin: features are activated.

    By default it is a classifier's body; `AlignedInceptionResNet(num_classes=1000)` is the
    classifier itself, whose output is named `linear`, as in Detectron2's `ResNet`. The weights of
    one load into the other.
    """

    def __init__(
        self,
        *,
        num_classes: int | None = None,
        out_features: Sequence[str] | None = None,
        in_channels: int = 3,
        stem_channels: int = 64,
        res2_channels: int = 256,
        blocks: Sequence[int] = BLOCKS,
        strides: Sequence[int] = STRIDES,
        dilations: Sequence[int] = (1, 1, 1, 1),
        deformable: Sequence[int] = (0, 0, 0, 0),
        offsets: dict[str, Any] | None = None,
        norm: str = "BN",
        stride_in_1x1: bool = True,
        reduced_channels: int = 1024,
        reduced_norm: str = "",
        freeze_at: int = 0,
    ) -> None:
        """Makes the network.

        Args:
            num_classes: of a classifier; None: no classifier.
            out_features: names of stages, `res2` to `res5`, and `reduced`; None: the last there is.
            in_channels: of the images.
            stem_channels: of the 7x7 convolution.
            res2_channels: of the first stage, a multiple of 8; each further one has twice as many.
            blocks: of each stage.
            strides: of each stage.
            dilations: of the 3x3 convolutions of each stage.
            deformable: how many blocks at the end of each stage are.
            offsets: arguments of the deformable blocks, `offset_groups` and `modulated`.
            norm: Detectron2's name of the normalization.
            stride_in_1x1: as in `InceptionResidualBlock`.
            reduced_channels: as in `ReducedResNet`.
            reduced_norm: likewise.
            freeze_at: as in `ResNet`.

        Raises:
            ValueError: if a stage has fewer blocks than shall be deformable.
        """
        if any(not 0 <= k <= n for k, n in zip(deformable, blocks, strict=True)):
            raise ValueError(
                f"deformable must be from 0 to the blocks of each stage, {list(blocks)}, "
                f"got {list(deformable)}"
            )
        stem = BasicStem(in_channels, stem_channels, norm)
        stages: list[list[CNNBlockBase]] = []
        channels = stem_channels
        for index, (count, stride) in enumerate(zip(blocks, strides, strict=True)):
            width = res2_channels * 2**index
            shared = {
                "norm": norm,
                "dilation": dilations[index],
                "stride_in_1x1": stride_in_1x1,
            }
            stage: list[CNNBlockBase] = []
            for block in range(count):
                settings = {**shared, "stride": 1 if block else stride}
                if block < count - deformable[index]:
                    stage.append(InceptionResidualBlock(channels, width, **settings))
                else:
                    settings |= offsets or {}
                    stage.append(DeformInceptionResidualBlock(channels, width, **settings))
                channels = width
            stages.append([*stage, Activation(width, norm)])
        super().__init__(
            stem,
            stages,
            out_features=out_features,
            reduced_channels=reduced_channels,
            reduced_norm=reduced_norm,
            num_classes=num_classes,
            freeze_at=freeze_at,
        )


@BACKBONE_REGISTRY.register()
def build_aligned_inception_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Builds an Aligned-Inception-ResNet whose last blocks are deformable.

    Args:
        cfg: of MODEL.RESNETS it reads what `build_deform_resnet_backbone` does, but for DEPTH,
            NUM_GROUPS and WIDTH_PER_GROUP.
        input_shape: of the images.

    Returns:
        the network, with features `res2` to `res5` and `reduced`.

    Raises:
        ValueError: if a key's value does not fit; the message names the key.
    """
    resnets = cfg.MODEL.RESNETS
    check_features(resnets)
    if resnets.RES2_OUT_CHANNELS < 8 or resnets.RES2_OUT_CHANNELS % 8 != 0:
        raise ValueError(
            "MODEL.RESNETS.RES2_OUT_CHANNELS must be a multiple of 8 in an "
            f"Aligned-Inception-ResNet, got {resnets.RES2_OUT_CHANNELS}"
        )
    blocks = blocks_per_stage(resnets, BLOCKS)
    deformable = deformable_blocks(resnets, blocks, "an Aligned-Inception-ResNet")
    deep = [resnets.RES2_OUT_CHANNELS // 8 * 2**index for index in range(4)]
    strides, dilations = zip(*(stage_layout(resnets, index) for index in range(4)), strict=True)
    return AlignedInceptionResNet(
        out_features=resnets.OUT_FEATURES,
        in_channels=input_shape.channels,
        stem_channels=resnets.STEM_OUT_CHANNELS,
        res2_channels=resnets.RES2_OUT_CHANNELS,
        blocks=blocks,
        strides=strides,
        dilations=dilations,
        deformable=deformable,
        offsets=offset_settings(resnets, deformable, deep),
        norm=resnets.NORM,
        stride_in_1x1=resnets.STRIDE_IN_1X1,
        reduced_channels=resnets.REDUCED_CHANNELS,
        reduced_norm=resnets.REDUCED_NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
