# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Differences between Detectron2 0.6 and its main branch, and fixes for either."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch.distributed as dist
from PIL import Image

from detectron2 import data, solver
from detectron2.engine import TrainerBase, defaults
from detectron2.evaluation import SemSegEvaluator, sem_seg_evaluation
from detectron2.utils import comm

# Key of the state of the trainer within `DefaultTrainer`, the optimizer's, in checkpoints of
# Detectron2's main. Version 0.6 does not save it.
INNER_TRAINER = "_trainer"
# Whether Detectron2's `launch` starts several processes on CPUs.
LAUNCHES_ON_CPU = hasattr(comm, "create_local_process_group")
# Values of SOLVER.LR_SCHEDULER_NAME and DATALOADER.SAMPLER_TRAIN.
LR_SCHEDULERS = ["WarmupMultiStepLR", "WarmupCosineLR"]
if hasattr(solver.build, "StepWithFixedGammaParamScheduler"):
    LR_SCHEDULERS.append("WarmupStepWithFixedGammaLR")
TRAIN_SAMPLERS = ["TrainingSampler", "RepeatFactorTrainingSampler"]
if hasattr(data.build, "_build_weighted_sampler"):
    TRAIN_SAMPLERS.append("WeightedTrainingSampler")


def saves_inner_trainer(trainer: TrainerBase) -> bool:
    """Returns whether a trainer's `state_dict` has the optimizer's state."""
    return trainer.__class__.state_dict is not TrainerBase.state_dict


def create_local_process_group(per_machine: int) -> None:
    """Tells Detectron2 which processes run on one machine, as its `launch` does.

    Args:
        per_machine: number of processes on each machine.
    """
    if hasattr(comm, "create_local_process_group"):  # main
        comm.create_local_process_group(per_machine)
        return
    for first in range(0, comm.get_world_size(), per_machine):
        ranks = list(range(first, first + per_machine))
        group = dist.new_group(ranks)  # every process has to call it for every group
        if comm.get_rank() in ranks:
            comm._LOCAL_PROCESS_GROUP = group


@contextmanager
def ddp_on_cpu() -> Iterator[None]:
    """Makes `DefaultTrainer` wrap models on the CPU: by default it names a GPU for each process."""
    original = defaults.create_ddp_model
    defaults.create_ddp_model = partial(original, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = original


@contextmanager
def labels_from_memory(
    evaluator: SemSegEvaluator, image: str, labels: np.ndarray
) -> Iterator[None]:
    """Makes Detectron2's evaluator of semantic segmentation use labels that were read already.

    Args:
        evaluator: whose `process` is called for one image.
        image: path of the image.
        labels: integers below 2^31.
    """
    if hasattr(sem_seg_evaluation, "load_image_into_numpy_array"):  # main
        original = evaluator.sem_seg_loading_fn
        evaluator.sem_seg_loading_fn = lambda path, dtype: labels.astype(dtype)
        try:
            yield
        finally:
            evaluator.sem_seg_loading_fn = original
        return
    original = evaluator.input_file_to_gt_file
    with tempfile.TemporaryDirectory() as folder:  # 0.6 reads files only
        path = os.path.join(folder, "labels.tiff")
        Image.fromarray(labels.astype(np.int32)).save(path)
        evaluator.input_file_to_gt_file = {image: path}
        try:
            yield
        finally:
            evaluator.input_file_to_gt_file = original


def ignore_known_warnings() -> None:
    """Hides the deprecation warning of torch.meshgrid, which Detectron2 0.6 triggers."""
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
