# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What is refused, and how, and that nothing crashes or hangs."""

from __future__ import annotations

import pytest
import torch

from dcn_plugin.ops import ps_roi_pool, roi_pool
from tests.ops import roi_bad_inputs
from tests.ops.alone import run_alone, run_under_memcheck
from tests.ops.roi_cases import ASYMMETRIC, BOTH, TENSORS


@pytest.mark.parametrize("name", roi_bad_inputs.REFUSED)
def test_is_refused_with_the_value_found(name, device):
    roi_bad_inputs.check_refused(name, device)


@pytest.mark.parametrize("name", roi_bad_inputs.REFUSED_ON_CPU)
def test_a_bad_batch_index_is_refused_on_the_cpu(name):
    roi_bad_inputs.check_refused(name, "cpu")


@pytest.mark.parametrize("name", roi_bad_inputs.SURVIVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_survived(name, dtype, device):
    roi_bad_inputs.check_survived(name, device, dtype)


@pytest.mark.parametrize("function", [roi_pool, ps_roi_pool])
def test_the_plain_functions_refuse_as_well(function, device):
    input, boxes = torch.rand(1, 4, 5, 6, device=device), torch.zeros(2, 5, device=device)
    with pytest.raises(ValueError, match=r"roi_pool: output_size .*\[0, 2\]"):
        function(input, boxes, (0, 2))
    with pytest.raises(ValueError, match=r"roi_pool: .*mode.*'max'"):
        function(input, boxes, 2, mode="max")


def test_any_batch_index_of_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match=r"roi_pool: .*batch index.*0"):
        roi_pool(torch.rand(0, 4, 5, 6), torch.zeros(2, 5), 2)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["boxes", "offset"])
def test_devices_do_not_mix(name):
    call = ASYMMETRIC["align"].draw("cuda")
    call[name] = call[name].cpu()
    with pytest.raises(ValueError, match=rf"roi_pool: {name} must be on .* cuda:0, got cpu"):
        ASYMMETRIC["align"].function(**call)


@pytest.mark.parametrize("name", TENSORS)
def test_sparse_tensors_are_refused(name):
    case = ASYMMETRIC["align"]
    call = case.draw()
    with pytest.raises(NotImplementedError, match="deform_roi_pool"):
        case.function(**{**call, name: call[name].to_sparse()})


@pytest.mark.parametrize(
    "bad",
    [{"output_size": 1.5}, {"output_size": "2"}, {"mode": 3}, {"sampling_ratio": None}],
    ids=str,
)
def test_arguments_of_another_type_are_refused(bad):
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
    ],
)
def test_backward_checks_grad_output(changed, error, message, device):
    case, call = roi_bad_inputs.good_call(device)
    output = case.function(**call)
    with pytest.raises(error, match=message):
        torch.ops.dcn_plugin._deform_roi_pool_backward(changed(output), wanted=[True, True], **call)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*roi_bad_inputs.REFUSED, *roi_bad_inputs.SURVIVED])
def test_a_process_of_its_own_neither_dies_nor_hangs(name, device):
    result = run_alone(roi_bad_inputs, device, name)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", roi_bad_inputs.REFUSED_ON_CPU)
def test_a_batch_index_in_a_process_of_its_own(name):
    result = run_alone(roi_bad_inputs, "cpu", name)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.cuda
def test_memcheck_finds_nothing():
    result = run_under_memcheck(roi_bad_inputs)
    assert result.returncode == 0, result.stdout + result.stderr
