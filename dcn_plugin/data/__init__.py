# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Data sets beside Detectron2's, and loading that can be resumed."""

from .batches import TrainingBatches, share_of_batch
from .check import ROOT, check_datasets
from .custom_coco import add_custom_data_option, use_custom_data
from .loader import TrainLoader, build_train_loader
from .seeds import image_seed
from .shapes import register_shapes
from .voc import register_voc

__all__ = [
    "TrainLoader",
    "TrainingBatches",
    "add_custom_data_option",
    "build_train_loader",
    "check_datasets",
    "image_seed",
    "share_of_batch",
    "use_custom_data",
]

register_voc(ROOT)
register_shapes(ROOT)
