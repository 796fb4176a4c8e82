# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""R-FCN."""

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN


@META_ARCH_REGISTRY.register()
class RFCN(GeneralizedRCNN):
    """`GeneralizedRCNN`, for MODEL.ROI_HEADS.NAME RFCNROIHeads."""
