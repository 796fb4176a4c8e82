# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Names and layouts of weights of other projects, and Detectron2's.

MMDetection 1 to 3 (ResNets with mmcv's deformable convolution, FPN, RPN, and the box and mask heads
of Faster, Mask and Cascade R-CNN), and ResNets of torchvision and timm, which have the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
# Standard deviations of the box deltas of a head (x, y, width, height): MMDetection multiplies its
# predictions by them where Detectron2 divides by BBOX_REG_WEIGHTS.
BoxStds = tuple[float, float, float, float]
# MMDetection's defaults, by the number of heads.
DEFAULT_BOX_STDS: dict[int, tuple[BoxStds, ...]] = {
    1: ((0.1, 0.1, 0.2, 0.2),),
    3: ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)),
}

# Pairs of keys without the name of the parameter; # is a number, the same one on both sides.
Renames = list[tuple[str, str]]


@dataclass
class Origin:
    """What is known of the model that weights come from.

    Attributes:
        project: "MMDetection", "torchvision", "Caffe2" or "Detectron2"; "" if it is unknown.
        stride_in_1x1: whether the first 1x1 convolution of a bottleneck block has the stride.
        input_format: order of the channels of the images.
        box_stds: of each box head; empty if its deltas are not normalized as MMDetection's.
    """

    project: str = ""
    stride_in_1x1: bool | None = None
    input_format: str | None = None
    box_stds: tuple[BoxStds, ...] = ()


# By `__author__` in Detectron2's files.
AUTHORS = {
    "Caffe2": Origin("Caffe2", True, "BGR"),
    "torchvision": Origin("torchvision", False, "RGB"),
}


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


class Renamer:
    """Renames keys by pairs of patterns."""

    def __init__(self, renames: Renames) -> None:
        """Compiles the patterns.

        Args:
            renames: the first pattern that matches a whole key, but for the name of the
                parameter, applies.
        """
        self.rules = [
            (
                re.compile(re.escape(old).replace(r"\#", r"(\d+)") + r"(\.[^.]+)"),
                re.sub("#", lambda _: "{}", new) + "{}",
            )
            for old, new in renames
        ]

    def __call__(self, key: str) -> str:
        """Returns the new name of a key, or the key if no pattern matches."""
        for pattern, new in self.rules:
            if match := pattern.fullmatch(key):
                return new.format(*match.groups())
        return key


def rename(weights: Mapping[str, Tensor], renames: Renames) -> Weights:
    """Returns weights with other keys.

    Args:
        weights: a state dict.
        renames: pairs of patterns, as in `Renamer`.
    """
    renamer = Renamer(renames)
    return {renamer(key): value for key, value in weights.items()}


def to_detectron2(
    checkpoint: Mapping[str, Any], model_keys: Iterable[str] = ()
) -> tuple[Weights, Origin]:
    """Returns the weights of a checkpoint under Detectron2's names, and where they come from.

    Args:
        checkpoint: as Detectron2's checkpointer reads it: with `model`, the whole content of the
            file if it is of another project.
        model_keys: of the model that is to load them. If the weights have one of its keys, their
            names are Detectron2's already.

    Raises:
        ValueError: if a part of the model cannot be represented in Detectron2.
    """
    content, meta = checkpoint["model"], None
    if isinstance(content.get("state_dict"), Mapping):
        content, meta = content["state_dict"], content.get("meta")
    # DataParallel and DistributedDataParallel add a prefix.
    weights = {key.removeprefix("module."): value for key, value in content.items()}
    if isinstance(checkpoint.get("origin"), Mapping):  # of tools/convert_weights.py
        return weights, Origin(**checkpoint["origin"])
    author = checkpoint.get("__author__")
    if author in AUTHORS:
        return weights, AUTHORS[author]
    if not weights.keys().isdisjoint(model_keys):
        return weights, Origin()
    if {"conv1.0.weight", "layer1.0.conv1.weight"} <= weights.keys():
        raise ValueError(
            "the weights must be of a ResNet with one convolution in its stem, got conv1.0.weight, "
            "of a ResNet-C or ResNet-D (resnet50d in timm)"
        )
    if is_torchvision_resnet(weights):
        return from_torchvision(weights)
    if is_mmdet(weights):
        return from_mmdet(weights, meta if isinstance(meta, Mapping) else {})
    return weights, Origin()


