# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Costs that can be counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fvcore", reason="its counters count")

from dcn_plugin.analysis.cost import count_cost
from dcn_plugin.layers import DeformConv2dPack, DeformRoIPool, make_deformable


@pytest.mark.parametrize("groups", [1, 2])
def test_a_deformable_convolution_costs_its_products_samples_and_offsets(groups: int) -> None:
    pack = DeformConv2dPack(4, 6, 3, padding=1, stride=2, groups=groups)
    cost = count_cost(pack, torch.rand(2, 4, 8, 8))
    cells = 2 * 4 * 4
    products = cells * 6 * (4 // groups) * 9
    samples = cells * 9 * 4 * 4
    offsets = cells * 18 * 4 * 9
    assert cost.flops == products + samples + offsets
    assert cost.flops_by_operator["deform_conv2d"] == products + samples
    assert cost.activations == cells * (6 + 18)
    assert cost.parameters == 6 * 4 // groups * 9 + 6 + 18 * 4 * 9 + 18
    assert not cost.not_counted


@pytest.mark.parametrize(("ratio", "samples"), [(3, 9), (0, 4)])
def test_roi_pooling_costs_its_samples(ratio: int, samples: int) -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = DeformRoIPool(4, 2, 0.5, ratio)

        def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
            return self.pool(features, boxes)

    boxes = torch.tensor([[0.0, 0, 0, 8, 8], [0, 2, 2, 9, 9], [0, 1, 1, 5, 5]])
    cost = count_cost(Pools(), (torch.rand(1, 4, 8, 8), boxes))
    pooled = 3 * 4 * 2 * 2  # plainly for the offsets, then where they say
    linear = 3 * 16 * 8
    assert cost.flops == 2 * pooled * samples * 4 + linear
    assert cost.activations == 2 * pooled + 3 * 8
    assert not cost.not_counted


def test_three_layers_cost_a_tenth_of_a_network() -> None:
    from torchvision.models import resnet50

    model = resnet50(weights=None).eval()
    image = torch.rand(1, 3, 64, 64)
    plain = count_cost(model, image)
    make_deformable(model, last=3)
    deformable = count_cost(model, image)
    assert plain.flops == pytest.approx(0.337e9, rel=0.02)  # 4.1 billion at 224 x 224
    assert deformable.parameters - plain.parameters == 3 * (512 * 9 + 1) * 18
    cells = 2 * 2
    more = 3 * cells * (18 * 512 * 9 + 9 * 512 * 4)
    assert deformable.flops - plain.flops == more
