# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""torch.compile, torch.export, torch.jit.trace, opcheck, double backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dcn_plugin.ops import deform_ps_roi_pool, deform_roi_pool, ps_roi_pool, roi_pool
from tests.ops.opcheck import opcheck
from tests.ops.roi_cases import ASYMMETRIC, BOTH, BOXES, PLAIN, gradients
from tests.tolerances import assert_near

both = pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
SCALE = 0.5


class Head(nn.Module):
    """A typical head: RoI pooling, an offset branch, deformable RoI pooling."""

    def __init__(self, mode: str = "align", as_list: bool = False) -> None:
        super().__init__()
        self.mode, self.as_list = mode, as_list
        self.reduce = nn.Conv2d(4, 6, 1)
        self.offset = nn.Linear(6 * 3 * 2, 2 * 3 * 2)
        self.score = nn.Conv2d(4, 2 * 3 * 2, 1)
        self.score_offset = nn.Conv2d(4, 4 * 3 * 2, 1)

    def forward(self, x: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        if self.as_list:
            boxes = [boxes[:, 1:], boxes[:, 1:] + 1]
        at = {"output_size": (3, 2), "spatial_scale": SCALE, "mode": self.mode}
        maps = self.reduce(x).relu()
        pooled = roi_pool(maps, boxes, **at)
        offset = self.offset(pooled.flatten(1)).unflatten(1, (2, 3, 2))
        pooled = deform_roi_pool(maps, boxes, 3 * offset, **at)
        offset = 3 * ps_roi_pool(self.score_offset(x), boxes, **at)
        scores = deform_ps_roi_pool(self.score(x), boxes, offset, **at)
        return torch.cat([pooled, scores], dim=1).tanh()


def drawn(device, batch=2, height=9, width=8, rois=7, dtype=torch.float64):
    x = torch.randn(batch, 4, height, width, dtype=dtype, device=device)
    boxes = torch.tensor([*BOXES.values()], dtype=dtype, device=device).repeat(3, 1)[:rois]
    images = torch.arange(rois, dtype=dtype, device=device) % batch
    return x, torch.cat([images[:, None], boxes], dim=1)


def parameter_gradients(function, head, *arguments):
    return torch.autograd.grad(function(*arguments).square().sum(), list(head.parameters()))


def assert_same(function, head, *arguments):
    """Compares a traced head with the original, forward and backward."""
    output, expected = function(*arguments), head(*arguments)
    assert_near(output, expected)
    assert output.stride() == expected.stride()
    found = parameter_gradients(function, head, *arguments)
    for gradient, expected in zip(found, parameter_gradients(head, head, *arguments), strict=True):
        assert_near(gradient, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph_forward_and_backward(dynamic, layout, device):
    torch.compiler.reset()
    head = Head().to(device, torch.float64)
    # aot_eager traces forward and backward like other backends, without a C++ compiler.
    compiled = torch.compile(head, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(2, 9, 8, 7), (3, 11, 13, 30)]:
        x, boxes = drawn(device, *size)
        assert_same(compiled, head, x.contiguous(memory_format=layout), boxes)


def test_compile_with_a_list_of_boxes(device):
    torch.compiler.reset()
    head = Head(as_list=True).to(device, torch.float64)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    assert_same(compiled, head, *drawn(device))


@both
def test_compile_with_inductor(case, device):
    """The default backend checks the strides of fake kernels. Only the op: compiling is slow."""
    torch.compiler.reset()
    call = case.draw(device)
    call["input"] = call["input"].contiguous(memory_format=torch.channels_last)
    output, found = gradients(torch.compile(case.function, fullgraph=True), call)
    expected, expected_gradients = gradients(case.function, call)
    assert_near(output, expected)
    for name, gradient in expected_gradients.items():
        assert_near(found[name], gradient, name)


def test_compile_under_autocast(device):
    torch.compiler.reset()
    head = Head().to(device)
    arguments = drawn(device, dtype=torch.float32)

    def run(function):
        with torch.autocast(device, torch.bfloat16):
            return function(*arguments)

    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    output = run(compiled)
    assert output.dtype == torch.bfloat16
    assert_near(output, run(head).double())


@pytest.mark.cuda
@pytest.mark.gpu
def test_cuda_graphs_after_a_linear_layer():
    """A kernel on a wrong stream would run before the layer that it reads from."""
    torch.compiler.reset()
    linear, head = nn.Linear(8, 8).cuda(), Head().cuda()

    def function(x, boxes):
        return head(linear(x), boxes)

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        arguments = drawn("cuda", dtype=torch.float32)
        torch.compiler.cudagraph_mark_step_begin()
        assert_near(compiled(*arguments).clone(), function(*arguments).double())


@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_batch_size_and_rois(strict, device):
    head = Head().to(device, torch.float64)
    sizes = {place: torch.export.Dim(f"size{place}", min=2, max=64) for place in (0, 2, 3)}
    rois = {0: torch.export.Dim("rois", min=2, max=100)}
    program = torch.export.export(
        head, drawn(device), dynamic_shapes={"x": sizes, "boxes": rois}, strict=strict
    )
    assert any("dcn_plugin.deform_roi_pool" in str(n.target) for n in program.graph.nodes)
    for size in [(4, 9, 8, 7), (5, 12, 9, 20), (3, 6, 30, 2)]:
        arguments = drawn(device, *size)
        assert_near(program.module()(*arguments), head(*arguments))


def test_jit_trace(device):
    head = Head().to(device, torch.float64)
    traced = torch.jit.trace(head, drawn(device))
    assert_same(traced, head, *drawn(device, 3, 11, 13, 20))


@pytest.mark.parametrize("as_list", [False, True])
def test_fake_tensors_give_shapes_without_data(as_list):
    with torch.device("meta"):
        head = Head(as_list=as_list)
        x, boxes = torch.empty(2, 4, 9, 8), torch.empty(7, 5)
    assert head(x, boxes).shape == (14 if as_list else 7, 8, 3, 2)


def op_arguments(case, device, dtype=torch.float64):
    """Returns the arguments of the registered op in order."""
    call = case.to_ps(case.draw(device, dtype))
    sizes = [list(call[k]) for k in ("output_size", "part_size", "group_size")]
    settings = [call[k] for k in ("spatial_scale", "sampling_ratio", "gamma", "mode")]
    return [call["input"], call["boxes"], call["offset"], *sizes, *settings]


OPCHECKED = {
    **{f"ps-{mode}": case for mode, case in ASYMMETRIC.items()},
    "plain": PLAIN["align"],
    "no-offset": replace(PLAIN["align"], classes=0),
    "no-rois": replace(PLAIN["align"], boxes=()),
    "nothing": replace(PLAIN["align"], boxes=(), batch=0),
}


@pytest.mark.parametrize(
    "dtype, layout",
    [(torch.float64, torch.channels_last), (torch.bfloat16, torch.contiguous_format)],
    ids=["float64-nhwc", "bfloat16-nchw"],
)
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_forward(name, layout, dtype, device):
    arguments = op_arguments(OPCHECKED[name], device, dtype)
    arguments[0] = arguments[0].contiguous(memory_format=layout)
    for place in (0, 2):
        if arguments[place] is not None:
            arguments[place].requires_grad_()
    opcheck(torch.ops.dcn_plugin.deform_roi_pool.default, arguments, dtype)


@pytest.mark.parametrize(
    "output_mask, layout",
    [
        ([True, True], torch.channels_last),
        ([True, False], torch.contiguous_format),
        ([False, True], torch.contiguous_format),
    ],
    ids=["both-nhwc", "input-nchw", "offset-nchw"],
)
@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck_backward(name, layout, output_mask, device):
    case = OPCHECKED[name]
    input, boxes, offset, *settings = op_arguments(case, device)
    input = input.contiguous(memory_format=layout)
    output = torch.ops.dcn_plugin.deform_roi_pool(input, boxes, offset, *settings)
    output_mask = [output_mask[0], output_mask[1] and offset is not None]
    torch.library.opcheck(
        torch.ops.dcn_plugin._deform_roi_pool_backward.default,
        (torch.randn_like(output), input, boxes, offset, *settings, output_mask),
    )


@both
def test_double_backward_raises(case, device):
    call = case.draw(device)
    leaf = call["input"].requires_grad_()
    output = case.function(**call)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="roi_pool: double backward is not supported"):
        gradient.sum().backward()


@both
def test_saves_no_more_than_its_arguments(case, device):
    call = case.draw(device)
    mine = {v.data_ptr() for v in call.values() if isinstance(v, torch.Tensor)}
    saved = []
    call["input"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        case.function(**call)
    assert {t.data_ptr() for t in saved} <= mine


def test_no_graph_without_requires_grad(device):
    case = ASYMMETRIC["align"]
    call = case.draw(device)
    assert not case.function(**call).requires_grad
    call["offset"].requires_grad_()
    with torch.no_grad():
        assert not case.function(**call).requires_grad
    with torch.inference_mode():
        assert case.function(**call).is_inference()
