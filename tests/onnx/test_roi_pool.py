# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI pooling in mode `align` as standard operators, in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.export import Dim

from tests.onnx.runtime import (
    Calls,
    Export,
    automatic,
    by_table,
    causes,
    needs_onnx_ops,
    op_types,
    run,
    translations,
)
from tests.ops.roi_cases import BOXES, HALF_PIXEL_BOXES, RoiCase
from tests.tolerances import assert_near, tolerance

PLAIN = RoiCase(classes=0, ratio=2)
HALF_PIXELS = RoiCase(classes=0, ratio=1, boxes=tuple(HALF_PIXEL_BOXES.values()))
DEFORMABLE = RoiCase(classes=1, ratio=2)
POSITION_SENSITIVE = RoiCase(classes=3, ratio=3, part=(2, 3), group=(3, 2))
# A scale by which coordinates in half precision would be rounded.
SCALED = replace(PLAIN, scale=1 / 14)
CASES = [PLAIN, HALF_PIXELS, SCALED, DEFORMABLE, POSITION_SENSITIVE]


def calls_of(cases: list[RoiCase], dtype: torch.dtype) -> Calls:
    return Calls([(case.function, case.draw(dtype=dtype)) for case in cases])


def assert_runs(model: Any, cases: list[RoiCase], dtype: torch.dtype) -> None:
    module = calls_of(cases, dtype)
    expected = module(module.tensors)
    for found, one in zip(run(model, (module.tensors,)), expected, strict=True):
        assert one.any() and found.dtype == dtype
        # In float64 the exporter rounds gamma and spatial_scale to float32.
        rounded = torch.float32 if dtype == torch.float64 else dtype
        assert_near(found, one, allowed=tolerance(rounded))


@pytest.mark.parametrize(
    "export, dtype",
    [
        pytest.param(automatic, torch.float32, marks=needs_onnx_ops),
        pytest.param(automatic, torch.float64, marks=needs_onnx_ops),
        pytest.param(automatic, torch.float16, marks=needs_onnx_ops),
        (by_table, torch.float16),
    ],
)
def test_equals_onnxruntime_at_other_sizes(export: Export, dtype: torch.dtype) -> None:
    module = calls_of(CASES, dtype)
    shapes = [
        {k: {0: Dim.AUTO, **({2: Dim.AUTO, 3: Dim.AUTO} if k == "input" else {})} for k in tensors}
        for tensors in module.tensors
    ]
    model = export(module, (module.tensors,), (shapes,))
    assert op_types(model).count("RoiAlign") == (3 if export is automatic else 0)
    assert_runs(model, CASES, dtype)
    boxes = tuple(list(BOXES.values())[::-2])
    other = [replace(case, size=(14, 5), batch=2, boxes=boxes) for case in CASES]
    assert_runs(model, other, dtype)


@needs_onnx_ops
def test_casts_where_dtypes_differ() -> None:
    """Boxes and offsets in float32 with maps in float16, as under autocast."""
    module = calls_of([PLAIN, DEFORMABLE], torch.float32)
    for tensors in module.tensors:
        tensors["input"] = tensors["input"].half()
    model = automatic(module, (module.tensors,))
    expected = module(module.tensors)
    for found, one in zip(run(model, (module.tensors,)), expected, strict=True):
        assert found.dtype == torch.float16
        assert_near(found, one)


@needs_onnx_ops
@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "bin"}, "mode 'align' is available as standard operators, got 'bin'"),
        ({"mode": "msra"}, "mode 'align' is available as standard operators, got 'msra'"),
        ({"ratio": 0}, "got sampling_ratio=0"),
    ],
)
def test_rejects_other_modes_by_name(change: dict[str, Any], message: str) -> None:
    module = calls_of([replace(DEFORMABLE, **change)], torch.float32)
    with pytest.raises(Exception) as error:
        automatic(module, (module.tensors,))
    assert message in causes(error.value)


def test_table_says_how_to_replace_it() -> None:
    module = calls_of([DEFORMABLE], torch.float32)
    program = torch.export.export(module, (module.tensors,), strict=False)
    with pytest.raises(Exception) as error:
        torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=19,
            custom_translation_table=translations,
        )
    assert "run_decompositions(dcn_plugin.onnx.decompositions)" in causes(error.value)
