# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""COCO's metrics, and the paper's AP at IoU 0.7."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval

from detectron2.evaluation import COCOEvaluator


class DetectionEvaluator(COCOEvaluator):
    """Detectron2's COCO evaluator, with AP70 beside AP50 and AP75 of boxes and masks."""

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
