# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Effective dilations of filters with known offsets."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

from dcn_plugin.analysis import AnnotatedImage, effective_dilation, record
from dcn_plugin.analysis.effective_dilation import CATEGORIES, category_map, dilation_map
from dcn_plugin.layers import DeformConv2dPack

TAPS = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]


def make_model(dilation: int = 1, stride: int = 1, **settings: object) -> nn.Sequential:
    pack = DeformConv2dPack(4, 4, 3, padding=dilation, dilation=dilation, stride=stride, **settings)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 8, 1), pack)


def scale(model: nn.Sequential, factor: float) -> None:
    """Sets the offsets that scale the kernel's grid by `factor`."""
    pack = model[1]
    offsets = [[(factor - 1) * pack.dilation[0] * step for step in tap] for tap in TAPS]
    with torch.no_grad():
        groups = pack.offset_conv.offset_groups
        pack.offset_conv.bias[: 18 * groups] = torch.tensor(offsets).flatten().repeat(groups)


def image(*boxes: tuple[int, int, int, int], side: int = 128) -> AnnotatedImage:
    return AnnotatedImage(
        torch.rand(1, 3, side, side), torch.tensor(boxes).reshape(-1, 4).float(), (side, side)
    )


@pytest.mark.parametrize("dilation", [1, 2, 4])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@pytest.mark.parametrize("settings", [{}, {"offset_groups": 2}, {"modulated": True}])
def test_a_scaled_grid_has_a_scaled_dilation(
    dilation: int, factor: float, settings: dict[str, object]
) -> None:
    model = make_model(dilation, **settings)
    scale(model, factor)
    (found,) = effective_dilation(model, [image()]).values()
    assert found["background"].mean == pytest.approx(dilation * factor, rel=1e-5)
    assert found["background"].std == pytest.approx(0, abs=1e-2)
    assert found["background"].filters == 16 * 16
    assert all(math.isnan(found[name].mean) and not found[name].filters for name in CATEGORIES[:3])


def test_distances_are_between_neighbouring_taps() -> None:
    model = make_model()
    with torch.no_grad():  # the centre tap moves down by three
        model[1].offset_conv.bias[2 * 4] = 3.0
    with record(model) as recording:
        model(torch.rand(1, 3, 64, 64))
    (layer,) = recording.layers.values()
    # Of twelve pairs four include the centre tap: above, below, left, right.
    expected = (8 * 1 + 4 + 2 + 2 * math.hypot(1, 3)) / 12
    torch.testing.assert_close(dilation_map(layer), torch.full((8, 8), expected))


def test_filters_count_for_the_smallest_box_around_their_centre() -> None:
    model = make_model()
    boxes = (0, 0, 64, 64), (8, 8, 24, 24), (0, 0, 128, 128)
    annotated = image(*boxes)
    (found,) = effective_dilation(model, [annotated], areas=(20**2, 100**2)).values()
    assert [found[name].filters for name in CATEGORIES] == [4, 60, 192, 0]
    found = effective_dilation(model, [annotated, image()], areas=(20**2, 100**2))["1"]
    assert [found[name].filters for name in CATEGORIES] == [4, 60, 192, 256]


def test_mean_and_std_are_over_the_filters_of_all_images() -> None:
    model = make_model()
    images = [image(), image((0, 0, 128, 128))]
    with torch.no_grad():
        model[1].offset_conv.weight.normal_(0, 0.1)
    found = effective_dilation(model, [images[0], images[0], images[1]])["1"]
    values = []
    for annotated in (images[0], images[0]):
        with record(model) as recording:
            model(annotated.inputs)
        values.append(dilation_map(recording.layers["1"]).flatten())
    both = torch.cat(values).double()
    assert found["background"].mean == pytest.approx(both.mean().item(), rel=1e-6)
    assert found["background"].std == pytest.approx(both.std(correction=0).item(), rel=1e-4)
    assert found["medium"].filters == 256


def test_positions_on_padding_do_not_count() -> None:
    model = make_model(stride=2)
    inputs = torch.rand(1, 3, 64, 128)
    annotated = AnnotatedImage(inputs, torch.zeros(0, 4), (40, 100))
    with record(model) as recording:
        model(inputs)
    found = category_map(recording.layers["1"], annotated, (1.0, 2.0))
    assert found.shape == (4, 8)
    assert (found[:3, :7] == CATEGORIES.index("background")).all()
    assert (found == -1).sum() == 32 - 21


def test_wrong_arguments() -> None:
    with pytest.raises(
        ValueError, match=r"areas must be two ascending numbers above 0, got \(4, 2"
    ):
        effective_dilation(make_model(), [image()], areas=(4, 2))
    with pytest.raises(ValueError, match="Sequential has no deformable convolutions"):
        effective_dilation(nn.Sequential(nn.Conv2d(3, 4, 1)), [image()])


def test_layers_with_one_tap_are_skipped() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DeformConv2dPack(4, 4, 1), *make_model()[1:])
    assert list(effective_dilation(model, [image()])) == ["2"]


def test_crowds_are_neither_objects_nor_background() -> None:
    annotated = dataclasses.replace(
        image((0, 0, 24, 24)), crowds=torch.tensor([[0.0, 0, 64, 64], [96, 96, 128, 128]])
    )
    (found,) = effective_dilation(make_model(), [annotated], areas=(20**2, 100**2)).values()
    # Of 16 x 16 positions 8 x 8 and 4 x 4 are in crowds; an object in a crowd counts.
    assert [found[name].filters for name in CATEGORIES] == [0, 9, 0, 256 - 64 - 16]


def test_a_model_without_a_layer_to_measure() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), DeformConv2dPack(4, 4, 1))
    with pytest.raises(ValueError, match="no deformable layer ran whose effective dilation"):
        effective_dilation(model, [image()])
