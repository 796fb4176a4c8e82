# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What is registered with Detectron2."""

from .backbone import DeformBottleneckBlock, build_deform_resnet_backbone

__all__ = ["DeformBottleneckBlock", "build_deform_resnet_backbone"]
