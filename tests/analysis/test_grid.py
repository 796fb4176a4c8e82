# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Cells lie where the gradient of an image says."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from dcn_plugin.analysis import AnnotatedImage, cell_at, effective_dilation, record, trace
from dcn_plugin.layers import DeformConv2dPack, make_deformable


class ToMap(nn.Module):
    """Applies a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def convolution(kernel: int, stride: int, padding: int, dilation: int) -> nn.Module:
    return nn.Conv2d(2, 2, kernel, stride, padding, dilation, bias=False)


# What has weights that are the same on both sides of its middle, so that a gradient shows it.
steps = st.one_of(
    st.builds(convolution, *(st.integers(1, 4), st.integers(1, 3)), st.integers(0, 2), st.just(1)),
    st.builds(convolution, st.just(3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2)),
    st.builds(nn.AvgPool2d, st.integers(1, 3), st.sampled_from([None, 1, 2])),
    st.builds(
        lambda left, top: ToMap(lambda x: F.pad(x, (left, 1, top, 2))),
        *(st.integers(0, 3), st.integers(0, 3)),
    ),
    st.builds(
        lambda start, every: ToMap(lambda x: x[:, :, start::every, 1:]),
        *(st.integers(0, 2), st.integers(1, 2)),
    ),
    st.just(ToMap(lambda x: x.permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2))),
)


# What makes maps larger: the last step, since later ones could leave out every other cell of it.
growth = st.one_of(
    st.just(nn.Identity()),
    st.sampled_from([2, 3]).map(lambda n: nn.Upsample(scale_factor=n)),
    st.builds(
        lambda kernel, border: nn.ConvTranspose2d(2, 2, kernel, 2, border, bias=False),
        *(st.sampled_from([2, 4]), st.integers(0, 1)),
    ),
)


def middle_of_gradient(
    model: nn.Module, side: int, cell: tuple[int, int], border: int
) -> list[float] | None:
    """Returns row and column of the middle of what a cell sees; None if it sees the border."""
    image = torch.rand(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    model(image)[0, :, cell[0], cell[1]].sum().backward()
    weight, places = image.grad[0, 0], torch.arange(side, dtype=torch.float64)
    if weight.count_nonzero() > weight[border:-border, border:-border].count_nonzero():
        return None
    return [float((weight.sum(axis) * places).sum() / weight.sum()) for axis in (1, 0)]


@settings(max_examples=40, deadline=None)
@given(st.lists(steps, max_size=3), growth, st.booleans())
def test_the_middle_of_a_gradient_is_the_middle_of_its_cell(stem, last, inference: bool) -> None:
    side = 240
    pack = DeformConv2dPack(2, 2, 3, padding=1, bias=False)
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), *stem, last, pack).double()
    for name, weight in model.named_parameters():
        if "offset" not in name:
            nn.init.constant_(weight, 1.0)
    with torch.inference_mode(inference), record(model) as recording:
        out = model(torch.rand(1, 1, side, side, dtype=torch.float64))
    assert recording.image_size == (side, side)
    # Cells that share one of the map before it has grown lie around its middle.
    share = 3 if getattr(last, "scale_factor", 1) == 3 else 2
    block = [
        (row, column)
        for row in range(out.shape[2] // 2, out.shape[2] // 2 + share)
        for column in range(out.shape[3] // 2, out.shape[3] // 2 + share)
    ]
    assume(block[-1][0] < out.shape[2] and block[-1][1] < out.shape[3])
    # What is missing beyond the border has a neighbour on the image, which is no farther from it.
    border = math.ceil(2 * share * max(recording.layers[str(len(stem) + 2)].map_grid.step))
    assume(2 * border < side)
    middles = [middle_of_gradient(model, side, cell, border) for cell in block]
    assume(None not in middles)
    centres = [trace(recording, cell).centre for cell in block]
    torch.testing.assert_close(
        torch.tensor(centres).mean(dim=0), torch.tensor(middles).mean(dim=0), atol=1e-3, rtol=0
    )
    for row, column in block:
        assert cell_at(recording, trace(recording, (row, column)).centre[::-1]) == (row, column)


@pytest.mark.parametrize(
    ("name", "shift"), [("resnet18", 0.0), ("densenet121", 14.0), ("vgg11", 7.5)]
)
@pytest.mark.parametrize("side", [224, 230])
def test_torchvisions_networks_have_their_own_shifts(name: str, shift: float, side: int) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    make_deformable(model, last=1)
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, side, side))
    (layer,) = recording.layers.values()
    step = 16 if name == "vgg11" else 32
    assert layer.out_grid.step == (step, step)
    assert layer.out_grid.start == pytest.approx((shift, shift))


class OnRegions(nn.Module):
    """A deformable layer on the image, and one on regions of it."""

    def __init__(self, flipped: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 8, 1)
        self.shared = DeformConv2dPack(4, 4, 3, padding=1)
        self.head = DeformConv2dPack(4, 4, 3, padding=1)
        self.flipped = flipped

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x))
        if self.flipped:
            return self.head(x.flip(3))
        boxes = [torch.tensor([[0.0, 0, 60, 60]])]
        return self.head(torchvision.ops.roi_align(x, boxes, 8, 1 / 8))


@pytest.mark.parametrize("flipped", [False, True])
def test_layers_with_no_place_on_the_image_are_left_out(flipped: bool, caplog) -> None:
    model, image = OnRegions(flipped), torch.rand(1, 3, 64, 64)  # 8 x 8 cells, as of the regions
    with record(model) as recording, torch.no_grad():
        model(image)
    assert list(recording.layers) == ["shared", "head"]
    assert not recording.layers["head"].on_image
    assert [layer.layer for layer in recording.choose()] == ["shared"]
    assert len(trace(recording, (2, 3)).levels) == 1
    with pytest.raises(ValueError, match="where the cells of head lie on the image is not known"):
        trace(recording, (2, 3), layers=["head"])
    annotated = AnnotatedImage(image, torch.zeros(0, 4), (64, 64))
    assert list(effective_dilation(model, [annotated])) == ["shared"]
    assert "left out" in caplog.text and "head" in caplog.text


class Again(nn.Module):
    """A layer that runs on two maps, or twice in a row."""

    def __init__(self, in_a_row: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 4, 1)
        self.shared = DeformConv2dPack(4, 4, 3, padding=1)
        self.in_a_row = in_a_row

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        if self.in_a_row:
            return self.shared(self.shared(fine))
        return self.shared(fine).mean() + self.shared(fine[:, :, ::2, ::2]).mean()


def test_all_runs_of_a_layer_count() -> None:
    image = torch.rand(1, 3, 64, 64)
    annotated = AnnotatedImage(image, torch.zeros(0, 4), (64, 64))
    model = Again(in_a_row=False)
    found = effective_dilation(model, [annotated])["shared"]["background"]
    assert found.filters == 16 * 16 + 8 * 8 and found.mean == pytest.approx(1)
    with record(model) as recording, torch.no_grad():
        model(image)
    assert {name: layer.out_grid.step[0] for name, layer in recording.layers.items()} == {
        "shared": 4,
        "shared#2": 8,
    }
    with pytest.raises(ValueError, match=r"maps of one size, choose some of them; got shared#2"):
        trace(recording, (0, 0))
    assert len(trace(recording, (2, 2), layers=["shared#2"]).ends) == 9


def test_a_layer_twice_in_a_row_is_two_levels() -> None:
    model = Again(in_a_row=True)
    for _ in range(2):  # what was known of the first pass is forgotten
        with record(model) as recording, torch.no_grad():
            model(torch.rand(1, 3, 64, 64))
            model(torch.rand(1, 3, 64, 64))
        found = trace(recording, (8, 8))
        assert [len(level) for level in found.levels] == [9, 81]


def test_a_batch_of_more_images_is_refused() -> None:
    annotated = AnnotatedImage(torch.rand(2, 3, 64, 64), torch.zeros(0, 4), (64, 64))
    with pytest.raises(ValueError, match="inputs must be a batch of one image, got one of 2"):
        effective_dilation(Again(in_a_row=True), [annotated])
