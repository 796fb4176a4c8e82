# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Invalid arguments, NaN, infinities and huge numbers."""

from __future__ import annotations

import pytest
import torch

from dcn_plugin.ops import deform_conv2d
from tests.ops import bad_inputs
from tests.ops.conv_cases import ASYMMETRIC, gradients
from tests.ops.subprocesses import run_in_subprocess, run_under_memcheck
from tests.tolerances import DTYPES, assert_near

NAN, INF = float("nan"), float("inf")
# The tap changed by the tests below: image, row and column of the output, and its index.
N, Y, X, TAP = 1, 2, 3, 4
# Input channels of an offset group, and the output channels that read them.
GROUPS = {
    0: (slice(0, 2), slice(0, 2)),
    1: (slice(2, 4), slice(0, 4)),
    2: (slice(4, 6), slice(2, 4)),
}
OUTSIDE = 60000.0  # within float16


@pytest.mark.parametrize("name", bad_inputs.INVALID)
def test_invalid_input_raises_and_reports_the_value(name, device):
    bad_inputs.check_invalid(name, device)


@pytest.mark.parametrize("name", bad_inputs.EXTREME)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_do_not_crash(name, dtype, device):
    bad_inputs.check_extreme(name, device, dtype)


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["offset", "weight", "bias", "mask"])
def test_mixed_devices_raise(name):
    call = ASYMMETRIC.draw("cuda")
    call[name] = call[name].cpu()
    with pytest.raises(ValueError, match=rf"deform_conv2d: {name} must be on .* cuda:0, got cpu"):
        deform_conv2d(**call)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask"])
def test_sparse_tensors_raise(name):
    call = ASYMMETRIC.draw()
    with pytest.raises(NotImplementedError, match="deform_conv2d"):
        deform_conv2d(**{**call, name: call[name].to_sparse()})


@pytest.mark.parametrize("stride", [1.5, "2", None])
def test_arguments_of_a_wrong_type_raise(stride):
    with pytest.raises((TypeError, RuntimeError)):
        deform_conv2d(**{**ASYMMETRIC.draw(), "stride": stride})


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (lambda t: t[:, 1:], ValueError, r"grad_output .*\[2, 4, 3, 5\], got \[2, 3, 3, 5\]"),
        (lambda t: t[..., None], ValueError, r"grad_output .* 4-dim.*got .*\[2, 4, 3, 5, 1\]"),
        (lambda t: t.float(), TypeError, r"grad_output .*Double, got Float"),
        (lambda t: t.to("meta"), ValueError, r"grad_output .* device .*, got meta"),
    ],
)
def test_backward_checks_grad_output(changed, error, message, device):
    call = ASYMMETRIC.draw(device)
    output = deform_conv2d(**call)
    del call["bias"]
    with pytest.raises(error, match=message):
        torch.ops.dcn_plugin._deform_conv2d_backward(
            changed(output), output_mask=[True] * 5, **call
        )


def call_with_offset(device, dtype, layout, d_y, d_x, group=0, mask=None):
    """Returns a valid call with a given offset, and mask, of one tap."""
    call = ASYMMETRIC.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    plane = 2 * (6 * group + TAP)
    # As a tensor, whose conversion to float16 may overflow to infinity.
    call["offset"][N, plane : plane + 2, Y, X] = torch.tensor([d_y, d_x])
    if mask is not None:
        call["mask"][N, 6 * group + TAP, Y, X] = mask
    return call


