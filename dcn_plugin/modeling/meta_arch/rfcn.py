# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""R-FCN."""

from __future__ import annotations

from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN


@META_ARCH_REGISTRY.register()
class RFCN(GeneralizedRCNN):
    """Detectron2's `GeneralizedRCNN` under the name that R-FCN has.

    With MODEL.ROI_HEADS.NAME "RFCNROIHeads" it is R-FCN, which runs under Detectron2's name too.
    """
