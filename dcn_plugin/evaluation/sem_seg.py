# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Mean IoU, also at the model's input size, as the authors measured it on VOC."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from detectron2.utils import comm

from dcn_plugin.compat import labels_from_memory
from dcn_plugin.data.faults import DataError
from dcn_plugin.data.file_checks import labels_fault, read_label_map

LABEL_MAPS = ("sem_seg", "cityscapes_sem_seg")  # values of evaluator_type
logger = logging.getLogger(__name__)


def at_network_size(cfg: CfgNode, dataset_name: str) -> bool:
    """Returns whether a data set is evaluated at the model's input size.

    Args:
        cfg: with TEST.SEM_SEG_AT_NETWORK_SIZE; off if `add_dcn_config` was not called.
        dataset_name: a registered data set. Only semantic segmentation is affected: boxes and
            masks of objects are always evaluated at the image's size.
    """
    is_sem_seg = MetadataCatalog.get(dataset_name).get("evaluator_type") in LABEL_MAPS
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

    Labels outside the classes are an error; Detectron2 adds them to the counts of other classes.
    A class whose logit is NaN or infinite is not predicted; a pixel without a finite logit counts
    as wrong. The number of such pixels is logged.
    """

    def __init__(
        self,
        *args: Any,
        sem_seg_loading_fn: Callable[..., np.ndarray] = read_label_map,
        **kwargs: Any,
    ) -> None:
        """Finds the label maps; arguments as in Detectron2's main branch."""
        super().__init__(*args, **kwargs)
        self.sem_seg_loading_fn = sem_seg_loading_fn
        self.non_finite = 0

    def reset(self) -> None:
        """Prepares for an evaluation."""
        super().reset()
        self.non_finite = 0

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Tensor]]) -> None:
        """Adds images to the confusion matrices.

        Args:
            inputs: with `file_name`.
            outputs: with `sem_seg`, Tensor[C, height, width].

        Raises:
            DataError: if a label map cannot be read, or does not fit the classes or the prediction.
        """
        for image, output in zip(inputs, outputs, strict=True):
            labels, logits = self.read_labels(image), output["sem_seg"]
            self._check_labels(labels, image["file_name"], logits.shape[-2:])
            finite = {**output, "sem_seg": self._replace_non_finite(logits, labels)}
            with labels_from_memory(self, image["file_name"], labels):
                super().process([image], [finite])

    def read_labels(self, image: dict[str, Any]) -> np.ndarray:
        """Returns the labels of an image.

        Args:
            image: with `file_name`.
        """
        return self.sem_seg_loading_fn(self.input_file_to_gt_file[image["file_name"]], dtype=int)

    def _check_labels(self, labels: np.ndarray, image: str, size: tuple[int, int]) -> None:
        path = self.input_file_to_gt_file[image]
        if labels.shape != tuple(size):
            raise DataError(
                f"{path} has {' x '.join(map(str, labels.shape))} pixels (height x width), but the "
                f"prediction for {image} has {size[0]} x {size[1]}"
            )
        fault = labels_fault(labels, path, self._num_classes, self._ignore_label)
        if fault:
            raise DataError(fault)

    def _replace_non_finite(self, logits: Tensor, labels: np.ndarray) -> Tensor:
        finite = logits.isfinite()
        if finite.all():
            return logits
        self.non_finite += int((~finite).any(dim=0).sum())
        logits = logits.float().masked_fill(~finite, -torch.inf)
        without = ~finite.any(dim=0)
        wrong = (torch.from_numpy(labels.astype(np.int64)) + 1) % len(logits)
        rows, columns = without.nonzero(as_tuple=True)
        logits[wrong.to(logits.device)[without], rows, columns] = 0
        return logits

    def evaluate(self) -> dict[str, Any] | None:
        """Returns Detectron2's results, in the main process."""
        counts = comm.gather(self.non_finite) if self._distributed else [self.non_finite]
        if sum(counts) > 0:
            logger.warning(
                "%d pixels have a logit that is NaN or infinite: the model has diverged, or "
                "overflows float16. Such a class is not predicted; without any other, a pixel "
                "counts as wrong",
                sum(counts),
            )
        results = super().evaluate()
        if results is None:
            return None
        if self._conf_matrix[:, :-1].any():
            logger.info(describe_mean(results["sem_seg"]))
        else:
            logger.warning(
                "no pixel counts: all labels are %d, which is ignored, so mIoU is NaN",
                self._ignore_label,
            )
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

    def read_labels(self, image: dict[str, Any]) -> np.ndarray:
        """Returns the labels of an image, resized.

        Args:
            image: with `file_name`, and `height` and `width` as `NetworkSizeMapper` returns them.
        """
        labels, size = super().read_labels(image), (image["width"], image["height"])
        if labels.ndim != 2:  # which is an error
            return labels
        resized = Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST)
        return np.array(resized, dtype=int)
