# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Export of the ops to standard ONNX operators by `torch.onnx.export(dynamo=True)`.

Where PyTorch has `torch.onnx.ops`, modules that use the ops are exported without anything from
here. For a `torch.export.ExportedProgram`, and for older versions of PyTorch, `translations` is the
argument `custom_translation_table`. RoI pooling in a program is replaced before, by
`program.run_decompositions(decompositions)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..ops._roi_pool_decomposition import decompose_deform_roi_pool

__all__ = ["decompositions", "translations"]

Table = dict[Callable[..., Any], Callable[..., Any]]

translations: Table  # made by __getattr__, so that only its use needs onnxscript
decompositions: Table = {torch.ops.dcn_plugin.deform_roi_pool.default: decompose_deform_roi_pool}


def __getattr__(name: str) -> Any:
    """Makes `translations` when it is used."""
    if name != "translations":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from . import ops
    except ModuleNotFoundError as error:
        raise ImportError(
            f"dcn_plugin.onnx.translations needs {error.name}, as torch.onnx.export does; "
            "install it with: pip install --no-build-isolation -e '.[onnx]'"
        ) from error
    return {
        torch.ops.dcn_plugin.deform_conv2d.default: ops.deform_conv2d,
        torch.ops.dcn_plugin.deform_roi_pool.default: ops.deform_roi_pool,
    }
