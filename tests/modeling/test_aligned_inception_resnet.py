# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Aligned-Inception-ResNet: its block, its size, its deformable layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcn_plugin.modeling import AlignedInceptionResNet
from dcn_plugin.modeling.backbone import InceptionResidualBlock

from .backbones import build, offset_branches, shake, slim_config

NAME = "build_aligned_inception_resnet_backbone"
BLOCKS = (3, 4, 23, 3)


def norm_relu(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
    scaled = (x - mean) / (var + norm.eps).sqrt()
    return (scaled * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)


@pytest.mark.parametrize("dilation", [1, 2])
def test_block_matches_figure_8(dilation: int) -> None:
    block = shake(InceptionResidualBlock(32, 32, dilation=dilation)).double()
    shapes = {name: tuple(p.shape) for name, p in block.named_parameters() if p.dim() == 4}
    assert shapes == {
        "deep1.weight": (4, 32, 1, 1),
        "deep2.weight": (4, 4, 3, 3),
        "deep3.weight": (4, 4, 3, 3),
        "wide1.weight": (8, 32, 1, 1),
        "wide2.weight": (8, 8, 3, 3),
        "join.weight": (32, 12, 1, 1),
    }
    x = torch.randn(2, 32, 7, 6, dtype=torch.float64)

    def conv3(x: Tensor, conv: nn.Conv2d) -> Tensor:
        return F.conv2d(x, conv.weight, padding=dilation, dilation=dilation)

    # Norm and ReLU before each convolution; both branches share the first ones.
    active = norm_relu(x, block.activation.norm)
    deep = norm_relu(F.conv2d(active, block.deep1.weight), block.deep1.norm)
    deep = norm_relu(conv3(deep, block.deep2), block.deep2.norm)
    deep = norm_relu(conv3(deep, block.deep3), block.deep3.norm)
    wide = norm_relu(F.conv2d(active, block.wide1.weight), block.wide1.norm)
    wide = norm_relu(conv3(wide, block.wide2), block.wide2.norm)
    expected = x + F.conv2d(torch.cat([deep, wide], 1), block.join.weight)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.parametrize("stride_in_1x1", [True, False])
def test_block_projects_where_the_size_changes(stride_in_1x1: bool) -> None:
    block = InceptionResidualBlock(16, 32, stride=2, stride_in_1x1=stride_in_1x1)
    assert block.shortcut.kernel_size == (1, 1) and block.shortcut.stride == (2, 2)
    strides = {name: getattr(block, name).stride[0] for name in ("deep1", "deep2", "deep3")}
    strides |= {name: getattr(block, name).stride[0] for name in ("wide1", "wide2")}
    halving = {"deep1", "wide1"} if stride_in_1x1 else {"deep2", "wide2"}
    assert {name for name, stride in strides.items() if stride == 2} == halving
    assert block(torch.randn(1, 16, 9, 8)).shape == (1, 32, 5, 4)


def test_parameter_count_matches_table_7() -> None:
    network = AlignedInceptionResNet(num_classes=1000)
    total = sum(p.numel() for p in network.parameters())
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    affine = sum(p.numel() for norm in norms for p in norm.parameters())
    assert round((total - affine) / 1e6, 2) == 64.25
    assert round(total / 1e6, 2) == 64.37


@pytest.mark.parametrize("last", [[0, 0, 0, 1], [0, 0, 0, 3], [0, 0, 3, 3]])
@pytest.mark.parametrize("groups", [1, 2])
def test_starts_as_the_plain_network(last: list[int], groups: int) -> None:
    plain = shake(build(NAME, slim_config()))
    ours = build(NAME, slim_config(DEFORM_LAST=last, DEFORM_NUM_GROUPS=groups))
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == offset_branches(BLOCKS, last, ("deep3", "wide2"))
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, features = plain(image), ours(image)
    assert list(features) == ["res4", "res5"]
    for name in expected:
        torch.testing.assert_close(features[name], expected[name])


def test_offsets_learn() -> None:
    backbone = build(NAME, slim_config(DEFORM_LAST=[0, 0, 0, 1], OUT_FEATURES=["res5"]))
    backbone(torch.randn(1, 3, 64, 64, dtype=torch.float64))["res5"].square().sum().backward()
    for layer in ("deep3", "wide2"):
        branch = getattr(backbone.res5[2], f"{layer}_offset")
        assert branch.weight.grad.abs().max() > 0 and branch.bias.grad.abs().max() > 0


@pytest.mark.parametrize(("dilation", "stride"), [(1, 32), (2, 16), (4, 16)])
def test_a_dilated_res5_keeps_the_stride_of_res4(dilation: int, stride: int) -> None:
    cfg = slim_config(RES5_DILATION=dilation, OUT_FEATURES=["res5", "reduced"], REDUCED_CHANNELS=9)
    backbone = build(NAME, cfg)
    shapes = backbone.output_shape()
    assert shapes["res5"].stride == shapes["reduced"].stride == stride
    assert shapes["res5"].channels == 16 * 8 and shapes["reduced"].channels == 9
    spatial = [c for c in backbone.res5.modules() if getattr(c, "kernel_size", None) == (3, 3)]
    assert len(spatial) == 9
    assert {c.dilation for c in spatial} == {c.padding for c in spatial} == {(dilation, dilation)}
    features = backbone(torch.randn(1, 3, 64, 96, dtype=torch.float64))
    assert features["reduced"].shape == (1, 9, 64 // stride, 96 // stride)


def test_features_are_activated() -> None:
    names = ["res2", "res3", "res4", "res5"]
    features = build(NAME, slim_config(OUT_FEATURES=names))(torch.randn(1, 3, 64, 64).double())
    assert all(features[name].min() == 0 for name in names)


def test_freeze_at() -> None:
    cfg = slim_config(NORM="FrozenBN", OUT_FEATURES=["reduced"])
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    backbone = build(NAME, cfg)
    learns = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert learns == {"res4", "res5", "reduced"}


def test_every_norm_builds_and_runs() -> None:
    for norm in ("", "FrozenBN", "BN", "SyncBN", "GN"):
        width = {"STEM_OUT_CHANNELS": 32, "RES2_OUT_CHANNELS": 256} if norm == "GN" else {}
        backbone = build(NAME, slim_config(NORM=norm, DEFORM_LAST=[0, 0, 0, 1], **width))
        features = backbone(torch.randn(1, 3, 32, 32, dtype=torch.float64))
        assert features["res5"].shape[-2:] == (2, 2)


def test_classifier_and_backbone_have_the_same_names() -> None:
    shape = {"stem_channels": 8, "res2_channels": 16}
    classifier = AlignedInceptionResNet(num_classes=10, **shape).double().eval()
    backbone = build(NAME, slim_config(RES5_DILATION=1, OUT_FEATURES=["res5"]))
    missing, unexpected = backbone.load_state_dict(classifier.state_dict(), strict=False)
    assert not missing and set(unexpected) == {"linear.weight", "linear.bias"}
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    pooled = backbone(image)["res5"].mean(dim=(2, 3))
    expected = F.linear(pooled, classifier.linear.weight, classifier.linear.bias)
    torch.testing.assert_close(classifier(image)["linear"], expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DEFORM_LAST", [0, 0, 0, 4]),
        ("DEFORM_LAST", [0, 0, 24, 3]),
        ("RES2_OUT_CHANNELS", 12),
        ("RES5_DILATION", 0),
        ("OUT_FEATURES", ["conv5"]),
    ],
)
def test_error_names_the_config_key(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"MODEL.RESNETS.{key}\)? must be .*got"):
        build(NAME, slim_config(**{key: value}))


def test_offset_groups_must_divide_the_narrower_branch() -> None:
    cfg = slim_config(DEFORM_LAST=[0, 0, 0, 3], DEFORM_NUM_GROUPS=32)
    with pytest.raises(ValueError, match=r"divisor of the 16 .* res5, got 32"):
        build(NAME, cfg)
