# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable backbones."""

from .deform_block import DeformBottleneckBlock
from .resnet import build_deform_resnet_backbone

__all__ = ["DeformBottleneckBlock", "build_deform_resnet_backbone"]
