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
    """Detectron2's `ROIPooler` with the average RoI pooling of this project on each level."""

    def __init__(
        self,
        output_size: int,
        scales: Sequence[float],
        sampling_ratio: int = 0,
        mode: str = "align",
        **levels: int,
    ) -> None:
        """Makes a pooling for each level.

        Args:
            output_size: bins along each axis.
            scales: of each level relative to the image, powers of two, from fine to coarse.
            sampling_ratio: as in `RoIPool`, like the next.
            mode: where a bin samples.
            levels: `canonical_box_size` and `canonical_level` of `ROIPooler`.
        """
        # The type is replaced below.
        super().__init__(output_size, scales, sampling_ratio, "ROIAlignV2", **levels)
        self.level_poolers = nn.ModuleList(
            RoIPool(output_size, scale, sampling_ratio, mode) for scale in scales
        )

    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pools boxes.

        Args:
            x: Tensor[N, C, H, W] of each level.
            box_lists: of each image.

        Returns:
            Tensor[R, C, output_size, output_size].
        """
        kind = x[0].device.type
        if torch.is_autocast_enabled(kind) and x[0].dtype != torch.float64:
            # ROIPooler makes its result in the dtype of the features, the op in autocast's.
            x = [level.to(torch.get_autocast_dtype(kind)) for level in x]
        return super().forward(x, box_lists)


class DeformROIPooler(AverageROIPooler):
    """Deformable RoI pooling on each level, where `AverageROIPooler` pools plainly.

    Every level has an offset branch of its own, as in the authors' feature pyramid; a box is
    pooled on the level of its size. With one level it is plain deformable RoI pooling.
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
        """Makes a pooling for each level.

        Args:
            in_channels: of every level.
            output_size: as in `AverageROIPooler`, like the next two.
            scales: of each level relative to the image.
            sampling_ratio: samples of a bin along each axis.
            gamma: what offsets are multiplied by.
            mode: where a bin samples.
            levels: as in `AverageROIPooler`.
        """
        super().__init__(output_size, scales, sampling_ratio, mode, **levels)
        self.level_poolers = nn.ModuleList(
            DeformRoIPool(in_channels, output_size, scale, sampling_ratio, gamma, mode)
            for scale in scales
        )
