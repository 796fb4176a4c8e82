# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The figures of the paper's tables."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator

from .coco import DetectionEvaluator
from .sem_seg import NetworkSizeMapper, NetworkSizeSemSegEvaluator
from .voc import VOCEvaluator

__all__ = [
    "DetectionEvaluator",
    "NetworkSizeMapper",
    "NetworkSizeSemSegEvaluator",
    "VOCEvaluator",
    "build_evaluator",
]


def build_evaluator(cfg: CfgNode, dataset_name: str, folder: str) -> DatasetEvaluator:
    """Makes the evaluator of a data set.

    Args:
        cfg: of the network.
        dataset_name: in Detectron2's catalogue.
        folder: for the results.

    Raises:
        ValueError: if there is none for such data sets.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind == "pascal_voc":
        return VOCEvaluator(dataset_name, folder)
    if kind == "coco":
        return DetectionEvaluator(dataset_name, output_dir=folder)
    if kind in ("sem_seg", "cityscapes_sem_seg"):
        at_network_size = cfg.TEST.SEM_SEG_AT_NETWORK_SIZE
        evaluator = NetworkSizeSemSegEvaluator if at_network_size else SemSegEvaluator
        return evaluator(dataset_name, output_dir=folder)
    raise ValueError(
        f"DATASETS.TEST must name data sets of COCO's, VOC's or Cityscapes' kind, got "
        f"{dataset_name}, whose evaluator_type is {kind!r}"
    )
