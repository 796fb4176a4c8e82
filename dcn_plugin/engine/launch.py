# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's `launch`, which knows torchrun too."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from dcn_plugin.compat import LAUNCHES_ON_CPU, create_local_process_group

from .sigterm import exit_after_sigterm, exit_on_sigterm, set_handler


def launch(main_func: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Runs a function in every process: those of torchrun, or else those of --num-gpus.

    After SIGTERM the processes exit with code 143, and so does this one if it has started them.

    Args:
        main_func: called with `args`.
        args: of Detectron2's `default_argument_parser`.
    """
    if dist.is_torchelastic_launched():
        with exit_after_sigterm():
            join_torchrun()
            main_func(args)
        return
    if args.num_gpus < 0 or args.num_machines < 1:
        sys.exit(
            "--num-gpus must be 0 or more and --num-machines 1 or more, got "
            f"{args.num_gpus} and {args.num_machines}"
        )
    gpus = torch.cuda.device_count()
    # Detectron2 asserts the same, with a traceback of every process.
    if args.num_gpus > max(gpus, 1) and not (gpus == 0 and LAUNCHES_ON_CPU):
        sys.exit(
            f"--num-gpus is {args.num_gpus}, but PyTorch finds {gpus} GPUs; "
            "torchrun starts several processes on CPUs"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        sys.exit(
            f"--machine-rank must be at least 0 and below --num-machines, {args.num_machines}, got "
            f"{args.machine_rank}"
        )
    starts_processes = args.num_gpus * args.num_machines > 1
    previous = set_handler(forward_sigterm if starts_processes else exit_on_sigterm)
    try:
        detectron2_launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main_func, args),
        )
    except ProcessExitedException as error:  # the process has printed why
        # As shells report signals, which have negative codes here.
        sys.exit(error.exit_code if error.exit_code >= 0 else 128 - error.exit_code)
    finally:
        set_handler(previous)


def run(main_func: Callable[[argparse.Namespace], Any], args: argparse.Namespace) -> None:
    """Runs a function in a process that `launch` has started."""
    with exit_after_sigterm():
        main_func(args)


def forward_sigterm(number: int, frame: FrameType | None) -> None:
    """Sends SIGTERM to the processes that this one has started; it waits for them elsewhere."""
    processes = multiprocessing.active_children()
    if not processes:
        exit_on_sigterm(number, frame)
    for process in processes:
        process.terminate()


def join_torchrun() -> None:
    """Joins the other processes of torchrun: by NCCL with GPUs, by Gloo without."""
    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The timeout of `launch`: others wait while the first process computes metrics.
    dist.init_process_group("nccl" if use_gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
