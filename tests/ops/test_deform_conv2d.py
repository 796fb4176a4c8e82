# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Values and gradients, compared with the paper's equations, torchvision and F.conv2d."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

from dcn_plugin.ops import deform_conv2d
from tests import reference
from tests.ops.conv_cases import ASYMMETRIC, CASES, EMPTY, ConvCase, gradients
from tests.tolerances import DTYPES, assert_near

cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def on_cpu(call):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in call.items()}


@cases
def test_equals_the_equations_of_the_paper(case, device):
    call = case.draw(device)
    output, found = gradients(deform_conv2d, call)
    expected, expected_gradients = gradients(reference.deform_conv2d, on_cpu(call))
    assert_near(output, expected, "output")
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name)


def test_half_a_pixel_by_hand(device):
    #  0  1  2  3  4     Half a pixel down and right is the average of four pixels: v + 3. In the
    #  5  6  7  8  9     last row and column, neighbours outside the map count as zero: 3.25 =
    # 10 11 12 13 14     (4 + 9) / 4 at the upper right.
    # 15 16 17 18 19
    # 20 21 22 23 24
    input = torch.arange(25.0, device=device).reshape(1, 1, 5, 5)
    offset = torch.full((1, 2, 5, 5), 0.5, device=device)
    one = torch.ones(1, 1, 1, 1, device=device)
    expected = [
        [3, 4, 5, 6, 3.25],
        [8, 9, 10, 11, 5.75],
        [13, 14, 15, 16, 8.25],
        [18, 19, 20, 21, 10.75],
        [10.25, 10.75, 11.25, 11.75, 6],
    ]
    output = deform_conv2d(input, offset, one)
    torch.testing.assert_close(output[0, 0].cpu(), torch.tensor(expected), rtol=0, atol=0)


def test_offsets_are_dy_dx_per_tap_by_hand(device):
    # Tap (0, 0) is shifted one pixel down, tap (0, 1) two to the right; weights 100 and 1.
    input = torch.arange(25.0, device=device).reshape(1, 1, 5, 5)
    offset = torch.zeros(1, 4, 5, 4, device=device)
    offset[:, 0] = 1
    offset[:, 3] = 2
    weight = torch.tensor([100.0, 1.0], device=device).reshape(1, 1, 1, 2)
    output = deform_conv2d(input, offset, weight)
    assert output[0, 0, 0].tolist() == [503, 604, 700, 800]
    assert output[0, 0, 4].tolist() == [23, 24, 0, 0]


@cases
def test_zero_offset_equals_conv2d(case, device):
    call = case.draw(device)
    call["offset"].zero_()
    call["mask"] = None
    output, found = gradients(deform_conv2d, call)

    def conv2d(input, offset, weight, bias=None, mask=None, **geometry):
        return F.conv2d(input, weight, bias, groups=case.groups, **geometry) + 0 * offset.sum()

    expected, expected_gradients = gradients(conv2d, call)
    assert_near(output, expected, "output")
    for name in found.keys() - {"offset"}:
        assert_near(found[name], expected_gradients[name], name)


@cases
def test_equals_torchvision(torchvision, case, device):
    call = case.draw(device)
    output, found = gradients(deform_conv2d, call)
    expected, expected_gradients = gradients(torchvision.ops.deform_conv2d, call)
    assert_near(output, expected, "output")
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name)


def integer_offsets(call, lowest=-12, highest=12):
    """Sets integer sampling locations: on pixels, at -1 and H, and far outside."""
    call["offset"] = torch.randint_like(call["offset"], lowest, highest + 1)
    return call


def test_at_integers_equals_torchvision_except_for_the_offset(torchvision, device):
    call = integer_offsets(ASYMMETRIC.draw(device))
    output, found = gradients(deform_conv2d, call)
    expected, expected_gradients = gradients(torchvision.ops.deform_conv2d, call)
    assert_near(output, expected, "output")
    for name in ("input", "weight", "bias", "mask"):
        assert_near(found[name], expected_gradients[name], name)


@pytest.mark.parametrize("lowest, highest", [(0, 0), (-12, 12)], ids=["zero", "anywhere"])
def test_offset_gradient_at_integers_is_right_hand(lowest, highest, device):
    call = integer_offsets(ASYMMETRIC.draw(device), lowest, highest)
    output, found = gradients(deform_conv2d, call)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    arguments = on_cpu({k: v for k, v in call.items() if k != "bias"})
    assert_near(found["offset"], reference.offset_gradient(grad_output, **arguments), "offset")


def test_equation_7_is_the_derivative_of_equation_2():
    call = ASYMMETRIC.draw()
    output, found = gradients(reference.deform_conv2d, call)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    arguments = {k: v for k, v in call.items() if k != "bias"}
    assert_near(reference.offset_gradient(grad_output, **arguments), found["offset"])


