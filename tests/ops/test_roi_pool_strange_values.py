# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What NaN, infinities, huge numbers and missing RoIs do, and where they stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dcn_plugin.ops import deform_roi_pool
from tests.closeness import DTYPES, assert_near
from tests.ops import roi_bad_inputs
from tests.ops.conv_cases import cast
from tests.ops.roi_cases import BOTH, BOXES, MODES, RoiCase, gradients

NAN, INF = float("nan"), float("inf")
ROI = 5  # whom the tests below change: over all borders of the map
CLASS, ROW, COLUMN = 1, 2, 2  # the cell of its offset
both = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
modes = pytest.mark.parametrize("mode", MODES)
NCHW, NHWC = torch.contiguous_format, torch.channels_last
layouts = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
forms = pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float64, NCHW), (torch.float32, NHWC), (torch.bfloat16, NCHW), (torch.float16, NHWC)],
    ids=["float64-nchw", "float32-nhwc", "bfloat16-nchw", "float16-nhwc"],
)


def sane_call(case, device, dtype, layout):
    torch.manual_seed(1)
    call = case.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    return call


def without_roi(case, call):
    """Returns what a call gives where one RoI gives and gets nothing."""
    boxes = call["boxes"].clone()
    boxes[ROI, 1:] = torch.tensor([1e4, 1e4, 1e4 + 8, 1e4 + 8])
    return gradients(case.function, {**call, "boxes": boxes})


def assert_nan_exactly_at(tensor, where, expected, name):
    """NaN where it should be, the expected numbers elsewhere."""
    tensor, expected = tensor.cpu(), expected.cpu()
    assert torch.equal(tensor.isnan(), where), name
    # On the CPU the same sums in the same order; CUDA scatters in any order.
    assert_near(tensor.masked_fill(where, 0), expected.masked_fill(where, 0).double(), name)


