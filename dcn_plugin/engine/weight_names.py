# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Names of the weights of other projects, and Detectron2's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

Weights = dict[str, Tensor]
# Pairs of keys without the name of the parameter; # is a number, the same one on both sides.
Renames = list[tuple[str, str]]


def resnet_renames() -> Renames:
    """Returns the keys of torchvision's ResNets, with offset branches of mmcv, and Detectron2's."""
    pairs = [("conv1", "stem.conv1"), ("bn1", "stem.conv1.norm"), ("fc", "linear")]
    for stage in range(1, 5):
        theirs, ours = f"layer{stage}.#", f"res{stage + 1}.#"
        pairs += [
            (f"{theirs}.conv2.conv_offset", f"{ours}.conv2_offset"),
            (f"{theirs}.conv#", f"{ours}.conv#"),
            (f"{theirs}.bn#", f"{ours}.conv#.norm"),
            (f"{theirs}.downsample.0", f"{ours}.shortcut"),
            (f"{theirs}.downsample.1", f"{ours}.shortcut.norm"),
        ]
    return pairs


def fpn_renames(laterals: int) -> Renames:
    """Returns the keys of MMDetection's FPN, and Detectron2's.

    Args:
        laterals: number of feature maps of the backbone, the last ones.
    """
    pairs = []
    for index in range(laterals):
        level = 6 - laterals + index
        for theirs, ours in (("lateral_convs", "lateral"), ("fpn_convs", "output")):
            pairs.append((f"neck.{theirs}.{index}.conv", f"backbone.fpn_{ours}{level}"))
            pairs.append((f"neck.{theirs}.{index}.bn", f"backbone.fpn_{ours}{level}.norm"))
    # Of RetinaNet.
    pairs.append((f"neck.fpn_convs.{laterals}.conv", "backbone.top_block.p6"))
    pairs.append((f"neck.fpn_convs.{laterals + 1}.conv", "backbone.top_block.p7"))
    return pairs


def head_renames(cascade: bool) -> Renames:
    """Returns the keys of MMDetection's RPN, box and mask heads, and Detectron2's.

    Args:
        cascade: whether there are several box heads. Detectron2 has one mask head: the last one.
    """
    pairs = [
        ("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv"),
        ("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits"),
        ("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas"),
    ]
    stage, last = (".#", ".2") if cascade else ("", "")
    box, mask = f"roi_head.bbox_head{stage}", f"roi_head.mask_head{last}"
    head, predictor = f"roi_heads.box_head{stage}", f"roi_heads.box_predictor{stage}"
    pairs.append((f"{box}.fc_cls", f"{predictor}.cls_score"))
    pairs.append((f"{box}.fc_reg", f"{predictor}.bbox_pred"))
    for index in range(8):
        pairs += [
            (f"{box}.shared_fcs.{index}", f"{head}.fc{index + 1}"),
            (f"{box}.shared_convs.{index}.conv", f"{head}.conv{index + 1}"),
            (f"{box}.shared_convs.{index}.bn", f"{head}.conv{index + 1}.norm"),
            (f"{mask}.convs.{index}.conv", f"roi_heads.mask_head.mask_fcn{index + 1}"),
            (f"{mask}.convs.{index}.bn", f"roi_heads.mask_head.mask_fcn{index + 1}.norm"),
        ]
    return [
        *pairs,
        (f"{mask}.upsample", "roi_heads.mask_head.deconv"),
        (f"{mask}.conv_logits", "roi_heads.mask_head.predictor"),
    ]


def mmdet_renames(keys: Iterable[str]) -> Renames:
    """Returns the keys of an MMDetection model and Detectron2's, from the keys of either."""
    text = "\n".join(keys)
    levels = re.findall(r"^(?:neck\.lateral_convs\.|backbone\.fpn_lateral)(\d)", text, re.M)
    laterals = len(set(levels))
    cascade = re.search(r"^roi_heads?\.(bbox|box)_head\.\d", text, re.M) is not None
    body = "backbone.bottom_up" if laterals else "backbone"
    pairs = [(f"backbone.{theirs}", f"{body}.{ours}") for theirs, ours in resnet_renames()]
    return [*pairs, *fpn_renames(laterals), *head_renames(cascade)]


def rename(weights: Mapping[str, Tensor], renames: Renames) -> Weights:
    """Returns weights with other keys; those that no pattern matches are kept.

    Args:
        weights: a state dict.
        renames: the first pattern that matches a whole key, but for the name of the parameter,
            applies.
    """
    rules = [
        (
            re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(\.[^.]+)"),
            new.replace("#", "{}") + "{}",
        )
        for old, new in renames
    ]

    def new_name(key: str) -> str:
        for pattern, new in rules:
            if match := pattern.fullmatch(key):
                return new.format(*match.groups())
        return key

    return {new_name(key): value for key, value in weights.items()}


def to_mmdet(weights: Mapping[str, Tensor]) -> Weights:
    """Returns the weights of a model of Detectron2 under MMDetection's names (versions 2 and 3).

    Args:
        weights: with Detectron2's keys. The box deltas keep their normalization: set
            `target_stds` to 1 / BBOX_REG_WEIGHTS.
    """
    if "stem.conv1.weight" in weights:  # a backbone alone
        weights = {f"backbone.{key}": value for key, value in weights.items()}
    renames = [(ours, theirs) for theirs, ours in mmdet_renames(weights)]
    converted = rename(weights, renames)
    # Norms without running statistics are group norms.
    norms = {k.rpartition(".")[0] for k in converted if re.search(r"\.bn\d?\.weight$", k)}
    groups = {norm for norm in norms if f"{norm}.running_mean" not in converted}
    return {_gn_name(key, groups): value for key, value in converted.items()}


def _gn_name(key: str, group_norms: set[str]) -> str:
    """Returns the key with the name of group normalization, if its module is one."""
    if key.rpartition(".")[0] not in group_norms:
        return key
    return re.sub(r"\.bn(\d?)(\.\w+)$", r".gn\1\2", key)


def without_backbone_prefix(weights: Mapping[str, Tensor]) -> Weights:
    """Returns weights with the keys of their backbone as those of the backbone alone."""
    prefix = re.compile(r"^backbone\.(bottom_up\.)?(?!fpn_|top_block)")
    return {prefix.sub("", key): value for key, value in weights.items()}


def to_torchvision(weights: Mapping[str, Tensor]) -> Weights:
    """Returns the weights of the ResNet of a model of Detectron2 under torchvision's names.

    Args:
        weights: with Detectron2's keys. What is not of the ResNet is left out.
    """
    bare = without_backbone_prefix(weights)
    converted = rename(bare, [(ours, theirs) for theirs, ours in resnet_renames()])
    return {key: value for key, value in converted.items() if key not in bare}
