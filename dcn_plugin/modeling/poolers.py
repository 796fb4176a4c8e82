# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable RoI pooling over the levels of a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from detectron2.modeling.poolers import ROIPooler

from dcn_plugin.layers import DeformRoIPool


class DeformROIPooler(ROIPooler):
    """Detectron2's `ROIPooler` with deformable RoI pooling on each level.

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
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        """Makes a pooling for each level.

        Args:
            in_channels: of every level.
            output_size: bins along each axis.
            scales: of each level relative to the image, powers of two, from fine to coarse.
            sampling_ratio: as in `DeformRoIPool`, like the next two.
            gamma: what offsets are multiplied by.
            mode: where a bin samples.
            canonical_box_size: as in `ROIPooler`.
            canonical_level: likewise.
        """
        super().__init__(
            output_size,
            scales,
            sampling_ratio,
            "ROIAlignV2",  # replaced below
            canonical_box_size,
            canonical_level,
        )
        self.level_poolers = nn.ModuleList(
            DeformRoIPool(in_channels, output_size, scale, sampling_ratio, gamma, mode)
            for scale in scales
        )
