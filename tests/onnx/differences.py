# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Prints the largest differences between ONNX Runtime and the ops: the table of docs/onnx.md.

Usage: python -m tests.onnx.differences
"""

from __future__ import annotations

from functools import partial

import onnx
import onnxruntime
import onnxscript
import torch

from tests.onnx import test_deform_conv2d, test_roi_pool
from tests.onnx.runtime import automatic, by_table, run
from tests.tolerances import relative_error

DRAWS = 20  # of the values of all tensors


def main() -> None:
    all_cases = test_deform_conv2d.all_cases()
    for package in (torch, onnx, onnxscript, onnxruntime):
        print(package.__name__, package.__version__)
    torch.manual_seed(0)
    for dtype in (torch.float64, torch.float32, torch.float16):
        for name, draw in (
            ("convolution", partial(test_deform_conv2d.calls_of, all_cases, dtype)),
            ("RoI pooling", partial(test_roi_pool.calls_of, test_roi_pool.CASES, dtype)),
        ):
            module = draw()
            errors = []
            for export in (automatic, by_table):
                model = export(module, (module.tensors,))
                for _ in range(DRAWS):
                    args = (draw().tensors,)
                    pairs = zip(run(model, args), module(*args), strict=True)
                    errors += [relative_error(found, expected) for found, expected in pairs]
            print(f"{name} {dtype!s:14s} {max(errors):.1e} of the largest value")


if __name__ == "__main__":
    main()
