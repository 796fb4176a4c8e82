# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Values and gradients, compared with the reference and torchvision."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from dcn_plugin.ops import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool, roi_pool
from tests.ops.roi_cases import (
    ASYMMETRIC,
    BOTH,
    BOXES,
    CASES,
    HALF_PIXEL_BOXES,
    MODES,
    PLAIN,
    RoiCase,
    gradients,
    on_cpu_in_float64,
    standard_grad_output,
)
from tests.tolerances import assert_near

modes = pytest.mark.parametrize("mode", MODES)
both = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
# A bin of the huge box starts at a coordinate up to 500, which loses 9 bits for all its samples
# alike.
EXACT = 512 * torch.finfo(torch.float64).eps


def assert_equals_reference(case, call):
    """Compares the output, the gradient of the input and, by Eq. 8, that of the offset."""
    output, found = gradients(case.function, call)
    there = on_cpu_in_float64(call)
    expected, expected_gradients = gradients(case.reference, there)
    assert_near(output, expected, "output", EXACT)
    assert_near(found["input"], expected_gradients["input"], "input", EXACT)
    if call["offset"] is not None:
        by_equation_8 = case.reference_offset_gradient(standard_grad_output(output.shape), there)
        assert_near(found["offset"], by_equation_8, "offset", EXACT)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_reference(case, device):
    assert_equals_reference(case, case.draw(device))


@modes
@pytest.mark.parametrize("name", BOXES)
def test_one_box_equals_the_reference(name, mode, device):
    """One box at a time: gradients of larger boxes would hide errors."""
    case = replace(ASYMMETRIC[mode], boxes=(BOXES[name],))
    assert_equals_reference(case, case.draw(device))


@modes
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("name", HALF_PIXEL_BOXES)
@pytest.mark.parametrize("offsets", ["zero", "eighths"])
def test_half_pixel_boxes_equal_the_reference(offsets, name, ratio, mode, device):
    """All coordinates are exact; samples are at pixels, on the border, at -1 and at W."""
    case = RoiCase(
        mode, output=(4, 2), ratio=ratio, gamma=0.5, boxes=(HALF_PIXEL_BOXES[name],), spread=1.0
    )
    call = case.draw(device)
    call["offset"] = (call["offset"] * 8).round() / 8 * (offsets == "eighths")
    assert_equals_reference(case, call)


@modes
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_narrow_maps_equal_the_reference(size, mode, device):
    case = replace(ASYMMETRIC[mode], size=size)
    assert_equals_reference(case, case.draw(device))


@modes
@pytest.mark.parametrize("ratio", [0, 2])
def test_bins_of_every_width_equal_the_reference(ratio, mode, device):
    """The CPU reads up to 8 columns of a bin, and up to 8 samples along an axis, at once."""
    boxes = tuple((1.3, 2.1, 1.3 + width, 12.7) for width in range(4, 76, 3))
    case = replace(ASYMMETRIC[mode], size=(9, 40), ratio=ratio, boxes=boxes)
    assert_equals_reference(case, case.draw(device))


def roi_align(torchvision, input, boxes, output_size, spatial_scale, sampling_ratio, **others):
    return torchvision.ops.roi_align(
        input, boxes, output_size, spatial_scale, sampling_ratio, aligned=True
    )


def ps_roi_align(torchvision, input, boxes, output_size, spatial_scale, sampling_ratio, **others):
    return torchvision.ops.ps_roi_align(input, boxes, output_size, spatial_scale, sampling_ratio)


def assert_equals_torchvision(torchvision, case, call, allowed=EXACT):
    output, found = gradients(case.function, call)
    plain = case.part is None
    theirs = functools.partial(roi_align if plain else ps_roi_align, torchvision)
    expected, expected_gradients = gradients(theirs, {**call, "offset": None})
    assert_near(output, expected, "output", allowed)
    assert_near(found["input"], expected_gradients["input"], "input", allowed)


@pytest.mark.parametrize("classes", [0, 1, 3])
@pytest.mark.parametrize("ratio", [0, 1, 3])
@pytest.mark.parametrize("boxes", [BOXES, HALF_PIXEL_BOXES], ids=["any", "half-pixel"])
@pytest.mark.parametrize("kind", ["plain", "ps"])
def test_zero_offset_equals_torchvision(torchvision, kind, boxes, ratio, classes, device):
    # With adaptive sampling torchvision supports only boxes with at least one sample.
    drawn = [b for b in boxes.values() if ratio or (b[2] > b[0] and b[3] > b[1])]
    sizes = {"part": (2, 3), "group": (3, 2)} if kind == "ps" else {}
    case = RoiCase(classes=classes, ratio=ratio, spread=0.0, boxes=tuple(drawn), **sizes)
    assert_equals_torchvision(torchvision, case, case.draw(device))


