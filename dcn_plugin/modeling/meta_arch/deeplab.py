# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""DeepLab: semantic segmentation by a 1x1 convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY, SemanticSegmentor

from dcn_plugin.config import with_dcn_defaults

from ..model_config_checks import check_features


@SEM_SEG_HEADS_REGISTRY.register()
class DeepLabHead(nn.Module):
    """Semantic segmentation head: a 1x1 convolution and bilinear upsampling.

    It works under Detectron2's `SemanticSegmentor`.
    """

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        stride: int,
        num_classes: int,
        ignore_value: int,
        loss_weight: float,
        probabilities: bool,
    ) -> None:
        """Makes the head.

        Args:
            in_feature: name of the input feature.
            in_channels: channels of the input feature.
            stride: stride of the input feature.
            num_classes: number of classes, including background where it is one.
            ignore_value: label of pixels that are left out of the loss.
            loss_weight: factor of the loss.
            probabilities: whether inference returns probabilities instead of logits.
        """
        super().__init__()
        self.in_feature = in_feature
        self.stride = stride
        self.ignore_value = ignore_value
        self.loss_weight = loss_weight
        self.probabilities = probabilities
        self.predictor = Conv2d(in_channels, num_classes, kernel_size=1)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        """Reads IN_FEATURES, NUM_CLASSES, IGNORE_VALUE, LOSS_WEIGHT and PROBABILITIES.

        Args:
            cfg: the config; the keys are below MODEL.SEM_SEG_HEAD.
            input_shape: shapes of the backbone's features.
        """
        head = with_dcn_defaults(cfg).MODEL.SEM_SEG_HEAD
        check_features("MODEL.SEM_SEG_HEAD.IN_FEATURES", head.IN_FEATURES, input_shape, True)
        (in_feature,) = head.IN_FEATURES
        return {
            "in_feature": in_feature,
            "in_channels": input_shape[in_feature].channels,
            "stride": input_shape[in_feature].stride,
            "num_classes": head.NUM_CLASSES,
            "ignore_value": head.IGNORE_VALUE,
            "loss_weight": head.LOSS_WEIGHT,
            "probabilities": head.PROBABILITIES,
        }

    def forward(
        self, features: dict[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Computes the scores of each pixel, or the loss in training.

        Args:
            features: feature maps by name, Tensor[N, C, H, W].
            targets: labels in training, Tensor[N, height, width].

        Returns:
            Tensor[N, classes, H * stride, W * stride] and no losses; in training None and the loss.
        """
        scores = self.predictor(features[self.in_feature]).float()
        scores = F.interpolate(
            scores, scale_factor=self.stride, mode="bilinear", align_corners=False
        )
        if self.training:
            return None, self.losses(scores, targets)
        return scores.softmax(dim=1) if self.probabilities else scores, {}

    def losses(self, scores: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Computes the cross-entropy, averaged over all pixels that are not ignored.

        Args:
            scores: Tensor[N, classes, H', W'], at least as large as the images.
            targets: Tensor[N, height, width].

        Returns:
            `loss_sem_seg`.
        """
        height, width = targets.shape[-2:]
        scores = scores[..., :height, :width]
        loss = F.cross_entropy(scores, targets, ignore_index=self.ignore_value, reduction="sum")
        # The clamp: a batch without labelled pixels contributes 0 instead of NaN.
        labelled = (targets != self.ignore_value).sum().clamp(min=1)
        return {"loss_sem_seg": loss / labelled * self.loss_weight}


@META_ARCH_REGISTRY.register()
class DeepLab(SemanticSegmentor):
    """`SemanticSegmentor`, for MODEL.SEM_SEG_HEAD.NAME DeepLabHead."""
