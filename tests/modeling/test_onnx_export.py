# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Whole models in ONNX Runtime: one file for all sizes of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

pytest.importorskip("detectron2", reason="the networks are Detectron2's")

from detectron2.modeling import build_model

from dcn_plugin.modeling.export import (
    ExportableBackbone,
    ExportableCategoryAwareRPN,
    ExportableSegmentor,
)
from tests.onnx.runtime import automatic, needs_onnx_ops, op_types, run
from tests.tolerances import assert_near

from .backbones import shake
from .networks import network_config

SIZES = ((2, 96, 128), (1, 112, 160), (3, 75, 131))
# Normalized and resampled by random layers, in float32.
ALLOWED = 2e-5


def build(network: str) -> nn.Module:
    """Builds a slim network whose offsets are a few pixels, and whose scores differ."""
    cfg = network_config(network, deformable=True)
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.RES5_DILATION = 1
    cfg.MODEL.RESNETS.DEFORM_LAST = [0, 0, 0, 2]
    cfg.MODEL.PIXEL_STD = [57.0, 58.0, 59.0]
    cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = 300
    model = shake(build_model(cfg))
    for name, parameter in model.named_parameters():
        if "offset" in name:
            nn.init.normal_(parameter, std=0.01)
        elif "rpn_head" in name or "predictor" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def images(size: tuple[int, int, int]) -> Tensor:
    batch, height, width = size
    return torch.randint(0, 256, (batch, 3, height, width)).float()


def export(module: nn.Module, *args: Tensor) -> Any:
    shapes = [{0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, {0: Dim.DYNAMIC}]
    model = automatic(module, args, tuple(shapes[: len(args)]))
    assert op_types(model).count("DeformConv") == 2
    return model


@needs_onnx_ops
@torch.no_grad()
def test_backbone() -> None:
    module = ExportableBackbone(build("ca_rpn"))
    model = export(module, images(SIZES[0]))
    for size in SIZES:
        x = images(size)
        for found, expected in zip(run(model, (x,)), module(x).values(), strict=True):
            assert_near(found, expected, allowed=ALLOWED)


@needs_onnx_ops
@torch.no_grad()
def test_deeplab() -> None:
    network = build("deeplab")
    module = ExportableSegmentor(network)
    model = export(module, images(SIZES[0]))
    for size in SIZES:
        x = images(size)
        (found,) = run(model, (x,))
        expected = torch.stack([network([{"image": image}])[0]["sem_seg"] for image in x])
        assert_near(module(x), expected, allowed=ALLOWED)
        assert_near(found, expected, allowed=ALLOWED)


@torch.no_grad()
def test_deeplab_as_a_program_takes_other_sizes() -> None:
    module = ExportableSegmentor(build("deeplab"))
    shapes = ({0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},)
    program = torch.export.export(module, (images(SIZES[0]),), dynamic_shapes=shapes, strict=False)
    for size in SIZES:
        x = images(size)
        assert_near(program.module()(x), module(x), allowed=ALLOWED)


def assert_same_detections(outputs: list[Tensor], network: nn.Module, batch: list[Tensor]) -> None:
    """Compares with the meta-architecture, where every image is padded by itself."""
    boxes, scores, classes, count = outputs
    detected = network.inference([{"image": image} for image in batch], do_postprocess=False)
    for i, instances in enumerate(detected):
        number = len(instances)
        assert count[i] == number > 0 and not scores[i, number:].any()
        torch.testing.assert_close(scores[i, :number], instances.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            boxes[i, :number], instances.pred_boxes.tensor, rtol=1e-4, atol=1e-2
        )
        assert (classes[i, :number] == instances.pred_classes).all()


@needs_onnx_ops
@torch.no_grad()
def test_category_aware_rpn() -> None:
    network = build("ca_rpn")
    module = ExportableCategoryAwareRPN(network)
    model = export(module, images(SIZES[0]))
    assert "NonMaxSuppression" in op_types(model)
    for size in SIZES:
        x = images(size)
        assert_same_detections(list(module(x)), network, list(x))
        assert_same_detections(run(model, (x,)), network, list(x))


@needs_onnx_ops
@torch.no_grad()
def test_category_aware_rpn_clips_to_sizes_without_padding() -> None:
    network = build("ca_rpn")
    module = ExportableCategoryAwareRPN(network)
    batch = [images((1, 96, 128))[0], images((1, 80, 112))[0]]
    padded = network.pixel_mean.expand(2, 3, 96, 128).clone()
    for image, to in zip(batch, padded, strict=True):
        to[:, : image.shape[1], : image.shape[2]] = image
    sizes = torch.tensor([image.shape[1:] for image in batch])
    assert_same_detections(list(module(padded, sizes)), network, batch)
    model = export(module, padded, sizes)
    assert_same_detections(run(model, (padded, sizes)), network, batch)


@needs_onnx_ops
@torch.no_grad()
def test_category_aware_rpn_without_nms() -> None:
    module = ExportableCategoryAwareRPN(build("ca_rpn"), nms=False)
    model = export(module, images(SIZES[0]))
    assert "NonMaxSuppression" not in op_types(model)
    x = images(SIZES[1])
    for found, expected in zip(run(model, (x,)), module(x), strict=True):
        assert found.shape[1] == 300
        assert_near(found, expected, allowed=ALLOWED)


@torch.no_grad()
def test_there_may_be_fewer_candidates_than_detections() -> None:
    network = build("ca_rpn")
    network.proposal_generator.pre_nms_topk = {True: 10, False: 10}
    module = ExportableCategoryAwareRPN(network)
    boxes, scores, _, count = module(images(SIZES[0]))
    limit = network.proposal_generator.detections_per_image
    assert boxes.shape[1] == scores.shape[1] == limit > 10
    assert not scores[0, count[0] :].any() and not boxes[0, count[0] :].any()


def test_models_of_another_kind_and_in_training_are_rejected() -> None:
    deeplab = build("deeplab")
    with pytest.raises(TypeError, match="is for a CategoryAwareRPN, got a DeepLab"):
        ExportableCategoryAwareRPN(deeplab)
    with pytest.raises(ValueError, match=r"evaluation mode: model\.eval\(\)"):
        ExportableSegmentor(deeplab.train())
    assert deeplab.training
