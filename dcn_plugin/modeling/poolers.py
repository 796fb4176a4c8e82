# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Average RoI pooling, plain and deformable, over the levels of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from dcn_plugin.layers import DeformRoIPool, RoIPool


class AverageROIPooler(ROIPooler):
    """Detectron2's `ROIPooler` with `dcn_plugin.layers.RoIPool` on each level."""

    def __init__(
        self,
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int = 0,
        mode: str = "align",
        **levels: int,
    ) -> None:
        """Makes a pooling layer for each level.

        Args:
            output_size: number of bins along each axis.
            scales: as in `ROIPooler`.
            sampling_ratio: as in `RoIPool`.
            mode: sampling mode, as in `RoIPool`.
            levels: `canonical_box_size` and `canonical_level` of `ROIPooler`.
        """
        # The poolers of this type are replaced.
        super().__init__(output_size, scales, sampling_ratio, "ROIAlignV2", **levels)
        self.level_poolers = nn.ModuleList(
            RoIPool(output_size, scale, sampling_ratio, mode) for scale in scales
        )

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pools boxes.

        Args:
            x: feature maps of each level, Tensor[N, C, H, W].
            box_lists: boxes of each image.

        Returns:
            Tensor[R, C, output_size, output_size].
        """
        kind = x[0].device.type
        if torch.is_autocast_enabled(kind) and x[0].dtype != torch.float64:
            # ROIPooler's result has the dtype of the features, but the op returns autocast's.
            x = [level.to(torch.get_autocast_dtype(kind)) for level in x]
        return super().forward(x, box_lists)


class DeformROIPooler(AverageROIPooler):
    """`ROIPooler` with deformable RoI pooling on each level.

    Each level has its own offset branch, as in the authors' feature pyramid.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        mode: str = "align",
        **levels: int,
    ) -> None:
        """Makes a pooling layer for each level.

        Args:
            in_channels: channels of every level.
            output_size: as in `AverageROIPooler`.
            scales: as in `AverageROIPooler`.
            sampling_ratio: as in `AverageROIPooler`.
            gamma: factor of the offsets.
            mode: as in `AverageROIPooler`.
            levels: as in `AverageROIPooler`.
        """
        super().__init__(output_size, scales, sampling_ratio, mode, **levels)
        self.level_poolers = nn.ModuleList(
            DeformRoIPool(in_channels, output_size, scale, sampling_ratio, gamma, mode)
            for scale in scales
        )
