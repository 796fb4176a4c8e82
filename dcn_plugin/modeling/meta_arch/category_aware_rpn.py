# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The category-aware RPN, a one-stage detector (section 2.3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_backbone
from detectron2.structures import ImageList, Instances

from ..model_config_checks import check_only_boxes
from ..proposal_generator import CategoryDetector


@META_ARCH_REGISTRY.register()
class CategoryAwareRPN(GeneralizedRCNN):
    """A one-stage detector: an RPN that classifies its anchors.

    It is a `GeneralizedRCNN` whose proposal generator returns the detections, so test-time
    augmentation, tracing and visualization work as for any `GeneralizedRCNN`.
    """

    generator = CategoryDetector

    @configurable
    def __init__(self, **parts: Any) -> None:
        """Makes a `GeneralizedRCNN` without RoI heads.

        Args:
            parts: the other arguments of `GeneralizedRCNN`.
        """
        super().__init__(roi_heads=NoHeads(), **parts)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads the keys of `CategoryDetector`, and of `GeneralizedRCNN` without RoI heads.

        Args:
            cfg: the config.
        """
        check_only_boxes(cfg, cls.__name__)
        backbone = build_backbone(cfg)
        return {
            "backbone": backbone,
            "proposal_generator": cls.generator(cfg, backbone.output_shape()),
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }


class NoHeads(nn.Module):
    """RoI heads that return the detections of the proposal generator unchanged."""

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Returns the proposals, and no losses.

        Args:
            images: not used.
            features: not used.
            proposals: detections of each image.
            targets: not used.
        """
        return proposals, {}