def mask_at(shape, *index):
    """Returns a boolean mask, True at an index."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[index] = True
    return mask


def assert_nan_exactly_at(tensor, where, expected, name):
    """Checks for NaN at `where`, and for the expected values elsewhere."""
    tensor, expected = tensor.cpu(), expected.cpu()
    assert torch.equal(tensor.isnan(), where), name
    # Exactly equal on the CPU; atomics on CUDA sum in any order.
    assert_near(tensor.masked_fill(where, 0), expected.masked_fill(where, 0).double(), name)


BAD_TAPS = {
    "dy": {"d_y": NAN, "d_x": 0.5},
    "dx": {"d_y": 0.5, "d_x": NAN},
    "both": {"d_y": NAN, "d_x": NAN},
    "mask": {"d_y": 0.5, "d_x": 0.5, "mask": NAN},
    "mask-at-integer": {"d_y": 0.0, "d_x": 0.0, "mask": NAN},
    "mask-outside": {"d_y": OUTSIDE, "d_x": 0.5, "mask": NAN},
    "dy-dx-outside": {"d_y": NAN, "d_x": OUTSIDE},
    "dx-dy-infinite": {"d_y": INF, "d_x": NAN},
}
layouts = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bad", BAD_TAPS)
def test_nan_stays_at_its_position(bad, group, dtype, layout, device):
    """Like a tap outside the map, but with NaN in everything that depends on it."""
    torch.manual_seed(1)
    call = call_with_offset(device, dtype, layout, group=group, **BAD_TAPS[bad])
    torch.manual_seed(1)
    valid = call_with_offset(device, dtype, layout, OUTSIDE, OUTSIDE, group=group)
    output, found = gradients(deform_conv2d, call)
    expected, expected_gradients = gradients(deform_conv2d, valid)
    channels, outputs = GROUPS[group]
    plane = 2 * (6 * group + TAP)
    where = {
        "input": mask_at(call["input"].shape, slice(0)),
        "offset": mask_at(call["offset"].shape, N, slice(plane, plane + 2), Y, X),
        "mask": mask_at(call["mask"].shape, N, 6 * group + TAP, Y, X),
        "bias": mask_at(call["bias"].shape, slice(0)),
        "weight": torch.zeros(call["weight"].shape, dtype=torch.bool),
    }
    for channel in range(channels.start, channels.stop):
        first = channel // 3 * 2  # first output channel of its convolution group
        where["weight"][first : first + 2, channel % 3, TAP // 2, TAP % 2] = True
    at_position = mask_at(output.shape, N, outputs, Y, X)
    assert_nan_exactly_at(output, at_position, expected, "output")
    for name, gradient in expected_gradients.items():
        assert_nan_exactly_at(found[name], where[name], gradient, name)


@layouts
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("huge", [INF, -INF, 1e30, -1e30, 3e9, -3e9])
@pytest.mark.parametrize("axes", [(1, 0), (0, 1), (1, 1), (1, -1)], ids=str)
def test_infinite_and_huge_offsets_are_outside(axes, huge, dtype, layout, device):
    d_y, d_x = (huge * axis if axis else 0.0 for axis in axes)
    torch.manual_seed(1)
    call = call_with_offset(device, dtype, layout, d_y, d_x)
    torch.manual_seed(1)
    valid = call_with_offset(device, dtype, layout, OUTSIDE, OUTSIDE)
    output, found = gradients(deform_conv2d, call)
    expected, expected_gradients = gradients(deform_conv2d, valid)
    nowhere = mask_at(output.shape, slice(0))
    assert_nan_exactly_at(output, nowhere, expected, "output")
    for name, gradient in expected_gradients.items():
        assert_nan_exactly_at(found[name], mask_at(gradient.shape, slice(0)), gradient, name)
    plane = 2 * TAP
    assert not found["offset"][N, plane : plane + 2, Y, X].any()
    assert not found["mask"][N, TAP, Y, X].any()


@layouts
@pytest.mark.parametrize("y, x", [(0, 0), (3, 2), (6, 5)])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_nan_pixel_affects_only_the_positions_that_read_it(value, y, x, layout, device):
    call = ASYMMETRIC.draw(device)
    good = gradients(deform_conv2d, call)
    call["input"] = call["input"].clone(memory_format=layout)
    call["input"][0, 0, y, x] = value
    output, found = gradients(deform_conv2d, call)
    reads = positions_that_read(call, y, x)  # (H', W')
    bad = ~output.cpu().isfinite()
    assert bad[0, :2].any() or not reads.any()
    assert not bad[1].any() and not bad[0, 2:].any()
    assert not (bad[0, :2] & ~reads).any()
    assert_near(output.cpu().masked_fill(bad, 0), good[0].cpu().masked_fill(bad, 0))
    # The op is linear in the input, so grad_input does not depend on the pixel.
    assert_near(found["input"], good[1]["input"], "input")
    for name in ("offset", "mask"):
        wrong = ~found[name].cpu().isfinite()
        assert not wrong[1].any()
        assert not (wrong[0].any(0) & ~reads).any()
    assert found["weight"][2:].isfinite().all()


def positions_that_read(call, y, x):
    """Returns the output positions of image 0 with a tap of offset group 0 next to (y, x)."""
    offset = call["offset"][0, :12].cpu().unflatten(0, (3, 2, 2))  # rows, columns, (dy, dx)
    rows, columns = torch.arange(3.0)[:, None] * 2 - 1, torch.arange(5.0)[None, :]
    reads = torch.zeros(3, 5, dtype=torch.bool)
    for i in range(3):
        for j in range(2):
            at_y, at_x = rows + 2 * i + offset[i, j, 0], columns + j + offset[i, j, 1]
            reads |= ((at_y - y).abs() <= 1) & ((at_x - x).abs() <= 1)
    return reads


@layouts
def test_an_infinite_mask_does_not_affect_pixels_that_its_tap_does_not_read(layout, device):
    # The tap at (-0.5, -0.5) reads pixel (0, 0) only; the tap at (3, 2) reads that pixel only.
    input = torch.rand(1, 3, 7, 6, device=device).contiguous(memory_format=layout)
    for y, x, pixel in [(-0.5, -0.5, (0, 0)), (3.0, 2.0, (3, 2)), (6.5, 5.5, (6, 5))]:
        leaf = input.clone().requires_grad_()
        offset = torch.tensor([y, x], device=device).reshape(1, 2, 1, 1)
        mask = torch.full((1, 1, 1, 1), INF, device=device)
        one = torch.ones(1, 3, 1, 1, device=device)
        output = deform_conv2d(leaf, offset, one, stride=(7, 6), mask=mask)
        (gradient,) = torch.autograd.grad(output.sum(), leaf)
        wrong = ~gradient[0, 0].isfinite()
        assert wrong[pixel] and wrong.sum() == 1, gradient[0, 0]


def test_the_largest_geometry(device):
    largest = 2**31 - 1
    input = torch.rand(1, 1, 3, 2, device=device)
    offset = torch.zeros(1, 2, 3, 3, device=device)
    one = torch.ones(1, 1, 1, 1, device=device)
    # Rows -largest, 0, largest: float32 is exact enough to tell outside from 0.
    output = deform_conv2d(input, offset, one, None, largest, largest, largest)
    expected = torch.zeros(3, 3)
    expected[1, 1] = input[0, 0, 0, 0]
    assert torch.equal(output[0, 0].cpu(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*bad_inputs.INVALID, *bad_inputs.EXTREME])
def test_no_crash_or_hang_in_a_subprocess(name, device):
    result = run_in_subprocess(bad_inputs, device, name)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.gpu
def test_memcheck():
    result = run_under_memcheck(bad_inputs)
    assert result.returncode == 0, result.stdout + result.stderr
