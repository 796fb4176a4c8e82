# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Evaluators that add the metrics of the paper's tables to Detectron2's."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    SemSegEvaluator,
)

from .coco import DetectionEvaluator
from .sem_seg import NetworkSizeMapper, NetworkSizeSemSegEvaluator, at_network_size
from .voc import VOCEvaluator

__all__ = [
    "DetectionEvaluator",
    "NetworkSizeMapper",
    "NetworkSizeSemSegEvaluator",
    "VOCEvaluator",
    "at_network_size",
    "build_evaluator",
]


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """Builds the evaluator for the `evaluator_type` of a data set, as Detectron2's train_net.py.

    Unlike there, `coco` and `pascal_voc` have AP at IoU 0.7 too, and `cityscapes_sem_seg` is
    evaluated by `SemSegEvaluator`, which does not need cityscapesscripts.

    Args:
        cfg: with TEST.SEM_SEG_AT_NETWORK_SIZE and TEST.KEYPOINT_OKS_SIGMAS.
        dataset_name: a registered data set.
        output_folder: where the evaluators write predictions.

    Raises:
        NotImplementedError: if the type is another. `DefaultTrainer.test` then skips the data set.
    """
    evaluator_type = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if evaluator_type in ("sem_seg", "cityscapes_sem_seg"):
        at_input_size = at_network_size(cfg, dataset_name)
        evaluator = NetworkSizeSemSegEvaluator if at_input_size else SemSegEvaluator
        return evaluator(dataset_name, output_dir=output_folder)
    if evaluator_type == "cityscapes_instance":
        return CityscapesInstanceEvaluator(dataset_name)
    if evaluator_type == "pascal_voc":
        return VOCEvaluator(dataset_name, output_folder)
    if evaluator_type == "lvis":
        return LVISEvaluator(dataset_name, output_dir=output_folder)
    if evaluator_type not in ("coco", "coco_panoptic_seg"):
        raise NotImplementedError(
            f"no evaluator for {dataset_name}, whose evaluator_type is {evaluator_type!r}: "
            "override Trainer.build_evaluator, or set evaluator_type in its metadata"
        )
    detection = DetectionEvaluator(
        dataset_name, output_dir=output_folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS
    )
    if evaluator_type == "coco":
        return detection
    return DatasetEvaluators(
        [
            SemSegEvaluator(dataset_name, output_dir=output_folder),
            detection,
            COCOPanopticEvaluator(dataset_name, output_folder),
        ]
    )
