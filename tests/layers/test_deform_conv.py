# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution modules."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from dcn_plugin.layers import DeformConv2d, DeformConv2dPack, OffsetConv2d
from tests import reference
from tests.tolerances import assert_near

on_every_device = pytest.mark.usefixtures("default_device")
SHAPE = {
    "kernel_size": (3, 2),
    "stride": (2, 1),
    "padding": (1, 0),
    "dilation": (2, 1),
    "groups": 2,
}


@on_every_device
def test_deform_conv2d_equals_torchvision(torchvision: ModuleType) -> None:
    ours = DeformConv2d(6, 4, **SHAPE).double()
    theirs = torchvision.ops.DeformConv2d(6, 4, **SHAPE).double()
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    offset = torch.randn(2, 2 * 3 * 6, 4, 7, dtype=torch.float64)
    mask = torch.rand(2, 3 * 6, 4, 7, dtype=torch.float64)
    torch.testing.assert_close(ours(input, offset, mask), theirs(input, offset, mask))
    torch.testing.assert_close(ours(input, offset), theirs(input, offset))


@on_every_device
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("offset_groups", [1, 3])
def test_pack_starts_as_the_plain_convolution(modulated: bool, offset_groups: int) -> None:
    plain = nn.Conv2d(6, 4, **SHAPE).double()
    pack = DeformConv2dPack(
        6, 4, **SHAPE, offset_groups=offset_groups, modulated=modulated
    ).double()
    missing, unexpected = pack.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing) == {"offset_conv.weight", "offset_conv.bias"} and not unexpected
    input = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    expected = plain(input)
    if modulated:  # sigmoid(0)
        expected = expected / 2 + plain.bias[:, None, None] / 2
    torch.testing.assert_close(pack(input), expected)


def test_reset_parameters_resets_the_branch() -> None:
    pack = DeformConv2dPack(6, 4, 3)
    before = pack.weight.clone()
    nn.init.ones_(pack.offset_conv.weight)
    pack.reset_parameters()
    assert not torch.equal(pack.weight, before) and not pack.offset_conv.weight.any()


@on_every_device
@pytest.mark.parametrize("modulated", [False, True])
def test_every_parameter_of_a_pack_gets_a_gradient(modulated: bool) -> None:
    pack = DeformConv2dPack(6, 4, **SHAPE, modulated=modulated)
    pack(torch.randn(2, 6, 9, 8)).square().sum().backward()
    for name, parameter in pack.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_offsets_and_masks_are_ordered_as_in_detectron2() -> None:
    branch = OffsetConv2d(nn.Conv2d(4, 4, 3, padding=1), offset_groups=2, modulated=True)
    assert branch.out_channels == 2 * 27
    with torch.no_grad():
        branch.bias.copy_(torch.arange(2.0 * 27))
    offset, mask = branch(torch.randn(1, 4, 5, 5))
    torch.testing.assert_close(offset[0, :, 2, 2], torch.arange(36.0))
    torch.testing.assert_close(mask[0, :, 2, 2], torch.arange(36.0, 54.0).sigmoid())


def test_offsets_stay_in_float32_under_autocast(default_device: str) -> None:
    pack = DeformConv2dPack(8, 4, 3, padding=1)
    nn.init.normal_(pack.offset_conv.weight)
    input = torch.randn(1, 8, 6, 6)
    with torch.autocast(default_device, dtype=torch.bfloat16):
        offset, _ = pack.offset_conv(input.bfloat16())
        output = pack(input)
    assert offset.dtype == torch.float32 and output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), pack(input), rtol=0.05, atol=0.05)


@on_every_device
def test_compiles_without_graph_breaks() -> None:
    pack = DeformConv2dPack(4, 4, 3, padding=1, modulated=True)
    input = torch.randn(1, 4, 6, 6)
    compiled = torch.compile(pack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input), pack(input))


def foreign_state_dict(prefix: str, branch: str, maps: int, bias: bool) -> dict[str, Tensor]:
    """Returns a state dict as other libraries lay it out, of the convolution in `SHAPE`."""
    shapes = {
        "weight": (4, 3, 3, 2),
        "bias": (4,),
        f"{branch}.weight": (maps * 6, 6, 3, 2),
        f"{branch}.bias": (maps * 6,),
    }
    if not bias:
        del shapes["bias"]
    return {prefix + key: torch.randn(s, dtype=torch.float64) for key, s in shapes.items()}


@pytest.mark.parametrize(
    ("branch", "offset_groups", "modulated", "dilation"),
    [
        ("conv_offset", 3, False, (2, 1)),
        ("conv_offset", 3, True, (2, 1)),
        ("conv_offset_mask", 2, True, (1, 1)),  # DCNv2 does not dilate the offset branch
    ],
    ids=["mmcv v1", "mmcv v2", "DCNv2"],
)
@pytest.mark.parametrize("prefix", ["", "neck.0."])
def test_loads_the_state_dicts_of_mmcv_and_dcnv2(
    prefix: str, branch: str, offset_groups: int, modulated: bool, dilation: tuple[int, int]
) -> None:
    shape = {**SHAPE, "dilation": dilation}
    bias = modulated  # as mmcv's defaults; DCNv2 always has one
    pack = DeformConv2dPack(
        6, 4, **shape, bias=bias, offset_groups=offset_groups, modulated=modulated
    ).double()
    model = nn.ModuleDict({"neck": nn.Sequential(pack)}) if prefix else pack
    state = foreign_state_dict(prefix, branch, (3 if modulated else 2) * offset_groups, bias)
    keys = list(state)
    model.load_state_dict(state, strict=True)
    assert list(state) == keys  # the caller's dict

    # Their formula: offsets are the first two thirds of the prediction, the mask is the last one.
    input = torch.randn(1, 6, 6, 4, dtype=torch.float64)
    weight, own_bias = state[f"{prefix}weight"], state.get(f"{prefix}bias")
    geometry = shape["stride"], shape["padding"], dilation
    offset = nn.functional.conv2d(
        input, state[f"{prefix}{branch}.weight"], state[f"{prefix}{branch}.bias"], *geometry
    )
    mask = None
    if modulated:
        first, second, last = torch.chunk(offset, 3, dim=1)
        offset, mask = torch.cat((first, second), dim=1), torch.sigmoid(last)
    expected = reference.deform_conv2d(input, offset, weight, own_bias, *geometry, mask)
    assert_near(pack(input), expected)


def test_a_state_dict_with_both_names_does_not_load_silently() -> None:
    pack = DeformConv2dPack(6, 4, 3)
    state = pack.state_dict()
    state["conv_offset.weight"] = state["offset_conv.weight"]
    with pytest.raises(RuntimeError, match=r"Unexpected key.*conv_offset\.weight"):
        pack.load_state_dict(state)


@pytest.mark.parametrize("offset_groups", [0, 5, -1])
def test_offset_groups_must_divide_the_channels(offset_groups: int) -> None:
    with pytest.raises(ValueError, match=f"6 input channels, got {offset_groups}"):
        DeformConv2dPack(6, 4, 3, offset_groups=offset_groups)


def test_padding_by_name_raises() -> None:
    with pytest.raises(ValueError, match="got 'same'"):
        DeformConv2d(6, 4, 3, padding="same")


def test_repr() -> None:
    text = repr(DeformConv2dPack(6, 4, 3, padding=1, offset_groups=2, modulated=True))
    assert "DeformConv2dPack" in text and "offset_groups=2, modulated=True" in text
