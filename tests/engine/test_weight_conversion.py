# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Files laid out as other projects write them load, compute the same, and convert back exactly."""

from __future__ import annotations

import pickle
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
from dcn_plugin.engine.weight_conversion import from_mmdet, to_detectron2
from dcn_plugin.engine.weight_names import rename, to_mmdet, to_torchvision
from tests.engine.mmdet_models import mmdet_model
from tests.modeling.backbones import shake

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "COCO-InstanceSegmentation"
CLASSES = 5
# MMEngine sorts the keys, so the RPN comes after the heads; before, it came first.
CONFIG_TEXT = """
model = dict(
    backbone=dict(type='ResNet', depth=50, style='{style}'),
    {rpn_before}roi_head=dict(bbox_head={heads}),
    {rpn_after}type='MaskRCNN')
"""
RPN_TEXT = """rpn_head=dict(
        anchor_generator=dict(scales=[8], ratios=[0.5, 1.0, 2.0]),
        bbox_coder=dict(target_stds=[1.0, 1.0, 1.0, 1.0])),
    """
# Pixel statistics of versions 1 and 2, and 3.
NORM_TEXT = "img_norm_cfg = dict(mean={mean}, std={std}, to_rgb={rgb})"
PREPROCESSOR_TEXT = "data_preprocessor=dict(bgr_to_rgb={rgb}, mean={mean}, std={std}),"
RGB = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
BGR = ([103.53, 116.28, 123.675], [1.0, 1.0, 1.0])
CASCADE_STDS = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])


def config_text(stds: object = None, style: str = "pytorch", version: int = 3) -> str:
    """Returns the config that MMDetection writes into its checkpoints."""
    heads = [f"dict(bbox_coder=dict(target_stds={list(std)}))" for std in stds or ()]
    heads = heads[0] if len(heads) == 1 else f"[{', '.join(heads)}]"
    mean, std = RGB if style == "pytorch" else BGR
    statistics = {"mean": mean, "std": std, "rgb": style == "pytorch"}
    text = CONFIG_TEXT.format(
        style=style,
        heads=heads,
        rpn_before="" if version == 3 else RPN_TEXT,
        rpn_after=RPN_TEXT if version == 3 else "",
    )
    if version == 3:
        return text.replace("type='Mask", PREPROCESSOR_TEXT.format(**statistics) + " type='Mask")
    return text + NORM_TEXT.format(**statistics)


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
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = RGB
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
    assert ("WARNING" in log) == cascade  # the masks of the first two heads
    assert not cascade or "24 keys of the file are unused: 24 of roi_head.mask_head" in log
    assert "initial weights" not in log and "are missing" not in log

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


@pytest.mark.parametrize("version", [2, 3])
def test_other_box_normalizations_are_read_from_the_config(version, tmp_path, caplog) -> None:
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


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("style", ["pytorch", "caffe"])
def test_config_keys_that_do_not_fit_are_warnings(style, version, tmp_path, caplog) -> None:
    cfg = detector_config()
    if style == "pytorch":
        cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.INPUT.FORMAT = True, "BGR"
    weights = mmdet_model().state_dict()
    file = {"meta": {"cfg": config_text(style=style, version=version)}, "state_dict": weights}
    log = load(build_model(cfg), file, tmp_path, caplog)
    right = style == "caffe"
    start = f"WARNING {tmp_path / 'weights.pth'}: "
    assert (
        f"{start}MODEL.RESNETS.STRIDE_IN_1X1 is {not right}, but OpenMMLab weights of this kind "
        f"need {right}\n"
    ) in log
    mean, std = BGR if right else RGB
    assert (
        f"{start}OpenMMLab weights of this kind need INPUT.FORMAT {'BGR' if right else 'RGB'}, "
        f"MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD {std}"
    ) in log


