# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI heads without masks and keypoints."""

from __future__ import annotations

from torch import Tensor

from detectron2.structures import Instances


class BoxesOnly:
    """Mixin of RoI heads that predict boxes only; test-time augmentation calls its method."""

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Returns the instances unchanged: there are no masks or keypoints to predict.

        Args:
            features: not used.
            instances: detections of each image.
        """
        return instances
