# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Wide layers, which are divided into many GEMMs, compared with torchvision."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcn_plugin.ops import deform_conv2d
from tests.devices import kernels_of
from tests.ops.conv_cases import ConvCase, cast, gradients
from tests.tolerances import SUMMED, assert_near, tolerance

ROOT = Path(__file__).resolve().parents[2]
SQUARE = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
ONE_GROUP = {"groups": 1, "offset_groups": 1}
WIDE = {
    # A tap has more channels than a K block.
    "beyond-a-k-block": ConvCase(1, 1301, 5, (5, 4), (2, 1), (1, 1), (0, 0), (1, 1), **ONE_GROUP),
    # Several taps in a K block; depth, outputs and positions are odd.
    "odd": ConvCase(1, 35, 7, (7, 11), **SQUARE, **ONE_GROUP),
    "odd-sizes": ConvCase(2, 129, 33, (7, 7), **SQUARE, **ONE_GROUP),
    # Several offset groups in a K block, and several K blocks in a group.
    "offset-groups": ConvCase(1, 140, 10, (9, 7), **SQUARE, groups=2, offset_groups=5),
    "many-offset-groups": ConvCase(2, 96, 8, (6, 5), **SQUARE, groups=1, offset_groups=32),
    # Several tiles of positions.
    "several-tiles": ConvCase(3, 64, 17, (31, 23), **SQUARE, **ONE_GROUP),
}
# More outputs than columns: on the CPU a GEMM writes the planes of the output.
POINT = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
EXPANDING = {
    "1x1": ConvCase(2, 19, 70, (13, 17), **POINT, **ONE_GROUP),
    "groups": ConvCase(1, 24, 64, (23, 30), **POINT, groups=2, offset_groups=3),
    "without-bias": ConvCase(2, 16, 33, (11, 9), **POINT, **ONE_GROUP, bias=False),
    "3x3": ConvCase(1, 3, 40, (12, 11), **SQUARE, **ONE_GROUP),
}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def assert_equals_torchvision(torchvision, case, dtype, layout, device):
    call = case.draw(device, dtype)
    call["weight"] /= call["weight"][0].numel() ** 0.5
    call["input"] = call["input"].contiguous(memory_format=LAYOUTS[layout])
    output_shape = (case.batch, case.out_channels, *case.out_size)
    grad_output = torch.randn(output_shape, device=device).to(dtype)
    grad_output = grad_output.contiguous(memory_format=LAYOUTS[layout])
    output, found = gradients(deform_conv2d, call, grad_output)
    expected, expected_gradients = gradients(
        torchvision.ops.deform_conv2d, cast(call, torch.float64), grad_output.double()
    )
    assert_near(output, expected, "output", allowed_error(case, "output", dtype, device))
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name, allowed_error(case, name, dtype, device))


def allowed_error(case: ConvCase, name: str, dtype: torch.dtype, device: str) -> float:
    """Returns the tolerance of a result, in float64 for the number of products in its sums.

    GEMMs in float64 are those of the BLAS library, whose order of summation depends on the
    processor and the memory format. Added one after the other, the error of n products with varying
    signs grows as the square root of n. Measured against sums in long double, on an AMD EPYC and in
    channels-last: 21 eps for 26,020 products; torchvision, whose GEMM is another one, had 4.
    """
    products = {
        "output": case.in_channels // case.groups * case.taps,
        "weight": case.batch * math.prod(case.out_size),
    }.get(name, 0)
    more = max(1, products / SUMMED) if dtype == torch.float64 else 1
    return tolerance(dtype, device) * more**0.5


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("name", WIDE)
def test_wide_layers_equal_torchvision(torchvision, name, dtype, layout, device):
    assert_equals_torchvision(torchvision, WIDE[name], dtype, layout, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPANDING)
def test_layers_with_more_outputs_than_columns_equal_torchvision(torchvision, name, dtype, layout):
    assert_equals_torchvision(torchvision, EXPANDING[name], dtype, layout, "cpu")


@pytest.mark.parametrize("names", [("input",), ("offset",), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_gradients_equal_those_computed_with_all(dtype, names, device):
    case = WIDE["odd-sizes"]
    call = case.draw(device, dtype)
    grad_output = torch.randn(case.batch, case.out_channels, *case.out_size, device=device).to(
        dtype
    )
    _, everything = gradients(deform_conv2d, call, grad_output)
    leaves = [call[name].requires_grad_() for name in names]
    found = torch.autograd.grad(deform_conv2d(**call), leaves, grad_output)
    for name, gradient in zip(names, found, strict=True):
        # Accumulated with atomics on CUDA, in any order.
        allowed = 0 if kernels_of(device) == "cpu" else None
        assert_near(gradient, everything[name], name, allowed)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (7, 7), (23, 30)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_weights_do_not_reach_their_gradient(dtype, size, device):
    """Padding of a GEMM's K dimension is zero in both operands: 0 * inf would be NaN."""
    case = ConvCase(2, 6, 5, size, **SQUARE, **ONE_GROUP)
    call = case.draw(device, dtype)
    _, expected = gradients(deform_conv2d, call)
    call["weight"] = torch.full_like(call["weight"], torch.inf)
    _, found = gradients(deform_conv2d, call)
    assert_near(found["weight"], expected["weight"], "weight", 0)


@pytest.mark.usefixtures("torchvision")  # else the tests below are skipped
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_processors_without_fast_gemm_instructions_give_the_same(isa):
    """Restricts oneDNN to older instruction sets: other GEMM kernels, the same results."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-vv",
            __file__,
            "-k",
            "wide and cpu and (float32 or bfloat16)",  # those that oneDNN multiplies
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert "= 24 passed" in result.stdout
