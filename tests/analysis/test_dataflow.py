# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Strides are those that gradients show, or are unknown for a stated reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dcn_plugin.analysis import AnnotatedImage, effective_dilation, position_at, record, trace
from dcn_plugin.layers import DeformConv2dPack, make_deformable


@st.composite
def windows(draw: st.DrawFn) -> nn.Module:
    """A convolution or average pooling with an odd kernel and padding that keeps it centred."""
    kernel, stride = (draw(st.sampled_from(of)) for of in ([1, 3, 5], [1, 2, 3]))
    if draw(st.booleans()):
        return nn.AvgPool2d(kernel, stride, kernel // 2)
    dilation = draw(st.sampled_from([1, 2]))
    padding = dilation * (kernel - 1) // 2
    return nn.Conv2d(2, 2, kernel, stride, padding, dilation, bias=False)


@settings(max_examples=25)
@given(st.lists(windows(), max_size=3), st.booleans())
def test_stride_times_position_is_the_centre_of_the_gradient(
    stem: list[nn.Module], inference: bool
) -> None:
    side = 161
    pack = DeformConv2dPack(2, 2, 3, padding=1, bias=False)
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), *stem, pack).double()
    for name, weight in model.named_parameters():
        if "offset" not in name:
            nn.init.constant_(weight, 1.0)
    image = torch.rand(1, 1, side, side, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode(inference), record(model) as recording:
        out = model(image.detach())
    row, column = out.shape[2] // 2, out.shape[3] // 2
    model(image)[0, :, row, column].sum().backward()
    seen = image.grad[0, 0]
    assume(not any(edge.any() for edge in (seen[0], seen[-1], seen[:, 0], seen[:, -1])))
    pixels = torch.arange(side, dtype=torch.float64)
    centre = [float((seen.sum(axis) * pixels).sum() / seen.sum()) for axis in (1, 0)]
    found = trace(recording, (row, column)).centre
    assert found == pytest.approx(centre, abs=1e-6)
    assert position_at(recording, found[::-1]) == (row, column)


class Between(nn.Module):
    """A function between two deformable layers, on maps of 8 x 8 at stride 8."""

    def __init__(self, function: Callable[[Tensor], Tensor], stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = stem or nn.Conv2d(3, 4, 3, 8, 1)
        self.first = DeformConv2dPack(4, 4, 3, padding=1)
        self.last = DeformConv2dPack(4, 4, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(self.stem(x))))


def written_in_parts(x: Tensor) -> Tensor:
    whole = torch.zeros(1, 4, 8, 8)
    whole[:, :2] = x[:, :2]
    whole[:, 2:] = x[:, 2:] * 2
    return whole


KEPT = {
    "nothing": nn.Identity(),
    "activations": lambda x: nn.functional.hardswish(x.relu().clone(), inplace=True) + x,
    "norms": nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Dropout2d(0.5)),
    "split and cat": lambda x: torch.cat([part.relu() for part in x.split(2, dim=1)], dim=1),
    "squeeze and excitation": lambda x: x * x.mean(dim=(2, 3), keepdim=True).sigmoid(),
    "max pooling": nn.MaxPool2d(3, 1, 1),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", KEPT)
def test_strides_are_kept(kind: str, inference: bool) -> None:
    with torch.inference_mode(inference), record(model := Between(KEPT[kind])) as recording:
        model(torch.rand(1, 3, 64, 64))
    assert recording.layers["last"].output_stride == (8, 8)
    found = trace(recording, (4, 4))
    assert [len(level) for level in found.levels] == [9, 81]
    assert found.centre == (32, 32)


def test_strides_are_kept_by_writes_into_a_view() -> None:
    with torch.no_grad(), record(model := Between(written_in_parts)) as recording:
        model(torch.rand(1, 3, 64, 64))
    assert recording.layers["last"].depends_on == {"first"}
    assert [len(level) for level in trace(recording, (4, 4)).levels] == [9, 81]


SKIPPED = {
    "flip": (lambda x: x.flip(2), "flip"),
    "transpose": (lambda x: x.transpose(2, 3), "transpose"),
    "permute": (lambda x: x.permute(0, 1, 3, 2), "permute"),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2).mT.reshape(1, 4, 8, 8), "view"),
    "index": (lambda x: x[:, :, torch.arange(7, -1, -1)], "index"),
    "sort": (lambda x: x.sort(dim=3).values, "sort"),
    "flipped copy": (lambda x: x.clone().copy_(x.flip(3)), "flip"),
    "upsampling": (nn.Upsample(scale_factor=2), "upsample_nearest2d"),
    "transposed convolution": (nn.ConvTranspose2d(4, 4, 2, 2), "convolution"),
    "even kernel": (nn.MaxPool2d(2), r"kernel \(2, 2\), padding \(0, 0\) and dilation \(1, 1\)"),
    "no padding": (nn.Conv2d(4, 4, 3), r"kernel \(3, 3\), padding \(0, 0\)"),
    "slice": (lambda x: x[:, :, 1:], "slice from maps of another size"),
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_layers_of_unknown_stride_are_skipped_with_the_reason(kind: str) -> None:
    function, reason = SKIPPED[kind]
    with torch.no_grad(), record(model := Between(function)) as recording:
        model(torch.rand(1, 3, 64, 64))
    with pytest.warns(
        UserWarning, match=f"skipped layers of unknown positions: last is computed with {reason}"
    ):
        assert [layer.layer for layer in recording.choose()] == ["first"]


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_stems_with_padding_modes(mode: str) -> None:
    model = Between(nn.Identity(), nn.Conv2d(3, 4, 7, 8, padding=3, padding_mode=mode))
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert recording.image_size == (64, 64)
    if mode == "zeros":
        assert trace(recording, (4, 4)).centre == (32, 32)
    else:  # padded by another op
        assert "reflection_pad2d" in recording.layers["first"].unknown


