# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Rules for the values of config keys.

With other values Detectron2 0.6 or this package was seen to crash, or cannot train.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from PIL import Image

from detectron2.config import CfgNode
from detectron2.layers import get_norm

from dcn_plugin.compat import LR_SCHEDULERS, TRAIN_SAMPLERS
from dcn_plugin.layers.roi_pool import MODES
from dcn_plugin.modeling.backbone.deform_stages import FEATURES

from .optimizer import OPTIMIZERS

Check = Callable[[Any, CfgNode], bool]  # called with a value and the config


class Rule(NamedTuple):
    """What a value must be. `is_valid` returns whether it is, or raises, such as a TypeError."""

    text: str
    is_valid: Check


RuleGroups = Mapping[
    str, Mapping[str, Rule]
]  # by what reads the keys, and keys separated by spaces


def integer(low: int = -(2**63), high: int = 2**63 - 1) -> Check:
    """Returns whether a value is an integer from low to high, by default of 64 bits."""
    return lambda value, cfg: isinstance(value, int) and low <= value <= high


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """Returns whether a value is a finite number from low to high."""
    return lambda value, cfg: low <= value <= high and math.isfinite(value)


def positive(value: Any, cfg: CfgNode) -> bool:
    """Returns whether a value is a finite number above 0."""
    return 0 < value < math.inf


def each(is_valid: Check) -> Check:
    """Returns whether a value is a list that is not empty, and all its items are valid."""
    return lambda value, cfg: (
        isinstance(value, (list, tuple)) and bool(value) and all(is_valid(v, cfg) for v in value)
    )


def one_of(*known: object) -> Rule:
    """Requires a value that is known."""
    return Rule(f"one of {', '.join(map(str, known))}", lambda value, cfg: value in known)


def none_or(rule: Rule) -> Rule:
    """Requires None or another value."""
    return Rule(f"None or {rule.text}", lambda v, cfg: v is None or rule.is_valid(v, cfg))


def norm(section: str = "", channels: str = "") -> Rule:
    """Requires a norm that `get_norm` can build; it may be a function of a LazyConfig.

    Args:
        section: of MODEL.
        channels: key in the section with the number of channels, by default one that suits all.
    """

    def is_valid(value: Any, cfg: CfgNode) -> bool:
        with torch.device("meta"):
            get_norm(value, cfg.MODEL[section][channels] if channels else 32)
        return True

    multiple = f", with GN if 32 divides MODEL.{section}.{channels}" if channels else ""
    return Rule(
        'a name that detectron2.layers.get_norm knows, such as BN, FrozenBN, SyncBN, GN or ""'
        + multiple,
        is_valid,
    )


def channels_of(image_format: str | None) -> int:
    """Returns the number of channels of INPUT.FORMAT; an error if PIL has no such mode."""
    mode = "RGB" if image_format in (None, "BGR") else image_format
    return len(Image.new("RGB", (1, 1)).convert(mode).getbands())


def is_image_format(value: Any, cfg: CfgNode) -> bool:
    """Returns whether Detectron2 can read images in a format."""
    return channels_of(value) > 1 or value == "L"  # of the modes with one channel


def is_mean_per_channel(value: Any, cfg: CfgNode) -> bool:
    """Returns whether there are as many means as channels that Detectron2's mapper reads."""
    return len(value) == channels_of(cfg.INPUT.FORMAT)


def is_period(value: Any, cfg: CfgNode) -> bool:
    """Returns whether something can happen each time that many iterations are done."""
    return isinstance(value, int) and value != 0


def is_nesterov(value: Any, cfg: CfgNode) -> bool:
    """Returns whether SGD can have this SOLVER.NESTEROV."""
    return not value or cfg.SOLVER.MOMENTUM > 0


def divides_batch(value: Any, cfg: CfgNode) -> bool:
    """Returns whether SOLVER.IMS_PER_BATCH is a multiple of SOLVER.REFERENCE_WORLD_SIZE."""
    return value == 0 or (value > 0 and cfg.SOLVER.IMS_PER_BATCH % value == 0)


