# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Files laid out as other projects write them load, compute the same, and convert back exactly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from dcn_plugin import add_dcn_config
from dcn_plugin.engine import Checkpointer
from dcn_plugin.engine.weight_conversion import (
    from_mmdet,
    rename,
    to_detectron2,
    to_mmdet,
    to_torchvision,
)
from tests.engine.mmdet_models import mmdet_model
from tests.modeling.backbones import shake

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "COCO-InstanceSegmentation"
CLASSES = 5
CONFIG_TEXT = """
model = dict(
    backbone=dict(type='ResNet', depth=50, style='{style}'),
    rpn_head=dict(bbox_coder=dict(target_stds=[1.0, 1.0, 1.0, 1.0])),
    roi_head=dict(bbox_head={heads}))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
"""
CASCADE_STDS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])


def config_text(stds: object = None, style: str = "pytorch") -> str:
    """Returns the config that MMDetection writes into its checkpoints."""
    heads = [f"dict(bbox_coder=dict(target_stds={list(std)}))" for std in stds or ()]
    return CONFIG_TEXT.format(style=style, heads=f"[{', '.join(heads)}]")


def detector_config(modulated: bool = False, cascade: bool = False, groups: int = 1) -> CfgNode:
    """Returns the config of the model that `mmdet_model` has, in Detectron2."""
    name = "cascade_mask_rcnn" if cascade else "mask_rcnn"
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(CONFIGS / f"{name}_R_50_FPN_3x_dconv_c3-c5.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.BLOCKS = [1, 1, 1, 1]
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    cfg.MODEL.RESNETS.NUM_GROUPS = groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 64 if groups == 1 else 4
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 24
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    cfg.INPUT.FORMAT = "RGB"
    return cfg


def load(model: nn.Module, content: Mapping, folder: Path, log: pytest.LogCaptureFixture) -> str:
    """Writes a file and loads it as trainers do; returns the log."""
    torch.save(dict(content), folder / "weights.pth")
    log.clear()
    with log.at_level("INFO"):
        Checkpointer(model).load(str(folder / "weights.pth"))
    return "\n".join(f"{r.levelname} {r.getMessage()}" for r in log.records)


def decode(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Applies box deltas as MMDetection does, without its limits."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + deltas[:, :2] * size
    half = size * deltas[:, 2:].exp() / 2
    return torch.cat([centre - half, centre + half], dim=1)


def test_the_keys_of_the_models_are_those_of_mmdetection() -> None:
    keys = set(mmdet_model(cascade=True).state_dict())
    assert {
        "backbone.bn1.num_batches_tracked",
        "backbone.layer2.0.conv2.conv_offset.weight",
        "backbone.layer4.0.downsample.1.running_var",
        "neck.fpn_convs.3.conv.bias",
        "rpn_head.rpn_cls.weight",
        "roi_head.bbox_head.2.shared_fcs.0.weight",
        "roi_head.mask_head.0.convs.3.conv.weight",
        "roi_head.mask_head.2.conv_logits.bias",
    } <= keys
    assert "roi_head.bbox_head.fc_reg.bias" in mmdet_model().state_dict()


@pytest.mark.parametrize(
    ("modulated", "cascade", "groups"),
    [(False, False, 1), (True, False, 32), (False, True, 1)],
    ids=["v1", "v2 of ResNeXt", "cascade"],
)
@torch.no_grad()
def test_detectors_of_mmdetection_compute_the_same(
    modulated, cascade, groups, tmp_path, caplog
) -> None:
    theirs = mmdet_model(modulated, cascade=cascade, groups=groups)
    stds = CASCADE_STDS if cascade else CASCADE_STDS[:1]
    file = {"meta": {"config": config_text(stds)}, "state_dict": theirs.state_dict()}
    model = build_model(detector_config(modulated, cascade, groups)).eval()
    log = load(model, file, tmp_path, caplog)
    count = len(model.state_dict())
    assert f"Loaded {count} of {count} tensors of the model" in log
    assert "STRIDE_IN_1X1" not in log and "initial weights" not in log

    features = model.backbone(image := torch.randn(1, 3, 64, 96))
    expected = theirs.neck(theirs.backbone(image))
    for name, wanted in zip(("p2", "p3", "p4", "p5", "p6"), expected, strict=True):
        torch.testing.assert_close(features[name], wanted, rtol=1e-4, atol=1e-4)
    (logits,), (deltas,) = model.proposal_generator.rpn_head([features["p3"]])
    torch.testing.assert_close((logits, deltas), theirs.rpn_head(features["p3"]))

    pooled, boxes = torch.randn(6, 32, 7, 7), torch.rand(6, 4) * 50
    boxes[:, 2:] += boxes[:, :2] + 20
    heads, predictors = model.roi_heads.box_head, model.roi_heads.box_predictor
    if not cascade:
        heads, predictors, boxes_of = [heads], [predictors], [theirs.roi_head.bbox_head]
    else:
        boxes_of = theirs.roi_head.bbox_head
    for head, predictor, their_head, std in zip(heads, predictors, boxes_of, stds, strict=True):
        scores, deltas = predictor(head(pooled))
        their_scores, their_deltas = their_head(pooled)
        torch.testing.assert_close(scores, their_scores)  # the background is last
        found = predictor.box2box_transform.apply_deltas(deltas, boxes)
        for k in range(their_deltas.shape[1] // 4):
            wanted = decode(boxes, their_deltas[:, 4 * k : 4 * k + 4] * torch.tensor(std))
            torch.testing.assert_close(found[:, 4 * k : 4 * k + 4], wanted)
    masks = torch.randn(2, 32, 14, 14)
    mask_head = theirs.roi_head.mask_head
    wanted = (mask_head[-1] if cascade else mask_head)(masks)
    torch.testing.assert_close(model.roi_heads.mask_head.layers(masks), wanted)


@pytest.mark.parametrize("norm", ["", "bn", "gn"])
@pytest.mark.parametrize("cascade", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_conversion_to_detectron2_and_back_is_exact(norm, cascade, modulated) -> None:
    weights = mmdet_model(modulated, cascade=cascade, norm=norm).state_dict()
    if norm == "gn":  # ResNets with group normalization
        weights = {
            re.sub(r"\.bn(\d)\.", r".gn\1.", key): value
            for key, value in weights.items()
            if not re.search(r"bn\d\.(running|num)", key)
        }
    converted, _ = to_detectron2({"model": {"state_dict": weights, "meta": {}}})
    kept = set(converted) & set(weights)
    assert all(key.startswith("roi_head.mask_head.") for key in kept) and bool(kept) == cascade
    assert not any(".gn" in key or ".bn" in key for key in converted)
    back = to_mmdet(converted)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def version_1(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights of a detector of MMDetection 2 as version 1 has them."""
    old = {}
    for key, value in weights.items():
        key = key.removeprefix("roi_head.").replace(".conv2.conv_offset.", ".conv2_offset.")
        if ".fc_cls." in key:
            value = value.roll(1, 0)
        elif ".fc_reg." in key and len(value) > 4:
            value = torch.cat([torch.randn_like(value[:4]), value])
        elif ".conv_logits." in key:
            value = torch.cat([torch.randn_like(value[:1]), value])
        old[key] = value
    return old


@pytest.mark.parametrize("cascade", [False, True])
def test_the_background_of_mmdetection_1_is_moved(cascade) -> None:
    weights = mmdet_model(cascade=cascade).state_dict()
    expected, _ = from_mmdet(weights, {})
    found, _ = from_mmdet(version_1(weights), {})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_other_box_normalizations_are_read_from_the_config(tmp_path, caplog) -> None:
    stds = [(0.25, 0.5, 1.0, 2.0)]
    theirs = mmdet_model(mask=False)
    model = build_model(detector_config())
    file = {"meta": {"config": config_text(stds)}, "state_dict": theirs.state_dict()}
    load(model, file, tmp_path, caplog)
    factors = torch.tensor(stds[0]) * torch.tensor([10.0, 10.0, 5.0, 5.0])
    torch.testing.assert_close(
        model.roi_heads.box_predictor.bbox_pred.bias,
        theirs.roi_head.bbox_head.fc_reg.bias * factors.repeat(CLASSES),
    )


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_another_stride_placement_is_a_warning(style, tmp_path, caplog) -> None:
    cfg = detector_config()
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = style == "pytorch"
    cfg.INPUT.FORMAT = "BGR" if style == "pytorch" else "RGB"
    weights = mmdet_model().state_dict()
    file = {"meta": {"cfg": config_text(style=style)}, "state_dict": weights}
    log = load(build_model(cfg), file, tmp_path, caplog)
    right = style == "caffe"
    assert f"WARNING {tmp_path / 'weights.pth'}: MODEL.RESNETS.STRIDE_IN_1X1 is {not right}" in log
    assert f"set it to {right}" in log
    assert f"set it to {'BGR' if right else 'RGB'}, with MODEL.PIXEL_MEAN" in log


def test_an_rpn_that_detectron2_lacks_is_rejected() -> None:
    weights = mmdet_model().state_dict()
    softmax = {**weights, "rpn_head.rpn_cls.bias": torch.zeros(6)}
    with pytest.raises(ValueError, match=r"output for each of 3 anchors.*got 6.*no softmax"):
        from_mmdet(softmax, {})
    scales = {**weights, "rpn_head.rpn_cls.bias": torch.zeros(15)}
    scales["rpn_head.rpn_reg.bias"] = torch.zeros(60)
    with pytest.raises(ValueError, match=r"got 15 anchors.*remove rpn_head\.\*"):
        from_mmdet(scales, {})


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvisions_resnets_convert_back_exactly(name) -> None:
    weights = getattr(torchvision.models, name)(num_classes=5).state_dict()
    converted, origin = to_detectron2({"model": weights})
    assert origin.project == "torchvision" and origin.stride_in_1x1 is False
    assert {"stem.conv1.norm.running_var", "res5.1.conv2.weight", "linear.bias"} <= set(converted)
    prefixed = {f"backbone.bottom_up.{key}": value for key, value in converted.items()}
    back = to_torchvision({**prefixed, "roi_heads.box_head.fc1.weight": torch.zeros(1)})
    assert back.keys() == weights.keys()
    assert all(back[key] is weights[key] for key in weights)


def test_a_resnet_d_of_timm_is_rejected() -> None:
    weights = torchvision.models.resnet18().state_dict()
    deep = rename(weights, [("conv1", "conv1.0"), ("bn1", "conv1.1")])
    with pytest.raises(ValueError, match=r"got conv1\.0\.weight, of a ResNet-C or ResNet-D"):
        to_detectron2({"model": deep})


@pytest.mark.parametrize("fpn", [False, True])
@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone.bottom_up."])
def test_backbones_load_whatever_their_prefix(prefix, fpn, tmp_path, caplog) -> None:
    network = shake(torchvision.models.resnet50(num_classes=5))
    converted, _ = to_detectron2({"model": network.state_dict()})
    cfg = detector_config()
    cfg.MODEL.RESNETS.BLOCKS = []
    if not fpn:
        cfg.MODEL.BACKBONE.NAME = "build_deform_resnet_backbone"
        cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    model = build_model(cfg)
    file = {prefix + key: value for key, value in converted.items()}
    log = load(model, file, tmp_path, caplog)
    backbone = model.backbone.bottom_up if fpn else model.backbone
    for key, value in backbone.state_dict().items():
        if "offset" not in key:
            assert torch.equal(value, converted[key]), key
    offsets = sum("offset" in key for key in backbone.state_dict())
    assert f"{offsets} parameters of offset branches keep their initial weights" in log


def test_a_file_without_weights_of_the_backbone_is_an_error(tmp_path, caplog) -> None:
    model = build_model(detector_config())
    path = tmp_path / "weights.pth"
    for weights, keys in (
        ({}, r"its keys are \.\.\."),
        ({"encoder.0.weight": torch.zeros(1)}, r"its keys are encoder\.0\.weight, \.\.\."),
    ):
        torch.save(weights, path)
        with pytest.raises(
            ValueError, match=rf"weights\.pth has no weight of the backbone: {keys}"
        ):
            Checkpointer(model).load(str(path))
    with caplog.at_level("INFO"):
        Checkpointer(model, allow_unmatched=True).load(str(path))
    assert re.search(r"Loaded 0 of \d+ tensors of the model; not in the file", caplog.text)
    assert "not used of the file: 1 of encoder.0" in caplog.text
