# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Evaluators that add the metrics of the paper's tables to Detectron2's."""

from __future__ import annotations

from detectron2 import evaluation as d2_evaluation
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from .coco import DetectionEvaluator
from .sem_seg import (
    LABEL_MAPS,
    MeanIoUEvaluator,
    NetworkSizeMapper,
    NetworkSizeSemSegEvaluator,
    at_network_size,
)
from .voc import VOCEvaluator

__all__ = [
    "DetectionEvaluator",
    "MeanIoUEvaluator",
    "NetworkSizeMapper",
    "NetworkSizeSemSegEvaluator",
    "VOCEvaluator",
    "at_network_size",
    "build_evaluator",
]


def build_evaluator(
    cfg: CfgNode, dataset_name: str, output_folder: str
) -> d2_evaluation.DatasetEvaluator:
    """Builds the evaluator for the `evaluator_type` of a data set, as Detectron2's train_net.py.

    Unlike there, `coco` and `pascal_voc` have AP at IoU 0.7 too, and `cityscapes_sem_seg` is
    evaluated by Detectron2's `SemSegEvaluator`, which does not need cityscapesscripts.

    Args:
        cfg: with TEST.SEM_SEG_AT_NETWORK_SIZE and TEST.KEYPOINT_OKS_SIGMAS.
        dataset_name: a registered data set.
        output_folder: where the evaluators write predictions.

    Raises:
        NotImplementedError: if the type is another. `DefaultTrainer.test` then skips the data set.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type in ("coco", "coco_panoptic_seg"):
        sigmas = cfg.TEST.KEYPOINT_OKS_SIGMAS
        coco = DetectionEvaluator(dataset_name, output_dir=output_folder, kpt_oks_sigmas=sigmas)
        if evaluator_type == "coco":
            return coco
        sem_seg = MeanIoUEvaluator(dataset_name, output_dir=output_folder)
        panoptic = d2_evaluation.COCOPanopticEvaluator(dataset_name, output_folder)
        return d2_evaluation.DatasetEvaluators([sem_seg, coco, panoptic])
    if at_network_size(cfg, dataset_name):
        return NetworkSizeSemSegEvaluator(dataset_name, output_dir=output_folder)
    if evaluator_type in LABEL_MAPS:
        return MeanIoUEvaluator(dataset_name, output_dir=output_folder)
    if evaluator_type == "cityscapes_instance":
        return d2_evaluation.CityscapesInstanceEvaluator(dataset_name)
    if evaluator_type == "pascal_voc":
        return VOCEvaluator(dataset_name, output_folder)
    if evaluator_type == "lvis":
        return d2_evaluation.LVISEvaluator(dataset_name, output_dir=output_folder)
    raise NotImplementedError(
        f"no evaluator for {dataset_name}, whose evaluator_type is {evaluator_type!r}: override "
        "Trainer.build_evaluator, or set evaluator_type in its metadata"
    )