def is_sampler(value: Any, cfg: CfgNode) -> bool:
    """Returns whether Detectron2 can build a sampler; one needs a key that it does not define."""
    subset = value == "RandomSubsetTrainingSampler" and "RANDOM_SUBSET_RATIO" in cfg.DATALOADER
    return value in TRAIN_SAMPLERS or subset


def are_steps(value: Any, cfg: CfgNode) -> bool:
    """Returns whether a schedule can have these steps; it ignores those beyond its end."""
    steps = [step for step in value if step <= cfg.SOLVER.MAX_ITER]
    return all(a < b for a, b in zip([0, *steps], [*steps, cfg.SOLVER.MAX_ITER], strict=True))


def are_train_sizes(value: Any, cfg: CfgNode) -> bool:
    """Returns whether Detectron2 can sample the shorter side of images."""
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING != "range":
        return each(integer(0))(value, cfg) and 1 not in value
    return len(value) == 2 and (value[0] == 0 or value[0] > 1) and value[0] <= value[1]


def is_crop_size(value: Any, cfg: CfgNode) -> bool:
    """Returns whether INPUT.CROP.SIZE fits INPUT.CROP.TYPE."""
    if not cfg.INPUT.CROP.TYPE.startswith("absolute"):
        return len(value) == 2 and all(0 < part <= 1 for part in value)
    ordered = cfg.INPUT.CROP.TYPE == "absolute" or value[0] <= value[1]
    return len(value) == 2 and all(integer(1)(part, cfg) for part in value) and ordered


def are_expected_results(value: Any, cfg: CfgNode) -> bool:
    """Returns whether Detectron2 can compare results with TEST.EXPECTED_RESULTS."""
    return all(
        len(row) == 4 and all(map(math.isfinite, row[2:])) and all(map(str.strip, row[:2]))
        for row in value
    )


def of_stages(value: Any, cfg: CfgNode) -> bool:
    """Returns whether there is a value for each of res2 to res5."""
    return len(value) == 4


def are_blocks(value: Any, cfg: CfgNode) -> bool:
    """Returns whether there is a number of blocks for each of res2 to res5."""
    return len(value) == 4 and each(integer(0))(value, cfg)


def are_pyramid_inputs(value: Any, cfg: CfgNode) -> bool:
    """Returns whether a feature pyramid can be built on these features of the ResNet."""
    resnets = cfg.MODEL.RESNETS
    strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32 if resnets.RES5_DILATION == 1 else 16}
    given = [strides[name] for name in value if name in resnets.OUT_FEATURES]
    doubled = [2 * stride for stride in given[:-1]]
    return len(given) == len(value) > 0 and given[1:] == doubled


def are_channels(value: Any, cfg: CfgNode) -> bool:
    """Returns whether the head of an RPN can have these convolutions."""
    return all(integer(1)(channels, cfg) or channels == -1 for channels in value)


def are_thresholds(value: Any, cfg: CfgNode) -> bool:
    """Returns whether `Matcher` takes these IoU thresholds."""
    return value[0] > 0 and list(value) == sorted(value) and all(math.isfinite(v) for v in value)


def are_labels(section: str) -> Check:
    """Returns whether there is a label for each interval of IOU_THRESHOLDS of a section."""
    return lambda value, cfg: (
        len(value) == len(cfg.MODEL[section].IOU_THRESHOLDS) + 1 and set(value) <= {-1, 0, 1}
    )


def are_anchors(features: str) -> Check:
    """Returns whether anchors have these sizes or aspect ratios on the features of a section."""

    def is_valid(value: Any, cfg: CfgNode) -> bool:
        if not isinstance(value[0], (list, tuple)):  # the same for all features
            return each(positive)(value, cfg)
        levels = (1, len(cfg.MODEL[features].IN_FEATURES))
        return len(value) in levels and each(each(positive))(value, cfg)

    return is_valid


