# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Dtypes, autocast, memory formats and strides."""

from __future__ import annotations

import pytest
import torch

from dcn_plugin.ops import deform_conv2d
from tests.ops.conv_cases import ASYMMETRIC, CASES, ConvCase, cast, gradients
from tests.ops.strides import expanded, gaps, grad_outputs, sliced, transposed
from tests.tolerances import DTYPES, assert_near, relative_error, tolerance

HALVES = (torch.float16, torch.bfloat16)
LARGE = ConvCase(in_channels=6, size=(171, 163), stride=(1, 1), padding=(2, 1), groups=1)


def in_float64(call):
    """Returns the same values in float64 on the CPU, the reference of all dtypes and devices."""
    return cast(
        {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in call.items()}, torch.float64
    )


def grad_output_for(call, case):
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.out_channels, *case.out_size)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return drawn.to(call["input"].device, call["input"].dtype)


def assert_equals_float64(call, case, allowed=None):
    grad_output = grad_output_for(call, case)
    output, found = gradients(deform_conv2d, call, grad_output)
    expected, expected_gradients = gradients(
        deform_conv2d, in_float64(call), grad_output.double().cpu()
    )
    assert output.dtype == call["input"].dtype
    assert_near(output, expected, "output", allowed)
    for name, gradient in expected_gradients.items():
        assert found[name].dtype == call[name].dtype
        assert_near(found[name], gradient, name, allowed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["asymmetric", "neither", "depthwise", "batch-33"])
def test_every_dtype_equals_float64(name, dtype, layout, device):
    call = CASES[name].draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    assert_equals_float64(call, CASES[name])


@pytest.mark.parametrize("name", ["offset", "mask"])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_offset_gradients_are_summed_in_float32(dtype, name, device):
    """Each group adds 1 to a sum at which the dtype has a spacing of at least 2."""
    groups, large = 16, 2048.0
    ramp = torch.arange(6.0, device=device).expand(1, groups, 4, 6)
    weight = torch.ones(groups, 1, 1, 1, device=device)
    weight[0] = large
    call = {
        "input": ramp,
        "offset": torch.zeros(1, 2, 4, 6, device=device),
        "weight": weight,
        "mask": torch.ones(1, 1, 4, 6, device=device),
    }
    call = {k: v.to(dtype).requires_grad_() for k, v in call.items()}
    (gradient,) = torch.autograd.grad(deform_conv2d(**call).sum(), call[name])
    expected = torch.tensor(large + groups - 1).to(dtype)
    assert expected > large
    # d/dx of the ramp, and its value at x = 1.
    assert gradient[0, -1, 1, 1].item() == expected.item()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_large_map_in_every_dtype_equals_float64(dtype, device):
    # Coordinates up to 200 in float32 lose 8 bits; the weight gradient sums 6e4 products.
    coordinates = 4096 * torch.finfo(torch.float32).eps
    call = LARGE.draw(device, dtype)
    assert_equals_float64(call, LARGE, max(tolerance(dtype, device), coordinates))


@pytest.mark.parametrize("name", ["offset", "mask"])
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_offset_and_mask_may_have_another_dtype(dtype, other, name, device):
    call = cast(ASYMMETRIC.draw(device, dtype), other, [name])
    grad_output = grad_output_for(call, ASYMMETRIC)
    output, found = gradients(deform_conv2d, call, grad_output)
    expected, expected_gradients = gradients(
        deform_conv2d, in_float64(call), grad_output.double().cpu()
    )
    assert output.dtype == dtype
    for key, gradient in expected_gradients.items():
        assert found[key].dtype == call[key].dtype
        # Computed in the precision of the input, and rounded when stored.
        allowed = max(tolerance(dtype, device), tolerance(found[key].dtype, device))
        assert_near(found[key], gradient, key, allowed)
    assert_near(output, expected, "output")