LARGE_BOXES = {
    "all of a large map": ((0.0, 0.0, 1000.0, 1000.0), 0, (1000, 1000)),
    "a million pixels": ((-391.3, -407.9, 608.7, 592.1), 0, (9, 8)),
    "a million wide": ((-400000.25, 2.5, 599999.75, 4.5), 0, (9, 8)),
    "a million high": ((2.5, -599999.75, 4.5, 400000.25), 0, (9, 8)),
    "a million wide and high": ((-499998.25, -500003.5, 500001.75, 499996.5), 101, (9, 8)),
}


@pytest.mark.parametrize("name", LARGE_BOXES)
@pytest.mark.parametrize("part", [None, (2, 2)], ids=["plain", "ps"])
def test_zero_offset_equals_torchvision_in_a_huge_box(torchvision, part, name, device):
    box, ratio, size = LARGE_BOXES[name]
    case = RoiCase(
        channels=1, classes=1, batch=1, size=size, output=(2, 2), part=part, group=part,
        ratio=ratio, scale=1.0, spread=0.0, boxes=(box,),
    )  # fmt: skip
    # Coordinates up to 1e6 lose 20 bits; torchvision sums 1e6 samples one by one.
    assert_equals_torchvision(torchvision, case, case.draw(device), 1e-9)


@modes
def test_a_huge_box_has_its_exact_grid_and_divisor(mode, device):
    """The number of samples is not limited: a bin of 1e6 by 5e5 pixels has 5e11."""
    side = 1e6
    box = (-side / 2 - 2.5, -side / 2 - 1.5, side / 2 + 7.5, side / 2 + 4.5)
    case = RoiCase(
        mode, classes=1, channels=1, batch=1, size=(5, 3), output=(1, 2), scale=1.0, boxes=(box,),
        ratio=0 if mode != "msra" else int(side), spread=1e-4,
    )  # fmt: skip
    call = case.draw(device)
    output, found = gradients(case.function, call)
    there = on_cpu_in_float64(call)
    expected, expected_gradients = gradients(case.reference, there)
    assert expected.any()
    assert_near(output, expected, "output", 1e-8)
    assert_near(found["input"], expected_gradients["input"], "input", 1e-8)


@both
def test_a_uniform_offset_equals_a_shifted_box(case, device):
    """Two pixels of the map to the right and one up: four and two pixels of the image."""
    # Integers: halves would be rounded differently after a shift across zero.
    boxes = tuple(HALF_PIXEL_BOXES.values())[:3]
    case = replace(case, boxes=boxes, gamma=0.5, classes=1)
    call = case.draw(device)
    sizes = box_sizes(case.mode, torch.tensor(boxes, dtype=torch.float64)).to(device)
    by_pixels = torch.tensor([2.0, -1.0], device=device, dtype=torch.float64)
    call["offset"][:] = (by_pixels / (0.5 * sizes))[:, :, None, None]
    shifted = {**call, "offset": torch.zeros_like(call["offset"])}
    shifted["boxes"] = call["boxes"] + torch.tensor([0.0, 4.0, -2.0, 4.0, -2.0], device=device)
    output, found = gradients(case.function, call)
    expected, expected_gradients = gradients(case.function, shifted)
    # 2 / (0.5 w) * 0.5 * w is 2 up to rounding
    assert_near(output, expected, "output", EXACT)
    assert_near(found["input"], expected_gradients["input"], "input", EXACT)


def box_sizes(mode, boxes, scale=0.5):
    """Returns width and height on the map of boxes with integer coordinates."""
    low, high = boxes[:, :2], boxes[:, 2:]
    if mode == "align":
        return (high - low) * scale
    if mode == "bin":
        return (torch.floor(high * scale + 0.5) - torch.floor(low * scale + 0.5)).clamp(min=1)
    away = [torch.sign(v) * torch.floor(v.abs() + 0.5) for v in (low, high)]
    return (away[1] + 1 - away[0]) * scale


