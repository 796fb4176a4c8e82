# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""COCO's metrics, and the paper's AP at IoU 0.7."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from pycocotools.cocoeval import COCOeval

from detectron2.evaluation import COCOEvaluator

from .non_finite import DropNonFinite


class DetectionEvaluator(DropNonFinite, COCOEvaluator):
    """Detectron2's COCO evaluator, with AP70 beside AP50 and AP75 of boxes and masks.

    Ground truth without `iscrowd` is no crowd, and without `area` has that of its mask, or else of
    its box. Detections with NaN or infinity are dropped.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Loads the ground truth; arguments as in Detectron2."""
        super().__init__(*args, **kwargs)
        for annotation in self._coco_api.anns.values():
            annotation.setdefault("iscrowd", 0)
            if "area" not in annotation and annotation["image_id"] in self._coco_api.imgs:
                annotation["area"] = self._area(annotation)

    def _area(self, annotation: dict[str, Any]) -> float:
        if annotation.get("segmentation"):
            return float(mask_util.area(self._coco_api.annToRLE(annotation)))
        _, _, width, height = annotation["bbox"][:4]
        return float(width * height)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, Any]:
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        if iou_type != "keypoints":
            results["AP70"] = float("nan") if coco_eval is None else ap_at_iou(coco_eval, 0.7)
        return results


def ap_at_iou(coco_eval: COCOeval, iou: float) -> float:
    """Returns the AP in percent at one IoU threshold, averaged over classes.

    Args:
        coco_eval: after `accumulate`.
        iou: one of its thresholds.
    """
    index = int(np.flatnonzero(np.isclose(coco_eval.params.iouThrs, iou))[0])
    precision = coco_eval.eval["precision"][index, :, :, 0, -1]  # recall thresholds, classes
    precision = precision[precision > -1]  # -1: classes without ground truth
    return 100 * float(precision.mean()) if precision.size else float("nan")