def gradient_of_one_tap(function, y, x, device):
    """Offset gradient (dy, dx) of a 1x1 convolution at (y, x), on the map 10, 20; 30, 40."""
    input = torch.tensor([[10.0, 20.0], [30.0, 40.0]], device=device).reshape(1, 1, 2, 2)
    offset = torch.tensor([y, x], device=device).reshape(1, 2, 1, 1).requires_grad_()
    one = torch.ones(1, 1, 1, 1, device=device)
    (gradient,) = torch.autograd.grad(function(input, offset, one, stride=(2, 2)).sum(), offset)
    return gradient.flatten().tolist()


@pytest.mark.parametrize(
    "y, x, ours, theirs",
    [
        (-1.0, 0.0, [0, 0], [10, 0]),  # torchvision: the right-hand derivative; here: outside
        (-1.0, 0.5, [0, 0], [15, 0]),
        (0.5, -1.0, [0, 0], [0, 20]),
        (-1.0, -1.0, [0, 0], [0, 0]),
        (-0.5, 0.0, [10, 5], [10, 5]),
        (0.0, 0.0, [20, 10], [20, 10]),
        (1.0, 1.0, [-40, -40], [-40, -40]),
        (1.5, 0.5, [-35, 5], [-35, 5]),
        (2.0, 0.5, [0, 0], [0, 0]),
        (0.5, 2.0, [0, 0], [0, 0]),
        (-1.5, 0.5, [0, 0], [0, 0]),
        (0.5, -7.0, [0, 0], [0, 0]),
    ],
)
def test_offset_gradient_at_the_border_here_and_in_torchvision(
    torchvision, y, x, ours, theirs, device
):
    assert gradient_of_one_tap(deform_conv2d, y, x, device) == ours
    assert gradient_of_one_tap(torchvision.ops.deform_conv2d, y, x, device) == theirs


@pytest.mark.parametrize("name", ["asymmetric", "neither", "depthwise", "wide-stride"])
def test_gradcheck(name, device):
    case = CASES[name]
    call = case.draw(device)
    keys = [k for k, v in call.items() if isinstance(v, torch.Tensor)]

    def function(*tensors):
        return deform_conv2d(**{**call, **dict(zip(keys, tensors, strict=True))})

    tensors = [call[k].requires_grad_() for k in keys]
    # On CUDA grad_input is accumulated in any order: a few eps of values near 10.
    torch.autograd.gradcheck(function, tensors, fast_mode=True, nondet_tol=1e-13)


@pytest.mark.parametrize("name", ["input", "offset", "weight", "bias", "mask"])
def test_a_single_gradient_equals_that_computed_with_all(name, device):
    call = ASYMMETRIC.draw(device)
    _, together = gradients(deform_conv2d, call)
    leaf = call[name].detach().requires_grad_()
    output = deform_conv2d(**{**call, name: leaf})
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    (single,) = torch.autograd.grad(output, leaf, drawn.to(device))
    assert_near(single, together[name], name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_batch_has_an_empty_output_and_zero_gradients(dtype, layout, device):
    call = EMPTY.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    output, found = gradients(deform_conv2d, call)
    assert output.shape == (0, EMPTY.out_channels, *EMPTY.out_size)
    for name, gradient in found.items():
        assert gradient.shape == call[name].shape
        assert not gradient.any(), name


@pytest.mark.parametrize(
    "case",
    [
        # slices of 64 channels end at group borders; 65 and 130 leave a slice of one channel
        ConvCase(in_channels=65, out_channels=2, groups=1, offset_groups=1),
        ConvCase(in_channels=130, out_channels=4, groups=2, offset_groups=1),
        ConvCase(in_channels=195, out_channels=5, groups=5, offset_groups=3),
        # several im2col tiles, the last one smaller
        ConvCase(size=(41, 67), stride=(1, 1), padding=(2, 1)),
        ConvCase(
            batch=1, in_channels=2, out_channels=2, size=(151, 149), groups=1, offset_groups=2
        ),
        # a map too large for a channels-last copy
        ConvCase(batch=1, in_channels=4, size=(520, 530), kernel=(2, 1), offset_groups=1),
    ],
    ids=lambda case: f"{case.in_channels}x{case.size[0]}x{case.size[1]}",
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_many_tiles_equal_torchvision(torchvision, case, layout, device):
    call = case.draw(device)
    call["input"] = call["input"].contiguous(memory_format=layout)
    output, found = gradients(deform_conv2d, call)
    expected, expected_gradients = gradients(torchvision.ops.deform_conv2d, call)
    # Coordinates up to 530 lose 9 bits; the gradients of weight and bias are sums over 3e5
    # positions, and their errors grow with the square root of that.
    allowed = 600 * torch.finfo(torch.float64).eps
    assert_near(output, expected, "output", allowed)
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name, allowed)


def test_one_number_applies_to_both_axes(device):
    case = ConvCase(stride=(2, 2), padding=(1, 1), dilation=(1, 1))
    call = case.draw(device)
    expected = deform_conv2d(**call)
    output = deform_conv2d(**{**call, "stride": 2, "padding": 1, "dilation": 1})
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_signature_equals_torchvision(torchvision):
    ours = inspect.signature(deform_conv2d).parameters
    theirs = inspect.signature(torchvision.ops.deform_conv2d).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
