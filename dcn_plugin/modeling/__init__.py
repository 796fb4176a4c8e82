# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Components for Detectron2: backbones, poolers, heads and meta-architectures."""

from .backbone import (
    AlignedInceptionResNet,
    DeformResNet,
    build_aligned_inception_resnet_backbone,
    build_deform_resnet_backbone,
    build_deform_resnet_fpn_backbone,
    build_retinanet_deform_resnet_fpn_backbone,
)
from .meta_arch import RFCN, CategoryAwareRPN, DeepLab
from .model_config_checks import check_deformable
from .poolers import AverageROIPooler, DeformROIPooler
from .proposal_generator import CategoryRPN
from .roi_heads import DeformROIHeads, RFCNROIHeads

__all__ = [
    "RFCN",
    "AlignedInceptionResNet",
    "AverageROIPooler",
    "CategoryAwareRPN",
    "CategoryRPN",
    "DeepLab",
    "DeformROIHeads",
    "DeformROIPooler",
    "DeformResNet",
    "RFCNROIHeads",
    "build_aligned_inception_resnet_backbone",
    "build_deform_resnet_backbone",
    "build_deform_resnet_fpn_backbone",
    "build_retinanet_deform_resnet_fpn_backbone",
    "check_deformable",
]
