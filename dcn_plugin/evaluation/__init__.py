# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The figures of the paper's tables."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator

from dcn_plugin.data.check import learns_pixels

from .coco import DetectionEvaluator
from .sem_seg import NetworkSizeMapper, NetworkSizeSemSegEvaluator
from .voc import VOCEvaluator

__all__ = [
    "DetectionEvaluator",
    "NetworkSizeMapper",
    "NetworkSizeSemSegEvaluator",
    "VOCEvaluator",
    "build_evaluator",
    "check_evaluator",
]


DETECTION, VOC, SEGMENTATION = ("coco",), ("pascal_voc",), ("sem_seg", "cityscapes_sem_seg")


def check_evaluator(dataset_name: str) -> str:
    """Checks that there is an evaluator for a data set.

    Args:
        dataset_name: in Detectron2's catalogue.

    Returns:
        its evaluator_type.

    Raises:
        ValueError: if there is none.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in DETECTION + VOC + SEGMENTATION:
        raise ValueError(
            "DATASETS.TEST must name data sets of COCO's, VOC's or Cityscapes' kind, got "
            f"{dataset_name}, whose evaluator_type is {kind!r}"
        )
    return kind


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    """Makes the evaluator of a data set.

    Args:
        cfg: of the network.
        dataset_name: in Detectron2's catalogue.
        folder: for the results.
    """
    kind = check_evaluator(dataset_name)
    if kind in VOC:
        return VOCEvaluator(dataset_name, folder)
    labels = MetadataCatalog.get(dataset_name).get("stuff_classes")
    of_pixels = learns_pixels(cfg.MODEL.META_ARCHITECTURE) and labels is not None
    if kind in DETECTION and not of_pixels:
        return DetectionEvaluator(dataset_name, output_dir=folder)
    at_network_size = cfg.TEST.SEM_SEG_AT_NETWORK_SIZE
    evaluator = NetworkSizeSemSegEvaluator if at_network_size else SemSegEvaluator
    return evaluator(dataset_name, output_dir=folder)
