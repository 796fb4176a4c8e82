# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What training needs beside Detectron2's trainer."""

from .checkpoint import Checkpointer
from .offset_monitor import OffsetMonitor
from .optimizer import build_optimizer
from .trainer import Trainer

__all__ = ["Checkpointer", "OffsetMonitor", "Trainer", "build_optimizer"]