def autocast_call(device):
    """A call with offsets of 200 pixels: the error of bfloat16 is half a pixel, of float16 1/16."""
    case = ConvCase(batch=1, size=(230, 7), stride=(20, 1), offset_groups=1, groups=1)
    call = case.draw(device, torch.float32)
    down = torch.arange(230, device=device)[case.padding[0] :: case.stride[0]]
    to_far_end = torch.where(down < 115, 200.0, -200.0)[: case.out_size[0], None]
    call["offset"][:, ::2] = to_far_end + 0.3 + 0.4 * torch.rand(case.out_size, device=device)
    return case, call


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_keeps_coordinates_in_float32(dtype, device):
    case, call = autocast_call(device)
    grad_output = grad_output_for(cast(call, dtype), case)

    def under_autocast(**call):
        with torch.autocast(device, dtype):
            return deform_conv2d(**call)

    rounded = cast(call, dtype, ["input", "weight", "bias", "mask"])
    output, found = gradients(under_autocast, call, grad_output)
    expected, expected_gradients = gradients(
        deform_conv2d, in_float64(rounded), grad_output.double().cpu()
    )
    assert output.dtype == dtype
    assert_near(output, expected, "output")
    for name, gradient in expected_gradients.items():
        assert found[name].dtype == torch.float32
        assert_near(found[name], gradient, name, tolerance(dtype, device))
    lost = deform_conv2d(**in_float64(cast(rounded, dtype, ["offset"])))
    assert relative_error(lost, expected) > 4 * tolerance(
        dtype, device
    )  # rounded offsets would fail the test


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_does_not_cast_float64_or_in_disabled_regions(dtype, device):
    call = ASYMMETRIC.draw(device)
    with torch.autocast(device, dtype):
        assert deform_conv2d(**call).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            assert deform_conv2d(**cast(call, torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_output_has_the_memory_format_of_the_input(layout, dtype, device):
    call = ASYMMETRIC.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    output, found = gradients(deform_conv2d, call)
    assert output.is_contiguous(memory_format=layout)
    assert found["input"].is_contiguous(memory_format=layout)
    for name in ("offset", "weight", "mask"):
        assert found[name].is_contiguous()


@pytest.mark.parametrize("name", ["input", "offset", "weight", "mask"])
def test_gradients_have_the_memory_format_of_their_tensor(name, device):
    call = ASYMMETRIC.draw(device)
    expected, expected_gradients = gradients(deform_conv2d, call)
    call[name] = call[name].contiguous(memory_format=torch.channels_last)
    output, found = gradients(deform_conv2d, call)
    assert found[name].is_contiguous(memory_format=torch.channels_last)
    assert_near(output, expected, "output")
    for key, gradient in expected_gradients.items():
        assert_near(found[key], gradient, key)


@pytest.mark.parametrize("strides", [gaps, transposed, sliced, expanded])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_strides_give_the_results_of_contiguous(dtype, strides, device):
    call = ASYMMETRIC.draw(device, dtype)
    call = {k: strides(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    packed = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    output, found = gradients(deform_conv2d, call)
    expected, expected_gradients = gradients(deform_conv2d, packed)
    assert_near(output, expected, "output")
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name)


# A tensor with one row or column is contiguous whatever the stride of that axis.
@pytest.mark.parametrize("size", [(9, 7), (9, 1), (1, 7), (1, 1)], ids=str)
# float32, and bfloat16 on processors with bfloat16 instructions, are read in place.
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_grad_output(dtype, channels, size, device):
    case = ConvCase(
        out_channels=channels, size=size, kernel=(1, 1), stride=(1, 1), padding=(0, 0), groups=1
    )
    call = case.draw(device, dtype)
    shape = (case.batch, channels, *case.out_size)
    for name, grad_output in grad_outputs(shape, dtype, device):
        packed = torch.empty(grad_output.shape, dtype=dtype, device=device).copy_(grad_output)
        _, found = gradients(deform_conv2d, call, grad_output)
        _, expected = gradients(deform_conv2d, call, packed)
        for key, gradient in expected.items():
            assert_near(found[key], gradient, f"{name}, {key}")


def test_backward_of_a_sum(device):
    call = ASYMMETRIC.draw(device)
    leaf = call["input"].requires_grad_()
    output = deform_conv2d(**call)
    (of_sum,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
    (of_ones,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    assert_near(of_sum, of_ones)
