# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Some of the calls of `make fuzz`, and what it found."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from dcn_plugin import ops
from tests.fuzzing.calls import Call, calls, limited_memory
from tests.ops import roi_cases
from tests.ops.conv_cases import ASYMMETRIC

EXAMPLES = int(os.environ.get("DCN_EXAMPLES", "200"))


@given(call=calls())
@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@pytest.mark.usefixtures("restore_threads")
def test_random_calls_return_or_raise_documented_errors(call: Call) -> None:
    with limited_memory():
        call.check()


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"input": lambda t: t[0]}, "input must have 4 dimensions"),
        ({"bias": lambda t: t[None]}, "bias must have 1 dimensions"),
        ({"stride": ()}, "stride must be two integers"),
        ({"stride": (0, 1)}, "from 1 to 2147483647, got [0, 1]"),
        ({"padding": (2**63 - 1, 0)}, "from 0 to 2147483647"),
        ({"dilation": (9, 9)}, "output_size"),
        ({"weight": lambda t: t[..., :0]}, "kernel_size"),
    ],
)
def test_fake_convolution_raises_documented_errors(change: dict[str, Any], fragment: str) -> None:
    arguments = ASYMMETRIC.draw("meta")
    arguments |= {k: v(arguments[k]) if callable(v) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"deform_conv2d: .*{re.escape(fragment)}"):
        ops.deform_conv2d(**arguments)


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"boxes": lambda t: t[0]}, "boxes must have 2 dimensions"),
        ({"offset": lambda t: t[None]}, "offset must have 4 dimensions"),
        ({"output_size": []}, "output_size must be two integers"),
        ({"group_size": (0, 3)}, "got [0, 3]"),
    ],
)
def test_fake_roi_pooling_raises_documented_errors(change: dict[str, Any], fragment: str) -> None:
    arguments = roi_cases.ASYMMETRIC["align"].draw("meta")
    arguments |= {k: v(arguments[k]) if callable(v) else v for k, v in change.items()}
    with pytest.raises(ValueError, match=f"deform_roi_pool: .*{re.escape(fragment)}"):
        ops.deform_ps_roi_pool(**arguments)


SPARSE, NESTED = torch.zeros(2, 4).to_sparse(), torch.nested.nested_tensor([torch.zeros(4)])


@pytest.mark.parametrize(
    "boxes",
    [None, 1.5, "boxes", [1.0], [torch.zeros(0, 4), None], [SPARSE], [NESTED]],
    ids=["none", "number", "text", "list-of-numbers", "list-with-none", "sparse", "nested"],
)
def test_boxes_that_are_not_tensors_are_named(boxes: Any) -> None:
    with pytest.raises(TypeError, match=r"deform_roi_pool: .* boxes a tensor or a list of tensors"):
        ops.roi_pool(torch.rand(3, 4, 5, 6), boxes, 2)


@pytest.mark.parametrize("name", ["input", "offset", "weight"])
def test_fake_convolution_names_missing_tensors(name: str) -> None:
    arguments = {**ASYMMETRIC.draw(), name: None}
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match=f"2d: {name}"):
        torch.ops.dcn_plugin.deform_conv2d(**arguments)


@pytest.mark.parametrize("name", ["input", "boxes"])
def test_fake_roi_pooling_names_missing_tensors(name: str) -> None:
    case = roi_cases.ASYMMETRIC["align"]
    arguments = {**case.to_ps(case.draw()), name: None}
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(TypeError, match=f"l: {name}"):
        torch.ops.dcn_plugin.deform_roi_pool(**arguments)


@pytest.mark.parametrize("size", [2**31 - 1, (2**31 - 1, 1)])
def test_any_number_of_bins_without_boxes(size: Any) -> None:
    """The CPU kernel listed all bins: memory without end, for an empty output."""
    maps = torch.rand(1, 12, 5, 6, requires_grad=True)
    with limited_memory():
        output = ops.ps_roi_pool(maps, torch.zeros(0, 5), size, group_size=(3, 4))
        (gradient,) = torch.autograd.grad(output.sum(), maps)
    assert output.numel() == 0 and not gradient.any()
