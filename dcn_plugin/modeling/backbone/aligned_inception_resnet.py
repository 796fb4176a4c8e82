# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Aligned-Inception-ResNet, plain or deformable (appendix B)."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.messages import UserError

from .deform_stages import arguments_from_config, make_deform_stages
from .inception_block import Activation, DeformInceptionResidualBlock, InceptionResidualBlock
from .reduced import ReducedResNet

BLOCKS = (3, 4, 23, 3)  # in res2 to res5, which table 6 calls conv2 to conv5


class AlignedInceptionResNet(ReducedResNet):
    """Aligned-Inception-ResNet (table 6), built on Detectron2's `ResNet`.

    Every kernel is padded symmetrically, so the receptive field of cell i of a feature of stride s
    is centred on pixel s * i. The blocks are pre-activated; each stage ends with the norm and ReLU
    with which the next one would otherwise begin, so features are taken after the activation.

    `AlignedInceptionResNet(num_classes=1000)` is the ImageNet classifier, whose output is named
    `linear` as in Detectron2's `ResNet`. Its weights load into the backbone.
    """

    def __init__(
        self,
        *,
        deform_last: Sequence[int] = (0, 0, 0, 0),
        modulated: bool = False,
        offset_groups: int = 1,
        res5_dilation: int = 1,
        out_features: Sequence[str] | None = None,
        blocks: Sequence[int] | None = None,
        in_channels: int = 3,
        stem_channels: int = 64,
        res2_channels: int = 256,
        norm: str = "BN",
        stride_in_1x1: bool = True,
        reduced_channels: int = 1024,
        reduced_norm: str = "",
        num_classes: int | None = None,
        freeze_at: int = 0,
    ) -> None:
        """Builds the backbone.

        Args:
            deform_last: number of blocks at the end of res2, res3, res4 and res5 in which the last
                3x3 convolution of each branch is deformable.
            modulated: whether deformable convolutions have a mask (DCNv2).
            offset_groups: number of offset groups.
            res5_dilation: dilation of the 3x3 convolutions in res5; above 1, res5 has stride 16.
            out_features: names of `stem`, `res2` to `res5` and `reduced`; None: the last layer.
            blocks: number of blocks in each stage; None: 3, 4, 23, 3.
            in_channels: channels of the images.
            stem_channels: channels of the 7x7 convolution.
            res2_channels: channels of res2, a multiple of 8; each further stage has twice as many.
            norm: Detectron2's name of the normalization.
            stride_in_1x1: as in `InceptionResidualBlock`.
            reduced_channels: as in `ReducedResNet`.
            reduced_norm: as in `ReducedResNet`.
            num_classes: as in `ResNet`.
            freeze_at: as in `ResNet`.

        Raises:
            ValueError: if an argument is out of range.
        """
        if res2_channels < 8 or res2_channels % 8 != 0:
            raise UserError(
                "res2_channels (MODEL.RESNETS.RES2_OUT_CHANNELS) must be a multiple of 8 in an "
                f"Aligned-Inception-ResNet, got {res2_channels}"
            )
        widths = [res2_channels * 2**index for index in range(4)]
        shared = {"norm": norm, "stride_in_1x1": stride_in_1x1}
        stem = BasicStem(in_channels, stem_channels, norm)  # first, as in Detectron2: seeds
        stages = make_deform_stages(
            InceptionResidualBlock,
            DeformInceptionResidualBlock,
            in_channels=stem_channels,
            blocks=blocks or BLOCKS,
            deform_last=deform_last,
            modulated=modulated,
            offset_groups=offset_groups,
            offset_channels=res2_channels // 8,
            res5_dilation=res5_dilation,
            out_features=out_features,
            block_args=[{"out_channels": width, **shared} for width in widths],
        )
        super().__init__(
            stem,
            [
                [*stage, Activation(width, norm)]
                for stage, width in zip(stages, widths, strict=True)
            ],
            out_features=out_features,
            reduced_channels=reduced_channels,
            reduced_norm=reduced_norm,
            num_classes=num_classes,
            freeze_at=freeze_at,
        )


@BACKBONE_REGISTRY.register()
def build_aligned_inception_resnet_backbone(
    cfg: CfgNode, input_shape: ShapeSpec
) -> AlignedInceptionResNet:
    """Builds an `AlignedInceptionResNet` from a config.

    Args:
        cfg: the keys of `build_deform_resnet_backbone`, except DEPTH, NUM_GROUPS and
            WIDTH_PER_GROUP.
        input_shape: shape of the images.

    Raises:
        ValueError: if the value of a key is out of range; the message names the key.
    """
    cfg = with_dcn_defaults(cfg)
    return AlignedInceptionResNet(**arguments_from_config(cfg, input_shape, BLOCKS))
