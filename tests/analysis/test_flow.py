# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What is known of where cells lie survives what networks do to maps, or is known to be lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dcn_plugin.analysis import cell_at, record, trace
from dcn_plugin.layers import DeformConv2dPack, make_deformable


class Between(nn.Module):
    """A function between two deformable layers, on maps of 8 x 8 cells of 8 pixels."""

    def __init__(self, function: Callable[[Tensor], Tensor], stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Conv2d(3, 4, 3, 8, 1)
        self.first = DeformConv2dPack(4, 4, 3, padding=1)
        self.last = DeformConv2dPack(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(self.stem(x))))


def shuffled(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    parts = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).contiguous()
    return parts.view(batch, channels, height, width)


def as_tokens_and_back(x: Tensor) -> Tensor:
    return (x.permute(0, 2, 3, 1).flatten(0, 2) * 2).view(1, 8, 8, 4).permute(0, 3, 1, 2)


def written_in_parts(x: Tensor) -> Tensor:
    whole = torch.zeros(1, 4, 8, 8)
    whole[:, :2] = x[:, :2]
    whole[:, 2:] = x[:, 2:] * 2
    return whole


def split_and_joined(x: Tensor) -> Tensor:
    return torch.cat([part.relu() for part in x.split(2, dim=1)], dim=1)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        shuffled,
        split_and_joined,
        nn.Identity(),
        nn.GroupNorm(2, 4),
        nn.Dropout2d(0.5),
    ],
)
def test_places_survive(function: Callable[[Tensor], Tensor], inference: bool) -> None:
    model = Between(function)
    with torch.inference_mode(inference), record(model) as recording:
        model(torch.rand(1, 3, 64, 64))
    assert recording.layers["last"].out_grid.step == (8, 8)
    found = trace(recording, (4, 4))
    assert [len(level) for level in found.levels] == [9, 81]
    assert found.centre == (32, 32)


def test_places_survive_being_written_in_parts() -> None:
    model = Between(written_in_parts)
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert recording.layers["last"].behind == {"first"}
    assert [len(level) for level in trace(recording, (4, 4)).levels] == [9, 81]


@pytest.mark.parametrize(
    "function",
    [
        as_tokens_and_back,
        lambda x: x.transpose(2, 3),
        lambda x: x.permute(0, 1, 3, 2),
        lambda x: x.flip(2),
        lambda x: x[:, :, torch.arange(7, -1, -1)],
        lambda x: x.sort(dim=3).values,
    ],
)
def test_places_that_are_lost_are_not_made_up(function: Callable[[Tensor], Tensor]) -> None:
    model = Between(function)
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    with pytest.warns(UserWarning, match="left out, since it is not known where.*: last"):
        assert [layer.layer for layer in recording.choose()] == ["first"]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_padded_stem_shifts_nothing(mode: str) -> None:
    model = Between(nn.Identity(), nn.Conv2d(3, 4, 7, 8, padding=3, padding_mode=mode))
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert recording.image_size == (64, 64)
    if mode != "circular":  # whose border is made of other cells
        assert trace(recording, (4, 4)).centre == (32, 32)


def test_whole_numbers_are_points_too() -> None:
    model = torchvision.models.vgg11(weights=None).features.eval()
    make_deformable(model, last=1)
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 224, 224))
    for point in ((31, 31), (40, 24), (0, 223)):
        assert cell_at(recording, point) == cell_at(recording, tuple(map(float, point)))
    assert cell_at(recording, (31, 31)) == (1, 1)  # cells lie at 7.5, 23.5, 39.5, ...


def test_a_network_that_shuffles_channels_is_traced() -> None:
    model = torchvision.models.shufflenet_v2_x0_5(weights=None).eval()
    names = make_deformable(model, last=2)
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 96, 96))
    assert [layer.layer for layer in recording.choose()] == names[::-1]
    assert len(trace(recording, (1, 1)).levels[0]) == 9
