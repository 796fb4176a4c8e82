# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""torch.compile, torch.export, torch.jit.trace, opcheck, double backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dcn_plugin.ops import deform_conv2d
from tests.ops.conv_cases import ASYMMETRIC, CASES, EMPTY, ConvCase, gradients
from tests.ops.opcheck import opcheck
from tests.tolerances import assert_near

# A typical model: an offset branch, the op, and layers before and after it.
PLAIN = ConvCase(in_channels=4, out_channels=6, size=(8, 7), stride=(1, 1), offset_groups=2)


class Network(nn.Module):
    """A model with an offset branch and the op."""

    def __init__(self, case: ConvCase = PLAIN) -> None:
        super().__init__()
        self.case = case
        channels = 2 * case.offset_groups * case.taps
        self.offset = nn.Conv2d(case.in_channels, channels, case.kernel, **case.geometry)
        self.mask = nn.Conv2d(case.in_channels, channels // 2, case.kernel, **case.geometry)
        self.conv = nn.Conv2d(
            case.in_channels, case.out_channels, case.kernel, groups=case.groups, **case.geometry
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        offset, mask = 3 * self.offset(x), self.mask(x).sigmoid()
        weight, bias = self.conv.weight, self.conv.bias
        return deform_conv2d(x, offset, weight, bias, mask=mask, **self.case.geometry).tanh()


def drawn_input(device, batch=2, height=8, width=7, dtype=torch.float64):
    return torch.randn(batch, PLAIN.in_channels, height, width, dtype=dtype, device=device)


def parameter_gradients(function, network, x):
    return torch.autograd.grad(function(x).square().sum(), list(network.parameters()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_forward_and_backward(dynamic, layout, device):
    torch.compiler.reset()
    network = Network().to(device, torch.float64)
    # aot_eager traces forward and backward like other backends, without a C++ compiler.
    compiled = torch.compile(network, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(2, 8, 7), (3, 9, 11)]:
        x = drawn_input(device, *size).contiguous(memory_format=layout)
        output = compiled(x)
        assert_near(output, network(x))
        assert output.stride() == network(x).stride()
        found = parameter_gradients(compiled, network, x)
        for gradient, expected in zip(found, parameter_gradients(network, network, x), strict=True):
            assert_near(gradient, expected)


def test_compile_with_inductor(device):
    """The default backend checks the strides of fake kernels. Only the op: compiling is slow."""
    torch.compiler.reset()
    call = ASYMMETRIC.draw(device)
    call["input"] = call["input"].contiguous(memory_format=torch.channels_last)
    output, found = gradients(torch.compile(deform_conv2d, fullgraph=True), call)
    expected, expected_gradients = gradients(deform_conv2d, call)
    assert_near(output, expected)
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name)


def test_compile_under_autocast(device):
    torch.compiler.reset()
    network = Network().to(device)
    x = drawn_input(device, dtype=torch.float32)

    def run(function):
        with torch.autocast(device, torch.bfloat16):
            return function(x)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    output = run(compiled)
    assert output.dtype == torch.bfloat16
    assert_near(output, run(network).double())


@pytest.mark.cuda
@pytest.mark.gpu
def test_cuda_graphs_after_a_linear_layer():
    """A kernel on a wrong stream would run before the layer that it reads from."""
    torch.compiler.reset()
    linear = nn.Linear(7, 7).cuda()
    network = Network().cuda()

    def function(x):
        return network(linear(x))

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        x = drawn_input("cuda", dtype=torch.float32)
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(compiled(x).clone(), function(x).double())


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch_and_size(strict, device):
    network = Network().to(device, torch.float64)
    # At least 4, so that the output is wider than one pixel: export specializes on 1.
    sizes = {place: torch.export.Dim(f"size{place}", min=4, max=64) for place in (0, 2, 3)}
    program = torch.export.export(
        network, (drawn_input(device, 4),), dynamic_shapes={"x": sizes}, strict=strict
    )
    assert any("dcn_plugin.deform_conv2d" in str(n.target) for n in program.graph.nodes)
    for size in [(4, 8, 7), (5, 12, 9), (6, 6, 30)]:
        x = drawn_input(device, *size)
        assert_near(program.module()(x), network(x))


def test_jit_trace(device):
    network = Network().to(device, torch.float64)
    traced = torch.jit.trace(network, drawn_input(device))
    x = drawn_input(device, 3, 9, 11)
    assert_near(traced(x), network(x))
    found = parameter_gradients(traced, network, x)
    for gradient, expected in zip(found, parameter_gradients(network, network, x), strict=True):
        assert_near(gradient, expected)


def op_arguments(case, device, dtype=torch.float64):
    call = case.draw(device, dtype)
    names = ("input", "offset", "weight", "bias", "stride", "padding", "dilation", "mask")
    return [list(call[k]) if isinstance(call[k], tuple) else call[k] for k in names]


OPCHECKED = {"asymmetric": ASYMMETRIC, "neither": CASES["neither"], "batch-0": EMPTY}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_forward(name, layout, dtype, device):
    arguments = op_arguments(OPCHECKED[name], device, dtype)
    arguments[0] = arguments[0].contiguous(memory_format=layout)
    for place in (0, 1, 2, 3, 7):
        if arguments[place] is not None:
            arguments[place].requires_grad_()
    opcheck(torch.ops.dcn_plugin.deform_conv2d.default, arguments, dtype)


@pytest.mark.parametrize("output_mask", [[True] * 5, [False, True, False, True, False]], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_backward(name, layout, output_mask, device):
    case = OPCHECKED[name]
    input, offset, weight, bias, *geometry, mask = op_arguments(case, device)
    input = input.contiguous(memory_format=layout)
    output = deform_conv2d(input, offset, weight, bias, *geometry, mask)
    output_mask = [
        w and tensor is not None
        for w, tensor in zip(output_mask, (input, offset, weight, bias, mask), strict=True)
    ]
    torch.library.opcheck(
        torch.ops.dcn_plugin._deform_conv2d_backward.default,
        (torch.randn_like(output), input, offset, weight, *geometry, mask, output_mask),
    )


def test_double_backward_raises(device):
    call = ASYMMETRIC.draw(device)
    leaf = call["input"].requires_grad_()
    output = deform_conv2d(**call)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="deform_conv2d: double backward is not support"):
        gradient.sum().backward()


def test_saves_no_more_than_its_arguments(device):
    call = {**ASYMMETRIC.draw(device)}
    mine = {v.data_ptr() for v in call.values() if isinstance(v, torch.Tensor)}
    saved = []
    call["weight"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        deform_conv2d(**call)
    assert {t.data_ptr() for t in saved} <= mine


def test_no_graph_without_requires_grad(device):
    call = ASYMMETRIC.draw(device)
    assert not deform_conv2d(**call).requires_grad
    call["weight"].requires_grad_()
    with torch.no_grad():
        assert not deform_conv2d(**call).requires_grad
    with torch.inference_mode():
        assert deform_conv2d(**call).is_inference()
