# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Losses of RoIs, averaged over images."""

from __future__ import annotations

from torch import Tensor

from detectron2.layers import cat
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers, _log_classification_stats
from detectron2.structures import Instances


class ImageMeanOutputLayers(FastRCNNOutputLayers):
    """Detectron2's `FastRCNNOutputLayers`, to whose losses every image contributes the same.

    Detectron2 averages over the RoIs of a process: an image then weighs more beside one with fewer
    RoIs, and it matters which images share a process. The authors have one image to a process.
    """

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """Computes the mean of the images' losses.

        Args:
            predictions: logits and deltas of all RoIs.
            proposals: with the truth, of each image.

        Returns:
            `loss_cls` and `loss_box_reg`.
        """
        if len(proposals) < 2:
            return super().losses(predictions, proposals)
        sizes = [len(found) for found in proposals]
        logits, deltas = (part.split(sizes) for part in predictions)
        of_images = [
            super(ImageMeanOutputLayers, self).losses(own, [found])
            for *own, found in zip(logits, deltas, proposals, strict=True)
        ]
        _log_classification_stats(predictions[0], cat([p.gt_classes for p in proposals]))
        return {
            name: sum(losses[name] for losses in of_images) / len(of_images)
            for name in of_images[0]
        }
