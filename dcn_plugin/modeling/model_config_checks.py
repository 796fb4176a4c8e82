# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of config keys that several components read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import ROIHeads

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.layers import OffsetBranch
from dcn_plugin.messages import UserError


def check_deformable(cfg: CfgNode, model: nn.Module) -> None:
    """Checks that a model has the deformable layers that its config asks for.

    Components that do not read MODEL.RESNETS.DEFORM_LAST or MODEL.ROI_BOX_HEAD.DEFORM, such as
    Detectron2's own, ignore them, and a plain model would be trained. Call this after
    `build_model`.

    Args:
        cfg: the config.
        model: what `build_model` returned.

    Raises:
        ValueError: if the backbone or the RoI heads have no offset branches but should.
    """
    keys = with_dcn_defaults(cfg).MODEL
    last, backbone = keys.RESNETS.DEFORM_LAST, getattr(model, "backbone", model)
    if any(last) and not _has_offset_branches(backbone):
        raise UserError(
            f"MODEL.RESNETS.DEFORM_LAST is {list(last)}, but the backbone that MODEL.BACKBONE.NAME "
            f"{keys.BACKBONE.NAME} builds has no deformable convolutions. Name a backbone of "
            "dcn_plugin, such as build_deform_resnet_backbone, or set DEFORM_LAST to [0, 0, 0, 0]"
        )
    heads = getattr(model, "roi_heads", None)
    if keys.ROI_BOX_HEAD.DEFORM and isinstance(heads, ROIHeads) and not _has_offset_branches(heads):
        raise UserError(
            f"MODEL.ROI_BOX_HEAD.DEFORM is True, but MODEL.ROI_HEADS.NAME {keys.ROI_HEADS.NAME} "
            "has no deformable RoI pooling. Name DeformROIHeads or RFCNROIHeads, or set DEFORM to "
            "False"
        )


def _has_offset_branches(module: nn.Module) -> bool:
    return any(isinstance(part, OffsetBranch) for part in module.modules())


def check_features(key: str, names: Sequence[str], known: Iterable[str], only_one: bool) -> None:
    """Checks the names of the features that a component reads.

    Args:
        key: the config key.
        names: its value.
        known: features of the backbone.
        only_one: whether the component reads a single feature.

    Raises:
        ValueError: if there are none, unknown ones or too many.
    """
    if set(names) - set(known) or not names or (only_one and len(names) > 1):
        some = "one" if only_one else "some"
        raise UserError(
            f"{key} must be {some} of the backbone's features {sorted(known)}, got {list(names)}"
        )


def check_only_boxes(cfg: CfgNode, name: str) -> None:
    """Raises a ValueError if masks or keypoints are asked of a component that predicts neither.

    Args:
        cfg: the config.
        name: name of the component, for the message.
    """
    for key in ("MASK_ON", "KEYPOINT_ON"):
        if cfg.MODEL[key]:
            raise UserError(f"MODEL.{key} must be False for {name}, which predicts only boxes")
