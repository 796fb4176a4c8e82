# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The deformable ResNet backbone."""

from __future__ import annotations

import pytest
import torch

from detectron2.modeling.backbone.resnet import ResNet

from dcn_plugin.modeling import AlignedInceptionResNet, DeformResNet

from .backbones import BLOCKS, build, offset_branches, slim_config


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize(
    "last", [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 2], [0, 0, 0, 3], [0, 0, 3, 3], [0, 1, 1, 3]]
)
def test_starts_as_detectron2s_resnet(depth: int, last: list[int]) -> None:
    plain = build("build_resnet_backbone", slim_config(DEPTH=depth))
    ours = build("build_deform_resnet_backbone", slim_config(DEPTH=depth, DEFORM_LAST=last))
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == offset_branches(BLOCKS[depth], last)
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, features = plain(image), ours(image)
    assert ours.output_shape() == plain.output_shape()
    for name in expected:
        torch.testing.assert_close(features[name], expected[name])


@pytest.mark.parametrize("depth", [18, 34])
def test_basic_blocks_start_as_detectron2s(depth: int) -> None:
    shape = {"DEPTH": depth, "STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 64, "RES5_DILATION": 1}
    last = [0, 0, 1, 2]
    plain = build("build_resnet_backbone", slim_config(**shape))
    ours = build("build_deform_resnet_backbone", slim_config(**shape, DEFORM_LAST=last))
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and set(missing) == offset_branches(BLOCKS[depth], last)
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, features = plain(image), ours(image)
    for name in expected:
        torch.testing.assert_close(features[name], expected[name])


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("dilation", [2, 4, 6, 8])
def test_a_dilated_res5_keeps_the_stride_of_res4(depth: int, dilation: int) -> None:
    cfg = slim_config(DEPTH=depth, RES2_OUT_CHANNELS=8, RES5_DILATION=dilation)
    backbone = build("build_deform_resnet_backbone", cfg)
    assert backbone.output_shape()["res5"].stride == 16
    spatial = [
        conv
        for conv in backbone.res5.modules()
        if isinstance(conv, torch.nn.Conv2d) and conv.kernel_size == (3, 3)
    ]
    assert len(spatial) == (4 if depth == 18 else 3)
    for conv in spatial:
        assert conv.dilation == conv.padding == (dilation, dilation)
    features = backbone(torch.randn(1, 3, 64, 96, dtype=torch.float64))
    assert features["res5"].shape[-2:] == features["res4"].shape[-2:] == (4, 6)


def test_resnext_and_every_norm_build_and_run() -> None:
    for norm in ("FrozenBN", "BN", "SyncBN", "GN"):
        cfg = slim_config(
            NUM_GROUPS=2,
            NORM=norm,
            STEM_OUT_CHANNELS=32,
            RES2_OUT_CHANNELS=32,
            WIDTH_PER_GROUP=16,
            DEFORM_LAST=[0, 0, 0, 3],
            DEFORM_NUM_GROUPS=4,
        )
        backbone = build("build_deform_resnet_backbone", cfg)
        assert backbone.res5[0].conv2.groups == 2
        assert backbone(torch.randn(1, 3, 32, 32, dtype=torch.float64))["res5"].shape == (
            1,
            256,
            2,
            2,
        )


def test_three_layers_add_a_quarter_million_parameters() -> None:
    wide = {"STEM_OUT_CHANNELS": 64, "RES2_OUT_CHANNELS": 256, "WIDTH_PER_GROUP": 64}
    plain, ours = (
        build("build_deform_resnet_backbone", slim_config(**wide, DEFORM_LAST=[0, 0, 0, k]))
        for k in (0, 3)
    )
    sizes = [sum(p.numel() for p in net.parameters()) for net in (plain, ours)]
    assert sizes[1] - sizes[0] == 3 * (512 * 9 + 1) * 18  # 0.249 million


def test_reduced_is_res5_through_a_1x1_convolution_and_relu() -> None:
    cfg = slim_config(OUT_FEATURES=["reduced", "res4"], REDUCED_CHANNELS=24)
    backbone = build("build_deform_resnet_backbone", cfg)
    shapes = backbone.output_shape()
    assert list(shapes) == ["reduced", "res4"]
    assert shapes["reduced"].channels == 24 and shapes["reduced"].stride == 16
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    features = backbone(image)
    assert list(features) == ["reduced", "res4"]
    whole = build("build_deform_resnet_backbone", slim_config())
    whole.load_state_dict(backbone.state_dict(), strict=False)
    conv = backbone.reduced
    expected = torch.nn.functional.conv2d(whole(image)["res5"], conv.weight, conv.bias).relu()
    torch.testing.assert_close(features["reduced"], expected)
    assert conv.weight.std().item() == pytest.approx(0.01, rel=0.1) and not conv.bias.any()
    assert not hasattr(whole, "reduced")


def test_reduced_may_have_a_norm() -> None:
    cfg = slim_config(OUT_FEATURES=["reduced"], REDUCED_CHANNELS=8, REDUCED_NORM="BN")
    backbone = build("build_deform_resnet_backbone", cfg).train()
    assert backbone.reduced.bias is None
    feature = backbone(torch.randn(4, 3, 64, 96, dtype=torch.float64))["reduced"]
    # The mean of a rectified normal distribution.
    assert feature.mean().item() == pytest.approx((2 * torch.pi) ** -0.5, rel=0.2)


@pytest.mark.parametrize("name", ["resnet", "aligned_inception_resnet"])
def test_stages_have_as_many_blocks_as_asked_for(name: str) -> None:
    cfg = slim_config(BLOCKS=[1, 2, 1, 3], DEFORM_LAST=[0, 0, 0, 3], RES2_OUT_CHANNELS=16)
    backbone = build(f"build_{name if 'aligned' in name else 'deform_resnet'}_backbone", cfg)
    blocks = [
        [block for block in stage if type(block).__name__ != "Activation"]
        for stage in (backbone.res2, backbone.res3, backbone.res4, backbone.res5)
    ]
    assert [len(stage) for stage in blocks] == [1, 2, 1, 3]


@pytest.mark.parametrize("blocks", [[1, 2, 3], [0, 1, 1, 1], [1, 1, 1, 1.5]])
def test_invalid_numbers_of_blocks(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=r"MODEL.RESNETS.BLOCKS\) must be four integers above 0"):
        build("build_deform_resnet_backbone", slim_config(BLOCKS=blocks))


def test_freeze_at() -> None:
    cfg = slim_config(DEFORM_LAST=[0, 0, 0, 3], OUT_FEATURES=["reduced"], NORM="FrozenBN")
    cfg.MODEL.BACKBONE.FREEZE_AT = 4
    backbone = build("build_deform_resnet_backbone", cfg)
    learns = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert learns == {"res5", "reduced"}


def test_the_pyramid_starts_as_detectron2s() -> None:
    features = ["res2", "res3", "res4", "res5"]
    configs = [
        slim_config(RES5_DILATION=1, OUT_FEATURES=features, DEFORM_LAST=last)
        for last in ([0, 0, 0, 0], [0, 1, 1, 3])
    ]
    for cfg in configs:
        cfg.MODEL.FPN.IN_FEATURES = features
    plain = build("build_resnet_fpn_backbone", configs[0])
    ours = build("build_deform_resnet_fpn_backbone", configs[1])
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and len(missing) == 10
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, levels = plain(image), ours(image)
    assert list(levels) == ["p2", "p3", "p4", "p5", "p6"]
    for name, level in levels.items():
        torch.testing.assert_close(level, expected[name])


def test_a_pyramid_may_have_a_dilated_res5() -> None:
    cfg = slim_config(OUT_FEATURES=["res3", "res5"])
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res5"]  # strides 8 and 16
    assert list(build("build_deform_resnet_fpn_backbone", cfg).output_shape()) == ["p3", "p4", "p5"]


def test_the_retinanet_pyramid_is_detectron2s() -> None:
    features = ["res3", "res4", "res5"]
    cfg = slim_config(RES5_DILATION=1, OUT_FEATURES=features)
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = features, 16
    theirs = build("build_retinanet_resnet_fpn_backbone", cfg)
    cfg.MODEL.RESNETS.DEFORM_LAST = [0, 4, 6, 3]
    ours = build("build_retinanet_deform_resnet_fpn_backbone", cfg)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and len(missing) == 2 * 13
    assert ours.output_shape() == theirs.output_shape()
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    expected, levels = theirs(image), ours(image)
    assert list(levels) == ["p3", "p4", "p5", "p6", "p7"]
    for name, level in levels.items():
        torch.testing.assert_close(level, expected[name])


def test_explicit_arguments_build_what_the_config_builds() -> None:
    cfg = slim_config(DEFORM_LAST=[0, 1, 1, 3], DEFORM_MODULATED=True, DEFORM_NUM_GROUPS=2)
    cfg.MODEL.BACKBONE.FREEZE_AT = 2
    arguments = {
        "deform_last": [0, 1, 1, 3],
        "modulated": True,
        "offset_groups": 2,
        "res5_dilation": 2,
        "out_features": ["res4", "res5"],
        "stem_channels": 8,
        "res2_channels": 16,
        "freeze_at": 2,
    }
    ours = DeformResNet(50, width_per_group=4, **arguments).eval().double()
    _same_network(ours, build("build_deform_resnet_backbone", cfg))
    air = AlignedInceptionResNet(**arguments).eval().double()
    _same_network(air, build("build_aligned_inception_resnet_backbone", cfg))


def _same_network(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    assert isinstance(found, ResNet) and str(found) == str(expected)
    found.load_state_dict(expected.state_dict())
    learns = [
        [name for name, p in network.named_parameters() if p.requires_grad]
        for network in (found, expected)
    ]
    assert learns[0] == learns[1]
    assert found.output_shape() == expected.output_shape()


def test_a_seed_gives_detectron2s_weights() -> None:
    weights = []
    for name in ("build_resnet_backbone", "build_deform_resnet_backbone"):
        torch.manual_seed(5)
        weights.append(build(name, slim_config()).state_dict())
    for key, value in weights[0].items():
        assert torch.equal(weights[1][key], value), key


def test_the_constructor_makes_a_classifier() -> None:
    network = DeformResNet(18, stem_channels=8, num_classes=7, deform_last=[0, 0, 0, 1])
    assert network(torch.randn(2, 3, 64, 64))["linear"].shape == (2, 7)


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
        ("DEPTH", 34, "RES2_OUT_CHANNELS"),
        ("RES5_DILATION", 0, "RES5_DILATION"),
        ("OUT_FEATURES", ["res6"], "OUT_FEATURES"),
        ("OUT_FEATURES", [], "OUT_FEATURES"),
    ],
)
def test_error_names_the_config_key(key: str, value: object, named: str) -> None:
    cfg = slim_config(**{key: value})
    with pytest.raises(ValueError, match=rf"MODEL.RESNETS.{named}\)? must be .*got"):
        build("build_deform_resnet_backbone", cfg)