def is_torchvision_resnet(keys: Iterable[str]) -> bool:
    """Returns whether a state dict has the keys of the ResNets of torchvision and timm."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= set(keys)


def is_mmdet(keys: Iterable[str]) -> bool:
    """Returns whether a state dict has the keys of a ResNet detector of MMDetection."""
    return any(re.match(r"backbone\.layer1\.0\.conv1\.|neck\.lateral_convs\.", key) for key in keys)


def from_torchvision(weights: Mapping[str, Tensor]) -> tuple[Weights, Origin]:
    """Returns the weights of a ResNet of torchvision or timm under Detectron2's names.

    Args:
        weights: the state dict; one with the names of mmcv's offset branches too.
    """
    return rename(weights, resnet_renames()), Origin("torchvision", False, "RGB")


def from_mmdet(weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[Weights, Origin]:
    """Returns the weights of a detector of MMDetection under Detectron2's names.

    Classes and box deltas are in Detectron2's order and number; their normalization is in the
    returned origin, see `scale_box_deltas`.

    Args:
        weights: the state dict.
        meta: `meta` of the checkpoint; its config reveals the stride and the input format.

    Raises:
        ValueError: if a head cannot be represented in Detectron2.
    """
    weights = {_current_name(key): value for key, value in weights.items()}
    if any(key.startswith("rpn_head.") for key in weights):
        check_rpn(weights)
        if any(re.match(r"(bbox|mask)_head\.", key) for key in weights):  # versions before 2.0
            weights = upgrade_mmdet_1(weights)
    converted = rename(weights, mmdet_renames(weights))
    config = str(meta.get("config") or meta.get("cfg") or "")
    style = re.search(r"\bstyle\s*=\s*['\"](\w+)['\"]", config)
    origin = Origin("MMDetection", box_stds=box_stds(converted, config))
    if style:
        caffe = style[1] == "caffe"
        origin = replace(origin, stride_in_1x1=caffe, input_format="BGR" if caffe else "RGB")
    return converted, origin


def _current_name(key: str) -> str:
    """Returns a key of MMDetection with the newer name of offset branches, and bn for any norm."""
    key = re.sub(r"\.conv2_offset\.", ".conv2.conv_offset.", key)
    return re.sub(r"\.gn(\d?)\.", r".bn\1.", key)


def check_rpn(weights: Mapping[str, Tensor]) -> None:
    """Rejects an RPN whose outputs Detectron2 has in another form.

    Args:
        weights: with MMDetection's keys.

    Raises:
        ValueError: if the RPN has a softmax, or several anchor scales.
    """
    logits, deltas = weights.get("rpn_head.rpn_cls.bias"), weights.get("rpn_head.rpn_reg.bias")
    if logits is None or deltas is None:
        return
    anchors = len(deltas) // 4
    if len(logits) != anchors:
        raise ValueError(
            f"rpn_head.rpn_cls must have an output for each of {anchors} anchors "
            f"(use_sigmoid=True), got {len(logits)}: Detectron2's RPN has no softmax"
        )
    if anchors > 3:
        raise ValueError(
            f"rpn_head must have anchors of one scale and up to 3 ratios, got {anchors} anchors, "
            "and Detectron2 orders several scales otherwise; remove rpn_head.* to load the rest"
        )


def upgrade_mmdet_1(weights: Mapping[str, Tensor]) -> Weights:
    """Returns weights of MMDetection 1 in the layout of version 2.

    The background was the first class, and had box deltas and a mask of its own.

    Args:
        weights: of a two-stage detector, `bbox_head.…` without `roi_head.`.
    """
    upgraded = {}
    for key, value in weights.items():
        if re.match(r"(bbox|mask)_head\.", key):
            head = key.rpartition(".fc_reg.")[0] or key.rpartition(".fc_cls.")[0]
            classes = len(weights[f"{head}.fc_cls.bias"]) if head else 0
            if ".fc_cls." in key:
                value = value.roll(-1, 0)
            elif ".fc_reg." in key and len(value) == 4 * classes:
                value = value[4:]
            elif ".conv_logits." in key and len(value) > 1:
                value = value[1:]
            key = f"roi_head.{key}"
        upgraded[key] = value
    return upgraded


def box_stds(weights: Iterable[str], config: str) -> tuple[BoxStds, ...]:
    """Returns the standard deviations of the box deltas of each head.

    Args:
        weights: with Detectron2's keys.
        config: MMDetection's config as text; the RPN's comes first. Its defaults apply if it has
            other numbers than heads.
    """
    predictor = re.compile(r"roi_heads\.box_predictor\.(\d\.)?bbox_pred\.weight")
    heads = sum(predictor.fullmatch(key) is not None for key in weights)
    number = r"\s*([\d.e-]+)\s*"
    found = re.findall(rf"\btarget_stds\s*=\s*[\[(]{','.join([number] * 4)},?\s*[\])]", config)
    if heads and len(found) == heads + 1:
        return tuple(tuple(map(float, stds)) for stds in found[1:])
    return DEFAULT_BOX_STDS.get(heads, ())


def scale_box_deltas(
    weights: Weights, stds: Sequence[BoxStds], reg_weights: Sequence[Sequence[float]]
) -> None:
    """Converts the box deltas of MMDetection's heads to a model's BBOX_REG_WEIGHTS, in place.

    Args:
        weights: with Detectron2's keys.
        stds: of each head, as in `Origin`.
        reg_weights: of each box head of the model. If it has other heads, nothing is done.
    """
    if len(stds) != len(reg_weights):
        return
    for head, (std, reg_weight) in enumerate(zip(stds, reg_weights, strict=True)):
        factor = torch.tensor(std, dtype=torch.float64) * torch.tensor(reg_weight).double()
        if torch.allclose(factor, torch.ones_like(factor), rtol=0, atol=1e-6):
            continue
        prefix = "roi_heads.box_predictor." + (f"{head}." if len(stds) > 1 else "")
        for key in (f"{prefix}bbox_pred.weight", f"{prefix}bbox_pred.bias"):
            value = weights[key]
            rows = factor.repeat(len(value) // 4).reshape(-1, *[1] * (value.dim() - 1))
            weights[key] = (value.double() * rows).to(value.dtype)


def to_mmdet(weights: Mapping[str, Tensor]) -> Weights:
    """Returns the weights of a model of Detectron2 under MMDetection's names (versions 2 and 3).

    Args:
        weights: with Detectron2's keys. The box deltas keep their normalization: set
            `target_stds` to 1 / BBOX_REG_WEIGHTS.
    """
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
