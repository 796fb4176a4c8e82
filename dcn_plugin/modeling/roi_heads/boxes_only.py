# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What heads without masks and keypoints have in common."""

from __future__ import annotations

from torch import Tensor

from detectron2.structures import Instances


class BoxesOnly:
    """Heads that have nothing to add to given boxes, as test-time augmentation asks for."""

    def forward_with_given_boxes(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> list[Instances]:
        """Returns the instances as they are: there are no masks or keypoints to add.

        Args:
            features: not needed.
            instances: of each image, with boxes.
        """
        return instances
