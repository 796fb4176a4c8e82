# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""replace_deform_conv2d: who runs our kernels, with which results, and that it can be undone."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor
from torchvision.ops import deform_conv2d

from dcn_plugin.integrations import torchvision as integration
from dcn_plugin.integrations.torchvision import replace_deform_conv2d
from tests import reference
from tests.integrations.blocks import BLOCKS
from tests.ops.conv_cases import ASYMMETRIC, CASES, ConvCase, cast, gradients
from tests.tolerances import assert_near

ROOT = Path(__file__).resolve().parents[2]


def calls_of_ours(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int, int]:
    """Runs a function; returns its result, and how often it ran our two ops."""
    with torch.profiler.profile(acc_events=True) as profile:
        result = function(*arguments)
    count = {event.key: event.count for event in profile.key_averages()}
    names = ("dcn_plugin::deform_conv2d", "dcn_plugin::_deform_conv2d_backward")
    return result, count.get(names[0], 0), count.get(names[1], 0)


def is_replaced() -> bool:
    """Returns whether torchvision's function runs our op."""
    call = ConvCase(batch=1, groups=1, offset_groups=1, bias=False, mask=False).draw()
    return calls_of_ours(lambda: deform_conv2d(**call))[1] == 1


@pytest.fixture(autouse=True)
def _nothing_stays_replaced() -> Iterator[None]:
    yield
    assert not replace_deform_conv2d._active
    assert not is_replaced()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients(case: ConvCase, device: str) -> None:
    call = case.draw(device)
    expected, expected_gradients = gradients(deform_conv2d, call)
    with replace_deform_conv2d():
        (output, found), forward, backward = calls_of_ours(gradients, deform_conv2d, call)
    assert (forward, backward) == (1, 1)
    assert_near(output, expected, "output")
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name)

    output, found = gradients(deform_conv2d, call)  # torchvision's again, to the last bit
    assert torch.equal(output, expected)
    for name in ("offset", "weight", "bias", "mask"):  # its input gradient uses atomics on CUDA
        assert name not in found or torch.equal(found[name], expected_gradients[name]), name


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_public_models(name: str, device: str) -> None:
    make, size = BLOCKS[name]
    block = make().to(device, torch.float64)
    input = torch.randn(size, device=device, dtype=torch.float64)

    def run() -> dict[str, Tensor]:
        leaf = input.clone().requires_grad_()
        output = block(leaf)
        leaves = {"input": leaf, **dict(block.named_parameters())}
        grad_output = torch.linspace(-1, 1, output.numel(), device=device, dtype=torch.float64)
        found = torch.autograd.grad(output, leaves.values(), grad_output.reshape(output.shape))
        return {"output": output.detach(), **dict(zip(leaves, found, strict=True))}

    expected = run()
    with replace_deform_conv2d():
        found, forward, backward = calls_of_ours(run)
    assert (forward, backward) == (block.calls, block.calls)
    for key, value in expected.items():
        assert_near(found[key], value, key)


def scripted(call: dict[str, Any]) -> Callable[[], Tensor]:
    layer = torchvision.ops.DeformConv2d(6, 4, (3, 2), (2, 1), (1, 0), (2, 1), groups=2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script
        script = torch.jit.script(layer)
    return lambda: script(call["input"], call["offset"], call["mask"])


def compiled(call: dict[str, Any]) -> Callable[[], Tensor]:
    function = torch.compile(deform_conv2d, fullgraph=True, backend="aot_eager")
    return lambda: function(**call)


def exported(call: dict[str, Any]) -> Callable[[], Tensor]:
    layer = torchvision.ops.DeformConv2d(6, 4, (3, 2), (2, 1), (1, 0), (2, 1), groups=2).double()
    arguments = (call["input"], call["offset"], call["mask"])
    module = torch.export.export(layer, arguments).module()
    return lambda: module(*arguments)


def overload(call: dict[str, Any]) -> Callable[[], Tensor]:
    tensors = [call[name] for name in ("input", "weight", "offset", "mask", "bias")]
    numbers = (*call["stride"], *call["padding"], *call["dilation"], 2, 3, True)
    return lambda: torch.ops.torchvision.deform_conv2d.default(*tensors, *numbers)


@pytest.mark.parametrize("prepare", [scripted, compiled, exported, overload])
def test_reaches_callers_that_were_prepared_before(prepare: Callable[..., Any]) -> None:
    run = prepare(ASYMMETRIC.draw())
    expected, before, _ = calls_of_ours(run)
    with replace_deform_conv2d():
        output, during, _ = calls_of_ours(run)
    again, after, _ = calls_of_ours(run)
    assert (before, during, after) == (0, 1, 0)
    assert_near(output, expected)
    assert torch.equal(again, expected)


def test_what_was_compiled_during_a_replacement_follows_its_end() -> None:
    call = ASYMMETRIC.draw()
    with replace_deform_conv2d():
        run = compiled(call)
        assert calls_of_ours(run)[1] == 1
    output, after, _ = calls_of_ours(run)
    assert after == 0 and torch.equal(output, deform_conv2d(**call))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any]) -> None:
    call = ASYMMETRIC.draw()
    expected = deform_conv2d(**call)
    with replace_deform_conv2d(), mode():
        output, forward, _ = calls_of_ours(lambda: deform_conv2d(**call))
    assert forward == 1
    assert_near(output, expected)


