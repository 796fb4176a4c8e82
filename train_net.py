#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains and evaluates models, as Detectron2's tools/train_net.py does.

    python train_net.py --config-file configs/VOC-Detection/rfcn_R_101_dconv3.yaml --num-gpus 8
    python train_net.py --config-file … --resume
    python train_net.py --config-file … --eval-only MODEL.WEIGHTS path/to/model.pth
    python train_net.py --config-file … --train-data train.json train/ --test-data val.json val/
    torchrun --nproc_per_node 8 train_net.py --config-file …

Any config key can be set at the end of the command line. OUTPUT_DIR gets config.yaml, log.txt,
metrics.json, checkpoints and results.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import torch.distributed as dist

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from dcn_plugin.data import add_custom_data_option
from dcn_plugin.engine import (
    Checkpointer,
    Trainer,
    check_config,
    exit_on_error,
    launch,
    lock_output_dir,
    read_config,
    write_results,
)
from dcn_plugin.engine.output_dir import require_space, warn_of_training
from dcn_plugin.engine.trainer import uses_tta
from dcn_plugin.env import git_revision


def argument_parser() -> argparse.ArgumentParser:
    """Returns Detectron2's parser with --train-data and --test-data."""
    parser = default_argument_parser(epilog=__doc__)
    for part in ("train", "test"):
        add_custom_data_option(parser, part)
    return parser


def setup(cfg: CfgNode, args: argparse.Namespace) -> CfgNode:
    """Prepares logging, seeds and OUTPUT_DIR; returns the config, frozen."""
    cfg.freeze()
    default_setup(cfg, args)
    logger = setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dcn_plugin")
    if comm.is_main_process():
        logger.info("Revision of dcn_plugin: %s", git_revision())
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains and evaluates, or with --eval-only evaluates; returns the results."""
    with exit_on_error("train_net"):
        cfg = read_config(args)
        require_space(cfg.OUTPUT_DIR)
        return evaluate(cfg, args) if args.eval_only else train(cfg, args)


def train(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains and evaluates; no other run can train in the same OUTPUT_DIR meanwhile."""
    with lock_output_dir(cfg.OUTPUT_DIR):
        trainer = Trainer(setup(cfg, args))
        trainer.resume_or_load(resume=args.resume)
        try:
            return trainer.train()
        except FloatingPointError:  # the log has a report
            sys.exit(1)


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates MODEL.WEIGHTS, or with --resume the last checkpoint."""
    cfg = setup(cfg, args)
    warn_of_training(cfg.OUTPUT_DIR)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(
        model,
        cfg.OUTPUT_DIR,
        allow_unmatched=cfg.MODEL.ALLOW_UNMATCHED_WEIGHTS,
        trained=True,
    )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    results = Trainer.test(cfg, model)
    if uses_tta(cfg):
        results.update(Trainer.test_with_TTA(cfg, model))
    write_results(cfg, results)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def invoke_main() -> None:
    """Checks the config, once on each machine, and starts one process per GPU."""
    args = argument_parser().parse_args()
    with exit_on_error("train_net"):
        torchrun = dist.is_torchelastic_launched()  # it has started all processes
        if not torchrun or int(os.environ["LOCAL_RANK"]) == 0:
            started = max(args.num_gpus, 1) * max(args.num_machines, 1)
            processes = int(os.environ["WORLD_SIZE"]) if torchrun else started
            check_config(
                read_config(args), not args.eval_only, args.resume, processes, stock_trainer=True
            )
    launch(main, args)


if __name__ == "__main__":
    invoke_main()
