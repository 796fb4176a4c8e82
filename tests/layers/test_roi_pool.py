# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling and deformable RoI pooling modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcn_plugin import ops
from dcn_plugin.layers import DeformPSRoIPool, DeformRoIPool
from dcn_plugin.layers.roi_pool import MODES
from tests import roi_reference

SIZE = (3, 2)
LAYERS = {
    "plain": lambda **more: DeformRoIPool(4, SIZE, 0.25, **more),
    "position-sensitive": lambda **more: DeformPSRoIPool(4, 6, SIZE, 0.25, classes=3, **more),
}
on_every_device = pytest.mark.usefixtures("default_device")
layers = pytest.mark.parametrize("name", LAYERS)


def three_boxes() -> torch.Tensor:
    return torch.tensor([[0.0, 3, 5, 50, 61], [1, -9, 8, 30, 40], [0, 20, 2, 77, 33]])


def features(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 4, 16, 20, dtype=dtype)


def with_offsets(layer: nn.Module) -> nn.Module:
    """Randomizes the offset branch of a layer."""
    for name, parameter in layer.named_parameters():
        if name.startswith("offset_"):
            nn.init.normal_(parameter, std=0.7)
    return layer


@on_every_device
@pytest.mark.parametrize("mode", MODES)
def test_deform_roi_pool_starts_plain(mode: str) -> None:
    layer = DeformRoIPool(4, SIZE, 0.25, 2, mode=mode).double()
    x, boxes = features(), three_boxes()
    torch.testing.assert_close(layer(x, boxes), ops.roi_pool(x, boxes, SIZE, 0.25, 2, mode=mode))


@on_every_device
@pytest.mark.parametrize("mode", MODES)
def test_deform_ps_roi_pool_starts_plain(mode: str) -> None:
    layer = DeformPSRoIPool(4, 6, SIZE, 0.25, 2, mode=mode, classes=3).double()
    x, boxes = features(), three_boxes()
    expected = ops.ps_roi_pool(layer.score_conv(x), boxes, SIZE, 0.25, 2, mode=mode)
    torch.testing.assert_close(layer(x, boxes), expected)
    assert layer.score_conv.weight.std().item() == pytest.approx(0.01, rel=0.2)


@on_every_device
def test_bins_are_shifted_by_offset_fc() -> None:
    layer = with_offsets(DeformRoIPool(4, SIZE, 0.25, 2, gamma=0.3).double())
    x, boxes = features(), three_boxes()
    call = {"output_size": SIZE, "spatial_scale": 0.25, "sampling_ratio": 2, "mode": "align"}
    one_map = {"gamma": 0.3, "part_size": SIZE, "group_size": (1, 1)}
    pooled = roi_reference.deform_ps_roi_pool(x, boxes, None, **call, **one_map)
    weight, bias = layer.offset_fc.weight, layer.offset_fc.bias
    # x of all bins, row by row, then y of all bins.
    offset = (pooled.reshape(3, 24) @ weight.T + bias).reshape(3, 2, 3, 2)
    expected = roi_reference.deform_ps_roi_pool(x, boxes, offset, **call, **one_map)
    torch.testing.assert_close(layer(x, boxes), expected)


@on_every_device
def test_bins_of_each_class_are_shifted_by_its_offset_maps() -> None:
    layer = with_offsets(DeformPSRoIPool(4, 6, SIZE, 0.25, 2, gamma=0.3, classes=3).double())
    x, boxes = features(), three_boxes()
    call = {"output_size": SIZE, "spatial_scale": 0.25, "sampling_ratio": 2, "mode": "align"}
    per_bin = {"gamma": 0.3, "part_size": SIZE, "group_size": SIZE}
    offset_maps, scores = layer.offset_conv(x), layer.score_conv(x)
    assert offset_maps.shape[1] == 2 * 3 * 6 and scores.shape[1] == 6 * 6
    offset = roi_reference.deform_ps_roi_pool(offset_maps, boxes, None, **call, **per_bin)
    expected = roi_reference.deform_ps_roi_pool(scores, boxes, offset, **call, **per_bin)
    torch.testing.assert_close(layer(x, boxes), expected)


@on_every_device
@layers
def test_every_parameter_gets_a_gradient_initially(name: str) -> None:
    layer = LAYERS[name]().double()
    layer(features(), three_boxes()).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, key


@on_every_device
@layers
def test_boxes_may_be_a_list(name: str) -> None:
    layer = with_offsets(LAYERS[name]().double())
    x, boxes = features(), three_boxes()
    lists = [boxes[[0, 2], 1:], boxes[[1], 1:]]
    torch.testing.assert_close(layer(x, lists), layer(x, boxes)[[0, 2, 1]])


@on_every_device
@layers
def test_no_boxes(name: str) -> None:
    layer = LAYERS[name]().double()
    pooled = layer(features(), torch.zeros(0, 5))
    assert pooled.shape[0] == 0 and pooled.shape[2:] == SIZE
    pooled.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


@layers
def test_offsets_stay_in_float32_under_autocast(name: str, default_device: str) -> None:
    layer = with_offsets(LAYERS[name]())
    x, boxes = features(torch.float32), three_boxes()
    found = []
    inside = layer.offset_fc if name == "plain" else layer.offset_conv
    inside.register_forward_hook(lambda module, inputs, output: found.append(output.dtype))
    with torch.autocast(default_device, dtype=torch.bfloat16):
        pooled = layer(x.bfloat16(), boxes)
    assert found == [torch.float32] and pooled.dtype == torch.bfloat16


@on_every_device
@layers
def test_channels_last_features_give_the_same(name: str) -> None:
    layer = with_offsets(LAYERS[name]().double())
    x, boxes = features(), three_boxes()
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(last, boxes), layer(x, boxes))


@layers
def test_runs_on_meta_tensors(name: str) -> None:
    with torch.device("meta"):
        layer = LAYERS[name]()
        pooled = layer(torch.empty(2, 4, 16, 20), torch.empty(3, 5))
    assert pooled.device.type == "meta" and pooled.shape[2:] == SIZE


@on_every_device
@layers
def test_compiles_without_graph_breaks(name: str) -> None:
    layer = with_offsets(LAYERS[name]())
    x, boxes = features(torch.float32), three_boxes()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, boxes), layer(x, boxes))


@layers
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling_ratio": -1}, "sampling_ratio must be 0 or more, got -1"),
        ({"mode": "max"}, "mode must be one of .*, got 'max'"),
    ],
)
def test_invalid_arguments_raise(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYERS[name](**settings)


def test_invalid_sizes_raise() -> None:
    with pytest.raises(ValueError, match=r"output_size must be .* got \(7, 0\)"):
        DeformRoIPool(4, (7, 0), 0.25)
    with pytest.raises(ValueError, match=r"spatial_scale must be .* got 0"):
        DeformRoIPool(4, 7, 0)
    with pytest.raises(ValueError, match="divisor of the 6 output channels, got 4"):
        DeformPSRoIPool(4, 6, 7, 0.25, classes=4)
    with pytest.raises(ValueError, match="in_channels must be positive, got 0"):
        DeformRoIPool(0, 7, 0.25)


def test_other_channels_than_in_channels_raise() -> None:
    layer = DeformRoIPool(4, 3, 1.0)
    with pytest.raises(ValueError, match="must have the 4 channels of in_channels, got 8"):
        layer(torch.ones(1, 8, 6, 6), torch.tensor([[0.0, 1, 1, 4, 4]]))


def test_repr() -> None:
    text = repr(LAYERS["position-sensitive"]())
    assert "DeformPSRoIPool" in text and "output_size=(3, 2)" in text and "classes=3" in text
