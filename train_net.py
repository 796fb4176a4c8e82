#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains and evaluates the networks of this project with Detectron2's trainer.

    python train_net.py --config-file configs/VOC-Detection/rfcn_R_101_dconv3.yaml --num-gpus 8
    python train_net.py --config-file … --resume
    python train_net.py --config-file … --eval-only MODEL.WEIGHTS path/to/model.pth
    python train_net.py --config-file … --train-data train.json train/ --test-data val.json val/
    torchrun --nproc_per_node 8 train_net.py --config-file …

Any key of the config can be set at the end of the line. OUTPUT_DIR gets the config, the
environment, log.txt, metrics.json, checkpoints and results.json.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from dcn_plugin.data import add_custom_data_option
from dcn_plugin.engine import (
    Checkpointer,
    Trainer,
    check_config,
    choose_processes,
    count_processes,
    describe_run,
    read_config,
    stop_with,
    write_results,
)
from dcn_plugin.engine.trainer import uses_tta
from dcn_plugin.modeling.test_time_augmentation import build_model_with_tta


def argument_parser() -> argparse.ArgumentParser:
    """Returns Detectron2's parser, which also takes data of one's own."""
    parser = default_argument_parser(epilog=__doc__)
    for part in ("train", "test"):
        add_custom_data_option(parser, part)
    return parser


def configure(args: argparse.Namespace, processes: int) -> CfgNode:
    """Reads and checks the config of a command line."""
    cfg = read_config(args)
    check_config(cfg, not args.eval_only, processes, args.resume)
    cfg.freeze()
    return cfg


def setup(args: argparse.Namespace, cfg: CfgNode | None = None) -> CfgNode:
    """Prepares logging and the output folder, and reads the config if this process has not yet."""
    cfg = cfg if cfg is not None else configure(args, comm.get_world_size())
    default_setup(cfg, args)
    describe_run(cfg)
    if not torch.cuda.is_available():
        logging.getLogger("detectron2").warning("PyTorch finds no GPU: running on the CPU")
    return cfg


def evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    """Evaluates a network, and writes the results."""
    results = Trainer.test(cfg, model)
    if uses_tta(cfg):
        results.update(Trainer.test_with_TTA(cfg, model))
    write_results(cfg, results)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args: argparse.Namespace, cfg: CfgNode | None = None) -> dict[str, Any] | None:
    """Trains and evaluates, or with --eval-only evaluates; returns the results."""
    with one_line_errors():
        cfg = setup(args, cfg)
        if args.eval_only:
            model = Trainer.build_model(cfg)
            if uses_tta(cfg):
                build_model_with_tta(cfg, model)  # fails now rather than after the plain test
            checkpointer = Checkpointer(model, save_dir=cfg.OUTPUT_DIR)
            checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
    return evaluate(cfg, model) if args.eval_only else trainer.train()


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Ends the program with one line, of the first process, where settings do not fit."""
    try:
        yield
    except (OSError, ValueError, ModuleNotFoundError) as error:
        stop_with(f"train_net: {error}")


def invoke_main() -> None:
    """Parses the command line and starts one process per GPU."""
    args = argument_parser().parse_args()
    with one_line_errors():
        run = choose_processes(args, configure(args, count_processes(args)))
    run(main)


if __name__ == "__main__":
    invoke_main()
