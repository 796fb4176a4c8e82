# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Modules of deformable convolution and deformable RoI pooling. Require PyTorch only."""

from .deform_conv import DeformConv2d, DeformConv2dPack
from .make_deformable import make_deformable
from .offset_branch import OffsetBranch, OffsetConv2d, OffsetLinear
from .roi_pool import DeformPSRoIPool, DeformRoIPool, PSRoIPool, RoIPool

__all__ = [
    "DeformConv2d",
    "DeformConv2dPack",
    "DeformPSRoIPool",
    "DeformRoIPool",
    "OffsetBranch",
    "OffsetConv2d",
    "OffsetLinear",
    "PSRoIPool",
    "RoIPool",
    "make_deformable",
]