def border_call() -> dict[str, Any]:
    """Returns a call with many taps exactly at -1, where torchvision's offset gradient differs."""
    call = ConvCase(mask=False, bias=False).draw()
    call["offset"] = torch.randint_like(call["offset"], -3, 4)
    return call


def test_all_threads_run_our_kernels() -> None:
    call = border_call()
    _, theirs = gradients(deform_conv2d, call)
    with replace_deform_conv2d(), ThreadPoolExecutor(4) as pool:
        _, ours = gradients(deform_conv2d, call)
        assert not torch.allclose(ours["offset"], theirs["offset"])
        for _, found in pool.map(lambda _: gradients(deform_conv2d, call), range(16)):
            assert torch.equal(found["offset"], ours["offset"])


def test_a_function_that_is_undone() -> None:
    replacement = replace_deform_conv2d()
    assert is_replaced()
    replacement.undo()
    assert not is_replaced()
    replacement.undo()  # no effect
    with replacement:  # again
        assert is_replaced()


def test_nested_replacements_end_with_the_last() -> None:
    outer = replace_deform_conv2d()
    with replace_deform_conv2d():
        outer.undo()
        outer.undo()
        assert is_replaced()
    assert not is_replaced()


def test_an_exception_in_the_block_restores_and_propagates() -> None:
    with pytest.raises(ZeroDivisionError), replace_deform_conv2d():
        raise ZeroDivisionError


def test_a_backward_pass_uses_the_kernels_of_its_time() -> None:
    call = ASYMMETRIC.draw()
    leaf = call["weight"].requires_grad_()
    with replace_deform_conv2d():
        output = deform_conv2d(**call)
    assert calls_of_ours(output.sum().backward)[2] == 0
    theirs, leaf.grad = leaf.grad, None
    output = deform_conv2d(**call)
    with replace_deform_conv2d():
        assert calls_of_ours(output.sum().backward)[2] == 1
    assert_near(leaf.grad, theirs)


def test_offset_gradient_follows_our_rule_at_the_border() -> None:
    call = border_call()
    with replace_deform_conv2d():
        output, ours = gradients(deform_conv2d, call)
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    arguments = {k: v for k, v in call.items() if k != "bias"}
    assert_near(ours["offset"], reference.offset_gradient(grad_output, **arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    # torchvision has no kernel for bfloat16 on the CPU.
    call = cast(ASYMMETRIC.draw(), dtype)
    with replace_deform_conv2d():
        output = deform_conv2d(**call)
    assert output.dtype == dtype
    assert_near(output, reference.deform_conv2d(**cast(call, torch.float64)))


def test_autocast_stays_torchvisions() -> None:
    """Torchvision has no autocast on the CPU, so the results are in float32."""
    call = ASYMMETRIC.draw(dtype=torch.float32)
    expected, expected_gradients = gradients(deform_conv2d, call)
    with replace_deform_conv2d(), torch.autocast("cpu", torch.bfloat16):
        output, found = gradients(deform_conv2d, call)
    assert output.dtype == torch.float32
    assert_near(output, expected)
    for name, gradient in expected_gradients.items():
        assert found[name].dtype == torch.float32
        assert_near(found[name], gradient, name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("mask", [True, False])
def test_opcheck_with_torchvisions_fake_kernels(mask: bool, layout: torch.memory_format) -> None:
    case = ConvCase(batch=1, groups=1, offset_groups=1)
    call = case.draw()
    input = call["input"].contiguous(memory_format=layout)
    tensors = [input, *(call[name] for name in ("weight", "offset", "mask", "bias"))]
    numbers = (*case.stride, *case.padding, *case.dilation, 1, 1, mask)
    with replace_deform_conv2d():
        output = torch.ops.torchvision.deform_conv2d(*tensors, *numbers)
        torch.library.opcheck(
            torch.ops.torchvision._deform_conv2d_backward.default,
            (torch.ones_like(output), *tensors, *numbers),
            test_utils=("test_schema", "test_faketensor"),
        )
        for tensor in tensors:
            tensor.requires_grad_()
        torch.library.opcheck(
            torch.ops.torchvision.deform_conv2d.default,
            (*tensors, *numbers),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


def test_another_torchvision_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_ARGUMENTS", ("input", "mask"))
    with pytest.raises(RuntimeError, match=r"\(input, mask\), but torchvision .* has \(input, we"):
        replace_deform_conv2d()
    with pytest.raises(RuntimeError, match=r"torchvision::deform_conv3d .* has no such op"):
        integration._check_arguments("deform_conv3d", ())


def test_no_warning_is_shown_and_none_of_others_is_lost() -> None:
    program = """
import sys, torch, warnings, torchvision
from dcn_plugin.integrations.torchvision import replace_deform_conv2d
with warnings.catch_warnings(record=True) as ours:
    warnings.simplefilter("always")
    if sys.argv[1] == "replace":
        replace_deform_conv2d().undo()
with warnings.catch_warnings(record=True) as others:
    warnings.simplefilter("always")
    torch.library.Library("torchvision", "IMPL").impl("nms", print, "CPU")
print(len(ours), len(others), torch.is_warn_always_enabled())
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", program, what], cwd=ROOT, text=True, stdout=subprocess.PIPE
        )
        for what in ("replace", "nothing")
    ]
    replaced, plain = (run.communicate(timeout=120)[0] for run in runs)
    # PyTorch 2.14 has shown its warning by then, earlier ones show it now.
    assert replaced == plain and replaced in ("0 0 False\n", "0 1 False\n")
