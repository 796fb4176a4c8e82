# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""NaN, infinities, huge numbers and missing RoIs: which results they affect."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dcn_plugin.ops import deform_roi_pool
from tests.devices import CUDA
from tests.ops import roi_bad_inputs
from tests.ops.conv_cases import cast
from tests.ops.roi_cases import BOTH, BOXES, MODES, RoiCase, gradients
from tests.tolerances import DTYPES, assert_near

NAN, INF = float("nan"), float("inf")
ROI = 5  # the RoI changed by the tests below, across all borders of the map
CLASS, ROW, COLUMN = 1, 2, 2  # the element of its offset
both = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
modes = pytest.mark.parametrize("mode", MODES)
NCHW, NHWC = torch.contiguous_format, torch.channels_last
layouts = pytest.mark.parametrize("layout", [NCHW, NHWC], ids=["nchw", "nhwc"])
forms = pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float64, NCHW), (torch.float32, NHWC), (torch.bfloat16, NCHW), (torch.float16, NHWC)],
    ids=["float64-nchw", "float32-nhwc", "bfloat16-nchw", "float16-nhwc"],
)


def valid_call(case, device, dtype, layout):
    torch.manual_seed(1)
    call = case.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    return call


def without_roi(case, call):
    """Returns the results of a call in which one RoI contributes nothing."""
    boxes = call["boxes"].clone()
    boxes[ROI, 1:] = torch.tensor([1e4, 1e4, 1e4 + 8, 1e4 + 8])
    return gradients(case.function, {**call, "boxes": boxes})


def assert_nan_exactly_at(tensor, where, expected, name):
    """Checks for NaN at `where`, and for the expected values elsewhere."""
    tensor, expected = tensor.cpu(), expected.cpu()
    assert torch.equal(tensor.isnan(), where), name
    # Exactly equal on the CPU; atomics on CUDA sum in any order.
    assert_near(tensor.masked_fill(where, 0), expected.masked_fill(where, 0).double(), name)


def used_cells(case):
    """Returns a mask of the elements of the offset that bins read."""
    part, cells = case.part or case.output, torch.zeros(case.part or case.output, dtype=torch.bool)
    for i in range(case.output[0]):
        for j in range(case.output[1]):
            cells[i * part[0] // case.output[0], j * part[1] // case.output[1]] = True
    return cells


@forms
@pytest.mark.parametrize("columns", [(1,), (4,), (1, 2, 3, 4)], ids=str)
@both
def test_nan_in_a_box_stays_in_its_roi(case, columns, dtype, layout, device):
    call = valid_call(case, device, dtype, layout)
    expected, expected_gradients = without_roi(case, call)
    call["boxes"][ROI, list(columns)] = NAN
    output, found = gradients(case.function, call)
    where = torch.zeros(output.shape, dtype=torch.bool)
    where[ROI] = True
    assert_nan_exactly_at(output, where, expected, "output")
    nowhere = torch.zeros(found["input"].shape, dtype=torch.bool)
    assert_nan_exactly_at(found["input"], nowhere, expected_gradients["input"], "input")
    # Elements that no bin reads have gradient 0.
    where = torch.zeros(found["offset"].shape, dtype=torch.bool)
    where[ROI] = used_cells(case)
    gradient = found["offset"].cpu().masked_fill(~(where | (used_cells(case))), 0)
    assert_nan_exactly_at(gradient, where, expected_gradients["offset"], "offset")


def bins_of_cell(case):
    """Returns a mask of the output positions that read the changed element."""
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
    """Like bins outside the map, but with NaN in them and in both components of the offset."""
    column = COLUMN % (case.part or case.output)[1]
    planes = slice(2 * CLASS, 2 * CLASS + 2)
    call = valid_call(case, device, dtype, layout)
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
    call = valid_call(case, device, dtype, layout)
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
    call = valid_call(case, device, dtype, layout)
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
def test_an_enormous_box_is_fast(mode, side, dtype, device):
    """More samples than any integer holds, of which only a few are on the map."""
    box = (-side, -side, side, side)
    case = RoiCase(mode, classes=1, boxes=(box,), scale=1.0, spread=0.0)
    call = case.draw(device, dtype)
    output, found = gradients(case.function, call)
    for tensor in (output, *found.values()):
        assert tensor.isfinite().all()
    if mode != "msra":  # its four samples of a bin may be on the map
        assert output.abs().max() < 1e-9


@pytest.mark.parametrize("offset", [(INF, 0.0), (0.0, -INF), (INF, INF)], ids=str)
def test_an_infinite_offset_is_outside_also_for_an_empty_box(offset, device):
    """Infinity times a width of 0 must not give NaN."""
    input = torch.rand(1, 1, 9, 8, device=device)
    box = torch.tensor([[0.0, 4.0, 4.0, 4.0, 4.0]], device=device)
    bad = torch.tensor(offset, device=device).reshape(1, 2, 1, 1).requires_grad_()
    output = deform_roi_pool(input, box, bad, 1, sampling_ratio=2)
    assert output.item() == 0
    (gradient,) = torch.autograd.grad(output.sum(), bad)
    assert not gradient.any()


@modes
def test_nan_in_the_offset_of_a_box_without_samples(mode, device):
    """The output is NaN, even if it would be 0 otherwise."""
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
def test_a_nan_pixel_stays_in_its_image_and_channel(case, value, layout, device):
    call = valid_call(case, device, torch.float64, layout)
    good, good_gradients = gradients(case.function, call)
    call["input"][0, 0, 4, 3] = value
    output, found = gradients(case.function, call)
    bad = ~output.cpu().isfinite()
    assert bad[:, 0].any()
    of_image = call["boxes"][:, 0].cpu() == 0
    assert not bad[~of_image].any() and not bad[:, 1:].any()
    assert_near(output.cpu().masked_fill(bad, 0), good.cpu().masked_fill(bad, 0))
    # The op is linear in the input, so grad_input does not depend on the pixel.
    assert_near(found["input"], good_gradients["input"], "input")
    assert found["offset"].cpu()[~of_image].isfinite().all()
    assert found["offset"][:, 2:].isfinite().all()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", roi_bad_inputs.BATCH_INDICES)
@both
def test_an_invalid_batch_index_gives_nan_and_no_gradient_on_cuda(case, name, dtype):
    call = valid_call(case, CUDA, dtype, torch.contiguous_format)
    call = cast(call, torch.float32, ["boxes"])
    expected, expected_gradients = without_roi(case, call)
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
