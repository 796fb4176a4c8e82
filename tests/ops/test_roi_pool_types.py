# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Dtypes, autocast, memory formats and strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.ops.conv_cases import cast
from tests.ops.roi_cases import (
    ASYMMETRIC,
    BOTH,
    BOXES,
    MODES,
    PLAIN,
    RoiCase,
    gradients,
    on_cpu_in_float64,
    standard_grad_output,
)
from tests.ops.strides import expanded, gaps, grad_outputs, sliced, transposed
from tests.tolerances import DTYPES, assert_near, relative_error, tolerance

HALVES = (torch.float16, torch.bfloat16)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Without the huge box, whose coordinates lose five more bits.
USUAL_BOXES = tuple(box for name, box in BOXES.items() if name != "huge")
USUAL = {name: replace(case, boxes=USUAL_BOXES) for name, case in BOTH.items()}
usual = pytest.mark.parametrize("case", USUAL.values(), ids=USUAL)
modes = pytest.mark.parametrize("mode", MODES)


def allowed_for(dtype, device):
    """Returns the tolerance: the start of a bin is a sum of coordinates that loses five bits."""
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    return max(32 * torch.finfo(computed_in).eps, tolerance(dtype, device))


def assert_equals_float64(case, call, allowed=None):
    grad_output = standard_grad_output(case.output_shape).to(call["input"])
    output, found = gradients(case.function, call, grad_output)
    expected, expected_gradients = gradients(
        case.function, on_cpu_in_float64(call), grad_output.double().cpu()
    )
    assert output.dtype == call["input"].dtype
    device = output.device.type
    assert_near(output, expected, "output", allowed or allowed_for(output.dtype, device))
    for name, gradient in expected_gradients.items():
        assert found[name].dtype == call[name].dtype
        both = max(allowed_for(t.dtype, device) for t in (output, found[name]))
        assert_near(found[name], gradient, name, allowed or both)


@usual
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_equals_float64(dtype, layout, case, device):
    call = case.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    assert_equals_float64(case, call)


@pytest.mark.parametrize("dtype", DTYPES)
@modes
def test_a_huge_box_in_every_dtype_equals_float64(mode, dtype, device):
    # Coordinates up to 500 in float32 lose 9 bits, and 2 more in the sum.
    case = replace(PLAIN[mode], boxes=(BOXES["huge"],), spread=1.0)
    allowed = max(2048 * torch.finfo(torch.float32).eps, tolerance(dtype, device))
    assert_equals_float64(case, case.draw(device, dtype), allowed)


@pytest.mark.parametrize("names", [("boxes",), ("offset",), ("boxes", "offset")], ids=str)
@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_boxes_and_offsets_may_have_another_dtype(dtype, other, names, device):
    case = USUAL["ps-align"]
    assert_equals_float64(case, cast(case.draw(device, dtype), other, names))


def autocast_case(mode):
    """Boxes at 2200 pixels of the image: the error of bfloat16 is eight pixels, of float16 one."""
    boxes = ((2203.2, 9.8, 2244.9, 57.4), (2181.3, 6.6, 2251.2, 67.2), (2219.1, 16.8, 2286.6, 60.4))
    return RoiCase(mode, batch=1, size=(9, 290), scale=0.125, boxes=boxes, spread=1.0)


