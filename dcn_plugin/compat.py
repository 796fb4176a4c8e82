# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What differs between Detectron2 0.6 and its main branch, or is wrong in one of them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import detectron2.engine.defaults
from detectron2.utils import comm

# Of checkpoints: what Detectron2's main calls the state of the trainer within `DefaultTrainer`,
# the optimizer's. Version 0.6 does not save it.
INNER_TRAINER = "_trainer"


def set_local_group(machines: int, per_machine: int) -> None:
    """Tells Detectron2 which processes are on one machine, as its `launch` does.

    Args:
        machines: how many there are.
        per_machine: processes on each, in the order of their ranks.
    """
    if hasattr(comm, "create_local_process_group"):  # main
        comm.create_local_process_group(per_machine)
        return
    for machine in range(machines):
        ranks = range(machine * per_machine, (machine + 1) * per_machine)
        group = dist.new_group(list(ranks))  # by every process, also those outside the group
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


def ignore_known_warnings() -> None:
    """Keeps out of what programs print that version 0.6 calls torch.meshgrid the old way."""
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)


_create_ddp_model = detectron2.engine.defaults.create_ddp_model


def create_ddp_model(model: nn.Module, **settings: Any) -> nn.Module:
    """Is Detectron2's function, but does not name a GPU for a model on the CPU."""
    if comm.get_world_size() > 1 and next(model.parameters()).device == torch.device("cpu"):
        settings.setdefault("device_ids", None)
    return _create_ddp_model(model, **settings)


def train_on_cpus_too() -> None:
    """Lets Detectron2's trainer wrap a model on the CPU."""
    detectron2.engine.defaults.create_ddp_model = create_ddp_model