def test_weights_without_a_config_give_no_advice(tmp_path, caplog) -> None:
    cfg = detector_config()
    cfg.MODEL.RESNETS.STRIDE_IN_1X1, cfg.INPUT.FORMAT = True, "BGR"
    log = load(build_model(cfg), {"state_dict": mmdet_model().state_dict()}, tmp_path, caplog)
    assert "STRIDE_IN_1X1" not in log and "INPUT.FORMAT" not in log


@pytest.mark.parametrize("groups", [1, 32])
def test_the_stride_of_caffe2s_resnexts_is_unknown(groups) -> None:
    weights = {"res2_0_branch2b_w": torch.zeros(64, 64 // groups, 3, 3)}
    _, origin = to_detectron2({"model": weights, "__author__": "Caffe2"})
    assert origin.stride_in_1x1 is (True if groups == 1 else None)


@pytest.mark.parametrize(
    ("outputs", "anchors", "scales", "reason"),
    [
        (6, 3, None, "6 outputs for 3 anchors, a softmax"),
        (15, 15, None, "15 anchors are of several scales"),
        (3, 3, 3, "3 anchors are of several scales"),
    ],
)
def test_an_rpn_that_detectron2_lacks_is_left_out(outputs, anchors, scales, reason, caplog) -> None:
    weights = mmdet_model().state_dict()
    weights["rpn_head.rpn_cls.bias"] = torch.zeros(outputs)
    weights["rpn_head.rpn_reg.bias"] = torch.zeros(4 * anchors)
    scales = f"[{', '.join('8' * scales)}]" if scales else "None"
    text = f"model = dict(rpn_head=dict(anchor_generator=dict(scales={scales})))"
    converted, _ = from_mmdet(weights, {"cfg": text})
    assert reason in caplog.text
    assert not any("rpn_head" in key for key in converted)
    assert "roi_heads.box_predictor.cls_score.bias" in converted


def test_five_anchor_ratios_are_loaded() -> None:
    weights = {"rpn_head.rpn_cls.bias": torch.zeros(5), "rpn_head.rpn_reg.bias": torch.zeros(20)}
    text = "model = dict(rpn_head=dict(anchor_generator=dict(scales=[8])))"
    converted, _ = from_mmdet(weights, {"cfg": text})
    assert "proposal_generator.rpn_head.anchor_deltas.bias" in converted


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_torchvisions_resnets_convert_back_exactly(name) -> None:
    weights = getattr(torchvision.models, name)(num_classes=5).state_dict()
    converted, origin = to_detectron2({"model": weights})
    assert origin.project == "torchvision and timm" and origin.stride_in_1x1 is False
    assert {"stem.conv1.norm.running_var", "res5.1.conv2.weight", "linear.bias"} <= set(converted)
    prefixed = {f"backbone.bottom_up.{key}": value for key, value in converted.items()}
    back = to_torchvision({**prefixed, "roi_heads.box_head.fc1.weight": torch.zeros(1)})
    assert back.keys() == weights.keys()
    assert all(back[key] is weights[key] for key in weights)


@pytest.mark.parametrize("stem", ["conv1.0", "stem.0", "backbone.stem.0"])
def test_deep_stems_of_timm_and_openmmlab_are_rejected(stem) -> None:
    weights = torchvision.models.resnet18().state_dict()
    deep = rename(weights, [("conv1", stem), ("bn1", "stem.1")])
    with pytest.raises(ValueError, match=rf"got {re.escape(stem)}\.weight: .*no ResNet-C"):
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
    fpn = {key: value for key, value in model.state_dict().items() if "bottom_up" not in key}
    other = {key: torch.zeros(1) for key in model.state_dict()}
    for weights, reason in (
        ({}, r"its keys are \.\.\."),
        ({"encoder.0.weight": torch.zeros(1)}, r"its keys are encoder\.0\.weight, \.\.\."),
        (fpn, r"its keys are backbone\.fpn_lateral2.*, the model's backbone\.bottom_up\."),
        (other, r"has the shape \(1,\) there and \("),
        ({"bias": torch.zeros(1)}, r"its keys are bias"),
    ):
        torch.save(weights, path)
        expected = rf"weights\.pth has no weight that fits the backbone: .*{reason}"
        with pytest.raises(ValueError, match=expected):
            Checkpointer(model).load(str(path))
    torch.save(fpn, path)
    with caplog.at_level("INFO"):
        Checkpointer(model, allow_unmatched=True).load(str(path))
    assert re.search(
        r"\d+ tensors of the model are missing: \d+ of backbone\.bottom_up", caplog.text
    )


def test_what_does_not_match_is_counted(tmp_path, caplog) -> None:
    model = build_model(detector_config())
    weights = model.state_dict()
    del weights["backbone.fpn_output2.bias"]
    weights["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(81)
    log = load(model, {**weights, "teacher.weight": torch.zeros(1)}, tmp_path, caplog)
    assert log.splitlines()[-1] == (
        f"WARNING Weights of {tmp_path / 'weights.pth'}: 1 tensors of the model are missing: "
        "backbone.fpn_output2.bias; 1 have another shape, such as "
        "roi_heads.box_predictor.cls_score.bias with (81,) instead of (6,); 1 keys of the file are "
        "unused: teacher.weight"
    )
    log = load(model, model.state_dict(), tmp_path, caplog)
    assert re.search(r"INFO All keys of .* match the model, and no other weight is missing$", log)


class Versioned(nn.Linear):
    """A layer that renamed a parameter in version 2, as Detectron2's heads do."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others) -> None:
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


@pytest.mark.parametrize("inner", ["layer", "module"])
def test_state_dicts_of_the_model_are_passed_on_as_they_are(inner, tmp_path, caplog) -> None:
    model = nn.ModuleDict({inner: Versioned(3, 2), "other": nn.Linear(2, 1)})
    log = load(model, {"model": model.state_dict()}, tmp_path, caplog)
    assert "no other weight is missing" in log


@pytest.mark.parametrize(
    "content", [nn.Linear(1, 1), [1], {1: torch.zeros(1)}, {"net": {"weight": torch.zeros(1)}}]
)
def test_what_is_no_state_dict_is_named(content, tmp_path) -> None:
    torch.save(content, tmp_path / "file.pth")
    expected = r"file\.pth(:| contains| must be a checkpoint).*(must be a|save its state_dict)"
    with pytest.raises(ValueError, match=expected):
        Checkpointer(nn.Linear(1, 1)).load(str(tmp_path / "file.pth"))


@pytest.mark.parametrize("kind", ["Box2BoxTransformLinear", "Box2BoxTransformRotated"])
def test_other_box_transforms_are_left_alone(kind, tmp_path, caplog) -> None:
    from detectron2.modeling import box_regression

    model = build_model(detector_config())
    transform = getattr(box_regression, kind)
    model.roi_heads.box_predictor.box2box_transform = transform.__new__(transform)
    theirs = mmdet_model()
    load(model, {"state_dict": theirs.state_dict()}, tmp_path, caplog)
    bias = theirs.roi_head.bbox_head.fc_reg.bias
    assert torch.equal(model.roi_heads.box_predictor.bbox_pred.bias, bias)


def test_pickles_of_torchvisions_weights_are_not_caffe2s(tmp_path, caplog) -> None:
    network = torchvision.models.resnet50(num_classes=5)
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    (tmp_path / "r50.pkl").write_bytes(pickle.dumps(weights))
    cfg = detector_config()
    cfg.MODEL.RESNETS.BLOCKS = []
    model = build_model(cfg)
    with caplog.at_level("INFO"):
        Checkpointer(model).load(str(tmp_path / "r50.pkl"))
    assert torch.equal(
        model.backbone.bottom_up.res4[5].conv3.weight, network.layer3[5].conv3.weight
    )


def test_wrapped_state_dicts_keep_their_versions(tmp_path, caplog) -> None:
    model = nn.ModuleDict({"layer": Versioned(3, 2)})
    state = nn.DataParallel(model).state_dict()
    assert "No weights" not in load(model, {"model": state}, tmp_path, caplog)
