# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Weights of other projects in Detectron2's names and layout, and what they need from a config.

MMDetection 1 to 3 (ResNets with mmcv's deformable convolution, FPN, RPN, and the box and mask heads
of Faster, Mask and Cascade R-CNN), and ResNets of torchvision and timm, which have the same keys.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dcn_plugin.messages import UserError

from . import mmdet_config
from .weight_names import Weights, mmdet_renames, rename, resnet_renames

logger = logging.getLogger(__name__)

# Standard deviations of the box deltas of a head (x, y, width, height): MMDetection multiplies its
# predictions by them where Detectron2 divides by BBOX_REG_WEIGHTS.
BoxStds = tuple[float, ...]
# MMDetection's defaults, by the number of heads.
DEFAULT_BOX_STDS: dict[int, tuple[BoxStds, ...]] = {
    1: ((0.1, 0.1, 0.2, 0.2),),
    3: ((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)),
}


@dataclass
class Origin:
    """What is known of the model that weights come from, and what a config must say to fit them.

    Attributes:
        project: its name; "" if it is Detectron2 or unknown.
        stride_in_1x1: MODEL.RESNETS.STRIDE_IN_1X1.
        input_format: INPUT.FORMAT.
        pixel_mean: MODEL.PIXEL_MEAN.
        pixel_std: MODEL.PIXEL_STD.
        box_stds: of each box head; empty if its deltas are not normalized as MMDetection's.
    """

    project: str = ""
    stride_in_1x1: bool | None = None
    input_format: str | None = None
    pixel_mean: Sequence[float] = ()
    pixel_std: Sequence[float] = ()
    box_stds: Sequence[BoxStds] = ()


TORCHVISION = Origin(
    "torchvision", False, "RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
)
# Of files that tools/convert_weights.py writes.
CONVERTED_BY = "dcn_plugin's convert_weights.py"


def state_dict_of(checkpoint: Mapping[str, Any]) -> tuple[Any, Any]:
    """Returns the state dict of a checkpoint, and its `meta` if it is one of OpenMMLab.

    Args:
        checkpoint: as Detectron2's checkpointer reads it.
    """
    content = checkpoint["model"]
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        return content["state_dict"], content.get("meta")
    return content, None


def to_detectron2(
    checkpoint: Mapping[str, Any], model_keys: Iterable[str] = ()
) -> tuple[Weights, Origin]:
    """Returns the weights of a checkpoint under Detectron2's names, and where they come from.

    Args:
        checkpoint: as Detectron2's checkpointer reads it: with `model`, the whole content of the
            file if it is of another project.
        model_keys: of the model that is to load them. If the weights have one of its keys, their
            names are Detectron2's already, and they are returned as they are.

    Raises:
        ValueError: if the weights are no state dict, or of a network that Detectron2 lacks.
    """
    content, meta = state_dict_of(checkpoint)
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise UserError(
            f"the weights must be a state dict, whose keys are strings, got a "
            f"{type(content).__name__}"
        )
    for name, value in content.items():
        if not isinstance(value, (np.ndarray, torch.Tensor)):
            kind = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
            nested = "; the weights may be below it" if isinstance(value, Mapping) else ""
            raise UserError(f"{name} must be a tensor, got a {kind}{nested}")
    author = checkpoint.get("__author__")
    if author == CONVERTED_BY:
        return content, Origin(**checkpoint["origin"])
    if author == "Caffe2" and not is_torchvision_resnet(content):  # of any .pkl without an author
        return content, Origin("Caffe2", caffe2_stride_in_1x1(content))
    if author == "torchvision":  # of Detectron2's own converter
        return content, TORCHVISION
    if content and all(key.startswith("module.") for key in content):
        content = copy.copy(content)  # DataParallel and DistributedDataParallel add a prefix
        consume_prefix_in_state_dict_if_present(content, "module.")
    if not content.keys().isdisjoint(model_keys):
        return content, Origin()
    weights = {key: _tensor(value) for key, value in content.items()}
    check_stem(weights)
    if is_torchvision_resnet(weights):
        origin = replace(TORCHVISION, project="torchvision and timm")
        return rename(weights, resnet_renames()), origin
    if is_openmmlab(weights):
        return from_mmdet(weights, meta if isinstance(meta, Mapping) else {})
    return weights, Origin()


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def caffe2_stride_in_1x1(weights: Mapping[str, Any]) -> bool | None:
    """Returns True, as MSRA's ResNets have it; None for ResNeXts, of which some differ."""
    middle = [value for key, value in weights.items() if key.endswith("_branch2b_w")]
    grouped = any(value.shape[1] < value.shape[0] for value in middle)
    return None if grouped or not middle else True


