# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The deformable ResNet backbone."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2", reason="backbones need Detectron2")

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone

from dcn_plugin import add_dcn_config


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


def build(name: str, cfg: CfgNode) -> torch.nn.Module:
    """Builds the backbone registered as `name`, for evaluation."""
    cfg.MODEL.BACKBONE.NAME = name
    return build_backbone(cfg).eval()


@pytest.mark.parametrize(
    "last", [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 3], [0, 0, 3, 3], [0, 1, 1, 3]]
)
def test_starts_as_detectron2s_resnet(last: list[int]) -> None:
    plain = build("build_resnet_backbone", slim_config())
    ours = build("build_deform_resnet_backbone", slim_config(DEFORM_LAST=last))
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    blocks = {"res2": 3, "res3": 4, "res4": 6, "res5": 3}
    assert set(missing) == {
        f"{stage}.{block}.conv2_offset.{name}"
        for (stage, n), k in zip(blocks.items(), last, strict=True)
        for block in range(n - k, n)
        for name in ("weight", "bias")
    }
    image = torch.randn(1, 3, 64, 96)
    expected, features = plain(image), ours(image)
    assert ours.output_shape() == plain.output_shape()
    for name in expected:
        torch.testing.assert_close(features[name], expected[name])


def test_detectron2s_own_keys_are_honoured() -> None:
    cfg = slim_config(
        DEFORM_ON_PER_STAGE=[False, False, True, True],
        DEFORM_MODULATED=True,
        DEFORM_NUM_GROUPS=2,
    )
    theirs = build("build_resnet_backbone", cfg)
    ours = build("build_deform_resnet_backbone", cfg)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("DEFORM_LAST", [0, 0, 0, 4], "DEFORM_LAST"),
        ("DEFORM_LAST", [0, 0, 3], "DEFORM_LAST"),
        ("DEFORM_LAST", [0, 0, 0, -1], "DEFORM_LAST"),
        ("DEPTH", 51, "DEPTH"),
        ("RES5_DILATION", 3, "RES5_DILATION"),
    ],
)
def test_settings_that_do_not_fit_are_named(key: str, value: object, named: str) -> None:
    cfg = slim_config(**{key: value})
    with pytest.raises(ValueError, match=f"MODEL.RESNETS.{named} must be .*got"):
        build("build_deform_resnet_backbone", cfg)
