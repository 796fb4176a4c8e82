# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What is registered with Detectron2, and what its parts are made of."""

from .backbone import (
    AlignedInceptionResNet,
    build_aligned_inception_resnet_backbone,
    build_deform_resnet_backbone,
    build_deform_resnet_fpn_backbone,
)
from .poolers import DeformROIPooler

__all__ = [
    "AlignedInceptionResNet",
    "DeformROIPooler",
    "build_aligned_inception_resnet_backbone",
    "build_deform_resnet_backbone",
    "build_deform_resnet_fpn_backbone",
]