def are_box_weights(value: Any, cfg: CfgNode) -> bool:
    """Returns whether deltas of boxes can be normalized with these weights."""
    return len(value) in (4, 5) and all(math.isfinite(weight) and weight != 0 for weight in value)


def has_layers(value: Any, cfg: CfgNode) -> bool:
    """Returns whether a box head has a layer."""
    return value + cfg.MODEL.ROI_BOX_HEAD.NUM_CONV > 0


def are_cascade_ious(value: Any, cfg: CfgNode) -> bool:
    """Returns whether a cascade can have these IoU thresholds."""
    return value[0] == cfg.MODEL.ROI_HEADS.IOU_THRESHOLDS[0] and each(positive)(value, cfg)


def are_stages(value: Any, cfg: CfgNode) -> bool:
    """Returns whether there are weights for each stage of a cascade."""
    stages = len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS)
    return len(value) == stages and all(are_box_weights(weights, cfg) for weights in value)


def are_sigmas(value: Any, cfg: CfgNode) -> bool:
    """Returns whether there is a sigma for each keypoint, or none."""
    count = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    return len(value) in (0, count) and all(sigma > 0 for sigma in value)


INTEGER = Rule("an integer", integer())
POSITIVE = Rule("a positive integer", integer(1))
COUNT = Rule("an integer, 0 or more", integer(0))
FINITE = Rule("a finite number", number())
A_NUMBER = Rule("a number", lambda value, cfg: not math.isnan(value))
NOT_NEGATIVE = Rule("a finite number, 0 or more", number(0))
ABOVE_0 = Rule("a finite number above 0", positive)
FRACTION = Rule("from 0 to 1", number(0, 1))
PERIOD = Rule("a number of iterations (0: never)", integer())
THRESHOLDS = Rule("ascending numbers above 0, at least one", are_thresholds)
LABELS = "one more than IOU_THRESHOLDS, each -1, 0 or 1"
BOX_WEIGHTS = Rule("four finite numbers other than 0 (five for rotated boxes)", are_box_weights)
NAMES = Rule("names of features", each(lambda value, cfg: isinstance(value, str)))
LOSS = one_of("smooth_l1", "giou", "diou", "ciou")
POOLER = one_of("ROIAlign", "ROIAlignV2", "ROIPool")
ROTATED = "RotatedAnchorGenerator"


def anchor_rules(section: str) -> dict[str, Rule]:
    """Returns the rules of anchors on the features of a section of MODEL."""
    lists = Rule(
        f"positive numbers, in one list for all of MODEL.{section}.IN_FEATURES or one for each",
        are_anchors(section),
    )
    return {
        "MODEL.ANCHOR_GENERATOR.SIZES MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": lists,
        "MODEL.ANCHOR_GENERATOR.OFFSET": Rule("from 0 to below 1", lambda v, cfg: 0 <= v < 1),
    }


