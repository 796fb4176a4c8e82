# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Invalid arguments and extreme values."""

from __future__ import annotations

import pytest
import torch

from dcn_plugin.ops import ps_roi_pool, roi_pool
from tests.ops import roi_bad_inputs
from tests.ops.roi_cases import ASYMMETRIC, BOTH, TENSORS
from tests.ops.subprocesses import run_in_subprocess, run_under_memcheck


@pytest.mark.parametrize("name", roi_bad_inputs.INVALID)
def test_invalid_input_raises_and_reports_the_value(name, device):
    roi_bad_inputs.check_invalid(name, device)


@pytest.mark.parametrize("name", roi_bad_inputs.INVALID_ON_CPU)
def test_an_invalid_batch_index_raises_on_the_cpu(name):
    roi_bad_inputs.check_invalid(name, "cpu")


@pytest.mark.parametrize("name", roi_bad_inputs.EXTREME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_values_do_not_crash(name, dtype, device):
    roi_bad_inputs.check_extreme(name, device, dtype)


@pytest.mark.parametrize("function", [roi_pool, ps_roi_pool])
def test_the_plain_functions_raise_too(function, device):
    input, boxes = torch.rand(1, 4, 5, 6, device=device), torch.zeros(2, 5, device=device)
    with pytest.raises(ValueError, match=r"roi_pool: output_size .*\[0, 2\]"):
        function(input, boxes, (0, 2))
    with pytest.raises(ValueError, match=r"roi_pool: .*mode.*'max'"):
        function(input, boxes, 2, mode="max")


def test_any_batch_index_of_an_empty_batch_raises():
    with pytest.raises(ValueError, match=r"roi_pool: .*batch index.*0"):
        roi_pool(torch.rand(0, 4, 5, 6), torch.zeros(2, 5), 2)


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["boxes", "offset"])
def test_mixed_devices_raise(name):
    call = ASYMMETRIC["align"].draw("cuda")
    call[name] = call[name].cpu()
    with pytest.raises(ValueError, match=rf"roi_pool: {name} must be on .* cuda:0, got cpu"):
        ASYMMETRIC["align"].function(**call)


@pytest.mark.parametrize("name", TENSORS)
def test_sparse_tensors_raise(name):
    case = ASYMMETRIC["align"]
    call = case.draw()
    with pytest.raises(NotImplementedError, match="deform_roi_pool"):
        case.function(**{**call, name: call[name].to_sparse()})


@pytest.mark.parametrize(
    "bad",
    [{"output_size": 1.5}, {"output_size": "2"}, {"mode": 3}, {"sampling_ratio": None}],
    ids=str,
)
def test_arguments_of_a_wrong_type_raise(bad):
    case = BOTH["plain-align"]
    with pytest.raises((TypeError, RuntimeError)):
        case.function(**{**case.draw(), **bad})


@pytest.mark.parametrize(
    "changed, error, message",
    [
        (lambda t: t[:, 1:], ValueError, r"grad_output .*\[12, 6, 3, 2\], got \[12, 5, 3, 2\]"),
        (lambda t: t[1:], ValueError, r"grad_output .*\[12, 6, 3, 2\], got \[11, 6, 3, 2\]"),
        (lambda t: t[..., None], ValueError, r"grad_output .* 4-dim.*got .*\[12, 6, 3, 2, 1\]"),
        (lambda t: t.float(), TypeError, r"grad_output .*Double, got Float"),
        (lambda t: t.to("meta"), ValueError, r"grad_output .* device .*, got meta"),
    ],
)
def test_backward_checks_grad_output(changed, error, message, device):
    case, call = roi_bad_inputs.valid_call(device)
    output = case.function(**call)
    with pytest.raises(error, match=message):
        torch.ops.dcn_plugin._deform_roi_pool_backward(
            changed(output), output_mask=[True, True], **call
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", [*roi_bad_inputs.INVALID, *roi_bad_inputs.EXTREME])
def test_no_crash_or_hang_in_a_subprocess(name, device):
    result = run_in_subprocess(roi_bad_inputs, device, name)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", roi_bad_inputs.INVALID_ON_CPU)
def test_an_invalid_batch_index_in_a_subprocess(name):
    result = run_in_subprocess(roi_bad_inputs, "cpu", name)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.cuda
@pytest.mark.gpu
def test_memcheck():
    result = run_under_memcheck(roi_bad_inputs)
    assert result.returncode == 0, result.stdout + result.stderr
