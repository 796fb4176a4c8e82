# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Images of random sizes through the slim models of Shapes, forward and backward."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from dcn_plugin.config import add_dcn_config

from .progress import Progress

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("rfcn_dconv3_droi", "faster_rcnn_dconv3_droi", "ca_rpn_dconv3", "deeplab_dconv3")
CLASSES = 8  # of Shapes
SIZES = (16, 256)  # of an image, in pixels


def run(progress: Progress, seed: int) -> None:
    """Runs the models in turn until the time is over, each at least once.

    Args:
        progress: of the part.
        seed: of the weights and the images.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    models = {name: build_slim_model(name) for name in MODELS}
    while not progress.is_over() or any(progress.counts[name] == 0 for name in MODELS):
        for name, model in models.items():
            images = [random_image(rng) for _ in range(2)]
            sizes = [tuple(image["image"].shape[1:]) for image in images]
            try:
                problem = train_and_detect(model, images)
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
            if problem:
                progress.fail(f"{name} on images of {sizes}: {problem}")
            progress.count(name)


def build_slim_model(name: str) -> torch.nn.Module:
    """Builds a model from its config in configs/Shapes; `rfcn_dconv3` is rfcn_slim_dconv3.yaml."""
    network, _, rest = name.partition("_dconv3")
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(ROOT / f"configs/Shapes/{network}_slim_dconv3{rest}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return build_model(cfg)


def random_image(rng: random.Random) -> dict[str, Any]:
    """Returns an image of random size with up to four objects, as Detectron2's mappers do."""
    height, width = rng.randint(*SIZES), rng.randint(*SIZES)
    boxes = []
    for _ in range(rng.randint(0, 4)):
        x, y = rng.uniform(0, width - 8), rng.uniform(0, height - 8)
        boxes.append([x, y, rng.uniform(x + 4, width), rng.uniform(y + 4, height)])
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.gt_classes = torch.randint(CLASSES, (len(boxes),))
    return {
        "image": torch.randint(256, (3, height, width), dtype=torch.uint8),
        "instances": instances,
        "sem_seg": torch.randint(CLASSES + 1, (height, width)),
        "height": height,
        "width": width,
    }


def train_and_detect(model: torch.nn.Module, images: list[dict[str, Any]]) -> str:
    """Computes losses, gradients and predictions; returns what is wrong with them."""
    model.train()
    with EventStorage():
        losses = model(images)
    model.zero_grad()
    sum(losses.values()).backward()
    found = {**losses, **{k: p.grad for k, p in model.named_parameters() if p.grad is not None}}
    wrong = [name for name, value in found.items() if not value.isfinite().all()]
    if wrong:
        return f"{', '.join(wrong[:5])} not finite"
    model.eval()
    with torch.no_grad():
        predictions = model(images)
    return "" if len(predictions) == len(images) else f"{len(predictions)} predictions"
