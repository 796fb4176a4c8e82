# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Traces end on exactly the pixels that an output position depends on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcn_plugin.analysis import Recording, position_at, record, trace
from dcn_plugin.analysis.trace import order_levels
from dcn_plugin.layers import DeformConv2d, DeformConv2dPack


class RandomOffsets(nn.Module):
    """Consecutive deformable convolutions with random integer offsets."""

    def __init__(self, layers: list[dict[str, int]], modulated: bool, seed: int) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(seed)
        self.modulated = modulated
        self.groups = [layer.pop("offset_groups") for layer in layers]
        self.convs = nn.ModuleList(DeformConv2d(2, 2, **layer) for layer in layers)
        for conv in self.convs:
            nn.init.constant_(conv.weight, 1.0)  # so that no gradient is lost

    def forward(self, x: Tensor) -> Tensor:
        for conv, groups in zip(self.convs, self.groups, strict=True):
            plain = nn.functional.conv2d(
                x, conv.weight, None, conv.stride, conv.padding, conv.dilation
            )
            size = (len(x), 2 * groups * 9, *plain.shape[-2:])
            offset = torch.randint(-2, 3, size, generator=self.draw).to(x)
            mask = torch.rand(len(x), groups * 9, *plain.shape[-2:], generator=self.draw) + 0.1
            x = conv(x, offset, mask.to(x) if self.modulated else None)
        return x


layers = st.fixed_dictionaries(
    {
        "kernel_size": st.just(3),
        "stride": st.sampled_from([1, 1, 2]),
        "padding": st.just(2),
        "dilation": st.just(2),
        "offset_groups": st.sampled_from([1, 2]),
    }
)


