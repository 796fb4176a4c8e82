# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Slim backbones, built from a config through the registry."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone

from dcn_plugin import add_dcn_config

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def slim_config(**resnets: object) -> CfgNode:
    """Returns a config of a slim R-50 with dilated res5; arguments are keys of RESNETS."""
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    slim = {
        "OUT_FEATURES": ["res4", "res5"],
        "NORM": "BN",
        "STEM_OUT_CHANNELS": 8,
        "RES2_OUT_CHANNELS": 16,
        "WIDTH_PER_GROUP": 4,
        "RES5_DILATION": 2,
    }
    for key, value in {**slim, **resnets}.items():
        setattr(cfg.MODEL.RESNETS, key, value)
    return cfg


def build(name: str, cfg: CfgNode) -> nn.Module:
    """Builds the backbone registered as `name`, for evaluation in float64."""
    cfg.MODEL.BACKBONE.NAME = name
    return build_backbone(cfg).eval().double()


def offset_branches(
    blocks: Sequence[int], last: Sequence[int], layers: Sequence[str] = ("conv2",)
) -> set[str]:
    """Returns the parameters that the offset branches of the last blocks have."""
    return {
        f"res{stage}.{block}.{layer}_offset.{name}"
        for stage, n, k in zip(range(2, 6), blocks, last, strict=True)
        for block in range(n - k, n)
        for layer in layers
        for name in ("weight", "bias")
    }


def shake(network: nn.Module) -> nn.Module:
    """Randomizes the statistics and parameters of norms; returns the network in eval mode."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_var, 0.7, 1.3)
            nn.init.normal_(norm.running_mean, 0, 0.1)
            nn.init.uniform_(norm.weight, 0.7, 1.3)
            nn.init.normal_(norm.bias, 0, 0.1)
    return network.eval()
