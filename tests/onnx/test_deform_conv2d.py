# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Deformable convolution as ONNX DeformConv, in ONNX Runtime."""

from __future__ import annotations

import functools
import random
import re
import sys

import pytest
import torch
from onnx import TensorProto, checker, helper
from torch import Tensor, nn
from torch.export import Dim

import dcn_plugin.onnx
from dcn_plugin.layers import DeformConv2dPack
from dcn_plugin.onnx.ops import TRANSLATES_AT_TARGET
from dcn_plugin.ops import deform_conv2d
from tests.onnx.runtime import (
    Calls,
    Export,
    automatic,
    both_ways,
    by_table,
    causes,
    needs_onnx_ops,
    op_types,
    run,
)
from tests.ops.conv_cases import ASYMMETRIC, CASES, ConvCase, cast
from tests.tolerances import assert_near

NAMES = ("input", "offset", "weight", "bias", "mask")


def random_cases(count: int) -> list[ConvCase]:
    """Returns convolutions of random sizes with at least one output."""
    draw = random.Random(0)
    cases = []
    while len(cases) < count:
        pair = lambda low, high: (draw.randint(low, high), draw.randint(low, high))  # noqa: E731
        groups, offset_groups = draw.choice([(1, 1), (2, 3), (3, 2), (6, 1), (1, 6), (2, 2)])
        case = ConvCase(
            batch=draw.randint(1, 3),
            out_channels=6 * draw.randint(1, 2),
            size=pair(1, 12),
            kernel=pair(1, 4),
            stride=pair(1, 3),
            padding=pair(0, 3),
            dilation=pair(1, 3),
            groups=groups,
            offset_groups=offset_groups,
            bias=draw.random() < 0.5,
            mask=draw.random() < 0.5,
        )
        if min(case.out_size) > 0:
            cases.append(case)
    return cases


def all_cases() -> list[ConvCase]:
    return [*CASES.values(), *random_cases(20)]


def calls_of(cases: list[ConvCase], dtype: torch.dtype) -> Calls:
    return Calls([(deform_conv2d, case.draw(dtype=dtype)) for case in cases])


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_equals_onnxruntime(export: Export, dtype: torch.dtype) -> None:
    module = calls_of(all_cases(), dtype)
    model = export(module, (module.tensors,))
    assert set(op_types(model)) == {"DeformConv"}
    expected = module(module.tensors)
    for found, one in zip(run(model, (module.tensors,)), expected, strict=True):
        assert_near(found, one)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_casts_where_dtypes_differ(export: Export, dtype: torch.dtype) -> None:
    calls = [
        (deform_conv2d, cast(ASYMMETRIC.draw(dtype=dtype), torch.float32, names))
        for names in (["offset"], ["offset", "mask"])
    ]
    calls += [(deform_conv2d, cast(ASYMMETRIC.draw(dtype=dtype), torch.bfloat16, ["mask"]))]
    calls[2][1]["mask"] = calls[2][1]["mask"].to(torch.float64)
    module = Calls(calls)
    model = export(module, (module.tensors,))
    for found, expected in zip(run(model, (module.tensors,)), module(module.tensors), strict=True):
        assert found.dtype == dtype
        assert_near(found, expected)