@pytest.mark.parametrize(
    ("name", "reason"),
    [("resnet18", None), ("mobilenet_v3_small", None), ("squeezenet1_1", "padding (0, 0)")],
)
@pytest.mark.parametrize("side", [96, 102])
def test_torchvisions_models(name: str, reason: str | None, side: int) -> None:
    model = torchvision.models.get_model(name, weights=None).eval()
    make_deformable(model, last=1)
    with record(model) as recording, torch.no_grad():
        model(torch.rand(1, 3, side, side))
    (layer,) = recording.layers.values()
    assert layer.output_stride == (None if reason else (32, 32))
    assert reason is None or reason in layer.unknown


class OnRegions(nn.Module):
    """A deformable layer on the image, and one on RoIs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 8, 1)
        self.shared = DeformConv2dPack(4, 4, 3, padding=1)
        self.head = DeformConv2dPack(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.stem(x))
        boxes = [torch.tensor([[0.0, 0, 60, 60]])]
        return self.head(torchvision.ops.roi_align(x, boxes, 8, 1 / 8))


def test_layers_on_rois_are_skipped(caplog) -> None:
    model, image = OnRegions(), torch.rand(1, 3, 64, 64)  # maps and RoIs of 8 x 8
    with record(model) as recording, torch.no_grad():
        model(image)
    assert list(recording.layers) == ["shared", "head"]
    assert not recording.layers["head"].on_image
    with pytest.warns(UserWarning, match="head is computed with torchvision::roi_align"):
        assert len(trace(recording, (2, 3)).levels) == 1
    with pytest.raises(ValueError, match=r"not known: head is computed with .*roi_align; choose"):
        trace(recording, (2, 3), layers=["head"])
    annotated = AnnotatedImage(image, torch.zeros(0, 4), (64, 64))
    assert list(effective_dilation(model, [annotated])) == ["shared"]
    assert "skipped head, which is computed with torchvision::roi_align" in caplog.text


class Twice(nn.Module):
    """A deformable layer that runs on two maps, or twice in a row."""

    def __init__(self, in_a_row: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 4, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.shared = DeformConv2dPack(4, 4, 3, padding=1)
        self.in_a_row = in_a_row

    def forward(self, x: Tensor) -> Tensor:
        fine = self.stem(x)
        if self.in_a_row:
            return self.shared(self.shared(fine))
        return self.shared(fine).mean() + self.shared(self.pool(fine)).mean()


def test_all_runs_of_a_layer_count() -> None:
    image = torch.rand(1, 3, 64, 64)
    annotated = AnnotatedImage(image, torch.zeros(0, 4), (64, 64))
    model = Twice(in_a_row=False)
    found = effective_dilation(model, [annotated])["shared"]["background"]
    assert found.filters == 16 * 16 + 8 * 8 and found.mean == pytest.approx(1)
    with record(model) as recording, torch.no_grad():
        model(image)
    assert {name: layer.output_stride[0] for name, layer in recording.layers.items()} == {
        "shared": 4,
        "shared#2": 8,
    }
    with pytest.raises(ValueError, match=r"outputs of one size, choose some of them; got shared#2"):
        trace(recording, (0, 0))
    assert len(trace(recording, (2, 2), layers=["shared#2"]).ends) == 9


def test_a_layer_that_runs_twice_in_a_row_is_two_levels() -> None:
    model = Twice(in_a_row=True)
    for _ in range(2):  # nothing is kept from the pass before
        with record(model) as recording, torch.no_grad():
            model(torch.rand(1, 3, 64, 64))
            model(torch.rand(1, 3, 64, 64))
        found = trace(recording, (8, 8))
        assert [len(level) for level in found.levels] == [9, 81]


def test_batches_of_more_than_one_image_are_rejected() -> None:
    annotated = AnnotatedImage(torch.rand(2, 3, 64, 64), torch.zeros(0, 4), (64, 64))
    with pytest.raises(ValueError, match="inputs must be a batch of one image, got one of 2"):
        effective_dilation(Twice(in_a_row=True), [annotated])
