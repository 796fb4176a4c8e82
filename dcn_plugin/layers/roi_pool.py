# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling and deformable RoI pooling modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool, roi_pool
from ..ops._common import pair
from ..ops.roi_pool import Size, join_boxes
from .offset_branch import OffsetLinear, OffsetMaps, without_autocast

"""
Shape shorthand in this module:

    N: images, C: input channels, C': output channels, H, W: size of the maps
    R: RoIs, P_h, P_w: bins, n: classes with separate offsets
"""

Boxes = Tensor | Sequence[Tensor]
MODES = ("align", "bin", "msra")


class BoxPool(nn.Module):
    """Base class of the RoI pooling modules: arguments of the plain op."""

    def __init__(
        self, output_size: Size, spatial_scale: float, sampling_ratio: int = 0, mode: str = "align"
    ) -> None:
        """Checks and stores the arguments.

        Args:
            output_size: (P_h, P_w), or one number for both.
            spatial_scale: size of the features relative to the image.
            sampling_ratio: as in `dcn_plugin.ops.roi_pool`.
            mode: as in `dcn_plugin.ops.roi_pool`.

        Raises:
            ValueError: if an argument is not valid.
        """
        super().__init__()
        self.output_size = tuple(pair(output_size))
        if len(self.output_size) != 2 or min(self.output_size) < 1:
            raise ValueError(f"output_size must be one or two positive numbers, got {output_size}")
        if not 0 < spatial_scale < float("inf"):
            raise ValueError(f"spatial_scale must be positive and finite, got {spatial_scale}")
        if sampling_ratio < 0:
            raise ValueError(f"sampling_ratio must be 0 or more, got {sampling_ratio}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.mode = mode

    @property
    def bins(self) -> int:
        """Number of bins."""
        return self.output_size[0] * self.output_size[1]

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the plain op."""
        return {
            "output_size": self.output_size,
            "spatial_scale": self.spatial_scale,
            "sampling_ratio": self.sampling_ratio,
            "mode": self.mode,
        }

    def extra_repr(self) -> str:
        """Adds the arguments to the repr of the module."""
        names = (*self.settings, "gamma", "classes")
        return ", ".join(f"{n}={getattr(self, n)!r}" for n in names if hasattr(self, n))


class RoIPool(BoxPool):
    """Average RoI pooling (Eq. 5)."""

    def forward(self, features: Tensor, boxes: Boxes) -> Tensor:
        """Pools the features of boxes.

        Args:
            features: Tensor[N, C, H, W].
            boxes: Tensor[R, 5] (batch index, x1, y1, x2, y2), or Tensor[L, 4] per image.

        Returns:
            Tensor[R, C, P_h, P_w].
        """
        return roi_pool(features, boxes, **self.settings)


class DeformRoIPool(BoxPool):
    """Deformable RoI pooling (section 2.2).

    Plain average pooling, then the fully connected layer `offset_fc`, predicts an offset per bin,
    relative to the size of the box. It is initialized with zeros: initially this is plain average
    pooling. The paper trains it with 0.01 times the learning rate.
    """

    def __init__(
        self,
        in_channels: int,
        output_size: Size,
        spatial_scale: float,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        mode: str = "align",
    ) -> None:
        """Creates the module and its offset branch.

        Args:
            in_channels: C.
            output_size: as in `BoxPool`.
            spatial_scale: as in `BoxPool`.
            sampling_ratio: as in `BoxPool`.
            gamma: factor of the offsets.
            mode: as in `BoxPool`.
        """
        super().__init__(output_size, spatial_scale, sampling_ratio, mode)
        if in_channels < 1:
            raise ValueError(f"in_channels must be positive, got {in_channels}")
        self.gamma = gamma
        self.in_channels = in_channels
        self.offset_fc = OffsetLinear(in_channels * self.bins, 2 * self.bins)

    def forward(self, features: Tensor, boxes: Boxes) -> Tensor:
        """Pools the features of boxes.

        Args:
            features: Tensor[N, C, H, W].
            boxes: Tensor[R, 5] (batch index, x1, y1, x2, y2), or Tensor[L, 4] per image.

        Returns:
            Tensor[R, C, P_h, P_w].
        """
        boxes = join_boxes(boxes, features)
        offset = self.offsets(features, boxes)
        return deform_roi_pool(features, boxes, offset, **self.settings, gamma=self.gamma)

    def offsets(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Predicts the offsets, Tensor[R, 2, P_h, P_w] with x and y.

        Under autocast they are computed in the dtype of the weights.
        """
        if features.shape[1] != self.in_channels:
            raise ValueError(
                f"DeformRoIPool: features must have the {self.in_channels} channels of in_channels,"
                f" got {features.shape[1]}"
            )
        pooled = roi_pool(features, boxes, **self.settings)
        with without_autocast(pooled):
            flat = pooled.flatten(1).to(self.offset_fc.weight.dtype)
            return self.offset_fc(flat).reshape(-1, 2, *self.output_size)


class PSRoIPool(BoxPool):
    """Position-sensitive RoI pooling of score maps.

    The 1x1 convolution `score_conv` predicts a score map for every bin of every output channel.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        output_size: Size,
        spatial_scale: float,
        sampling_ratio: int = 0,
        mode: str = "align",
    ) -> None:
        """Creates the module and its convolution.

        Args:
            in_channels: C.
            out_channels: C'.
            output_size: as in `BoxPool`.
            spatial_scale: as in `BoxPool`.
            sampling_ratio: as in `BoxPool`.
            mode: as in `BoxPool`.
        """
        super().__init__(output_size, spatial_scale, sampling_ratio, mode)
        self.score_conv = nn.Conv2d(in_channels, out_channels * self.bins, 1)
        nn.init.normal_(self.score_conv.weight, std=0.01)
        nn.init.zeros_(self.score_conv.bias)

    def forward(self, features: Tensor, boxes: Boxes) -> Tensor:
        """Pools the features of boxes.

        Args:
            features: Tensor[N, C, H, W].
            boxes: Tensor[R, 5] (batch index, x1, y1, x2, y2), or Tensor[L, 4] per image.

        Returns:
            Tensor[R, C', P_h, P_w].
        """
        return ps_roi_pool(self.score_conv(features), boxes, **self.settings)


class DeformPSRoIPool(PSRoIPool):
    """Deformable position-sensitive RoI pooling (section 2.2).

    A second 1x1 convolution, `offset_conv`, predicts offset maps for every bin of every class. It
    is initialized with zeros: initially this is plain position-sensitive pooling.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        output_size: Size,
        spatial_scale: float,
        sampling_ratio: int = 0,
        gamma: float = 0.1,
        mode: str = "align",
        classes: int = 1,
    ) -> None:
        """Creates the module and its convolutions.

        Args:
            in_channels: C.
            out_channels: C'.
            output_size: as in `BoxPool`.
            spatial_scale: as in `BoxPool`.
            sampling_ratio: as in `BoxPool`.
            gamma: factor of the offsets.
            mode: as in `BoxPool`.
            classes: n, number of blocks of output channels with separate offsets.

        Raises:
            ValueError: if the classes do not divide the output channels.
        """
        if classes < 1 or out_channels % classes != 0:
            raise ValueError(
                f"classes must be a divisor of the {out_channels} output channels, got {classes}"
            )
        super().__init__(
            in_channels, out_channels, output_size, spatial_scale, sampling_ratio, mode
        )
        self.gamma = gamma
        self.classes = classes
        self.offset_conv = OffsetMaps(in_channels, 2 * classes * self.bins, 1)

    def forward(self, features: Tensor, boxes: Boxes) -> Tensor:
        """Pools the features of boxes.

        Args:
            features: Tensor[N, C, H, W].
            boxes: Tensor[R, 5] (batch index, x1, y1, x2, y2), or Tensor[L, 4] per image.

        Returns:
            Tensor[R, C', P_h, P_w].
        """
        boxes = join_boxes(boxes, features)
        offset = self.offsets(features, boxes)
        scores = self.score_conv(features)
        return deform_ps_roi_pool(scores, boxes, offset, **self.settings, gamma=self.gamma)

    def offsets(self, features: Tensor, boxes: Tensor) -> Tensor:
        """Predicts the offsets, Tensor[R, 2*n, P_h, P_w] with x and y of each class.

        Under autocast they are computed in the dtype of the weights.
        """
        with without_autocast(features):
            maps = self.offset_conv(features.to(self.offset_conv.weight.dtype))
            return ps_roi_pool(maps, boxes, **self.settings)
