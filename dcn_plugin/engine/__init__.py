# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What training needs beside Detectron2's trainer."""

from .checkpoint import Checkpointer
from .image_seeds import ImageSeeds
from .network import lay_out, load_network
from .offset_monitor import OffsetMonitor
from .optimizer import build_optimizer
from .processes import choose_processes, count_processes, stop_with
from .run_folder import describe_run, write_results
from .settings import check_config, read_config
from .trainer import Trainer

__all__ = [
    "Checkpointer",
    "ImageSeeds",
    "OffsetMonitor",
    "Trainer",
    "build_optimizer",
    "check_config",
    "choose_processes",
    "count_processes",
    "describe_run",
    "lay_out",
    "load_network",
    "read_config",
    "stop_with",
    "write_results",
]
