#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trains and evaluates the networks of this project with Detectron2's trainer.

    python train_net.py --config-file configs/COCO-Detection/faster_rcnn_R_50_DC5_dconv3.yaml
    python train_net.py --config-file … --eval-only MODEL.WEIGHTS path/to/model.pth

Any key of the config can be set at the end of the line.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch

import detectron2.utils.comm as comm
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results

from dcn_plugin import add_dcn_config
from dcn_plugin.engine import Checkpointer, Trainer


def setup(args: argparse.Namespace) -> CfgNode:
    """Reads the config, and prepares logging and the output folder."""
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(args.config_file)
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        cfg.MODEL.DEVICE = "cpu"
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    default_setup(cfg, args)
    if not has_gpu:
        logging.getLogger("detectron2").warning("PyTorch finds no GPU: running on the CPU")
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Trains and evaluates, or with --eval-only evaluates and returns the results."""
    cfg = setup(args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        Checkpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def invoke_main() -> None:
    """Parses the command line and starts one process per GPU."""
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus if torch.cuda.is_available() else 1,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )


if __name__ == "__main__":
    invoke_main()
