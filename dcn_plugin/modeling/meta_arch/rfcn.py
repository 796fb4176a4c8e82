# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""R-FCN."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, GeneralizedRCNN

from ..model_config_checks import check_class
from ..roi_heads import RFCNROIHeads


@META_ARCH_REGISTRY.register()
class RFCN(GeneralizedRCNN):
    """`GeneralizedRCNN` with `RFCNROIHeads`, which also work under `GeneralizedRCNN` itself."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads the keys of `GeneralizedRCNN`.

        Args:
            cfg: the config; MODEL.ROI_HEADS.NAME must be RFCNROIHeads.
        """
        name, heads = cfg.MODEL.ROI_HEADS.NAME, ROI_HEADS_REGISTRY
        check_class("MODEL.ROI_HEADS.NAME", name, heads, RFCNROIHeads, cls.__name__)
        return super().from_config(cfg)
