# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Shares of points on objects that can be counted by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dcn_plugin.analysis import AnnotatedImage, share_on_objects
from dcn_plugin.analysis.following import OFFSETS
from dcn_plugin.layers import DeformConv2d, DeformConv2dPack

SIDE, STRIDE = 128, 8
PREDICTED, MEAN, NONE = OFFSETS


class Pulled(nn.Module):
    """A layer whose taps all meet in the middle of their cell, in the left half of the map."""

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


def test_points_that_meet_lie_on_the_smallest_object() -> None:
    # Around a middle on a cell; taps at 16 pixels are off the first two, those at 8 are off one.
    left, right, wider = (20, 60, 28, 68), (84, 60, 92, 68), (12, 52, 36, 76)
    found = share_on_objects(Pulled(), [image(left, right), image(wider)], areas=(20**2, 100**2))
    small, medium, large = found.values()
    assert small.objects == 2 and medium.objects == 1 and large.objects == 0
    # All nine points, and only the one in the middle.
    assert small.by_offsets[PREDICTED] == pytest.approx((1 + 1 / 9) / 2)
    # Half of the way, in all cells.
    assert small.by_offsets[MEAN] == pytest.approx(1 / 9)
    assert medium.by_offsets[MEAN] == pytest.approx(1)
    assert small.by_offsets[NONE] == medium.by_offsets[NONE] == pytest.approx(1 / 9)
    assert small.of_image == pytest.approx(64 / SIDE**2)
    assert math.isnan(large.by_offsets[PREDICTED]) and math.isnan(large.of_image)


def test_points_weigh_what_modulation_says() -> None:
    pack = DeformConv2dPack(4, 4, 3, padding=1, modulated=True)
    with torch.no_grad():
        pack.offset_conv.bias[18:] = -50.0  # no tap counts
        pack.offset_conv.bias[18 + 4] = 50.0  # but the one in the middle
    model = nn.Sequential(nn.Conv2d(3, 4, 3, STRIDE, 1), pack)
    found = share_on_objects(model, [image((20, 60, 28, 68))], areas=(20**2, 100**2))
    assert found["small"].by_offsets[PREDICTED] == pytest.approx(1)


def test_without_offsets_there_is_no_modulation_either() -> None:
    pack = DeformConv2dPack(4, 4, 3, padding=2, dilation=2, modulated=True)
    nn.init.normal_(pack.offset_conv.weight[18:], std=3.0)  # of the mask
    model = nn.Sequential(nn.Conv2d(3, 4, 3, STRIDE, 1), pack)
    found = share_on_objects(model, [image((20, 60, 28, 68))], areas=(20**2, 100**2))["small"]
    assert found.by_offsets[NONE] == pytest.approx(1 / 9)
    assert found.by_offsets[PREDICTED] != pytest.approx(1 / 9, abs=1e-3)


def test_a_cell_whose_taps_all_lie_off_the_map_sees_no_object() -> None:
    layers = [DeformConv2dPack(4, 4, 3, padding=1) for _ in range(2)]
    nn.init.constant_(layers[1].offset_conv.bias, 99.0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, STRIDE, 1), *layers)
    found = share_on_objects(model, [image((20, 60, 28, 68))], areas=(20**2, 100**2))["small"]
    assert found.by_offsets[PREDICTED] == 0 and found.by_offsets[NONE] > 0


def test_an_object_cut_off_by_the_border_is_looked_at_from_within() -> None:
    found = share_on_objects(Pulled(), [image((120, 120, 136, 140))], areas=(20**2, 100**2))
    assert found["small"].objects == 1


def test_what_cannot_be_measured() -> None:
    with pytest.raises(ValueError, match="areas must be two ascending"):
        share_on_objects(Pulled(), [], areas=(4, 2))
    with pytest.raises(ValueError, match="without deformable convolutions"):
        share_on_objects(nn.Sequential(nn.Conv2d(3, 4, 1)), [image((0, 0, 9, 9))])
    found = share_on_objects(Pulled(), [])
    assert [share.objects for share in found.values()] == [0, 0, 0]
