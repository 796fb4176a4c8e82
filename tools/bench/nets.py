# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Whole models, plain and deformable, as in Table 4 of the paper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .cases import OURS, PLAIN, Rival
from .machine import ROOT

if TYPE_CHECKING:
    from detectron2.config import CfgNode

INFERENCE, TRAINING = "inference", "training step"
NET_DTYPES = ("float32", "tf32")


@dataclass(frozen=True)
class Net:
    """A plain model, and the same with deformable convolution and RoI pooling."""

    name: str
    plain: str  # config below configs/
    deformable: str
    paper_times_plain: float | None = None  # net forward time in Table 4
    size: tuple[int, int] = (600, 1000)
    batch = 1
    kind = "nets"


def net(name: str, stem: str, deformable: str, *more: Any) -> Net:
    """Returns the model of two configs whose names begin with `stem`."""
    return Net(name, f"{stem}_plain.yaml", f"{stem}_{deformable}.yaml", *more)


NETS = (
    net("Faster R-CNN R-101", "COCO-Detection/faster_rcnn_R_101", "dconv3_droi", 1.31),
    net("R-FCN R-101", "COCO-Detection/rfcn_R_101", "dconv3_droi", 1.18),
    net("DeepLab R-101", "Cityscapes-Segmentation/deeplab_R_101", "dconv3", 1.075, (1024, 2048)),
)
QUICK_NETS = (net("small R-FCN", "Shapes/rfcn_slim", "dconv3_droi", None, (96, 128)),)

# Sizes of section 4 of the paper; and Detectron2's threshold, since untrained models have scores
# around 1 / classes, of which the paper's 0.001 would keep all.
FIXED = {
    "MODEL.WEIGHTS": "",
    "SOLVER.BASE_LR": 0.0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 300,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 300,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
}


def functions_of(net: Net, device: str, direction: str) -> dict[Rival, Callable[[], object]]:
    """Builds the plain and the deformable model; returns a function that runs one step of each."""
    from dcn_plugin.compat import ignore_known_warnings

    ignore_known_warnings()
    make = {INFERENCE: inference, TRAINING: training_step}[direction]
    configs = {PLAIN: net.plain, OURS: net.deformable}
    return {Rival(name): make(config_of(path, device), net.size) for name, path in configs.items()}


def config_of(path: str, device: str) -> CfgNode:
    """Reads a config; no weights are loaded, and the learning rate is zero."""
    from detectron2.config import get_cfg

    from dcn_plugin import add_dcn_config

    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / path))
    cfg.merge_from_list([word for pair in FIXED.items() for word in pair])
    cfg.MODEL.DEVICE = device
    return cfg


def build(cfg: CfgNode) -> nn.Module:
    """Builds a model with random weights whose activations stay near one.

    With the default initialization each residual block would double the variance: after a hundred
    layers all proposals are outside the image, and the heads would have no work. Offsets have a
    standard deviation of about a pixel, those of RoIs a tenth of the box.
    """
    from detectron2.modeling import build_model

    from dcn_plugin.layers import OffsetBranch

    torch.manual_seed(0)
    model = build_model(cfg)
    for name, module in model.named_modules():
        if name.endswith("stem.conv1.norm"):
            module.weight.data.fill_(0.05)
        elif name.endswith("conv3.norm"):
            module.weight.data.fill_(0.2)
        elif isinstance(module, OffsetBranch):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    return model


def inference(cfg: CfgNode, size: tuple[int, int]) -> Callable[[], object]:
    """Returns a function that runs inference on one image, with post-processing."""
    model, inputs = build(cfg).eval(), [sample(cfg, size)]

    def step() -> object:
        with torch.no_grad():
            return model(inputs)

    return step


def training_step(cfg: CfgNode, size: tuple[int, int]) -> Callable[[], object]:
    """Returns a function that runs forward, backward and optimizer step on one image."""
    from detectron2.solver import build_optimizer
    from detectron2.utils.events import EventStorage

    model, inputs = build(cfg).train(), [sample(cfg, size)]
    optimizer = build_optimizer(cfg, model)

    def step() -> None:
        with EventStorage():
            loss = sum(model(inputs).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def sample(cfg: CfgNode, size: tuple[int, int]) -> dict[str, Any]:
    """Returns a random image with boxes and a class per pixel, for any model."""
    from detectron2.structures import Boxes, Instances

    height, width = size
    torch.manual_seed(0)
    corner = torch.rand(8, 2) * torch.tensor([width, height]) / 2
    boxes = torch.cat([corner, corner * 1.5 + torch.tensor([width, height]) / 8], dim=1)
    classes = torch.randint(cfg.MODEL.ROI_HEADS.NUM_CLASSES, (8,))
    return {
        "image": torch.randint(256, (3, height, width), dtype=torch.uint8),
        "height": height,
        "width": width,
        "instances": Instances(size, gt_boxes=Boxes(boxes), gt_classes=classes),
        "sem_seg": torch.randint(cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, size),
    }
