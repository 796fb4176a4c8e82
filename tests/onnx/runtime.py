# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Exports modules to ONNX in every way, and runs them in ONNX Runtime."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import onnx
import onnxscript  # noqa: F401  the exporter needs it
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dcn_plugin.onnx import decompositions, translations

# The first with DeformConv on the CPU; the last for Python 3.10 is 1.23.
onnxruntime = pytest.importorskip("onnxruntime", minversion="1.25")

Export = Callable[..., onnx.ModelProto]


def automatic(module: nn.Module, args: tuple, dynamic_shapes: Any = None, **options: Any) -> Any:
    """Exports a module, without anything of dcn_plugin."""
    return torch.onnx.export(
        module, args, dynamic_shapes=dynamic_shapes, dynamo=True, verbose=False, **options
    ).model_proto


def by_table(module: nn.Module, args: tuple, dynamic_shapes: Any = None, **options: Any) -> Any:
    """Exports a program, with the table and the decompositions."""
    program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
    program = program.run_decompositions(decompositions)
    options = {"dynamo": True, "verbose": False, "opset_version": 19, **options}
    return torch.onnx.export(program, custom_translation_table=translations, **options).model_proto


needs_onnx_ops = pytest.mark.skipif(
    not hasattr(torch.onnx, "ops"), reason="this PyTorch has no torch.onnx.ops"
)
both_ways = pytest.mark.parametrize(
    "export", [pytest.param(automatic, marks=needs_onnx_ops), by_table]
)


class Calls(nn.Module):
    """Calls of functions, so that one export tests many."""

    def __init__(self, calls: list[tuple[Callable[..., Tensor], dict[str, Any]]]) -> None:
        super().__init__()
        self.functions = [function for function, _ in calls]
        self.tensors = [
            {k: v for k, v in call.items() if isinstance(v, Tensor)} for _, call in calls
        ]
        self.settings = [
            {k: v for k, v in call.items() if not isinstance(v, Tensor)} for _, call in calls
        ]
        self.eval()

    def forward(self, tensors: list[dict[str, Tensor]]) -> list[Tensor]:
        return [
            function(**own, **settings)
            for function, own, settings in zip(self.functions, tensors, self.settings, strict=True)
        ]


def run(model: onnx.ModelProto, args: tuple) -> list[Tensor]:
    """Checks a model, and runs it in ONNX Runtime on the CPU."""
    onnx.checker.check_model(model, full_check=True)
    stream = io.BytesIO()
    onnx.save(model, stream)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(stream.getvalue(), options)
    names = [i.name for i in session.get_inputs()]
    feed = {k: v.numpy() for k, v in zip(names, tree_leaves(args), strict=True)}
    return [torch.from_numpy(output) for output in session.run(None, feed)]


def op_types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def causes(error: BaseException | None) -> str:
    """Returns the messages of an exception and of all its causes."""
    messages = []
    while error is not None:
        messages.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(messages)