def test_boxes_get_no_gradient(device):
    case = ASYMMETRIC["align"]
    call = case.draw(device)
    call["boxes"].requires_grad_()
    call["input"].requires_grad_()
    output = case.function(**call)
    _, gradient = torch.autograd.grad(
        output.sum(), (call["input"], call["boxes"]), allow_unused=True
    )
    assert gradient is None or not gradient.any()


@both
def test_boxes_as_a_list_equal_the_tensor(case, device):
    call = case.draw(device)
    order = call["boxes"][:, 0].sort(stable=True)
    call["boxes"] = call["boxes"][order.indices]
    listed = [call["boxes"][call["boxes"][:, 0] == n, 1:] for n in range(case.batch)]
    assert [len(boxes) for boxes in listed] == [6, 0, 6]
    expected = case.function(**call)
    assert torch.equal(case.function(**{**call, "boxes": listed}), expected)
    assert torch.equal(case.function(**{**call, "boxes": tuple(listed)}), expected)


def test_a_long_list_in_half_precision_reads_the_right_images(device):
    """bfloat16 cannot represent 257."""
    input = torch.arange(300.0, device=device)[:, None, None, None].expand(300, 1, 2, 2)
    box = torch.tensor([[0.0, 0.0, 2.0, 2.0]], device=device, dtype=torch.bfloat16)
    output = roi_pool(input, [box] * 300, 1)
    assert output.flatten().tolist() == list(range(300))


@modes
def test_plain_functions_equal_the_deformable_ones(mode, device):
    call = PLAIN[mode].draw(device)
    input, boxes = call["input"], call["boxes"]
    expected = deform_roi_pool(input, boxes, None, (3, 2), 0.5, 2, mode=mode)
    assert torch.equal(roi_pool(input, boxes, (3, 2), 0.5, 2, mode), expected)
    expected = deform_ps_roi_pool(input, boxes, None, (3, 2), 0.5, 2, mode=mode)
    assert torch.equal(ps_roi_pool(input, boxes, (3, 2), 0.5, 2, mode), expected)
    options = {"mode": mode, "group_size": (1, 2)}
    expected = deform_ps_roi_pool(input, boxes, None, (3, 2), 0.5, 2, **options)
    assert torch.equal(ps_roi_pool(input, boxes, (3, 2), 0.5, 2, **options), expected)
    one = deform_ps_roi_pool(input, boxes, None, (3, 2), 0.5, 2, mode=mode, group_size=1)
    assert torch.equal(roi_pool(input, boxes, (3, 2), 0.5, 2, mode), one)


def test_one_number_applies_to_both_axes_and_sizes_default_to_the_output(device):
    input = torch.rand(1, 8, 9, 8, device=device)
    boxes = torch.tensor([[0.0, 1, 2, 7, 6]], device=device)
    offset = torch.rand(1, 4, 2, 2, device=device)
    expected = deform_ps_roi_pool(input, boxes, offset, (2, 2), part_size=(2, 2), group_size=(2, 2))
    assert torch.equal(deform_ps_roi_pool(input, boxes, offset, 2), expected)
    assert torch.equal(
        deform_roi_pool(input, boxes, offset, 2), deform_roi_pool(input, boxes, offset, (2, 2))
    )


@pytest.mark.parametrize("name", ["input", "offset"])
@both
def test_a_single_gradient_equals_that_computed_with_both(case, name, device):
    call = case.draw(device)
    output, together = gradients(case.function, call)
    leaf = call[name].requires_grad_()
    drawn = standard_grad_output(output.shape).to(device)
    (single,) = torch.autograd.grad(case.function(**call), leaf, drawn)
    assert_near(single, together[name], name)


@pytest.mark.parametrize("case", [replace(c, boxes=()) for c in BOTH.values()], ids=BOTH)
@pytest.mark.parametrize("batch", [0, 3])
def test_no_rois_give_an_empty_output_and_zero_gradients(batch, case, device):
    case = replace(case, batch=batch)
    call = case.draw(device)
    output, found = gradients(case.function, call)
    assert output.shape == case.output_shape
    for name, gradient in found.items():
        assert gradient.shape == call[name].shape
        assert not gradient.any(), name


@both
def test_gradcheck(case, device):
    # Without the largest and smallest boxes, which finite differences do not suit.
    case = replace(case, boxes=tuple(BOXES.values())[:7])
    call = case.draw(device)

    def function(input, offset):
        return case.function(**{**call, "input": input, "offset": offset})

    tensors = (call["input"].requires_grad_(), call["offset"].requires_grad_())
    torch.autograd.gradcheck(function, tensors, fast_mode=True, nondet_tol=1e-13)
