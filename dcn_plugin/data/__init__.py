# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Data sets beside Detectron2's."""

import os

from .custom_coco import add_custom_data_option, use_custom_data
from .shapes import register_shapes
from .voc import register_voc

__all__ = ["add_custom_data_option", "use_custom_data"]

ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))  # as in Detectron2's main
register_voc(ROOT)
register_shapes(ROOT)
