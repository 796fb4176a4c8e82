# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of the values of config keys, for each architecture."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

from detectron2 import data, model_zoo
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
from detectron2.solver import build_lr_scheduler

from dcn_plugin.compat import LR_SCHEDULERS, TRAIN_SAMPLERS
from dcn_plugin.engine import UserError, read_config
from dcn_plugin.engine.config_rules import RULES, WARNINGS
from dcn_plugin.engine.config_values import check_values
from tests.engine import config_sweep as sweep
from tests.engine.config_sweep import NAN, NETWORKS, network_file
from tests.test_configs import LEAVES
from tests.test_configs import config as leaf

ROOT = Path(__file__).resolve().parents[2]
ZOO = Path(model_zoo.get_config_file("COCO-Detection/rpn_R_50_C4_1x.yaml")).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Config files of small models."""
    folder = tmp_path_factory.mktemp("configs")
    return {name: network_file(name, folder, "train", "test") for name in NETWORKS}


def config(file: str, *options: object) -> CfgNode:
    return read_config(Namespace(config_file=file, opts=list(options)))


TWO_STAGES = ("faster_rcnn", "rfcn", "fpn", "cascade")
ALL = tuple(NETWORKS)
# Values that crashed with a traceback, or trained nothing, before they were checked.
WRONG = [
    ("SOLVER.MAX_ITER", 0, "a positive integer", ALL),
    ("SOLVER.MAX_ITER", -5, "a positive integer", ALL),
    ("SOLVER.CHECKPOINT_PERIOD", 0, "an integer other than 0", ALL),
    ("SOLVER.IMS_PER_BATCH", 0, "a positive integer", ALL),
    ("SOLVER.REFERENCE_WORLD_SIZE", 3, "0 or a divisor of SOLVER.IMS_PER_BATCH", ALL),
    ("SOLVER.STEPS", (5, 3), "ascending numbers above 0 and below SOLVER.MAX_ITER", ALL),
    ("SOLVER.STEPS", (10,), "ascending numbers above 0 and below SOLVER.MAX_ITER", ALL),
    ("SOLVER.STEPS", (0,), "ascending numbers above 0 and below SOLVER.MAX_ITER", ALL),
    ("SOLVER.BASE_LR", NAN, "a finite number, 0 or more", ALL),
    ("SOLVER.BASE_LR", -0.1, "a finite number, 0 or more", ALL),
    ("SOLVER.WEIGHT_DECAY", NAN, "a finite number, 0 or more", ALL),
    ("SOLVER.WEIGHT_DECAY_BIAS", -1.0, "None or a finite number, 0 or more", ALL),
    ("SOLVER.WARMUP_ITERS", None, "an integer", ALL),
    ("SOLVER.WARMUP_METHOD", "none", "one of constant, linear", ALL),
    ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "one of WarmupMultiStepLR, WarmupCosineLR", ALL),
    ("SOLVER.GAMMA", -1.0, "a finite number, 0 or more", ALL),
    ("SOLVER.AMP.ENABLED", True, "a GPU if SOLVER.AMP.ENABLED is True", ALL),
    ("DATALOADER.NUM_WORKERS", -1, "an integer, 0 or more", ALL),
    ("DATALOADER.SAMPLER_TRAIN", "Sampler", "one of TrainingSampler", ALL),
    ("INPUT.FORMAT", "XYZ", "BGR or a mode of PIL", ALL),
    ("INPUT.FORMAT", "P", "BGR or a mode of PIL", ALL),
    ("INPUT.FORMAT", "CMYK", "MODEL.PIXEL_MEAN must be a number for each channel", ALL),
    ("INPUT.MIN_SIZE_TRAIN", (), "0 or integers above 1, at least one", ALL),
    ("INPUT.MIN_SIZE_TRAIN", (-1,), "0 or integers above 1, at least one", ALL),
    ("INPUT.MIN_SIZE_TRAIN", (1,), "0 or integers above 1, at least one", ALL),
    ("INPUT.MAX_SIZE_TRAIN", 1, "an integer above 1", ALL),
    ("INPUT.FORMAT", "YUV-BT.601", "BGR or a mode of PIL", ALL),
    ("SOLVER.OPTIMIZER", "Adam", "one of SGD, AdamW", ALL),
    ("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator", "other than Rotated", TWO_STAGES),
    ("MODEL.PROPOSAL_GENERATOR.NAME", "RRPN", "MODEL.*NAME must be o", ("faster_rcnn", "fpn")),
    (
        "MODEL.PROPOSAL_GENERATOR.NAME",
        "PrecomputedProposals",
        "MODEL.LOAD_PROPOSALS must be one of True",
        ("fpn", "cascade"),
    ),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignRotated", "one of ROIAlign", ("cascade",)),
    ("INPUT.MIN_SIZE_TEST", -1, "an integer, 0 or more", ALL),
    ("INPUT.RANDOM_FLIP", "both", "one of horizontal, vertical, none", ALL),
    ("SEED", 2**32, r"below 2\*\*32", ALL),
    ("SEED", None, r"below 2\*\*32", ALL),
    ("OFFSET_MONITOR_PERIOD", None, "a number of iterations", ALL),
    ("TEST.EXPECTED_RESULTS", ["AP"], "lists of task, metric, number and tolerance", ALL),
    ("MODEL.PIXEL_MEAN", [1.0, 2.0], "a number for each channel of INPUT.FORMAT", ALL),
    ("MODEL.PIXEL_MEAN", ["a", 1, 1], "finite numbers, at least one", ALL),
    ("MODEL.PIXEL_MEAN", [1.0] * 6, "a number for each channel of INPUT.FORMAT", ALL),
    ("MODEL.PIXEL_STD", [0.0, 1.0, 1.0], "finite numbers other than 0", ALL),
    ("MODEL.PIXEL_STD", [1.0, 1.0], "as long as MODEL.PIXEL_MEAN", ALL),
    ("MODEL.RETINANET.NUM_CONVS", 0, "a positive integer", ("retinanet",)),
    ("MODEL.PIXEL_STD", [1.0], "as long as MODEL.PIXEL_MEAN", (*TWO_STAGES, "retinanet")),
    ("MODEL.MASK_ON", None, "one of True, False", ALL),
    ("MODEL.RESNETS.NORM", "Batch", "a name that detectron2.layers.get_norm knows", ALL),
    ("MODEL.RESNETS.NORM", "GN", r"cannot be built with these .*must be divisible by", ALL),
    ("MODEL.RESNETS.STEM_OUT_CHANNELS", 2**62, "cannot be built with these numbers", ALL),
    ("MODEL.RESNETS.REDUCED_NORM", "Batch", "a name that detectron2", ("rfcn", "deeplab")),
    ("MODEL.RESNETS.DEFORM_LAST", ["a", 0, 0, 1], "four integers", ALL),
    ("MODEL.RESNETS.OUT_FEATURES", ["res6"], "some of stem, res2", ALL),
    ("MODEL.BACKBONE.FREEZE_AT", None, "an integer", ALL),
    ("MODEL.FPN.NORM", "Batch", "a name that detectron2", ("fpn", "cascade", "retinanet")),
    ("MODEL.FPN.NORM", "GN", "GN if 32 divides MODEL.FPN.OUT_CHANNELS", ("fpn", "cascade")),
    ("MODEL.FPN.IN_FEATURES", ["res9"], "some of MODEL.RESNETS.OUT_FEATURES", ("fpn",)),
    ("MODEL.FPN.IN_FEATURES", ["res4", "res3"], "twice the stride", ("fpn", "retinanet")),
    ("MODEL.FPN.IN_FEATURES", ["res3", "res5"], "twice the stride", ("fpn", "retinanet")),
    ("MODEL.FPN.FUSE_TYPE", "max", "one of sum, avg", ("fpn", "cascade", "retinanet")),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[]], "positive numbers", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16]], "one for each", ("rfcn", "fpn", "retinanet")),
    ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0]], "positive numbers", ("rfcn", "retinanet")),
    ("MODEL.ANCHOR_GENERATOR.OFFSET", 1.0, "from 0 to below 1", ("rfcn", "retinanet")),
    ("MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3], "ascending numbers above 0", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.RPN.IOU_LABELS", [0, 1], "one more than IOU_THRESHOLDS", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 0, "a positive integer", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.RPN.IN_FEATURES", ["p9"], "some of the backbone's features", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.RPN.IN_FEATURES", [[]], "names of features", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.RPN.BBOX_REG_LOSS_TYPE", "l2", "one of smooth_l1, giou", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.RPN.NMS_THRESH", NAN, "a number", TWO_STAGES),
    ("MODEL.ROI_HEADS.NUM_CLASSES", 0, "a positive integer", (*TWO_STAGES, "ca_rpn")),
    ("MODEL.ROI_HEADS.IOU_THRESHOLDS", [0], "ascending numbers above 0", TWO_STAGES),
    ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 0, "a positive integer", ("fpn", "cascade")),
    ("MODEL.ROI_HEADS.POSITIVE_FRACTION", 2.0, "from 0 to 1", ("fpn", "cascade")),
    ("MODEL.ROI_HEADS.IN_FEATURES", ["p9"], "some of the backbone's features", TWO_STAGES),
    ("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p2"], "twice the stride", ("cascade",)),
    ("MODEL.ROI_HEADS.IN_FEATURES", ["p3", "p2"], "twice the stride", ("cascade",)),
    ("MODEL.BACKBONE.NAME", "build_deform", "registered, got .*; the nearest: build_def", ALL),
    (
        "MODEL.ANCHOR_GENERATOR.NAME",
        "Anchors",
        "registered, got 'Anchors'",
        (*TWO_STAGES, "retinanet"),
    ),
    ("MODEL.ROI_HEADS.NAME", "Standard", "registered, got 'Standard'", TWO_STAGES),
    ("MODEL.ROI_HEADS.OHEM", -1, "an integer, 0 or more", ("rfcn",)),
    ("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 0, "a positive integer", TWO_STAGES),
    ("MODEL.ROI_BOX_HEAD.POOLER_MODE", "max", "one of align, bin, msra", ("faster_rcnn", "rfcn")),
    ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "RoIAlign", "one of ROIAlign", ("faster_rcnn", "cascade")),
    ("MODEL.ROI_BOX_HEAD.DEFORM_GAMMA", NAN, "a finite number", ("faster_rcnn", "rfcn", "fpn")),
    ("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", -1, "an integer, 0", ("faster_rcnn", "rfcn")),
    ("MODEL.ROI_BOX_HEAD.NUM_FC", 0, "above 0 if NUM_CONV is 0", ("faster_rcnn", "cascade")),
    (
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS",
        (0.6, 0.5, 0.7),
        "numbers above 0, the first",
        ("cascade",),
    ),
    ("INPUT.MASK_FORMAT", "png", "one of polygon, bitmask", ("cascade",)),
    ("MODEL.RETINANET.IOU_THRESHOLDS", [0.5, 0.4], "ascending numbers above 0", ("retinanet",)),
    ("MODEL.RETINANET.PRIOR_PROB", 1.0, "above 0 and below 1", ("retinanet",)),
    ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0, "a positive integer", ("deeplab",)),
]


@pytest.mark.parametrize(("key", "value", "message", "networks"), WRONG)
def test_wrong_values_are_errors(
    key: str, value: object, message: str, networks: tuple[str, ...], files: dict[str, str]
) -> None:
    others = {"SOLVER.MAX_ITER": 10, "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR", key: value}
    pairs = [part for pair in others.items() for part in pair]
    named = (
        message
        if re.search("must|cannot", message)
        else f"(MODEL.DEVICE|{re.escape(key)}) must be .*{message}"
    )
    for network in networks[:: max(1, len(networks) - 1)]:  # the first and the last
        with pytest.raises(UserError, match=named):
            cfg = config(files[network], *pairs)
            check_values(cfg, training=True, stock_trainer=True)


SWITCHED = [
    ({"SOLVER.CLIP_GRADIENTS.ENABLED": True}, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full"),
    ({"SOLVER.CLIP_GRADIENTS.ENABLED": True}, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.0),
    ({"INPUT.CROP.ENABLED": True}, "INPUT.CROP.SIZE", [1.5, 0.9]),
    ({"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute"}, "INPUT.CROP.SIZE", [0.9, 0.9]),
    ({"INPUT.CROP.ENABLED": True}, "INPUT.CROP.TYPE", "relativ"),
    ({"TEST.AUG.ENABLED": True}, "TEST.AUG.MIN_SIZES", ()),
    ({"TEST.PRECISE_BN.ENABLED": True}, "TEST.PRECISE_BN.NUM_ITER", 0),
    ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, "INPUT.MIN_SIZE_TRAIN", (800, 640)),
    ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"}, "INPUT.MIN_SIZE_TRAIN", (800,)),
    ({"MODEL.ROI_BOX_HEAD.NUM_CONV": 1}, "MODEL.ROI_BOX_HEAD.NORM", "Batch"),
    ({"MODEL.ROI_MASK_HEAD.NUM_CONV": 1}, "MODEL.ROI_MASK_HEAD.NORM", "Batch"),
    (
        {"MODEL.RESNETS.RES5_DILATION": 2},
        "MODEL.FPN.IN_FEATURES",
        ["res2", "res3", "res4", "res5"],
    ),
    ({"MODEL.KEYPOINT_ON": True}, "TEST.KEYPOINT_OKS_SIGMAS", [0.1]),
    ({"MODEL.KEYPOINT_ON": True}, "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE", None),
    ({"MODEL.ROI_HEADS.OHEM": 0}, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 0),
    (
        {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"},
        "DATALOADER.REPEAT_THRESHOLD",
        NAN,
    ),
    ({"SOLVER.MOMENTUM": 0.0}, "SOLVER.NESTEROV", True),
    ({"DATASETS.TEST": ()}, "TEST.EXPECTED_RESULTS", [["bbox", "AP", 40.0, 1.0]]),
]


@pytest.mark.parametrize(("on", "key", "value"), SWITCHED)
def test_keys_are_checked_only_if_they_are_read(on, key, value, files) -> None:
    network = "cascade" if re.search("NORM|KEYPOINT|FPN", key) else "rfcn"
    with pytest.raises(UserError, match=f"{re.escape(key)} must be"):
        switches = [part for pair in on.items() for part in pair]
        cfg = config(files[network], *switches, key, value)
        check_values(cfg, training=True, stock_trainer=True)
    check_values(config(files[network], key, value), training="range" not in on.values())


@pytest.mark.parametrize(
    ("network", "key", "value"),
    [
        ("deeplab", "MODEL.RPN.IOU_THRESHOLDS", [0.7, 0.3]),
        ("ca_rpn", "MODEL.ROI_HEADS.IN_FEATURES", ["nothing"]),
        ("rfcn", "MODEL.FPN.NORM", "nothing"),
        ("rfcn", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 0),
        ("rfcn", "MODEL.ROI_BOX_HEAD.NORM", "nothing"),
        ("fpn", "MODEL.RETINANET.PRIOR_PROB", 5.0),
        ("rfcn", "TEST.DETECTIONS_PER_IMAGE", -1),
        ("rfcn", "MODEL.RPN.BOUNDARY_THRESH", -1),
        ("rfcn", "TEST.EVAL_PERIOD", -1),
        ("cascade", "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", -1),
        ("rfcn", "INPUT.MAX_SIZE_TEST", sys.maxsize),
        ("fpn", "MODEL.RESNETS.REDUCED_NORM", "nothing"),
        ("rfcn", "SOLVER.CLIP_GRADIENTS.NORM_TYPE", float("inf")),
        ("deeplab", "MODEL.PIXEL_STD", [50.0]),
        ("rfcn", "SOLVER.STEPS", (1, 200)),  # Detectron2 warns that it ignores the second
    ],
)
def test_other_values_pass(network: str, key: str, value: object, files) -> None:
    check_values(config(files[network], key, value), training=True)


def test_evaluation_does_not_read_the_keys_of_training(files) -> None:
    words = ["SOLVER.MAX_ITER", 0, "INPUT.MIN_SIZE_TRAIN", (), "SOLVER.AMP.ENABLED", True]
    check_values(config(files["rfcn"], *words), training=False)
    with pytest.raises(UserError, match=r"INPUT\.MIN_SIZE_TEST must be"):
        check_values(config(files["rfcn"], "INPUT.MIN_SIZE_TEST", -1), training=False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.BASE_LR", 0.0),
        ("SOLVER.CHECKPOINT_PERIOD", -1),
        ("SOLVER.WARMUP_ITERS", 500),
        ("SOLVER.WARMUP_ITERS", -1),
        ("SOLVER.GAMMA", 0.0),
        ("INPUT.MAX_SIZE_TRAIN", 32),
        ("INPUT.MAX_SIZE_TEST", 32),
        ("TEST.DETECTIONS_PER_IMAGE", 0),
        ("SOLVER.MOMENTUM", 1.5),
        ("MODEL.RPN.LOSS_WEIGHT", -1.0),
        ("MODEL.RPN.POSITIVE_FRACTION", 0.0),
        ("MODEL.RPN.POST_NMS_TOPK_TRAIN", 0),
        ("MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA", -1.0),
        ("MODEL.BACKBONE.FREEZE_AT", 6),
        ("MODEL.RPN.NMS_THRESH", 1.5),
        ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 2.0),
        ("MODEL.ROI_HEADS.NMS_THRESH_TEST", -1.0),
    ],
)
def test_values_that_work_hardly_as_meant_are_warnings(key, value, files, caplog) -> None:
    check_values(config(files["rfcn"]), training=True)
    assert caplog.text == ""
    check_values(config(files["rfcn"], key, value), training=True)
    assert f"{key} should be " in caplog.text and f", got {value}" in caplog.text


@pytest.mark.parametrize(
    ("network", "key", "value"),
    [
        ("faster_rcnn", "MODEL.RPN.CONV_DIMS", [-1, 64]),
        ("cascade", "MODEL.ROI_BOX_CASCADE_HEAD.IOUS", (0.5, 0.7, 0.6)),
        ("faster_rcnn", "MODEL.RPN.LOSS_WEIGHT", -1.0),
        ("rfcn", "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR"),  # of Detectron2's project DeepLab
        ("rfcn", "DATALOADER.SAMPLER_TRAIN", "ClassAwareSampler"),
    ],
)
def test_what_works_in_detectron2_or_another_trainer_passes(network, key, value, files) -> None:
    check_values(config(files[network], key, value), training=True)


class Heads(nn.Module):
    """Custom RoI heads."""


def test_keys_of_custom_components_are_not_checked(files, monkeypatch) -> None:
    def build_backbone(cfg, input_shape) -> nn.Module:
        raise AssertionError("must not be built")

    def build_architecture(cfg) -> nn.Module:
        raise AssertionError("must not be built")

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "custom", build_backbone)
    monkeypatch.setitem(ROI_HEADS_REGISTRY._obj_map, "custom", Heads)
    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "custom", build_architecture)
    words = ["MODEL.BACKBONE.NAME", "custom", "MODEL.RESNETS.NORM", "own"]
    check_values(config(files["rfcn"], *words, "MODEL.RPN.IN_FEATURES", ["own"]), training=True)
    words = ["MODEL.ROI_HEADS.NAME", "custom", "MODEL.ROI_HEADS.IOU_THRESHOLDS", []]
    check_values(config(files["rfcn"], *words), training=True)
    words = ["MODEL.META_ARCHITECTURE", "custom", "MODEL.PIXEL_STD", [], "MODEL.RPN.CONV_DIMS", [0]]
    words += ["INPUT.FORMAT", "RGBD"]
    check_values(config(files["rfcn"], *words), training=True)


def test_names_are_those_of_this_detectron2(files) -> None:
    cfg = config(files["fpn"], "SOLVER.MAX_ITER", 10)
    model = nn.Linear(2, 2)
    for cfg.SOLVER.LR_SCHEDULER_NAME in LR_SCHEDULERS:
        build_lr_scheduler(cfg, torch.optim.SGD(model.parameters(), 0.1))
    for sampler in TRAIN_SAMPLERS:
        assert f'"{sampler}"' in inspect.getsource(data.build)
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(UserError, match="SAMPLER_TRAIN must be one of TrainingSampler"):
        check_values(cfg, training=True, stock_trainer=True)
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    check_values(cfg, training=True, stock_trainer=True)


def test_every_rule_is_about_keys_that_exist() -> None:
    cfg = config(next(iter(str(path) for path in ZOO.glob("COCO-Detection/*.yaml"))))
    for rules in (RULES, WARNINGS):
        for key in (key for group in rules.values() for keys in group for key in keys.split()):
            node = cfg
            for part in key.split("."):
                node = node[part]
    assert WARNINGS.keys() <= RULES.keys()


@pytest.mark.parametrize("every", [15, pytest.param(1, marks=pytest.mark.slow)])
def test_configs_of_detectron2_and_of_this_package_pass(every: int) -> None:
    zoo = sorted(str(path) for path in ZOO.rglob("*.yaml"))
    assert len(zoo) > 80
    for cfg in [*(config(file) for file in zoo[::every]), *(leaf(n) for n in LEAVES[::every])]:
        cfg.MODEL.DEVICE = "cpu"
        cfg.SOLVER.AMP.ENABLED = False  # of one config of Detectron2, for GPUs
        check_values(cfg, training=True)
        check_values(cfg, training=False)


@pytest.mark.parametrize(
    ("every", "start"), [(231, 0), pytest.param(20, 7, marks=pytest.mark.slow)]
)
def test_senseless_values_do_not_end_with_a_traceback(every: int, start: int, tmp_path) -> None:
    # In a process of its own: where autograd has run, no other can be forked that uses it.
    options = [f"--every={every}", f"--start={start}", f"--json={tmp_path}/answers"]
    command = [sys.executable, "-m", sweep.__name__, *options]
    subprocess.run(command, cwd=ROOT, check=True)
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert len(answers) >= 20
    assert not [answer for answer in answers if "traceback" in answer[3]]
