# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Components in a training script that imports dcn_plugin but adds none of its config keys."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model

from dcn_plugin import add_dcn_config
from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.modeling import check_deformable
from dcn_plugin.modeling.test_time_augmentation import build_model_with_tta

from .networks import NETWORKS, network_config


def stock_keys(cfg: CfgNode) -> CfgNode:
    """Returns a copy of a config without the keys of dcn_plugin."""
    stock = get_cfg()

    def copy(source: CfgNode, target: CfgNode) -> None:
        for key in target:
            if isinstance(target[key], CfgNode):
                copy(source[key], target[key])
            else:
                target[key] = source[key]

    copy(cfg, stock)
    return stock


def on_meta(cfg: CfgNode) -> nn.Module:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("build_resnet_backbone", "build_deform_resnet_backbone"),
        ("build_resnet_fpn_backbone", "build_deform_resnet_fpn_backbone"),
        ("build_retinanet_resnet_fpn_backbone", "build_retinanet_deform_resnet_fpn_backbone"),
        (None, "build_aligned_inception_resnet_backbone"),
    ],
)
def test_only_the_name_of_the_backbone_changes(theirs: str | None, ours: str) -> None:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    cfg.freeze()
    before = cfg.dump()
    built = []
    for name in (theirs, ours):
        if name is not None:
            named = cfg.clone()
            named.defrost()
            named.MODEL.BACKBONE.NAME = name
            named.freeze()
            with torch.device("meta"):
                built.append(build_backbone(named).state_dict())
    assert any("offset" in key for key in built[-1])
    assert {k: v.shape for k, v in built[0].items()} == {k: v.shape for k, v in built[-1].items()}
    assert cfg.dump() == before


@pytest.mark.parametrize("network", NETWORKS)
def test_heads_have_their_default_keys(network: str) -> None:
    cfg = network_config(network, deformable=False)
    cfg.MODEL.RESNETS.REDUCED_CHANNELS = 1024  # the default
    expected = on_meta(cfg)
    assert str(on_meta(stock_keys(cfg))) == str(expected)


def test_test_time_augmentation_needs_no_keys() -> None:
    cfg = network_config("rfcn", deformable=False)
    cfg.TEST.AUG.ENABLED = True
    build_model_with_tta(stock_keys(cfg), on_meta(cfg))


def test_missing_keys_get_the_defaults_of_add_dcn_config() -> None:
    expected = get_cfg()
    add_dcn_config(expected)
    assert with_dcn_defaults(get_cfg()) == expected
    own = get_cfg()
    own.MODEL.RESNETS.DEFORM_LAST = [0, 0, 0, 2]
    own.MY_KEY = 3
    filled = with_dcn_defaults(own)
    assert filled.MODEL.RESNETS.DEFORM_LAST == [0, 0, 0, 2] and filled.MY_KEY == 3
    assert "BLOCKS" in filled.MODEL.RESNETS and "BLOCKS" not in own.MODEL.RESNETS


def test_deform_last_needs_a_backbone_that_reads_it() -> None:
    cfg = network_config("faster_rcnn", deformable=True)
    check_deformable(cfg, on_meta(cfg))
    cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    message = r"DEFORM_LAST is \[0, 0, 0, 3\], but .*NAME build_resnet_backbone .*no deformable"
    with pytest.raises(ValueError, match=message):
        check_deformable(cfg, on_meta(cfg))
    cfg.MODEL.RESNETS.DEFORM_LAST = [0, 0, 0, 0]
    check_deformable(cfg, on_meta(cfg))
    check_deformable(get_cfg(), on_meta(cfg))


def test_deform_needs_heads_that_read_it() -> None:
    cfg = network_config("faster_rcnn", deformable=True)
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    with pytest.raises(ValueError, match=r"DEFORM is True, but .*NAME StandardROIHeads has no"):
        check_deformable(cfg, on_meta(cfg))
