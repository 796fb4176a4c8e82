# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable backbones."""

from .aligned_inception_resnet import (
    AlignedInceptionResNet,
    build_aligned_inception_resnet_backbone,
)
from .deform_block import DeformBasicBlock, DeformBottleneckBlock
from .inception_block import DeformInceptionResidualBlock, InceptionResidualBlock
from .reduced import ReducedResNet
from .resnet import (
    DeformResNet,
    build_deform_resnet_backbone,
    build_deform_resnet_fpn_backbone,
    build_retinanet_deform_resnet_fpn_backbone,
)

__all__ = [
    "AlignedInceptionResNet",
    "DeformBasicBlock",
    "DeformBottleneckBlock",
    "DeformInceptionResidualBlock",
    "DeformResNet",
    "InceptionResidualBlock",
    "ReducedResNet",
    "build_aligned_inception_resnet_backbone",
    "build_deform_resnet_backbone",
    "build_deform_resnet_fpn_backbone",
    "build_retinanet_deform_resnet_fpn_backbone",
]
