# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Hooks and functions for Detectron2's `DefaultTrainer`, and a `Trainer` that combines them."""

from dcn_plugin.messages import UserError, exit_on_error

from .checkpoint import Checkpointer
from .command_line import read_config, read_trained_config
from .config_checks import check_config
from .divergence import DivergenceReport
from .exact_resume import ExactResume, ResumableTrainLoader
from .launch import launch
from .model import load_model
from .offset_monitor import OffsetMonitor
from .optimizer import build_optimizer, get_offset_optimizer_params
from .output_dir import lock_output_dir
from .sigterm import StopOnSigterm
from .trainer import Trainer, write_results

__all__ = [
    "Checkpointer",
    "DivergenceReport",
    "ExactResume",
    "OffsetMonitor",
    "ResumableTrainLoader",
    "StopOnSigterm",
    "Trainer",
    "UserError",
    "build_optimizer",
    "check_config",
    "exit_on_error",
    "get_offset_optimizer_params",
    "launch",
    "load_model",
    "lock_output_dir",
    "read_config",
    "read_trained_config",
    "write_results",
]
