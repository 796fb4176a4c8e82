# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The four networks overfit eight generated images, from random weights."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage

from .networks import DETECTORS, ground_truth, network_config

IMAGES, SIZE, CLASSES = 8, 128, 2


def draw(seed: int) -> dict[str, Any]:
    """Returns an image with a large disc or square and, opposite, a smaller one."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 80, (SIZE, SIZE, 3), dtype=np.uint8)
    labels = np.full((SIZE, SIZE), CLASSES, dtype=np.int64)  # of the background
    boxes, classes = [], []
    for side, corner in ((rng.integers(56, 70), 4), (rng.integers(36, 46), 78)):
        x, y = (int(corner + v) for v in rng.integers(0, 3, 2))
        kind, half = int(rng.integers(CLASSES)), int(side) // 2
        mask = np.zeros((SIZE, SIZE), dtype=np.uint8)
        if kind == 0:
            cv2.circle(mask, (x + half, y + half), half, 1, -1)
        else:
            cv2.rectangle(mask, (x, y), (x + 2 * half, y + 2 * half), 1, -1)
        image[mask > 0] = rng.integers(120, 256, 3)
        labels[mask > 0] = kind
        boxes.append([x, y, x + 2 * half + 1, y + 2 * half + 1])
        classes.append(kind)
    return {
        "image": torch.from_numpy(image).permute(2, 0, 1).contiguous(),
        "instances": ground_truth((SIZE, SIZE), boxes, classes),
        "sem_seg": torch.from_numpy(labels),
    }


def overfit_config(network: str, deformable: bool) -> CfgNode:
    """Returns a config of the network on a slim ResNet-18."""
    cfg = network_config(network, deformable, CLASSES + (network == "deeplab"))
    resnets = cfg.MODEL.RESNETS
    resnets.DEPTH, resnets.STEM_OUT_CHANNELS, resnets.RES2_OUT_CHANNELS = 18, 16, 16
    resnets.DEFORM_LAST = [0, 0, 0, 2 if deformable else 0]
    resnets.REDUCED_CHANNELS = 64
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.RPN.CONV_DIMS = [64]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 200, 50
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 50
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = cfg.MODEL.ROI_HEADS.OHEM = 32
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 64
    if network == "ca_rpn":
        # Use all anchors: on those with an IoU between the paper's thresholds, which it leaves out
        # of training, an overfitted model predicts arbitrary boxes, some with high scores.
        cfg.MODEL.RPN.IOU_THRESHOLDS = [0.5, 0.5]
        cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 576
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[36, 48, 64]]
    return cfg


def learn(model: nn.Module, batch: list[dict[str, Any]], steps: int) -> list[dict[str, float]]:
    """Trains on the same batch in every step; returns the losses of each step."""
    offsets = [p for n, p in model.named_parameters() if "offset" in n]
    others = [p for n, p in model.named_parameters() if "offset" not in n]
    rate = 3e-3
    groups = [{"params": others}, {"params": offsets, "lr": rate / 10}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    with EventStorage():
        for _ in range(steps):
            losses = model(batch)
            optimizer.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            history.append({name: value.item() for name, value in losses.items()})
    return history


def average_precision(results: list, batch: list[dict[str, Any]]) -> float:
    """Returns AP50, the mean over classes of the area under precision and recall."""
    areas = []
    for label in range(CLASSES):
        found, total = [], 0
        for result, item in zip(results, batch, strict=True):
            objects = item["instances"]
            objects = objects[objects.gt_classes == label]
            total += len(objects)
            taken: set[int] = set()
            of_class = result["instances"][result["instances"].pred_classes == label]
            overlaps = pairwise_iou(of_class.pred_boxes, objects.gt_boxes)
            for score, row in zip(of_class.scores.tolist(), overlaps, strict=True):
                best = int(row.argmax()) if len(row) else -1
                hit = best >= 0 and float(row[best]) >= 0.5 and best not in taken
                taken |= {best} if hit else set()
                found.append((score, hit))
        hits = np.array([hit for _, hit in sorted(found, key=lambda f: -f[0])], dtype=float)
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        areas.append(float((precision * hits).sum() / total))
    return sum(areas) / len(areas)


def mean_iou(results: list, batch: list[dict[str, Any]]) -> float:
    """Returns the mean over classes of the intersection over the union of their pixels."""
    found = torch.stack([r["sem_seg"].argmax(dim=0) for r in results])
    wanted = torch.stack([item["sem_seg"] for item in batch])
    values = []
    for label in range(CLASSES + 1):
        one, other = found == label, wanted == label
        values.append(float((one & other).sum() / (one | other).sum()))
    return sum(values) / len(values)


@pytest.mark.slow
@pytest.mark.parametrize("deformable", [False, True], ids=["plain", "deformable"])
@pytest.mark.parametrize("network", [*DETECTORS, "deeplab"])
def test_overfits_eight_images(network: str, deformable: bool) -> None:
    batch = [draw(seed) for seed in range(IMAGES)]
    model = build_model(overfit_config(network, deformable))
    history = learn(model, batch, steps=300)
    for name in history[0]:
        first, last = (sum(h[name] for h in part) for part in (history[:10], history[-10:]))
        assert last < 0.5 * first, f"{name} fell from {first / 10} to {last / 10} only"
    with torch.no_grad():
        results = model.eval()(batch)
    if network == "deeplab":
        assert mean_iou(results, batch) > 0.9
    else:
        assert average_precision(results, batch) > 0.9
