# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Mean IoU at the size of what the network saw, as the authors measured it on VOC."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from detectron2.data import DatasetMapper
from detectron2.evaluation import SemSegEvaluator


class NetworkSizeMapper(DatasetMapper):
    """Detectron2's mapper, for networks that are not to scale their results back."""

    def __call__(self, record: dict[str, Any]) -> dict[str, Any]:
        """Returns what the network takes; the image's own size is forgotten."""
        record = super().__call__(record)
        record["height"], record["width"] = record["image"].shape[-2:]
        return record


class NetworkSizeSemSegEvaluator(SemSegEvaluator):
    """Detectron2's evaluator, which compares with the truth as the mapper scaled it."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Counts the pixels of images.

        Args:
            inputs: with `sem_seg`, Tensor[H, W], as `NetworkSizeMapper` gives them.
            outputs: with `sem_seg`, Tensor[C, H, W].
        """
        side = self._num_classes + 1
        for image, found in zip(inputs, outputs, strict=True):
            predicted = found["sem_seg"].argmax(dim=0).cpu().numpy()
            truth = image["sem_seg"].numpy().copy()
            truth[truth == self._ignore_label] = self._num_classes
            pairs = np.bincount((side * predicted + truth).ravel(), minlength=side * side)
            self._conf_matrix += pairs.reshape(side, side)
            self._predictions.extend(self.encode_json_sem_seg(predicted, image["file_name"]))