RULES: RuleGroups = {
    "all": {
        "SEED": Rule("below 2**32 (negative: random)", integer(high=2**32 - 1)),
        "VIS_PERIOD OFFSET_MONITOR_PERIOD": PERIOD,
        "DATALOADER.NUM_WORKERS": COUNT,
        "CUDNN_BENCHMARK MODEL.MASK_ON MODEL.KEYPOINT_ON": one_of(True, False),
    },
    "training": {
        "SOLVER.MAX_ITER SOLVER.IMS_PER_BATCH": POSITIVE,
        "SOLVER.CHECKPOINT_PERIOD": Rule("an integer other than 0", is_period),
        "SOLVER.BASE_LR SOLVER.WARMUP_FACTOR SOLVER.MOMENTUM SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
        "SOLVER.OFFSET_LR_FACTOR SOLVER.ROI_OFFSET_LR_FACTOR": NOT_NEGATIVE,
        "SOLVER.WEIGHT_DECAY_NORM SOLVER.WEIGHT_DECAY_BIAS": none_or(NOT_NEGATIVE),
        "SOLVER.BIAS_LR_FACTOR": none_or(NOT_NEGATIVE),
        "SOLVER.NESTEROV": Rule("False without SOLVER.MOMENTUM", is_nesterov),
        "SOLVER.WARMUP_ITERS": INTEGER,
        "SOLVER.REFERENCE_WORLD_SIZE": Rule(
            "0 or a divisor of SOLVER.IMS_PER_BATCH", divides_batch
        ),
        "TEST.EVAL_PERIOD": PERIOD,
        "INPUT.MIN_SIZE_TRAIN": Rule(
            "0 or integers above 1, at least one; minimum and maximum with the sampling range",
            are_train_sizes,
        ),
        "INPUT.MAX_SIZE_TRAIN": Rule("an integer above 1", integer(2)),
        "TEST.EXPECTED_RESULTS": Rule(
            "empty if DATASETS.TEST is", lambda v, cfg: not v or bool(cfg.DATASETS.TEST)
        ),
    },
    # Trainers may build others than Detectron2's.
    "stock trainer": {
        "SOLVER.OPTIMIZER": one_of(*OPTIMIZERS),
        "SOLVER.LR_SCHEDULER_NAME": one_of(*LR_SCHEDULERS),
        "SOLVER.WARMUP_METHOD": one_of("constant", "linear"),
        "DATALOADER.SAMPLER_TRAIN": Rule(f"one of {', '.join(TRAIN_SAMPLERS)}", is_sampler),
        "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
        "INPUT.RANDOM_FLIP": one_of("horizontal", "vertical", "none"),
    },
    "stock clipping": {"SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm")},
    "steps": {
        "SOLVER.STEPS": Rule("ascending numbers above 0 and below SOLVER.MAX_ITER", are_steps),
        "SOLVER.GAMMA": NOT_NEGATIVE,
    },
    "repeat factors": {"DATALOADER.REPEAT_THRESHOLD": NOT_NEGATIVE},
    "clipping": {
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ABOVE_0,
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE": Rule("above 0", lambda value, cfg: value > 0),
    },
    "amp": {
        "MODEL.DEVICE": Rule(
            "a GPU if SOLVER.AMP.ENABLED is True, since Detectron2 scales gradients only there",
            lambda value, cfg: not value.startswith("cpu"),
        )
    },
    "crop": {
        "INPUT.CROP.TYPE": one_of("relative", "relative_range", "absolute", "absolute_range"),
        "INPUT.CROP.SIZE": Rule(
            "two fractions above 0; with an absolute TYPE two sizes in pixels", is_crop_size
        ),
    },
    "precise bn": {"TEST.PRECISE_BN.NUM_ITER": POSITIVE},
    "test": {
        "INPUT.MIN_SIZE_TEST": COUNT,
        "INPUT.MAX_SIZE_TEST": POSITIVE,
        "TEST.DETECTIONS_PER_IMAGE": Rule("an integer (negative: all)", integer()),
        "TEST.EXPECTED_RESULTS": Rule(
            "lists of task, metric, number and tolerance", are_expected_results
        ),
    },
    "tta": {
        "TEST.AUG.MIN_SIZES": Rule("positive integers, at least one", each(integer(1))),
        "TEST.AUG.MAX_SIZE": POSITIVE,
    },
    "images": {
        "MODEL.PIXEL_MEAN": Rule("finite numbers, at least one", each(number())),
        "MODEL.PIXEL_STD": Rule(
            "finite numbers other than 0", each(lambda v, cfg: v != 0 and math.isfinite(v))
        ),
    },
    "stock mapper": {
        "INPUT.FORMAT": Rule("BGR or a mode of PIL such as RGB or L", is_image_format),
        "MODEL.PIXEL_MEAN": Rule("a number for each channel of INPUT.FORMAT", is_mean_per_channel),
    },
    "normalization": {
        "MODEL.PIXEL_STD": Rule(
            "as long as MODEL.PIXEL_MEAN", lambda v, cfg: len(v) == len(cfg.MODEL.PIXEL_MEAN)
        )
    },
    "broadcast normalization": {
        "MODEL.PIXEL_STD": Rule(
            "as long as MODEL.PIXEL_MEAN, or one number",
            lambda v, cfg: len(v) in (1, len(cfg.MODEL.PIXEL_MEAN)),
        )
    },
    "resnet": {
        "MODEL.RESNETS.NORM": norm(),
        "MODEL.RESNETS.STEM_OUT_CHANNELS": POSITIVE,
        "MODEL.RESNETS.NUM_GROUPS MODEL.RESNETS.WIDTH_PER_GROUP": POSITIVE,
        "MODEL.RESNETS.DEFORM_NUM_GROUPS": POSITIVE,
        "MODEL.RESNETS.DEFORM_ON_PER_STAGE": Rule(
            "True or False for each of res2 to res5", of_stages
        ),
        "MODEL.BACKBONE.FREEZE_AT": INTEGER,
    },
    "plain resnet": {
        "MODEL.RESNETS.RES2_OUT_CHANNELS": POSITIVE,
        "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
        "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
        "MODEL.RESNETS.OUT_FEATURES": Rule(
            f"some of {', '.join(FEATURES[:-1])}", each(one_of(*FEATURES[:-1]).is_valid)
        ),
    },
    "deform resnet": {
        "MODEL.RESNETS.DEFORM_LAST": Rule("four integers, for res2 to res5", are_blocks),
        "MODEL.RESNETS.RES2_OUT_CHANNELS": none_or(POSITIVE),
        "MODEL.RESNETS.RES5_DILATION": POSITIVE,
        "MODEL.RESNETS.OUT_FEATURES": Rule(
            f"some of {', '.join(FEATURES)}", each(one_of(*FEATURES).is_valid)
        ),
    },
    "reduced": {
        "MODEL.RESNETS.REDUCED_CHANNELS": POSITIVE,
        "MODEL.RESNETS.REDUCED_NORM": norm("RESNETS", "REDUCED_CHANNELS"),
    },
    "fpn": {
        "MODEL.FPN.IN_FEATURES": Rule(
            "some of MODEL.RESNETS.OUT_FEATURES, each with twice the stride of the one before (if "
            "RES5_DILATION is above 1, res5 has the stride of res4)",
            are_pyramid_inputs,
        ),
        "MODEL.FPN.OUT_CHANNELS": POSITIVE,
        "MODEL.FPN.NORM": norm("FPN", "OUT_CHANNELS"),
        "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    },
    "rpn": {
        "MODEL.RPN.IN_FEATURES": NAMES,
        "MODEL.RPN.IOU_THRESHOLDS": THRESHOLDS,
        "MODEL.RPN.IOU_LABELS": Rule(LABELS, are_labels("RPN")),
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": POSITIVE,
        "MODEL.RPN.POSITIVE_FRACTION": FRACTION,
        "MODEL.RPN.BBOX_REG_LOSS_TYPE": LOSS,
        "MODEL.RPN.LOSS_WEIGHT MODEL.RPN.BBOX_REG_LOSS_WEIGHT": FINITE,
        "MODEL.RPN.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
        "MODEL.RPN.SMOOTH_L1_BETA": FINITE,
        "MODEL.RPN.BOUNDARY_THRESH": INTEGER,
        "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": FINITE,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": COUNT,
    },
    "proposals": {
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": COUNT,
        "MODEL.RPN.NMS_THRESH": A_NUMBER,
    },
    "rpn head": {
        "MODEL.RPN.CONV_DIMS": Rule(
            "positive integers, or -1 for the channels of the features", are_channels
        )
    },
    "rpn anchors": anchor_rules("RPN"),
    "upright anchors": {
        "MODEL.ANCHOR_GENERATOR.NAME": Rule(f"other than {ROTATED}", lambda v, cfg: v != ROTATED)
    },
    "rotated anchors": {"MODEL.ANCHOR_GENERATOR.NAME": one_of(ROTATED)},
    "precomputed proposals": {"MODEL.LOAD_PROPOSALS": one_of(True)},
    "classes": {"MODEL.ROI_HEADS.NUM_CLASSES": POSITIVE},
    "detections": {
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST MODEL.ROI_HEADS.NMS_THRESH_TEST": A_NUMBER,
    },
    "roi heads": {
        "MODEL.ROI_HEADS.IN_FEATURES": NAMES,
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": THRESHOLDS,
        "MODEL.ROI_HEADS.IOU_LABELS": Rule(LABELS, are_labels("ROI_HEADS")),
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": POSITIVE,
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": INTEGER,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": LOSS,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": FINITE,
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": FINITE,
    },
    "roi sampling": {
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": POSITIVE,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": FRACTION,
    },
    "one stage": {"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": BOX_WEIGHTS},
    "cascade": {
        "MODEL.ROI_BOX_CASCADE_HEAD.IOUS": Rule(
            "numbers above 0, the first as in MODEL.ROI_HEADS.IOU_THRESHOLDS",
            are_cascade_ious,
        ),
        "MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS": Rule(
            f"for each stage {BOX_WEIGHTS.text}", are_stages
        ),
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": one_of(True),
    },
    "box pooler": {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": POOLER},
    "rotated box pooler": {"MODEL.ROI_BOX_HEAD.POOLER_TYPE": one_of("ROIAlignRotated")},
    "upright proposals": {
        "MODEL.PROPOSAL_GENERATOR.NAME": Rule("other than RRPN", lambda v, cfg: v != "RRPN")
    },
    "rotated proposals": {
        "MODEL.PROPOSAL_GENERATOR.NAME": Rule("one of rotated boxes", lambda v, cfg: v != "RPN")
    },
    "deform pooler": {
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": COUNT,
        "MODEL.ROI_BOX_HEAD.POOLER_MODE": one_of(*MODES),
        "MODEL.ROI_BOX_HEAD.DEFORM_GAMMA": FINITE,
    },
    "ohem": {"MODEL.ROI_HEADS.OHEM": COUNT},
    "fc box head": {
        "MODEL.ROI_BOX_HEAD.NUM_CONV MODEL.ROI_BOX_HEAD.NUM_FC": COUNT,
        "MODEL.ROI_BOX_HEAD.NUM_FC": Rule("above 0 if NUM_CONV is 0", has_layers),
    },
    "box fcs": {"MODEL.ROI_BOX_HEAD.FC_DIM": POSITIVE},
    "box convs": {
        "MODEL.ROI_BOX_HEAD.CONV_DIM": POSITIVE,
        "MODEL.ROI_BOX_HEAD.NORM": norm("ROI_BOX_HEAD", "CONV_DIM"),
    },
    "masks": {
        "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION MODEL.ROI_MASK_HEAD.CONV_DIM": POSITIVE,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": COUNT,
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": INTEGER,
        "MODEL.ROI_MASK_HEAD.POOLER_TYPE": POOLER,
    },
    "mask convs": {"MODEL.ROI_MASK_HEAD.NORM": norm("ROI_MASK_HEAD", "CONV_DIM")},
    "keypoints": {
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": COUNT,
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": POSITIVE,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": POSITIVE,
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": INTEGER,
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_TYPE": POOLER,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": Rule("positive integers", each(integer(1))),
        "MODEL.ROI_KEYPOINT_HEAD.LOSS_WEIGHT": FINITE,
        "TEST.KEYPOINT_OKS_SIGMAS": Rule("empty, or a number above 0 per keypoint", are_sigmas),
    },
    "retinanet": {
        "MODEL.RETINANET.IN_FEATURES": NAMES,
        "MODEL.RETINANET.NUM_CLASSES": POSITIVE,
        "MODEL.RETINANET.NUM_CONVS": POSITIVE,
        "MODEL.RETINANET.TOPK_CANDIDATES_TEST": COUNT,
        "MODEL.RETINANET.IOU_THRESHOLDS": THRESHOLDS,
        "MODEL.RETINANET.IOU_LABELS": Rule(LABELS, are_labels("RETINANET")),
        "MODEL.RETINANET.PRIOR_PROB": Rule("above 0 and below 1", lambda v, cfg: 0 < v < 1),
        "MODEL.RETINANET.SCORE_THRESH_TEST MODEL.RETINANET.NMS_THRESH_TEST": A_NUMBER,
        "MODEL.RETINANET.FOCAL_LOSS_GAMMA MODEL.RETINANET.FOCAL_LOSS_ALPHA": FINITE,
        "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": FINITE,
        "MODEL.RETINANET.BBOX_REG_WEIGHTS": BOX_WEIGHTS,
        "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": LOSS,
        "MODEL.RETINANET.NORM": norm(),
    },
    "retinanet anchors": anchor_rules("RETINANET"),
    "semantic segmentation": {
        "MODEL.SEM_SEG_HEAD.IN_FEATURES": NAMES,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": POSITIVE,
        "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": INTEGER,
        "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": FINITE,
    },
    "sem seg fpn": {
        "MODEL.SEM_SEG_HEAD.CONVS_DIM MODEL.SEM_SEG_HEAD.COMMON_STRIDE": POSITIVE,
        "MODEL.SEM_SEG_HEAD.NORM": norm("SEM_SEG_HEAD", "CONVS_DIM"),
    },
}
# Values that run, but are probably mistakes.
WARNINGS: RuleGroups = {
    "training": {
        "SOLVER.BASE_LR": ABOVE_0,
        "SOLVER.MOMENTUM": Rule("below 1", lambda value, cfg: value < 1),
        "SOLVER.CHECKPOINT_PERIOD": Rule("above 0", lambda value, cfg: value > 0),
        "SOLVER.WARMUP_ITERS": Rule(
            "from 0 to below SOLVER.MAX_ITER", lambda v, cfg: 0 <= v < cfg.SOLVER.MAX_ITER
        ),
        "INPUT.MAX_SIZE_TRAIN": Rule(
            "at least INPUT.MIN_SIZE_TRAIN", lambda v, cfg: v >= max(cfg.INPUT.MIN_SIZE_TRAIN)
        ),
    },
    "steps": {"SOLVER.GAMMA": ABOVE_0},
    "test": {
        "INPUT.MAX_SIZE_TEST": Rule(
            "at least INPUT.MIN_SIZE_TEST", lambda value, cfg: value >= cfg.INPUT.MIN_SIZE_TEST
        ),
        "TEST.DETECTIONS_PER_IMAGE": Rule("other than 0", lambda value, cfg: value != 0),
    },
    "resnet": {"MODEL.BACKBONE.FREEZE_AT": Rule("from 0 to 5", integer(0, 5))},
    "rpn": {
        "MODEL.RPN.LOSS_WEIGHT MODEL.RPN.BBOX_REG_LOSS_WEIGHT": NOT_NEGATIVE,
        "MODEL.RPN.SMOOTH_L1_BETA": NOT_NEGATIVE,
        "MODEL.RPN.POSITIVE_FRACTION": ABOVE_0,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": POSITIVE,
    },
    "proposals": {
        "MODEL.RPN.NMS_THRESH": FRACTION,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN MODEL.RPN.POST_NMS_TOPK_TRAIN": POSITIVE,
        "MODEL.RPN.POST_NMS_TOPK_TEST": POSITIVE,
    },
    "roi heads": {
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT": NOT_NEGATIVE,
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": NOT_NEGATIVE,
    },
    "semantic segmentation": {"MODEL.SEM_SEG_HEAD.LOSS_WEIGHT": NOT_NEGATIVE},
    "detections": {
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST MODEL.ROI_HEADS.NMS_THRESH_TEST": FRACTION,
    },
    "retinanet": {
        "MODEL.RETINANET.SCORE_THRESH_TEST MODEL.RETINANET.NMS_THRESH_TEST": FRACTION,
    },
}
