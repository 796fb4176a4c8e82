# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Heads that classify regions: of Faster R-CNN and of R-FCN."""

from .deform_roi_heads import DeformROIHeads
from .rfcn import RFCNOutputLayers, RFCNROIHeads

__all__ = ["DeformROIHeads", "RFCNOutputLayers", "RFCNROIHeads"]