@settings(max_examples=25)
@given(st.lists(layers, min_size=1, max_size=3), st.booleans(), st.integers(0, 99), st.data())
def test_traces_end_on_the_pixels_with_a_gradient(
    specs: list[dict[str, int]], modulated: bool, seed: int, data: st.DataObject
) -> None:
    model = RandomOffsets([dict(spec) for spec in specs], modulated, seed).double()
    image = torch.rand(1, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    with record(model) as recording:
        out = model(image)
    row = data.draw(st.integers(0, out.shape[2] - 1))
    column = data.draw(st.integers(0, out.shape[3] - 1))
    found = trace(recording, (row, column))
    out[0, :, row, column].sum().backward()
    expected = image.grad[0].abs().sum(dim=0).nonzero()
    last = found.levels[-1]
    inside = ((last >= 0) & (last < 16)).all(dim=1)
    assert set(map(tuple, last[inside].long().tolist())) == set(map(tuple, expected.tolist()))
    if not modulated:
        assert all((weights == 1).all() for weights in found.weights)


class Branches(nn.Module):
    """A layer, two parallel branches of one and two layers, and a last layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        spec = {"kernel_size": 3, "stride": 1, "padding": 2, "dilation": 2, "offset_groups": 1}
        self.first, self.left, self.right, self.more, self.last = (
            RandomOffsets([dict(spec)], False, seed + number) for number in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.left(x) + self.more(self.right(x).relu()))


@settings(max_examples=10)
@given(st.integers(0, 99), st.integers(0, 15), st.integers(0, 15))
def test_parallel_branches_are_all_traced(seed: int, row: int, column: int) -> None:
    model = Branches(seed).double()
    image = torch.rand(1, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    with record(model) as recording:
        out = model(image)
    levels = [
        sorted(name.partition(".")[0] for name in level)
        for level in order_levels(recording.choose())
    ]
    # The first layer is reached through branches of different lengths.
    assert levels == [["last"], ["left", "more"], ["first", "right"], ["first"]]
    out[0, :, row, column].sum().backward()
    expected = set(map(tuple, image.grad[0].abs().sum(dim=0).nonzero().tolist()))
    found = trace(recording, (row, column))
    points = found.ends
    inside = ((points >= 0) & (points < 16)).all(dim=1)
    assert set(map(tuple, points[inside].long().tolist())) == expected


def three_layers(**settings: object) -> nn.Sequential:
    packs = [DeformConv2dPack(4, 4, 3, padding=2, dilation=2, **settings) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 4, 1), *packs)


def recorded(model: nn.Module, height: int = 32, width: int = 32) -> Recording:
    with record(model) as recording, torch.no_grad():
        model(torch.rand(2, 3, height, width))
    return recording


def test_three_levels_have_729_points() -> None:
    recording = recorded(three_layers())
    found = trace(recording, (16, 16), image=1)
    assert [len(level) for level in found.levels] == [9, 81, 729]
    assert found.centre == (16, 16)
    # Three times a grid with dilation 2.
    assert found.levels[-1].unique().tolist() == [10.0 + 2 * k for k in range(7)]
    groups = recorded(three_layers(offset_groups=2))
    assert [len(level) for level in trace(groups, (16, 16)).levels] == [18, 18**2, 18**3]
    names = list(recording.layers)[:2]
    assert [len(level) for level in trace(recording, (16, 16), layers=names).levels] == [9, 81]


def test_weights_are_products_of_modulation() -> None:
    found = trace(recorded(three_layers(modulated=True)), (16, 16))
    for level, weights in enumerate(found.weights, start=1):
        torch.testing.assert_close(weights, torch.full_like(weights, 0.5**level))


def test_locations_that_round_to_one_position_are_merged() -> None:
    model = three_layers(modulated=True)
    for pack in model[1:]:
        torch.nn.init.normal_(pack.offset_conv.weight, std=0.5)
    recording = recorded(model)
    whole, merged = (trace(recording, (13, 17), merge_above=n) for n in (10**6, 10))
    assert len(merged.ends) < len(whole.ends)
    assert merged.end_weights.sum() == pytest.approx(whole.end_weights.sum().item(), rel=1e-4)
    assert {tuple(p) for p in merged.ends.tolist()} == {tuple(p) for p in whole.ends.tolist()}


def test_many_layers_are_merged_by_default() -> None:
    packs = [DeformConv2dPack(4, 4, 3, padding=1) for _ in range(9)]
    found = trace(recorded(nn.Sequential(nn.Conv2d(3, 4, 1), *packs)), (16, 16))
    assert len(found.levels) == 9 and len(found.ends) <= 32 * 32 * 9


def test_aligned_inception_resnet_has_two_layers_a_level() -> None:
    pytest.importorskip("detectron2", reason="it needs Detectron2's blocks")
    from dcn_plugin.modeling import AlignedInceptionResNet

    model = AlignedInceptionResNet(
        stem_channels=8,
        res2_channels=8,
        blocks=(1, 1, 1, 2),
        res5_dilation=2,
        deform_last=(0, 0, 0, 2),
        out_features=["res5"],
    ).eval()
    recording = recorded(model, 64, 64)
    levels = order_levels(recording.choose())
    names = [sorted(name.split("res5.")[1] for name in level) for level in levels]
    assert names == [["1.deep3", "1.wide2"], ["0.deep3", "0.wide2"]]
    # On a 4 x 4 map four of the taps around (2, 2), at dilation 2, lie inside; each is traced from
    # both last branches into both first ones.
    assert [len(level) for level in trace(recording, (2, 2)).levels] == [2 * 9, 2 * 2 * 4 * 9]


def test_tracing_needs_a_layer_that_ran() -> None:
    with pytest.raises(ValueError, match="no deformable layer with known positions"):
        trace(Recording(), (0, 0))


def test_a_second_pass_starts_anew() -> None:
    model = three_layers()
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
        model(torch.rand(1, 3, 32, 16))
    assert recording.image_size == (32, 16) and len(recording.layers) == 3


def test_locations_off_the_map_are_not_traced_further() -> None:
    found = trace(recorded(three_layers()), (0, 0))
    assert [len(level) for level in found.levels] == [9, 2**2 * 9, 5**2 * 9]
    assert found.levels[0].min() == -2


def test_traces_are_in_pixels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, 4, 1), DeformConv2dPack(4, 4, 3, padding=1))
    recording = recorded(model, 30, 62)  # maps of 8 x 16, rounded up
    assert recording.image_size == (30, 62)
    found = trace(recording, position_at(recording, (41, 13)))
    assert found.centre == (12, 40)
    assert sorted(set(found.levels[0][:, 1].tolist())) == [36, 40, 44]


def test_positions_points_and_layers_out_of_range() -> None:
    recording = recorded(three_layers(), 16, 32)
    assert position_at(recording, (31.9, 15.9)) == (15, 31)
    with pytest.raises(
        ValueError, match=r"x from 0 to below 32 and y from 0 to below 16, got 32,3"
    ):
        position_at(recording, (32, 3))
    with pytest.raises(ValueError, match=r"row below 16 and a column below 32 .*got \(16, 0\)"):
        trace(recording, (16, 0))
    with pytest.raises(ValueError, match=r"deformable layers that ran, 1, 2, 3; got '4'"):
        trace(recording, (0, 0), layers=["4"])
