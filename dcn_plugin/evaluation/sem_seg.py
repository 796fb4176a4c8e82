# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Mean IoU, also at the model's input size, as the authors measured it on VOC."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from typing import Any

from PIL import Image
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)


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


class MeanIoUEvaluator(SemSegEvaluator):
    """Detectron2's evaluator, which logs the classes that its mIoU is the mean of.

    In Detectron2 0.6 a class that is predicted but does not occur in the ground truth counts as 0;
    its main branch leaves it out. Both give the same where every class occurs, as in VOC val,
    Cityscapes val and Shapes.
    """

    def evaluate(self) -> dict[str, Any] | None:
        """Returns Detectron2's results, in the main process."""
        results = super().evaluate()
        if results is not None:
            logger.info(describe_mean(results["sem_seg"]))
        return results


def describe_mean(results: dict[str, float]) -> str:
    """Says which classes the mean IoU averages over.

    Args:
        results: with `mIoU` and the IoU of each class, NaN if the ground truth has none.
    """
    ious = [value for name, value in results.items() if name.startswith("IoU-")]
    ious = [value for value in ious if not math.isnan(value)]
    text = f"mIoU is the mean over the {len(ious)} classes in the ground truth"
    mean = results["mIoU"]
    only_predicted = round(sum(ious) / mean) - len(ious) if mean > 0 else 0
    if only_predicted > 0:  # fewer than none if classes share a name
        text += (
            f" and {only_predicted} that are only predicted, which count as 0 (Detectron2 0.6); "
            f"without these it is {sum(ious) / len(ious):.4f}"
        )
    return text


class NetworkSizeSemSegEvaluator(MeanIoUEvaluator):
    """Detectron2's evaluator, with the ground truth resized to the size of the predictions."""

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Adds images to the confusion matrices.

        Args:
            inputs: with `file_name`, and `height` and `width` as `NetworkSizeMapper` returns them.
            outputs: with `sem_seg`, Tensor[C, height, width].
        """
        # Detectron2 reads the ground truth of an image from a file. The mapper's `sem_seg` is
        # unsuitable: it has 8 bits. TIFF files keep all dtypes.
        files = self.input_file_to_gt_file
        with tempfile.TemporaryDirectory() as folder:
            self.input_file_to_gt_file = {}
            for index, image in enumerate(inputs):
                path = os.path.join(folder, f"{index}.tiff")
                with PathManager.open(files[image["file_name"]], "rb") as file:
                    labels = Image.open(file)
                    size = image["width"], image["height"]
                    labels.resize(size, Image.Resampling.NEAREST).save(path)
                self.input_file_to_gt_file[image["file_name"]] = path
            super().process(inputs, outputs)
        self.input_file_to_gt_file = files