def used_cells(case):
    """Rows and columns of the offset that some bin reads, as a mask."""
    part, cells = case.part or case.output, torch.zeros(case.part or case.output, dtype=torch.bool)
    for i in range(case.output[0]):
        for j in range(case.output[1]):
            cells[i * part[0] // case.output[0], j * part[1] // case.output[1]] = True
    return cells


@forms
@pytest.mark.parametrize("columns", [(1,), (4,), (1, 2, 3, 4)], ids=str)
@both
def test_nan_in_a_box_stays_in_its_roi(case, columns, dtype, layout, device):
    call = sane_call(case, device, dtype, layout)
    expected, expected_gradients = without_roi(case, call)
    call["boxes"][ROI, list(columns)] = NAN
    output, found = gradients(case.function, call)
    where = torch.zeros(output.shape, dtype=torch.bool)
    where[ROI] = True
    assert_nan_exactly_at(output, where, expected, "output")
    nowhere = torch.zeros(found["input"].shape, dtype=torch.bool)
    assert_nan_exactly_at(found["input"], nowhere, expected_gradients["input"], "input")
    # Of cells that no bin reads there is nothing to say.
    where = torch.zeros(found["offset"].shape, dtype=torch.bool)
    where[ROI] = used_cells(case)
    gradient = found["offset"].cpu().masked_fill(~(where | (used_cells(case))), 0)
    assert_nan_exactly_at(gradient, where, expected_gradients["offset"], "offset")


def bins_of_cell(case):
    """The output positions that read the changed cell, as a mask of the output."""
    part = case.part or case.output
    where = torch.zeros(case.output_shape, dtype=torch.bool)
    per_class = case.channels // case.classes
    for i in range(case.output[0]):
        for j in range(case.output[1]):
            cell = (i * part[0] // case.output[0], j * part[1] // case.output[1])
            if cell == (ROW, COLUMN % part[1]):
                where[ROI, CLASS * per_class : (CLASS + 1) * per_class, i, j] = True
    assert where.any()
    return where


BAD_OFFSETS = {
    "dx": (NAN, 0.5),
    "dy": (0.5, NAN),
    "both": (NAN, NAN),
    "dx-dy-outside": (NAN, 6e4),
    "dy-dx-infinite": (INF, NAN),
}


@forms
@pytest.mark.parametrize("bad", BAD_OFFSETS)
@both
def test_nan_in_an_offset_stays_at_its_position(case, bad, dtype, layout, device):
    """As if the bins lay outside, but NaN in them and in both components of that offset."""
    column = COLUMN % (case.part or case.output)[1]
    planes = slice(2 * CLASS, 2 * CLASS + 2)
    call = sane_call(case, device, dtype, layout)
    call["offset"][ROI, planes, ROW, column] = 6e4
    expected, expected_gradients = gradients(case.function, call)
    call["offset"][ROI, planes, ROW, column] = torch.tensor(BAD_OFFSETS[bad]).to(call["offset"])
    output, found = gradients(case.function, call)
    assert_nan_exactly_at(output, bins_of_cell(case), expected, "output")
    nowhere = torch.zeros(found["input"].shape, dtype=torch.bool)
    assert_nan_exactly_at(found["input"], nowhere, expected_gradients["input"], "input")
    where = torch.zeros(found["offset"].shape, dtype=torch.bool)
    where[ROI, planes, ROW, column] = True
    assert_nan_exactly_at(found["offset"], where, expected_gradients["offset"], "offset")


@forms
@pytest.mark.parametrize("huge", [INF, 1e30, -3e9])
@pytest.mark.parametrize("axes", [(1, 0), (0, 1), (1, -1)], ids=str)
@both
def test_infinite_and_huge_offsets_are_outside(case, axes, huge, dtype, layout, device):
    column = COLUMN % (case.part or case.output)[1]
    planes = slice(2 * CLASS, 2 * CLASS + 2)
    call = sane_call(case, device, dtype, layout)
    call["offset"][ROI, planes, ROW, column] = 6e4
    expected, expected_gradients = gradients(case.function, call)
    bad = torch.tensor([huge * axis if axis else 0.0 for axis in axes], dtype=torch.float64)
    call["offset"][ROI, planes, ROW, column] = bad.to(call["offset"])
    output, found = gradients(case.function, call)
    assert not output.cpu()[bins_of_cell(case)].any()
    assert not found["offset"][ROI, planes, ROW, column].any()
    assert_near(output, expected.double(), "output")
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient.double(), name)


@forms
@pytest.mark.parametrize("value", [INF, -INF])
@pytest.mark.parametrize("columns", [(1,), (4,), (1, 3), (1, 2, 3, 4)], ids=str)
@both
def test_a_box_with_an_infinite_coordinate_gives_zero(case, columns, value, dtype, layout, device):
    call = sane_call(case, device, dtype, layout)
    expected, expected_gradients = without_roi(case, call)
    call["boxes"][ROI, list(columns)] = value
    output, found = gradients(case.function, call)
    assert not output[ROI].any()
    assert not found["offset"][ROI].any()
    assert_near(output, expected.double(), "output")
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient.double(), name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("side", [1e15, 1e30])
@modes
def test_an_enormous_box_is_soon_done(mode, side, dtype, device):
    """Samples too many for any integer: what falls on the map is next to nothing of them."""
    box = (-side, -side, side, side)
    case = RoiCase(mode, classes=1, boxes=(box,), scale=1.0, spread=0.0)
    call = case.draw(device, dtype)
    output, found = gradients(case.function, call)
    for tensor in (output, *found.values()):
        assert tensor.isfinite().all()
    if mode != "msra":  # whose four samples of a bin may meet the map
        assert output.abs().max() < 1e-9


@pytest.mark.parametrize("offset", [(INF, 0.0), (0.0, -INF), (INF, INF)], ids=str)
def test_an_infinite_offset_is_outside_also_for_an_empty_box(offset, device):
    """Infinity times a width of 0 is no reason for NaN."""
    input = torch.rand(1, 1, 9, 8, device=device)
    box = torch.tensor([[0.0, 4.0, 4.0, 4.0, 4.0]], device=device)
    bad = torch.tensor(offset, device=device).reshape(1, 2, 1, 1).requires_grad_()
    output = deform_roi_pool(input, box, bad, 1, sampling_ratio=2)
    assert output.item() == 0
    (gradient,) = torch.autograd.grad(output.sum(), bad)
    assert not gradient.any()


@modes
def test_nan_in_the_offset_of_a_box_without_samples(mode, device):
    """Also where the output would be 0: nobody may miss a NaN."""
    input = torch.rand(1, 1, 9, 8, device=device)
    boxes = torch.tensor([[0.0, *BOXES["inverted"]], [0.0, 80.0, 4.0, 89.0, 9.0]], device=device)
    bad = torch.full((2, 2, 1, 1), NAN, device=device, requires_grad=True)
    output = deform_roi_pool(input, boxes, bad, 1, mode=mode)
    assert output.isnan().all()
    (gradient,) = torch.autograd.grad(output.sum(), bad)
    assert gradient.isnan().all()


@layouts
@both
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_pixel_stays_in_its_image_and_map(case, value, layout, device):
    call = sane_call(case, device, torch.float64, layout)
    good, good_gradients = gradients(case.function, call)
    call["input"][0, 0, 4, 3] = value
    output, found = gradients(case.function, call)
    bad = ~output.cpu().isfinite()
    assert bad[:, 0].any()
    of_image = call["boxes"][:, 0].cpu() == 0
    assert not bad[~of_image].any() and not bad[:, 1:].any()
    assert_near(output.cpu().masked_fill(bad, 0), good.cpu().masked_fill(bad, 0))
    # Linear in the input, so its own gradient does not know of the pixel.
    assert_near(found["input"], good_gradients["input"], "input")
    assert found["offset"].cpu()[~of_image].isfinite().all()
    assert found["offset"][:, 2:].isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", roi_bad_inputs.BATCH_INDICES)
@both
def test_on_cuda_a_bad_batch_index_gives_nan_and_no_gradient(case, name, dtype):
    call = sane_call(case, "cuda", dtype, torch.contiguous_format)
    expected, expected_gradients = without_roi(case, call)
    call = cast(call, torch.float32, ["boxes"])
    call["boxes"][ROI, 0] = roi_bad_inputs.BATCH_INDICES[name]
    output, found = gradients(case.function, call)
    where = torch.zeros(output.shape, dtype=torch.bool)
    where[ROI] = True
    assert_nan_exactly_at(output, where, expected, "output")
    assert not found["offset"][ROI].any()
    for key, gradient in expected_gradients.items():
        assert_near(found[key], gradient.double(), key)


@both
@pytest.mark.parametrize("alone", [0, 1, 2])
def test_rois_of_one_image_only(case, alone, device):
    call = case.draw(device)
    keep = call["boxes"][:, 0] == alone
    call = {**call, "boxes": call["boxes"][keep], "offset": call["offset"][keep]}
    output, found = gradients(case.function, call)
    expected, expected_gradients = gradients(
        replace(case, boxes=case.boxes[: int(keep.sum())]).reference,
        {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in call.items()},
    )
    exact = 512 * torch.finfo(torch.float64).eps
    assert_near(output, expected, "output", exact)
    assert_near(found["input"], expected_gradients["input"], "input", exact)
    others = [n for n in range(3) if n != alone]
    assert not found["input"][others].any()
