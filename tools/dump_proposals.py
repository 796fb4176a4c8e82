#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Writes the proposals of a trained RPN to files, for training with precomputed proposals.

    python tools/dump_proposals.py --config-file configs/VOC-Detection/rpn_R_101.yaml \\
        --dataset voc_2007_trainval --dataset voc_2012_trainval --dataset voc_2007_test \\
        --output output/rpn_R_101 MODEL.WEIGHTS output/rpn_R_101/model_final.pth

The config is that of any model with a proposal generator; MODEL.RPN.POST_NMS_TOPK_TEST boxes per
image are written, in one file per data set. Use them with

    MODEL.LOAD_PROPOSALS True MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals
    DATASETS.PROPOSAL_FILES_TRAIN "('output/rpn_R_101/voc_2007_trainval.pkl',)"

and DATASETS.PROPOSAL_FILES_TEST accordingly.
"""

from __future__ import annotations

import argparse
import pickle
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BoxMode, Instances
from detectron2.utils.logger import setup_logger

from dcn_plugin.engine import check_config, load_model, read_config
from dcn_plugin.files import atomic_write, output_folder
from dcn_plugin.messages import UserError, exit_on_error
from dcn_plugin.modeling.proposal_generator import CategoryDetector


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", required=True, help="of a model with an RPN")
    add("--dataset", action="append", required=True, help="a registered name; may be repeated")
    add("--output", type=output_folder, required=True, help="folder for <data set>.pkl")
    add("opts", nargs=argparse.REMAINDER, help="keys and values of the config")
    return parser.parse_args(words)


def read_settings(args: argparse.Namespace) -> CfgNode:
    """Reads and checks the config."""
    cfg = read_config(args)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError("MODEL.LOAD_PROPOSALS must be False: the RPN has to compute the proposals")
    cfg.DATASETS.TEST = tuple(args.dataset)
    check_config(cfg, training=False, stock_trainer=True)
    return cfg


def load_proposal_model(cfg: CfgNode) -> nn.Module:
    """Builds and loads the model; ValueError if it computes no proposals."""
    model = load_model(cfg)
    generator = getattr(model, "proposal_generator", None)
    if generator is None or isinstance(generator, CategoryDetector):  # returns detections
        raise UserError(
            f"--config-file must be of an RPN or a two-stage model, got a {type(model).__name__}"
        )
    return model


@torch.no_grad()
def propose(model: nn.Module, batch: list[dict[str, Any]]) -> list[Instances]:
    """Returns the proposals of each image, in pixels of the original image."""
    if isinstance(model, ProposalNetwork):
        return [result["proposals"] for result in model(batch)]
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    proposals, _ = model.proposal_generator(images, features, None)
    return [
        detector_postprocess(boxes, item["height"], item["width"])
        for boxes, item in zip(proposals, batch, strict=True)
    ]


def collect(cfg: CfgNode, model: nn.Module, dataset: str) -> dict[str, Any]:
    """Returns the proposals of a data set in Detectron2's format, the highest scores first."""
    columns: dict[str, Any] = {"ids": [], "boxes": [], "objectness_logits": []}
    for batch in tqdm(build_detection_test_loader(cfg, dataset), f"proposals in {dataset}"):
        for item, proposals in zip(batch, propose(model, batch), strict=True):
            columns["ids"].append(item["image_id"])
            columns["boxes"].append(proposals.proposal_boxes.tensor.cpu().numpy())
            columns["objectness_logits"].append(proposals.objectness_logits.cpu().numpy())
    return {**columns, "bbox_mode": BoxMode.XYXY_ABS.value}


@exit_on_error("dump_proposals")
def main(words: list[str] | None = None) -> None:
    """Writes the files."""
    args = parse_arguments(words)
    setup_logger()
    cfg = read_settings(args)
    model = load_proposal_model(cfg)
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.dataset:
        proposals = collect(cfg, model, name)
        path = args.output / f"{name}.pkl"
        with atomic_write(path) as temporary:
            temporary.write_bytes(pickle.dumps(proposals))
        count = sum(len(boxes) for boxes in proposals["boxes"])
        print(f"{path}: {count} proposals in {len(proposals['ids'])} images")


if __name__ == "__main__":
    main()
