# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The four networks: gradients, inference, unusual inputs and invalid configs."""

from __future__ import annotations

import pytest
import torch

from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.utils.events import EventStorage

from .networks import DETECTORS, NETWORKS, build_network, ground_truth, inputs, network_config

networks = pytest.mark.parametrize("network", NETWORKS)
detectors = pytest.mark.parametrize("network", DETECTORS)
kinds = pytest.mark.parametrize("deformable", [False, True], ids=["plain", "deformable"])


@networks
@kinds
def test_every_parameter_gets_a_gradient(network: str, deformable: bool) -> None:
    model = build_network(network, deformable)
    with EventStorage():
        losses = model(inputs())
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@networks
@kinds
def test_starts_as_the_plain_network(network: str, deformable: bool) -> None:
    plain, ours = build_network(network, False), build_network(network, deformable)
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("offset" in name for name in missing)
    results = plain.eval()(inputs()), ours.eval()(inputs())
    for expected, found in zip(*results, strict=True):
        if network == "deeplab":
            torch.testing.assert_close(found["sem_seg"], expected["sem_seg"], rtol=1e-3, atol=1e-4)
        else:
            expected, found = expected["instances"], found["instances"]
            assert len(found) == len(expected) > 0
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "more"),
    [("faster_rcnn", 1.48), ("rfcn", 2.46), ("ca_rpn", 0.25), ("deeplab", 0.25)],
)
def test_parameters_of_deformable_parts_match_the_paper(network: str, more: float) -> None:
    sizes = []
    for deformable in (False, True):
        cfg = network_config(network, deformable, classes=20 + (network == "deeplab"))
        wide = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "WIDTH_PER_GROUP": 64}
        for key, value in wide.items():
            setattr(cfg.MODEL.RESNETS, key, value)
        cfg.MODEL.RESNETS.REDUCED_CHANNELS = 256 if network == "faster_rcnn" else 1024
        cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
        sizes.append(sum(p.numel() for p in build_model(cfg).parameters()))
    assert round((sizes[1] - sizes[0]) / 1e6, 2) == more


@networks
def test_images_without_ground_truth(network: str) -> None:
    model = build_network(network, True)
    batch = inputs()
    for item in batch:
        item["instances"] = ground_truth(tuple(item["image"].shape[1:]), [], [])
        item["sem_seg"] = torch.full(item["image"].shape[1:], 255)
    with EventStorage():
        losses = model(batch)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()


@detectors
def test_training_stops_on_nan_inputs(network: str) -> None:
    batch = inputs()
    for item in batch:
        item["image"] = torch.full_like(item["image"].float(), float("nan"))
    model = build_network(network, True)
    with EventStorage(), pytest.raises(FloatingPointError, match=r"has diverged"):
        model(batch)
    results = model.eval()(batch)
    assert all(len(r["instances"]) == 0 for r in results)


def test_ca_rpn_finds_no_empty_boxes_in_a_batch_of_two_sizes() -> None:
    model = build_network("ca_rpn", True).eval()
    sizes = (64, 64), (128, 192)
    batch = [{"image": torch.rand(3, *size) * 255} for size in sizes]
    for found in model.inference(batch, do_postprocess=False):
        assert len(found) > 20 and found.pred_boxes.nonempty().all()


def test_ca_rpn_honours_the_minimum_size_of_proposals() -> None:
    cfg = network_config("ca_rpn", deformable=False)
    cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE = 40
    (found, _) = build_model(cfg).eval().inference(inputs(), do_postprocess=False)
    assert len(found) > 0 and found.pred_boxes.nonempty(threshold=39.9).all()


def test_ca_rpn_computes_training_proposals_only_to_visualize() -> None:
    cfg = network_config("ca_rpn", deformable=False)
    cfg.VIS_PERIOD = 2
    model = build_model(cfg)
    batch = [{**item, "file_name": ""} for item in inputs()]
    with EventStorage() as storage:
        for iteration in range(3):
            storage.iter = iteration
            model(batch)
            assert len(storage._vis_data) == iteration // 2 + 1


@torch.no_grad()
def test_stock_heads_work_under_our_architectures() -> None:
    cfg = network_config("deeplab", deformable=True)
    head = cfg.MODEL.SEM_SEG_HEAD
    head.NAME, head.CONVS_DIM, head.COMMON_STRIDE = "SemSegFPNHead", 32, 16
    result = build_model(cfg).eval()(inputs()[:1])[0]["sem_seg"]
    assert result.shape[0] == head.NUM_CLASSES
    cfg = network_config("faster_rcnn", deformable=True)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.ROI_HEADS.NAME = "RFCN", "StandardROIHeads"
    assert len(build_model(cfg).eval()(inputs()[:1])[0]["instances"])


