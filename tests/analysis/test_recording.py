# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Offsets and masks of torchvision's, Detectron2's and our deformable layers are recorded."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dcn_plugin.analysis import deformable_layers, record, trace
from dcn_plugin.layers import DeformConv2d, DeformConv2dPack, OffsetConv2d, make_deformable


class TorchvisionLayer(nn.Module):
    """torchvision's deformable convolution with offsets from a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(3, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, offset=self.offsets(x))


def test_torchvisions_layer_is_recorded() -> None:
    model, image = TorchvisionLayer(), torch.rand(1, 3, 8, 9)
    with record(model) as recording:
        model(image)
    (found,) = recording.layers.values()
    assert found.layer == "conv" and found.output_size == (8, 9) and found.mask is None
    torch.testing.assert_close(found.offset, model.offsets(image))


def test_a_converted_torchvision_model_is_recorded() -> None:
    model = torchvision.models.resnet18(weights=None).eval()
    names = make_deformable(model, last=3)
    assert list(deformable_layers(model)) == names
    with record(model) as recording:
        model(torch.rand(1, 3, 64, 96))
    assert list(recording.layers) == names
    assert recording.image_size == (64, 96)
    assert {layer.input_stride for layer in recording.layers.values()} == {(32, 32)}


class OtherNames(nn.Module):
    """Our convolution with a branch that is not named after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = DeformConv2d(3, 4, 3, padding=1)
        self.branch = OffsetConv2d(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, *self.branch(x))


def test_a_branch_and_its_convolution_are_one_layer_under_any_name() -> None:
    model = OtherNames()
    for _ in range(2):
        with record(model) as recording:
            model(torch.rand(1, 3, 8, 9))
        assert list(recording.layers) == ["conv"]
        assert len(trace(recording, (4, 4)).ends) == 9


def test_detectron2s_blocks_and_ours_are_recorded_alike() -> None:
    pytest.importorskip("detectron2", reason="compares with Detectron2")
    from detectron2.modeling.backbone.resnet import DeformBottleneckBlock

    from dcn_plugin.modeling.backbone.deform_block import DeformBottleneckBlock as Ours

    settings = {"bottleneck_channels": 4, "norm": "BN"}
    theirs, ours = DeformBottleneckBlock(8, 8, **settings), Ours(8, 8, **settings)
    assert list(deformable_layers(theirs)) == list(deformable_layers(ours)) == ["conv2"]
    image = torch.rand(1, 8, 6, 7)
    locations = []
    for block in (theirs, ours):
        nn.init.constant_(block.conv2_offset.bias, 0.25)
        with record(block) as recording:
            block(image)
        locations.append(recording.layers["conv2"].locations())
    torch.testing.assert_close(*locations)
    assert locations[0].shape == (6, 7, 1, 9, 2)
    # Row 2, column 3, the first tap at (-1, -1), moved by 0.25.
    assert locations[0][2, 3, 0, 0].tolist() == [1.25, 2.25]


def test_modulation_is_recorded() -> None:
    model = DeformConv2dPack(4, 4, 3, padding=1, offset_groups=2, modulated=True)
    with record(model) as recording:
        model(torch.rand(2, 4, 5, 5))
    (found,) = recording.layers.values()
    assert found.weights(1).shape == (5, 5, 2, 9) and (found.weights(1) == 0.5).all()


def test_hooks_are_removed() -> None:
    model = DeformConv2dPack(4, 4, 3, padding=1)
    with pytest.raises(RuntimeError, match="stopped"), record(model):
        raise RuntimeError("stopped")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_plain_model_is_rejected() -> None:
    model = torchvision.models.resnet18(weights=None)
    assert deformable_layers(model) == {}
    message = r"ResNet has no deformable convolutions.*make_deform"
    with pytest.raises(ValueError, match=message), record(model):
        pass
