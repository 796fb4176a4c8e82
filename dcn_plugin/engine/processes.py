# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Processes that train together: of torchrun, or of Detectron2's `launch`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from detectron2.config import CfgNode
from detectron2.engine.launch import DEFAULT_TIMEOUT, launch
from detectron2.utils import comm

from dcn_plugin.compat import set_local_group, train_on_cpus_too

PATIENCE = 5  # seconds, for the first process to say what is wrong
Main = Callable[[argparse.Namespace, CfgNode | None], Any]


def under_torchrun() -> bool:
    """Returns whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop_with(message: str) -> NoReturn:
    """Ends this process with a line, which one process prints.

    Args:
        message: the line.
    """
    rank = int(os.environ["RANK"]) if under_torchrun() else comm.get_rank()
    if rank > 0:  # is ended while it waits, if the first process has the same to say
        time.sleep(PATIENCE)
    sys.exit(message)


def join_torchrun(backend: str) -> None:
    """Joins the other processes of torchrun.

    Args:
        backend: "nccl" with a GPU for each process of a machine, or "gloo".
    """
    per_machine = int(os.environ["LOCAL_WORLD_SIZE"])
    if backend == "nccl":
        if per_machine > torch.cuda.device_count():
            raise ValueError(
                f"torchrun's --nproc_per_node must be at most the {torch.cuda.device_count()} GPUs "
                f"of this machine, got {per_machine}"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The first process may compute figures for long while the others wait.
    dist.init_process_group(backend, timeout=DEFAULT_TIMEOUT)
    set_local_group(dist.get_world_size() // per_machine, per_machine)
    comm.synchronize()


def leave_processes() -> None:
    """Lets go of the other processes, when all of them are done."""
    if not dist.is_initialized():
        return
    dist.barrier()
    # PyTorch 2.11: gloo's threads need the interpreter's lock to let go of tensors, and
    # destroy_process_group waits for these threads with the lock held.
    time.sleep(0.5)
    dist.destroy_process_group()


def count_processes(args: argparse.Namespace) -> int:
    """Returns how many processes a command line of Detectron2's parser asks for."""
    if under_torchrun():
        return int(os.environ["WORLD_SIZE"])
    return max(1, args.num_gpus) * args.num_machines


def choose_processes(args: argparse.Namespace, cfg: CfgNode) -> Callable[[Main], Any]:
    """Joins the processes of torchrun, or chooses how many GPUs take part.

    Args:
        args: a command line of Detectron2's parser.
        cfg: its config, with MODEL.DEVICE.

    Returns:
        what runs a function in every process: of the command line, and of the config in this
        process, None in others, which have to read it. It returns what the function returned, or
        None where that ran in other processes.

    Raises:
        ValueError: if more GPUs are asked for than there are.
    """
    on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
    if under_torchrun():
        train_on_cpus_too()
        join_torchrun("nccl" if on_gpu else "gloo")
        return partial(_run_and_leave, args, cfg)
    found = torch.cuda.device_count() if on_gpu else 0
    if args.num_gpus > max(found, 1):
        raise ValueError(
            f"--num-gpus must be at most {max(found, 1)} with {found} GPUs to use, got "
            f"{args.num_gpus}; on CPUs torchrun starts several processes"
        )
    return partial(_launch, args, cfg if count_processes(args) == 1 else None)


def _launch(args: argparse.Namespace, cfg: CfgNode | None, main: Main) -> Any:
    try:
        return launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args, cfg),
        )
    except ProcessExitedException as error:  # which has said why
        sys.exit(error.exit_code)


def _run_and_leave(args: argparse.Namespace, cfg: CfgNode, main: Main) -> Any:
    result = main(args, cfg)
    leave_processes()
    return result
