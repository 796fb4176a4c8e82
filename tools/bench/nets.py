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
    """A config with the keys that make it plain or deformable."""

    name: str
    config: str  # below configs/
    plain: tuple[str, ...]
    deformable: tuple[str, ...]
    paper_times_plain: float | None = None  # net forward time in Table 4
    size: tuple[int, int] = (600, 1000)
    shared: tuple[str, ...] = ()
    kind = "nets"


PLAIN_RES5 = ("MODEL.RESNETS.DEFORM_LAST", "[0, 0, 0, 0]")
DEFORM_RES5 = ("MODEL.RESNETS.DEFORM_LAST", "[0, 0, 0, 3]")
DEFORM_BOTH = (*DEFORM_RES5, "MODEL.ROI_BOX_HEAD.DEFORM", "True")
CONFIG = "COCO-Detection/faster_rcnn_R_50_DC5_dconv3.yaml"


def on_reduced(channels: int, **keys: str) -> tuple[str, ...]:
    """Returns the keys of MODEL that turn a Faster R-CNN config into the paper's R-101 models."""
    settings = {
        "RESNETS.DEPTH": "101",
        "RESNETS.OUT_FEATURES": "['res4', 'reduced']",
        "RESNETS.REDUCED_CHANNELS": str(channels),
        "RPN.IN_FEATURES": "['res4']",
        "RPN.CONV_DIMS": "[512]",
        "ROI_HEADS.IN_FEATURES": "['reduced']",
        "SEM_SEG_HEAD.IN_FEATURES": "['reduced']",
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    return tuple(word for name, value in settings.items() for word in (f"MODEL.{name}", value))


FASTER_RCNN = on_reduced(256, ROI_HEADS__NAME="DeformROIHeads")
R_FCN = on_reduced(1024, META_ARCHITECTURE="RFCN", ROI_HEADS__NAME="RFCNROIHeads")
DEEPLAB = on_reduced(
    1024,
    META_ARCHITECTURE="DeepLab",
    RESNETS__OUT_FEATURES="['reduced']",
    SEM_SEG_HEAD__NAME="DeepLabHead",
    SEM_SEG_HEAD__NUM_CLASSES="19",
)
NETS = (
    Net("Faster R-CNN R-101", CONFIG, PLAIN_RES5, DEFORM_BOTH, 1.31, shared=FASTER_RCNN),
    Net("R-FCN R-101", CONFIG, PLAIN_RES5, DEFORM_BOTH, 1.18, shared=R_FCN),
    Net("DeepLab R-101", CONFIG, PLAIN_RES5, DEFORM_RES5, 1.075, (1024, 2048), DEEPLAB),
)

TINY = {
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "32",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "16",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "8",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
}
QUICK_NETS = (
    Net(
        "small Faster R-CNN",
        CONFIG,
        PLAIN_RES5,
        DEFORM_RES5,
        size=(96, 128),
        shared=tuple(word for pair in TINY.items() for word in pair),
    ),
)

# Section 4 of the paper, where Detectron2's defaults differ.
PAPER = {
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 300,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 300,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 128,
}


def functions_of(net: Net, device: str, direction: str) -> dict[Rival, Callable[[], object]]:
    """Builds the plain and the deformable model; returns a function that runs one step of each."""
    from dcn_plugin.compat import ignore_known_warnings

    ignore_known_warnings()
    make = {INFERENCE: inference, TRAINING: training_step}[direction]
    overrides = {PLAIN: net.plain, OURS: net.deformable}
    return {
        Rival(name): make(config_of(net, device, words), net.size)
        for name, words in overrides.items()
    }


def config_of(net: Net, device: str, overrides: tuple[str, ...]) -> CfgNode:
    """Reads a config; no weights are loaded, and the learning rate is zero."""
    from detectron2.config import get_cfg

    from dcn_plugin import add_dcn_config

    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / net.config))
    fixed = {**PAPER, "MODEL.WEIGHTS": "", "MODEL.DEVICE": device, "SOLVER.BASE_LR": 0.0}
    cfg.merge_from_list([word for pair in fixed.items() for word in pair])
    cfg.merge_from_list([*net.shared, *overrides])
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
