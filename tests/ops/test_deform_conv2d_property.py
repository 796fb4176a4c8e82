# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Random shapes, dtypes and layouts, compared with torchvision in float64."""

from __future__ import annotations

import os
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dcn_plugin.ops import deform_conv2d
from tests.ops.conv_cases import ConvCase, cast, gradients
from tests.tolerances import DTYPES, assert_near, tolerance

EXAMPLES = int(os.environ.get("DCN_EXAMPLES", "120"))
FORMATS = ("contiguous", "channels-last", "transposed", "every other")


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    """Draws valid sizes of a deformable convolution."""
    groups, offset_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel, stride, padding, dilation = (
        (draw(st.integers(*limits)), draw(st.integers(*limits)))
        for limits in [(1, 4), (1, 3), (0, 3), (1, 3)]
    )
    size = tuple(
        max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 9))
        for k, p, d in zip(kernel, padding, dilation, strict=True)
    )
    return ConvCase(
        batch=draw(st.integers(0, 4)),
        in_channels=groups * offset_groups * draw(st.integers(1, 5)),
        out_channels=groups * draw(st.integers(1, 5)),
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        bias=draw(st.booleans()),
        mask=draw(st.booleans()),
    )


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """Returns the tensor with other strides."""
    if tensor.dim() == 4 and layout == "channels-last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        swapped = tensor.transpose(0, -1).clone(memory_format=torch.contiguous_format)
        return swapped.transpose(0, -1)
    if layout == "every other":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    return tensor


def packed_in_float64(call: dict[str, Any]) -> dict[str, Any]:
    """Returns the call in float64 with plain strides: torchvision does not support all."""
    return {
        k: v.clone(memory_format=torch.contiguous_format) if isinstance(v, torch.Tensor) else v
        for k, v in cast(call, torch.float64).items()
    }


ARGUMENTS = {
    "case": conv_cases(),
    "dtype": st.sampled_from(DTYPES),
    "coordinates": st.sampled_from(DTYPES),
    "layouts": st.lists(st.sampled_from(FORMATS), min_size=6, max_size=6),
    "spread": st.sampled_from([0.0, 0.3, 1.0, 10.0]),
    "seed": st.integers(0, 2**31),
}


@given(**ARGUMENTS)
@settings(
    max_examples=EXAMPLES,  # DCN_EXAMPLES=10000 runs more
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_equals_torchvision_in_float64(
    torchvision, device, case, dtype, coordinates, layouts, spread, seed
):
    torch.manual_seed(seed)
    call = case.draw(device)
    keep_from_integers = (call["offset"] - call["offset"].floor()).clamp(0.1, 0.9)
    call["offset"] = (spread * call["offset"]).floor() + keep_from_integers
    call = cast(cast(call, dtype), coordinates, ["offset", "mask"])
    for name, layout in zip(("input", "offset", "weight", "bias", "mask"), layouts, strict=False):
        if call[name] is not None:
            call[name] = laid_out(call[name], layout)
    shape = (case.batch, case.out_channels, *case.out_size)
    grad_output = laid_out(torch.randn(shape, device=device).to(dtype), layouts[5])
    output, found = gradients(deform_conv2d, call, grad_output)
    expected, expected_gradients = gradients(
        torchvision.ops.deform_conv2d, packed_in_float64(call), grad_output.double()
    )
    # Coordinates of up to 45 pixels lose 6 bits at each of two roundings.
    exact = tolerance(dtype, device)
    if dtype in (torch.float64, torch.float32):
        exact = 256 * torch.finfo(dtype).eps
    assert output.dtype == dtype
    assert_near(output, expected, "output", exact)
    for name, gradient in expected_gradients.items():
        assert found[name].dtype == call[name].dtype
        allowed = max(exact, tolerance(found[name].dtype, device))
        assert_near(found[name], gradient, name, allowed)


def test_examples_are_not_degenerate():
    """The strategy must draw groups that do not divide each other, and so on."""
    drawn = []

    # Many: Hypothesis takes constants of the modules that are loaded, so that runs differ.
    @settings(max_examples=1000)
    @given(conv_cases())
    def collect(case):
        drawn.append(case)

    collect()
    assert any(min(c.groups, c.offset_groups) > 1 and c.groups % c.offset_groups for c in drawn)
    assert any(c.kernel[0] != c.kernel[1] and c.stride[0] != c.stride[1] for c in drawn)
    assert any(c.batch == 0 for c in drawn)
    assert {c.mask for c in drawn} == {c.bias for c in drawn} == {True, False}
