# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""On-object shares counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dcn_plugin.analysis import AnnotatedImage, on_object_share
from dcn_plugin.analysis.on_object_share import OFFSETS
from dcn_plugin.layers import DeformConv2d, DeformConv2dPack

SIDE, STRIDE = 128, 8
PREDICTED, MEAN, ZERO = OFFSETS


class Contracted(nn.Module):
    """All taps meet at the centre of their position in the left half of the map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, STRIDE, 1)
        self.conv = DeformConv2d(4, 4, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        taps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        offset = torch.tensor(taps).flatten().mul(-2.0)[None, :, None, None]
        left = torch.arange(x.shape[3]) < x.shape[3] // 2
        return self.conv(x, (offset * left).expand(-1, -1, x.shape[2], -1).contiguous())


def image(*boxes: tuple[int, int, int, int]) -> AnnotatedImage:
    found = torch.tensor(boxes).reshape(-1, 4).float()
    return AnnotatedImage(torch.rand(1, 3, SIDE, SIDE), found, (SIDE, SIDE))


def test_contracted_taps_lie_on_small_objects() -> None:
    # Centred on positions; taps 16 pixels away lie in the third box only.
    left, right, wider = (20, 60, 28, 68), (84, 60, 92, 68), (12, 52, 36, 76)
    found = on_object_share(Contracted(), [image(left, right), image(wider)], areas=(20**2, 100**2))
    small, medium, large = found.values()
    assert small.objects == 2 and medium.objects == 1 and large.objects == 0
    # All nine taps, and the centre tap alone.
    assert small.by_offsets[PREDICTED] == pytest.approx((1 + 1 / 9) / 2)
    # Taps at half the distance, at all positions.
    assert small.by_offsets[MEAN] == pytest.approx(1 / 9)
    assert medium.by_offsets[MEAN] == pytest.approx(1)
    assert small.by_offsets[ZERO] == medium.by_offsets[ZERO] == pytest.approx(1 / 9)
    assert small.of_image == pytest.approx(64 / SIDE**2)
    assert math.isnan(large.by_offsets[PREDICTED]) and math.isnan(large.of_image)


def test_locations_are_weighted_by_modulation() -> None:
    pack = DeformConv2dPack(4, 4, 3, padding=1, modulated=True)
    with torch.no_grad():
        pack.offset_conv.bias[18:] = -50.0  # weight 0
        pack.offset_conv.bias[18 + 4] = 50.0  # weight 1 for the centre tap
    model = nn.Sequential(nn.Conv2d(3, 4, 3, STRIDE, 1), pack)
    found = on_object_share(model, [image((20, 60, 28, 68))], areas=(20**2, 100**2))
    assert found["small"].by_offsets[PREDICTED] == pytest.approx(1)


def test_zero_offsets_are_without_modulation() -> None:
    pack = DeformConv2dPack(4, 4, 3, padding=2, dilation=2, modulated=True)
    nn.init.normal_(pack.offset_conv.weight[18:], std=3.0)  # of the mask
    model = nn.Sequential(nn.Conv2d(3, 4, 3, STRIDE, 1), pack)
    found = on_object_share(model, [image((20, 60, 28, 68))], areas=(20**2, 100**2))["small"]
    assert found.by_offsets[ZERO] == pytest.approx(1 / 9)
    assert found.by_offsets[PREDICTED] != pytest.approx(1 / 9, abs=1e-3)


def test_a_position_with_all_taps_off_the_map_has_share_zero() -> None:
    layers = [DeformConv2dPack(4, 4, 3, padding=1) for _ in range(2)]
    nn.init.constant_(layers[1].offset_conv.bias, 99.0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, STRIDE, 1), *layers)
    found = on_object_share(model, [image((20, 60, 28, 68))], areas=(20**2, 100**2))["small"]
    assert found.by_offsets[PREDICTED] == 0 and found.by_offsets[ZERO] > 0


def test_the_centre_of_an_object_cut_off_by_the_border_is_clipped() -> None:
    found = on_object_share(Contracted(), [image((120, 120, 136, 140))], areas=(20**2, 100**2))
    assert found["small"].objects == 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="areas must be two ascending"):
        on_object_share(Contracted(), [], areas=(4, 2))
    with pytest.raises(ValueError, match="no deformable convolutions"):
        on_object_share(nn.Sequential(nn.Conv2d(3, 4, 1)), [image((0, 0, 9, 9))])
    found = on_object_share(Contracted(), [])
    assert [share.objects for share in found.values()] == [0, 0, 0]
