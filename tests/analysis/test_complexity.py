# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Costs counted by hand."""

from __future__ import annotations

import inspect

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dcn_plugin.analysis.complexity import HANDLES, count_cost
from dcn_plugin.layers import DeformConv2dPack, DeformRoIPool, make_deformable


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_of_a_deformable_convolution(groups: int) -> None:
    pack = DeformConv2dPack(4, 6, 3, padding=1, stride=2, groups=groups)
    cost = count_cost(pack, torch.rand(2, 4, 8, 8))
    positions = 2 * 4 * 4
    multiply_adds = positions * 6 * (4 // groups) * 9
    samples = positions * 9 * 4 * 4
    offsets = positions * 18 * 4 * 9
    assert cost.flops == multiply_adds + samples + offsets
    assert cost.flops_by_operator["deform_conv2d"] == multiply_adds + samples
    assert cost.activations == positions * (6 + 18)
    assert cost.parameters == 6 * 4 // groups * 9 + 6 + 18 * 4 * 9 + 18
    assert not cost.not_counted


@pytest.mark.parametrize(("ratio", "samples"), [(3, 9), (0, 4)])
def test_flops_of_deformable_roi_pooling(ratio: int, samples: int) -> None:
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = DeformRoIPool(4, 2, 0.5, ratio)

        def forward(self, features: Tensor, boxes: Tensor) -> Tensor:
            return self.pool(features, boxes)

    boxes = torch.tensor([[0.0, 0, 0, 8, 8], [0, 2, 2, 9, 9], [0, 1, 1, 5, 5]])
    cost = count_cost(Pools(), (torch.rand(1, 4, 8, 8), boxes))
    pooled = 3 * 4 * 2 * 2  # once for the offsets, once with them
    linear = 3 * 16 * 8
    assert cost.flops == 2 * pooled * samples * 4 + linear
    assert cost.activations == 2 * pooled + 3 * 8
    assert not cost.not_counted


def test_flops_of_three_deformable_layers_in_a_resnet() -> None:
    from torchvision.models import resnet50

    model = resnet50(weights=None).eval()
    image = torch.rand(1, 3, 64, 64)
    plain = count_cost(model, image)
    make_deformable(model, last=3)
    deformable = count_cost(model, image)
    assert plain.flops == pytest.approx(0.337e9, rel=0.02)  # 4.1 billion at 224 x 224
    assert deformable.parameters - plain.parameters == 3 * (512 * 9 + 1) * 18
    positions = 2 * 2
    more = 3 * positions * (18 * 512 * 9 + 9 * 512 * 4)
    assert deformable.flops - plain.flops == more


class WithOffsets(nn.Module):
    """A deformable convolution whose offsets, and mask if modulated, come from plain ones."""

    def __init__(self, conv: nn.Module, modulated: bool) -> None:
        super().__init__()
        self.offset = nn.Conv2d(4, 18, 3, padding=1)
        self.mask = nn.Conv2d(4, 9, 3, padding=1) if modulated else None
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offset(x), *([self.mask(x).sigmoid()] if self.mask else []))


@pytest.mark.parametrize("make", ["torchvision", "torchvision, modulated", "detectron2"])
def test_torchvisions_and_detectron2s_layers_cost_as_ours(make: str) -> None:
    modulated = make.endswith("modulated")
    if make == "detectron2":
        layers = pytest.importorskip("detectron2.layers", reason="compares with Detectron2")
        conv = layers.DeformConv(4, 6, 3, padding=1)
    else:
        conv = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)
    image = torch.rand(1, 4, 8, 8)
    found = count_cost(WithOffsets(conv, modulated), image)
    ours = count_cost(DeformConv2dPack(4, 6, 3, padding=1, modulated=modulated), image)
    assert found.flops == ours.flops and found.activations == ours.activations
    assert not found.not_counted


def test_index_of_the_weight_in_detectron2s_modulated_convolution() -> None:
    conv = pytest.importorskip("detectron2.layers.deform_conv", reason="compares with Detectron2")
    arguments = list(inspect.signature(conv._ModulatedDeformConv.forward).parameters)[1:]
    count = HANDLES["prim::PythonOp._ModulatedDeformConv"]
    assert arguments[count.keywords["weight_at"]] == "weight"  # which runs on GPUs only


def test_flops_of_roi_align() -> None:
    align = torchvision.ops.RoIAlign(2, 1.0, 3)
    cost = count_cost(align, (torch.rand(1, 4, 8, 8), torch.tensor([[0.0, 0, 0, 8, 8]])))
    assert cost.flops == 4 * 2 * 2 * 9 * 4 and cost.activations == 16
    assert not cost.not_counted
