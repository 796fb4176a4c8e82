# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""ResNet with the paper's 1x1 convolution on res5 as an additional feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from detectron2.layers import CNNBlockBase, Conv2d, ShapeSpec, get_norm
from detectron2.modeling.backbone.resnet import ResNet

from dcn_plugin.messages import UserError

REDUCED = "reduced"


class ReducedResNet(ResNet):
    """Detectron2's `ResNet` with the additional feature `reduced`.

    It is a 1x1 convolution on res5 to fewer channels, with ReLU: 1024 channels for R-FCN and
    DeepLab, 256 for Faster R-CNN (section 4.1 and appendix B).
    """

    def __init__(
        self,
        stem: CNNBlockBase,
        stages: Sequence[Sequence[CNNBlockBase]],
        *,
        out_features: Sequence[str] | None = None,
        reduced_channels: int = 1024,
        reduced_norm: str = "",
        num_classes: int | None = None,
        freeze_at: int = 0,
    ) -> None:
        """Builds the backbone, and the 1x1 convolution if `out_features` names `reduced`.

        Args:
            stem: as in `ResNet`.
            stages: as in `ResNet`, with res5 last.
            out_features: as in `ResNet`; may name `reduced` too.
            reduced_channels: channels of `reduced`.
            reduced_norm: norm of `reduced`; empty: none, as in the paper.
            num_classes: as in `ResNet`.
            freeze_at: as in `ResNet`.

        Raises:
            ValueError: if `reduced` has no channels.
        """
        if REDUCED in (out_features or ()) and reduced_channels < 1:
            raise UserError(
                "reduced_channels (MODEL.RESNETS.REDUCED_CHANNELS) must be positive, got "
                f"{reduced_channels}"
            )
        computed = out_features
        if out_features is not None:
            named = ["res5" if name == REDUCED else name for name in out_features]
            computed = list(dict.fromkeys(named))
        super().__init__(stem, stages, num_classes, computed, freeze_at)
        self._returned = list(out_features or self._out_features)
        if REDUCED in self._returned:
            norm = get_norm(reduced_norm, reduced_channels)
            in_channels = self._out_feature_channels["res5"]
            self.reduced = Conv2d(in_channels, reduced_channels, 1, bias=norm is None, norm=norm)
            nn.init.normal_(self.reduced.weight, std=0.01)
            if norm is None:
                nn.init.zeros_(self.reduced.bias)
            self._out_feature_channels[REDUCED] = reduced_channels
            self._out_feature_strides[REDUCED] = self._out_feature_strides["res5"]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the features.

        Args:
            x: images, Tensor[N, C, H, W].

        Returns:
            features by name, Tensor[N, C', H', W'], in the order of `out_features`.
        """
        features = super().forward(x)
        if REDUCED in self._returned:
            features[REDUCED] = F.relu_(self.reduced(features["res5"]))
        return {name: features[name] for name in self._returned}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Returns the channels and stride of each feature by name."""
        return {
            name: ShapeSpec(
                channels=self._out_feature_channels[name], stride=self._out_feature_strides[name]
            )
            for name in self._returned
        }
