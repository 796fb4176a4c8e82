# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Mean IoU at the model's input size, as the authors measured it on VOC."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator


def at_network_size(cfg: CfgNode, dataset_name: str) -> bool:
    """Returns whether a data set is evaluated at the model's input size.

    Args:
        cfg: with TEST.SEM_SEG_AT_NETWORK_SIZE; off if `add_dcn_config` was not called.
        dataset_name: a registered data set. Only semantic segmentation is affected: boxes and
            masks of objects are always evaluated at the image's size.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    is_sem_seg = evaluator_type in ("sem_seg", "cityscapes_sem_seg")
    return is_sem_seg and cfg.TEST.get("SEM_SEG_AT_NETWORK_SIZE", False)


class NetworkSizeMapper(DatasetMapper):
    """Detectron2's mapper, with `height` and `width` set to the size of the resized image."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Returns the model's input; the model does not resize its output to the original size."""
        dataset_dict = super().__call__(dataset_dict)
        dataset_dict["height"], dataset_dict["width"] = dataset_dict["image"].shape[-2:]
        return dataset_dict


class NetworkSizeSemSegEvaluator(SemSegEvaluator):
    """Detectron2's evaluator, with the ground truth that `NetworkSizeMapper` has resized."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Adds images to the confusion matrices.

        Args:
            inputs: with `sem_seg`, Tensor[H, W], as `NetworkSizeMapper` returns it.
            outputs: with `sem_seg`, Tensor[C, H, W].
        """
        # Detectron2 reads the ground truth of an image from a file: main has a hook for another
        # loading function, 0.6 has not. PGM files are uncompressed.
        with tempfile.TemporaryDirectory() as folder:
            for index, image in enumerate(inputs):
                path = os.path.join(folder, f"{index}.pgm")
                Image.fromarray(image["sem_seg"].numpy().astype(np.uint8)).save(path)
                self.input_file_to_gt_file[image["file_name"]] = path
            super().process(inputs, outputs)
