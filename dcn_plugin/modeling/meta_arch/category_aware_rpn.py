# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The category-aware RPN as a detector."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, build_backbone
from detectron2.structures import ImageList, Instances

from ..config_checks import check_only_boxes
from ..proposal_generator import CategoryDetector
from ..roi_heads.boxes_only import BoxesOnly


@META_ARCH_REGISTRY.register()
class CategoryAwareRPN(GeneralizedRCNN):
    """A detector of one stage: a region proposal network that knows classes.

    Detectron2's `GeneralizedRCNN` whose proposal generator is the whole detector, so that whatever
    takes a `GeneralizedRCNN` (test-time augmentation, tracing, visualization) takes it too.
    """

    generator = CategoryDetector

    @configurable
    def __init__(self, **parts: Any) -> None:
        """Makes the network.

        Args:
            parts: of `GeneralizedRCNN`, but for its heads.
        """
        super().__init__(roi_heads=NoHeads(), **parts)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Reads a config.

        Args:
            cfg: with MODEL.RPN, and of MODEL.ROI_HEADS the number of classes and the thresholds.
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


class NoHeads(BoxesOnly, nn.Module):
    """Stands where a detector of two stages has its heads, and passes detections on."""

    def forward(
        self,
        images: ImageList,
        features: dict[str, Tensor],
        proposals: list[Instances],
        targets: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Returns the proposals, and no losses.

        Args:
            images: not needed.
            features: not needed.
            proposals: of each image.
            targets: not needed.
        """
        return proposals, {}
