#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Writes the proposals of a trained RPN to a file, for trainings with fixed proposals.

    python tools/dump_proposals.py --config-file configs/VOC-Detection/rpn_R_101.yaml \
        --dataset voc_2007_trainval --dataset voc_2012_trainval --dataset voc_2007_test \
        --output output/rpn_R_101 MODEL.WEIGHTS output/rpn_R_101/model_final.pth

The config is that of any network with a proposal generator; it keeps MODEL.RPN.POST_NMS_TOPK_TEST
boxes of each image, in one file for each data set. A training takes them by

    MODEL.LOAD_PROPOSALS True MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals
    DATASETS.PROPOSAL_FILES_TRAIN "('output/rpn_R_101/voc_2007_trainval.pkl',)"

and so on for DATASETS.PROPOSAL_FILES_TEST.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN, ProposalNetwork
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BoxMode, Instances
from detectron2.utils.logger import setup_logger

from dcn_plugin.engine import Checkpointer, check_config, read_config
from dcn_plugin.files import atomic_write
from dcn_plugin.modeling import CategoryAwareRPN


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of a network with an RPN")
    parser.add_argument(
        "--dataset",
        action="append",
        required=True,
        help="a name in Detectron2's catalogue; may be given several times",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for <data set>.pkl")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="keys of the config and values")
    return parser.parse_args(words)


def config_of(args: argparse.Namespace) -> CfgNode:
    """Reads and checks the config, whose data sets are those to propose in."""
    cfg = read_config(args)
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError("MODEL.LOAD_PROPOSALS must be False: the RPN is to make the proposals")
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("MODEL.WEIGHTS must name the weights of a trained network, got none")
    cfg.DATASETS.TEST = tuple(args.dataset)
    check_config(cfg, training=False)
    return cfg


def check_proposes(model: nn.Module) -> None:
    """Checks that a network has proposals between its stages."""
    if isinstance(model, CategoryAwareRPN):
        raise ValueError(
            "--config-file must be of a network of two stages; the weights of a CategoryAwareRPN "
            "fit a GeneralizedRCNN with MODEL.PROPOSAL_GENERATOR.NAME CategoryRPN"
        )
    known = isinstance(model, GeneralizedRCNN | ProposalNetwork)
    if not known or model.proposal_generator is None:
        raise ValueError(
            "--config-file must be of a network with a proposal generator, this is a "
            f"{type(model).__name__}"
        )


@torch.no_grad()
def propose(model: nn.Module, batch: list[dict[str, Any]]) -> list[Instances]:
    """Returns the proposals in each image of a batch, in pixels of the image's own size."""
    if isinstance(model, ProposalNetwork):
        return [result["proposals"] for result in model(batch)]
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    found, _ = model.proposal_generator(images, features, None)
    return [
        detector_postprocess(boxes, item["height"], item["width"])
        for boxes, item in zip(found, batch, strict=True)
    ]


def collect(cfg: CfgNode, model: nn.Module, dataset: str) -> dict[str, Any]:
    """Runs over a data set.

    Args:
        cfg: of the model.
        model: with a proposal generator.
        dataset: its name.

    Returns:
        what Detectron2 reads as a file of proposals: the best first, for each image.
    """
    ids, boxes, scores = [], [], []
    for batch in tqdm(build_detection_test_loader(cfg, dataset), f"proposals in {dataset}"):
        for item, found in zip(batch, propose(model, batch), strict=True):
            ids.append(item["image_id"])
            boxes.append(found.proposal_boxes.tensor.cpu().numpy())
            scores.append(found.objectness_logits.cpu().numpy())
    return {
        "ids": ids,
        "boxes": boxes,
        "objectness_logits": scores,
        "bbox_mode": BoxMode.XYXY_ABS.value,
    }


def main(words: list[str] | None = None) -> None:
    """Writes the file."""
    args = parse_arguments(words)
    setup_logger()
    try:
        cfg = config_of(args)
        model = build_model(cfg).eval()
        check_proposes(model)
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    except (OSError, ValueError, KeyError, AssertionError) as error:
        sys.exit(f"dump_proposals: {error}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.dataset:
        found = collect(cfg, model, name)
        path = args.output / f"{name}.pkl"
        with atomic_write(path) as temporary:
            temporary.write_bytes(pickle.dumps(found))
        count = sum(len(boxes) for boxes in found["boxes"])
        print(f"{path}: {count} proposals in {len(found['ids'])} images")


if __name__ == "__main__":
    main()
