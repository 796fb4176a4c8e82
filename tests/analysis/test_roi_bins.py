# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Recorded bins are where the op samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dcn_plugin.analysis import RoIBins, nearest_roi, record_roi_bins
from dcn_plugin.layers import DeformPSRoIPool, DeformRoIPool, RoIPool

MODES = ("align", "bin", "msra")
SIDE, SCALE = 64, 0.25
BOX = (48.0, 56.0, 160.0, 216.0)


def ramps() -> Tensor:
    """(1, 2, SIDE, SIDE) features whose values are their x and y in pixels of the image."""
    locations = (torch.arange(SIDE, dtype=torch.float64) + 0.5) / SCALE
    return torch.stack([locations.expand(SIDE, SIDE), locations[:, None].expand(SIDE, SIDE)])[None]


def centres(bins: Tensor) -> Tensor:
    """Returns Tensor[..., 2], x and y."""
    return (bins[..., :2] + bins[..., 2:]) / 2


def pooled_centres(pool: nn.Module, boxes: Tensor) -> tuple[Tensor, RoIBins]:
    with record_roi_bins(nn.Sequential(pool)) as found:
        out = pool(ramps(), boxes)
    return out.movedim(1, -1), found["0"]


@pytest.mark.parametrize("mode", MODES)
def test_pooling_a_ramp_gives_the_centres_of_the_bins(mode: str) -> None:
    pool = DeformRoIPool(2, 4, SCALE, sampling_ratio=4, gamma=0.2, mode=mode).double()
    nn.init.normal_(pool.offset_fc.bias, std=0.3)
    boxes = torch.tensor([[0, *BOX], [0, 60, 50, 120, 130]], dtype=torch.float64)
    out, found = pooled_centres(pool, boxes)
    assert found.bins.shape == (2, 1, 4, 4, 4)
    if mode == "msra":  # whose samples start at the edge of a bin
        out = out + (found.bins[:, 0, ..., 2:] - found.bins[:, 0, ..., :2]) / 8
    # In mode bin, whole pixels of the map.
    tolerance = 1 / SCALE if mode == "bin" else 1e-3
    torch.testing.assert_close(centres(found.bins[:, 0]).double(), out, atol=tolerance, rtol=0)
    undeformed = found.undeformed[:, None]
    shift = (undeformed - found.bins)[..., :2]
    torch.testing.assert_close(undeformed - shift.repeat(1, 1, 1, 1, 2), found.bins)
    with torch.no_grad():
        pool.offset_fc.bias.zero_()
    torch.testing.assert_close(pooled_centres(pool, boxes)[1].bins, undeformed)


def test_position_sensitive_bins_of_each_class() -> None:
    """Each class pools ramps of its own at its own bins."""
    pool = DeformPSRoIPool(2, 4, 3, SCALE, sampling_ratio=4, gamma=0.5, classes=2).double()
    with torch.no_grad():
        pool.score_conv.weight.zero_()
        # Output channels: x and y of class 0, x and y of class 1; each has nine maps.
        pool.score_conv.weight[torch.arange(36), (torch.arange(36) // 9) % 2] = 1.0
        pool.offset_conv.bias.normal_(std=0.1)
    boxes = torch.tensor([[0, *BOX]], dtype=torch.float64)
    out, found = pooled_centres(pool, boxes)  # (1, 3, 3, 4)
    assert found.bins.shape == (1, 2, 3, 3, 4)
    for kind in range(2):
        expected = centres(found.bins[:, kind]).double()
        torch.testing.assert_close(expected, out[..., 2 * kind : 2 * kind + 2], atol=1e-3, rtol=0)
    assert not torch.allclose(found.bins[:, 0], found.bins[:, 1])


def test_a_box_finds_its_roi() -> None:
    pool = DeformRoIPool(2, 2, SCALE).double()
    boxes = torch.tensor(
        [[0, 0, 0, 50, 50], [0, 100, 100, 200, 200], [1, 102, 100, 200, 200]], dtype=torch.float64
    )
    with record_roi_bins(nn.Sequential(pool)) as found:
        pool(ramps().repeat(2, 1, 1, 1), boxes=boxes)
    bins = found["0"]
    near, far = torch.tensor([104.0, 99.0, 190.0, 210.0]), torch.tensor([0.0, 0.0, 10.0, 10.0])
    assert nearest_roi(found, near) == (bins, 1)
    assert nearest_roi(found, far, image=1) == (bins, 2)
    assert nearest_roi(found, far, image=2) is None


def test_a_box_finds_its_roi_on_any_level() -> None:
    pools = nn.ModuleList([DeformRoIPool(2, 2, SCALE).double() for _ in range(3)])
    boxes = torch.tensor([[0, 10, 10, 50, 50], [0, 100, 100, 200, 200]], dtype=torch.float64)
    with record_roi_bins(pools) as found:
        for pool, level in zip(pools, (boxes[:0], boxes[:1], boxes[1:]), strict=True):
            pool(ramps(), boxes=level)
    assert nearest_roi(found, torch.tensor([12.0, 12, 50, 50])) == (found["1"], 0)
    assert nearest_roi(found, torch.tensor([120.0, 100, 200, 200])) == (found["2"], 0)
    assert nearest_roi({"0": found["0"]}, torch.tensor([12.0, 12, 50, 50])) is None


def test_a_model_without_deformable_pooling() -> None:
    with record_roi_bins(nn.Sequential(RoIPool(2, SCALE))) as found:
        pass
    assert found == {}