def check_stem(weights: Iterable[str]) -> None:
    """Rejects ResNet-C and ResNet-D, which have three convolutions in their stem."""
    deep = re.compile(r"(backbone\.)?(stem|conv1)\.0\.weight")
    found = [key for key in weights if deep.fullmatch(key)]
    if found:
        raise UserError(
            "the weights must be of a ResNet with one convolution in its stem, got "
            f"{found[0]}: Detectron2 has no ResNet-C or ResNet-D (resnet50d, ResNetV1c)"
        )


def is_torchvision_resnet(keys: Iterable[str]) -> bool:
    """Returns whether a state dict has the keys of the ResNets of torchvision and timm."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= set(keys)


def is_openmmlab(keys: Iterable[str]) -> bool:
    """Returns whether a state dict has the keys of a ResNet or FPN of MMDetection and the like."""
    return any(re.match(r"backbone\.layer1\.0\.conv1\.|neck\.lateral_convs\.", key) for key in keys)


def from_mmdet(weights: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[Weights, Origin]:
    """Returns the weights of a detector of MMDetection under Detectron2's names.

    Classes and box deltas are in Detectron2's order and number; their normalization is in the
    returned origin, see `scale_box_deltas`. An RPN that Detectron2 has in another form is left out
    with a warning.

    Args:
        weights: the state dict.
        meta: `meta` of the checkpoint, which may have the config as text.
    """
    config = mmdet_config.read_config(str(meta.get("cfg") or meta.get("config") or ""))
    weights = {_current_name(key): value for key, value in weights.items()}
    if "rpn_head.rpn_cls.bias" in weights and any(k.startswith("bbox_head.") for k in weights):
        weights = upgrade_mmdet_1(weights)
    if problem := rpn_problem(weights, mmdet_config.anchor_scales(config)):
        logger.warning("The weights of the RPN are not loaded: %s", problem)
        weights = {k: value for k, value in weights.items() if not k.startswith("rpn_head.")}
    converted = rename(weights, mmdet_renames(weights))
    origin = Origin("OpenMMLab", box_stds=box_stds_of(converted, config))
    style = mmdet_config.part(config, "model", "backbone", "style")
    if style in ("caffe", "pytorch"):
        origin = replace(origin, stride_in_1x1=style == "caffe")
    if statistics := mmdet_config.pixel_statistics(config):
        order, mean, std = statistics
        origin = replace(origin, input_format=order, pixel_mean=mean, pixel_std=std)
    return converted, origin


def _current_name(key: str) -> str:
    """Returns a key of MMDetection with the newer name of offset branches, and bn for any norm."""
    key = re.sub(r"\.conv2_offset\.", ".conv2.conv_offset.", key)
    return re.sub(r"\.gn(\d?)\.", r".bn\1.", key)


def rpn_problem(weights: Mapping[str, Tensor], scales: int | None) -> str:
    """Returns why Detectron2 cannot use the weights of an RPN; "" if it can.

    Args:
        weights: with MMDetection's keys.
        scales: number of anchor scales; None if it is unknown.
    """
    logits, deltas = weights.get("rpn_head.rpn_cls.bias"), weights.get("rpn_head.rpn_reg.bias")
    if logits is None or deltas is None:
        return ""
    anchors = len(deltas) // 4
    if len(logits) != anchors:
        return (
            f"rpn_head.rpn_cls has {len(logits)} outputs for {anchors} anchors, a softmax, which "
            "Detectron2's RPN lacks"
        )
    if scales is None:
        scales = 1 if anchors <= 3 else anchors
    if scales > 1:
        return f"its {anchors} anchors are of several scales, which Detectron2 orders otherwise"
    return ""


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


def box_stds_of(weights: Iterable[str], config: Mapping[str, Any]) -> tuple[BoxStds, ...]:
    """Returns the standard deviations of the box deltas of each head.

    Args:
        weights: with Detectron2's keys.
        config: of MMDetection. Its defaults apply if it does not state them.
    """
    predictor = re.compile(r"roi_heads\.box_predictor\.(\d\.)?bbox_pred\.weight")
    heads = sum(predictor.fullmatch(key) is not None for key in weights)
    found = mmdet_config.box_stds(config)
    return tuple(found) if heads and len(found) == heads else DEFAULT_BOX_STDS.get(heads, ())


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
            value = weights.get(key)
            if value is None:
                continue
            rows = factor.repeat(len(value) // 4).reshape(-1, *[1] * (value.dim() - 1))
            weights[key] = (value.double() * rows).to(value.dtype)
