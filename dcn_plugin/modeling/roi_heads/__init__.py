# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI heads of Faster R-CNN and R-FCN."""

from .deform_roi_heads import DeformROIHeads
from .rfcn import RFCNOutputLayers, RFCNROIHeads

__all__ = ["DeformROIHeads", "RFCNOutputLayers", "RFCNROIHeads"]