REFUSED = [
    ("rfcn", "MASK_ON", True, "MASK_ON must be False for RFCNROIHeads"),
    ("ca_rpn", "KEYPOINT_ON", True, "KEYPOINT_ON must be False for CategoryAwareRPN"),
    ("ca_rpn", "RPN.HEAD_NAME", "StandardRPNHead", "must be CategoryRPNHead for CategoryDetector"),
    (
        "rfcn",
        "RPN.HEAD_NAME",
        "CategoryRPNHead",
        "must be CategoryRPN with CategoryRPNHead, got RPN",
    ),
    ("ca_rpn", "RPN.IN_FEATURES", ["res4"], r"must be some of .*\['reduced'\], got \['res4'\]"),
    ("rfcn", "ROI_HEADS.IN_FEATURES", ["redcued"], r"must be one of .* got \['redcued'\]"),
    ("faster_rcnn", "ROI_HEADS.IN_FEATURES", ["res3"], r"must be some of .* got \['res3'\]"),
    ("deeplab", "SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3"], r"must be one of .* got \['p2', 'p3'\]"),
]


@pytest.mark.parametrize(("network", "key", "value", "message"), REFUSED)
def test_error_names_the_config_key(network: str, key: str, value: object, message: str) -> None:
    cfg = network_config(network, deformable=True)
    cfg.merge_from_list([f"MODEL.{key}", value])
    with pytest.raises(ValueError, match=rf"MODEL\..*{message}"):
        build_model(cfg)


@networks
def test_autocast(network: str) -> None:
    model = build_network(network, True)
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs())
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert len(model.eval()(inputs())) == 2


AIR = "build_aligned_inception_resnet_backbone"
FPN = "build_deform_resnet_fpn_backbone"


@pytest.mark.parametrize(
    ("network", "backbone"),
    [*((network, AIR) for network in NETWORKS), ("faster_rcnn", FPN), ("ca_rpn", FPN)],
)
def test_other_backbones(network: str, backbone: str) -> None:
    cfg = network_config(network, deformable=True)
    cfg.MODEL.BACKBONE.NAME = backbone
    if backbone == FPN:
        cfg.MODEL.RESNETS.RES5_DILATION = 1
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 16
        cfg.MODEL.RPN.IN_FEATURES = ["p3", "p4", "p5", "p6"]
        cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128]]
    model = build_model(cfg)
    with EventStorage():
        losses = model(inputs())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert len(model.eval()(inputs())) == 2


@pytest.mark.parametrize(("stride", "k", "classes"), [(32, 5, 1), (16, 2, 9)])
def test_rfcn_takes_any_stride_k_and_number_of_classes(stride: int, k: int, classes: int) -> None:
    cfg = network_config("rfcn", deformable=True, classes=classes)
    cfg.MODEL.RESNETS.RES5_DILATION = 1 if stride == 32 else 4
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = k
    model = build_model(cfg)
    pools = model.roi_heads.box_predictor.cls_score, model.roi_heads.box_predictor.bbox_pred
    assert {pool.spatial_scale for pool in pools} == {1 / stride}
    assert pools[0].score_conv.out_channels == k * k * (classes + 1)
    batch = inputs()
    batch[0]["instances"].gt_classes.clamp_(max=classes - 1)
    with EventStorage():
        sum(model(batch).values()).backward()
    assert len(model.eval()(batch)) == 2


def test_deeplab_loss_is_the_mean_over_labelled_pixels_of_the_batch() -> None:
    model = build_network("deeplab", deformable=True)
    batch = inputs()
    logits = [found["sem_seg"] for found in model.eval()(batch)]
    batch[0]["sem_seg"][:40] = 255
    batch[1]["sem_seg"][:80] = 255
    for module in model.modules():  # the same BatchNorm statistics as in the call above
        module.training = not isinstance(module, torch.nn.BatchNorm2d)
    loss = model(batch)["loss_sem_seg"]
    # (C, H, W) -> (H * W, C), both images together
    pixels = torch.cat([scores.flatten(1).t() for scores in logits])
    labels = torch.cat([item["sem_seg"].flatten() for item in batch])
    expected = torch.nn.functional.cross_entropy(pixels, labels, ignore_index=255)
    torch.testing.assert_close(loss, expected)


def test_deeplab_loss_of_an_ignored_batch_is_zero() -> None:
    model = build_network("deeplab", deformable=True)
    batch = inputs()
    for item in batch:
        item["sem_seg"].fill_(255)
    loss = model(batch)["loss_sem_seg"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_losses_of_the_box_head_are_those_of_detectron2() -> None:
    cfg = network_config("faster_rcnn", deformable=True)
    heads = build_model(cfg).roi_heads
    assert type(heads.box_predictor) is FastRCNNOutputLayers
    rfcn = build_network("rfcn", deformable=True).roi_heads.box_predictor
    assert type(rfcn).losses is FastRCNNOutputLayers.losses


def test_deeplab_returns_probabilities_on_request() -> None:
    cfg = network_config("deeplab", deformable=False)
    cfg.MODEL.SEM_SEG_HEAD.PROBABILITIES = True
    found = build_model(cfg).eval()(inputs())[0]["sem_seg"]
    torch.testing.assert_close(found.sum(dim=0), torch.ones(100, 130))
