# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Hooks and functions for Detectron2's `DefaultTrainer`, and a `Trainer` that combines them."""

from .checkpoint import Checkpointer
from .command_line import read_config, read_trained_config
from .config_checks import (
    check_config,
    check_datasets,
    check_device,
    check_weights,
    exit_on_error,
    refuse_proposals,
)
from .exact_resume import ExactResume, ResumableTrainLoader
from .launch import git_revision, join_torchrun, launch
from .model import load_network, set_memory_format
from .offset_monitor import OffsetMonitor
from .optimizer import build_optimizer, get_offset_optimizer_params
from .trainer import Trainer, uses_tta, write_results

__all__ = [
    "Checkpointer",
    "ExactResume",
    "OffsetMonitor",
    "ResumableTrainLoader",
    "Trainer",
    "build_optimizer",
    "check_config",
    "check_datasets",
    "check_device",
    "check_weights",
    "exit_on_error",
    "get_offset_optimizer_params",
    "git_revision",
    "join_torchrun",
    "launch",
    "load_network",
    "read_config",
    "read_trained_config",
    "refuse_proposals",
    "set_memory_format",
    "uses_tta",
    "write_results",
]
