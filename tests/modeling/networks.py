# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Slim versions of the four networks, and inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from .backbones import slim_config

NETWORKS = ("faster_rcnn", "rfcn", "ca_rpn", "deeplab")
DETECTORS = NETWORKS[:3]


def network_config(network: str, deformable: bool, classes: int = 5) -> CfgNode:
    """Returns a config of one of the four networks on a slim R-50."""
    cfg = slim_config(
        OUT_FEATURES=["reduced"] if network in ("ca_rpn", "deeplab") else ["res4", "reduced"],
        REDUCED_CHANNELS=32,
        DEFORM_LAST=[0, 0, 0, 3] if deformable else [0, 0, 0, 0],
    )
    model = cfg.MODEL
    model.DEVICE = "cpu"
    model.BACKBONE.NAME = "build_deform_resnet_backbone"
    model.ROI_HEADS.NUM_CLASSES = model.SEM_SEG_HEAD.NUM_CLASSES = classes
    model.ROI_HEADS.IN_FEATURES = model.SEM_SEG_HEAD.IN_FEATURES = ["reduced"]
    model.RPN.IN_FEATURES = ["res4"]
    model.RPN.CONV_DIMS = [32]
    model.ROI_BOX_HEAD.DEFORM = deformable
    if network == "faster_rcnn":
        model.ROI_HEADS.NAME = "DeformROIHeads"
        model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        model.ROI_BOX_HEAD.NUM_FC, model.ROI_BOX_HEAD.FC_DIM = 2, 64
        model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    elif network == "rfcn":
        model.META_ARCHITECTURE = "RFCN"
        model.ROI_HEADS.NAME = "RFCNROIHeads"
        model.ROI_BOX_HEAD.POOLER_RESOLUTION = 3
    elif network == "ca_rpn":
        model.META_ARCHITECTURE = "CategoryAwareRPN"
        model.RPN.HEAD_NAME = "CategoryRPNHead"
        model.RPN.IN_FEATURES = ["reduced"]
    else:
        model.META_ARCHITECTURE = "DeepLab"
        model.SEM_SEG_HEAD.NAME = "DeepLabHead"
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.001
    model.ROI_HEADS.NMS_THRESH_TEST = 0.3
    return cfg


def build_network(network: str, deformable: bool, classes: int = 5) -> nn.Module:
    """Builds one of the four networks from random weights."""
    return build_model(network_config(network, deformable, classes))


def ground_truth(size: tuple[int, int], boxes: list[list[float]], classes: list[int]) -> Instances:
    """Returns the ground truth of an image."""
    found = Instances(size)
    found.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return found


def inputs() -> list[dict[str, Tensor | Instances]]:
    """Returns two images of different sizes; the second has no objects."""
    sizes = (100, 130), (90, 140)
    objects = (
        ground_truth(sizes[0], [[10, 20, 60, 70], [30, 5, 100, 90]], [3, 1]),
        ground_truth(sizes[1], [], []),
    )
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
            "instances": shown,
            "sem_seg": torch.randint(0, 5, size, generator=generator),
        }
        for size, shown in zip(sizes, objects, strict=True)
    ]