class Layers(nn.Module):
    """DCNv1 and DCNv2, with offsets of several pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.v1 = DeformConv2dPack(4, 6, (3, 2), (2, 1), (1, 2), groups=2)
        self.v2 = DeformConv2dPack(6, 5, 3, 1, 2, 2, bias=False, offset_groups=3, modulated=True)
        for layer in (self.v1, self.v2):
            nn.init.normal_(layer.offset_conv.weight, std=0.5)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.v2(self.v1(images).relu())


@both_ways
@torch.no_grad()
def test_layers_with_dynamic_sizes(export: Export) -> None:
    module, sizes = Layers(), {0: Dim("batch"), 2: Dim("height", min=8), 3: Dim("width", min=8)}
    model = export(module, (torch.randn(2, 4, 16, 12),), ({**sizes},))
    assert op_types(model).count("DeformConv") == 2
    for size in ((2, 4, 16, 12), (1, 4, 9, 31), (3, 4, 40, 8)):
        images = torch.randn(size)
        assert_near(*run(model, (images,)), module(images), allowed=1e-5)


def node_of(model) -> dict:
    (node,) = (n for n in model.graph.node if n.op_type == "DeformConv")
    return {"inputs": list(node.input)} | {
        a.name: helper.get_attribute_value(a) for a in node.attribute
    }


@both_ways
def test_is_the_standard_operator(export: Export) -> None:
    case = ConvCase(bias=False, groups=2, offset_groups=3, stride=(2, 1), dilation=(2, 1))
    module = calls_of([case], torch.float32)
    model = export(module, (module.tensors,))
    assert node_of(model) == {
        "inputs": [f"tensors_0_{n}" for n in ("input", "weight", "offset")]
        + ["", "tensors_0_mask"],
        "kernel_shape": [3, 2],
        "strides": [2, 1],
        "pads": [1, 0, 1, 0],
        "dilations": [2, 1],
        "group": 2,
        "offset_group": 3,
    }


@both_ways
@pytest.mark.parametrize("opset", [None, 19, 21, 23])
def test_opsets(export: Export, opset: int | None) -> None:
    module = calls_of([ASYMMETRIC], torch.float32)
    options = {} if opset is None else {"opset_version": opset}
    model = export(module, (module.tensors,), **options)
    assert model.opset_import[0].version >= 19 and (
        opset is None or model.opset_import[0].version == opset
    )
    assert_near(*run(model, (module.tensors,)), *module(module.tensors))


@both_ways
def test_bfloat16_needs_opset_22(export: Export) -> None:
    module = calls_of([ASYMMETRIC], torch.bfloat16)
    model = export(module, (module.tensors,), opset_version=22)
    checker.check_model(model, full_check=True)
    assert op_types(model) == ["DeformConv"]
    assert {i.type.tensor_type.elem_type for i in model.graph.input} == {TensorProto.BFLOAT16}
    with pytest.raises(Exception) as error:
        export(module, (module.tensors,), opset_version=21)
    assert "22" in causes(error.value) and "21" in causes(error.value)


@pytest.mark.skipif(not TRANSLATES_AT_TARGET, reason="this PyTorch always translates at opset 18")
def test_table_rejects_opset_18() -> None:
    module = calls_of([ASYMMETRIC], torch.float32)
    with pytest.raises(Exception) as error:
        by_table(module, (module.tensors,), opset_version=18)
    assert "opset_version=19" in causes(error.value)


@needs_onnx_ops
def test_table_and_automatic_together() -> None:
    module = calls_of([ASYMMETRIC], torch.float32)
    table = dcn_plugin.onnx.translations
    model = automatic(module, (module.tensors,), custom_translation_table=table)
    assert op_types(model) == ["DeformConv"]


class Autocast(nn.Module):
    """Deformable convolution under autocast."""

    def forward(self, *tensors: Tensor) -> Tensor:
        call = dict(zip(NAMES, tensors, strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            return deform_conv2d(**call, **ASYMMETRIC.geometry)


@both_ways
def test_autocast_casts_all_but_the_offset(export: Export) -> None:
    call = ASYMMETRIC.draw(dtype=torch.float32)
    tensors = tuple(call[name] for name in NAMES)
    model = export(Autocast().eval(), tensors, opset_version=22)
    expected = Autocast()(*tensors)
    # NumPy has no bfloat16.
    model.graph.node.append(helper.make_node("Cast", [model.graph.output[0].name], ["f"], to=1))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("f", 1, expected.shape))
    assert_near(*run(model, tensors), expected.float(), allowed=torch.finfo(torch.bfloat16).eps)


@needs_onnx_ops
def test_autocast_casts_weights_of_another_dtype_than_the_input() -> None:
    """As after a plain convolution under autocast."""
    call = ASYMMETRIC.draw(dtype=torch.float32)
    call["input"] = call["input"].bfloat16()

    class Autocast(nn.Module):
        def forward(self, tensors: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return deform_conv2d(**tensors, **settings)

    settings = {name: value for name, value in call.items() if not isinstance(value, Tensor)}
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    model = automatic(Autocast().eval(), (tensors, {}), opset_version=22)
    assert "DeformConv" in [node.op_type for node in model.graph.node]


def test_programs_keep_the_op() -> None:
    module = calls_of([ASYMMETRIC], torch.float32)
    program = torch.export.export(module, (module.tensors,), strict=False)
    assert "dcn_plugin.deform_conv2d" in str(program.graph)


def test_missing_onnxscript_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dcn_plugin.onnx.ops", raising=False)
    monkeypatch.delattr(dcn_plugin.onnx, "ops", raising=False)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"needs onnxscript.*\[onnx\]"):
        _ = dcn_plugin.onnx.translations


@needs_onnx_ops
@pytest.mark.parametrize(
    "change, message",
    [
        ({"offset": torch.zeros(1, 17, 5, 5)}, "offset must have .*got 17"),
        ({"mask": torch.zeros(1, 8, 5, 5)}, "mask must have 9 channels.*got 8"),
        ({"weight": torch.zeros(2, 3, 3, 3)}, r"weight.size\(1\) must divide.*got 4 channels"),
    ],
)
def test_wrong_channels_are_not_exported(change: dict[str, Tensor], message: str) -> None:
    tensors = {
        "input": torch.zeros(1, 4, 5, 5),
        "offset": torch.zeros(1, 18, 5, 5),
        "weight": torch.zeros(2, 4, 3, 3),
        "mask": torch.zeros(1, 9, 5, 5),
        **change,
    }

    module = Calls([(functools.partial(deform_conv2d, padding=1), tensors)])
    for export in (automatic, torch.export.export):
        with pytest.raises(Exception) as error:
            export(module, (module.tensors,))
        assert re.search(message, causes(error.value))