@pytest.mark.parametrize("groups", [0, 3, -1])
def test_offset_groups_must_divide_the_channels(groups: int) -> None:
    cfg = slim_config(DEFORM_LAST=[0, 0, 0, 3], DEFORM_NUM_GROUPS=groups)
    message = rf"DEFORM_NUM_GROUPS\) must be a divisor of the 32 .*res5, got {groups}"
    with pytest.raises(ValueError, match=message):
        build("build_deform_resnet_backbone", cfg)


def test_deformable_blocks_must_be_in_computed_stages() -> None:
    cfg = slim_config(DEFORM_LAST=[0, 0, 0, 3], OUT_FEATURES=["res2", "res4"])
    with pytest.raises(ValueError, match=r"DEFORM_LAST\) must be 0 for res5, .* got \[0"):
        build("build_deform_resnet_backbone", cfg)


def test_deform_on_per_stage_may_name_stages_that_are_not_computed() -> None:
    cfg = slim_config(DEFORM_ON_PER_STAGE=[False, False, True, True], OUT_FEATURES=["res4"])
    backbone = build("build_deform_resnet_backbone", cfg)
    names = {name for name in backbone.state_dict() if "offset" in name}
    assert names == offset_branches(BLOCKS[50], [0, 0, 6, 0])


def test_reduced_needs_channels() -> None:
    cfg = slim_config(OUT_FEATURES=["reduced"], REDUCED_CHANNELS=0)
    with pytest.raises(ValueError, match=r"REDUCED_CHANNELS\) must be positive, got 0"):
        build("build_deform_resnet_backbone", cfg)