@pytest.mark.parametrize("dtype", HALVES)
@modes
def test_autocast_keeps_boxes_and_offsets_in_float32(mode, dtype, device):
    case = autocast_case(mode)
    call = case.draw(device, torch.float32)
    grad_output = standard_grad_output(case.output_shape).to(device, dtype)

    def under_autocast(**call):
        with torch.autocast(device, dtype):
            return case.function(**call)

    rounded = on_cpu_in_float64(cast(call, dtype, ["input"]))
    output, found = gradients(under_autocast, call, grad_output)
    expected, expected_gradients = gradients(case.function, rounded, grad_output.double().cpu())
    assert output.dtype == dtype
    assert_near(output, expected, "output", tolerance(dtype, device))
    for name, gradient in expected_gradients.items():
        assert found[name].dtype == torch.float32
        assert_near(found[name], gradient, name, tolerance(dtype, device))
    lost = case.function(**{**rounded, "boxes": rounded["boxes"].to(dtype).double()})
    assert relative_error(lost, expected) > 4 * tolerance(
        dtype, device
    )  # rounded boxes would fail the test


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_takes_boxes_as_a_list(dtype, device):
    call = PLAIN["align"].draw(device, torch.float32)
    boxes = [call["boxes"][call["boxes"][:, 0] == n] for n in range(3)]
    function = PLAIN["align"].function
    with torch.autocast(device, dtype):
        output = function(**{**call, "boxes": [b[:, 1:] for b in boxes]})
        assert torch.equal(output, function(**{**call, "boxes": torch.cat(boxes)}))
    assert output.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_does_not_cast_float64_or_in_disabled_regions(dtype, device):
    case = ASYMMETRIC["align"]
    call = case.draw(device)
    with torch.autocast(device, dtype):
        assert case.function(**call).dtype == torch.float64
        with torch.autocast(device, enabled=False):
            single = cast(call, torch.float32, ("input", "boxes", "offset"))
            assert case.function(**single).dtype == torch.float32


@usual
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_has_the_memory_format_of_the_input(layout, dtype, case, device):
    call = case.draw(device, dtype)
    call["input"] = call["input"].contiguous(memory_format=layout)
    output, found = gradients(case.function, call)
    assert output.is_contiguous(memory_format=layout)
    assert found["input"].is_contiguous(memory_format=layout)
    assert found["offset"].is_contiguous()


@usual
@pytest.mark.parametrize("name", ["input", "offset"])
def test_gradients_have_the_memory_format_of_their_tensor(name, case, device):
    call = case.draw(device)
    expected, expected_gradients = gradients(case.function, call)
    call[name] = call[name].contiguous(memory_format=torch.channels_last)
    output, found = gradients(case.function, call)
    assert found[name].is_contiguous(memory_format=torch.channels_last)
    assert_near(output, expected, "output")
    for key, gradient in expected_gradients.items():
        assert_near(found[key], gradient, key)


@usual
@pytest.mark.parametrize("strides", [gaps, transposed, sliced, expanded])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_strides_give_the_results_of_contiguous(dtype, strides, case, device):
    call = case.draw(device, dtype)
    call = {k: strides(v) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    packed = {k: v.contiguous() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    output, found = gradients(case.function, call)
    expected, expected_gradients = gradients(case.function, packed)
    assert_near(output, expected, "output")
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name)


# A tensor with one row or column is contiguous whatever the stride of that axis.
@pytest.mark.parametrize("size", [(3, 2), (3, 1), (1, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("channels", [3, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_grad_output(dtype, channels, size, device):
    case = replace(USUAL["ps-align"], channels=channels, output=size)
    call = case.draw(device, dtype)
    for name, grad_output in grad_outputs(case.output_shape, dtype, device):
        packed = torch.empty(grad_output.shape, dtype=dtype, device=device).copy_(grad_output)
        _, found = gradients(case.function, call, grad_output)
        _, expected = gradients(case.function, call, packed)
        for key, gradient in expected.items():
            assert_near(found[key], gradient, f"{name}, {key}")


@usual
def test_backward_of_a_mean(case, device):
    """R-FCN heads average over the bins, so grad_output is expanded."""
    call = case.draw(device)
    leaf = call["input"].requires_grad_()
    output = case.function(**call)
    (of_sum,) = torch.autograd.grad(output.sum(), leaf, retain_graph=True)
    (of_ones,) = torch.autograd.grad(output, leaf, torch.ones_like(output))
    assert_near(of_sum, of_ones)
