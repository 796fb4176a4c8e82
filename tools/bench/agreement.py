# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Compares the results of other libraries with ours, before any is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .cases import (
    DEFORMOPS,
    MMCV,
    NO_OFFSETS,
    ONNX_RUNTIME,
    OURS,
    TORCHVISION,
    Call,
    Rival,
    Setting,
)
from .onnx_runtime import OnnxRuntimeCall
from .table import title
from .timing import UNSUPPORTED

OTHERS = (TORCHVISION, MMCV, DEFORMOPS, ONNX_RUNTIME)
# Of ||theirs - ours|| / ||ours||. Coarse in half precision, in which torchvision and mmcv compute
# the sampling locations; the tests compare the values exactly.
LIMITS = {"float32": 1e-2, "tf32": 1e-2, "float16": 0.3, "bfloat16": 0.3}


@dataclass(frozen=True)
class Problem:
    """A rival that fails (`differs` is false) or whose results differ."""

    rival: Rival
    differs: bool
    line: str


def compare(
    calls: Mapping[Rival, Call | OnnxRuntimeCall], name: str, setting: Setting
) -> tuple[dict[Rival, float], list[Problem]]:
    """Runs our call and those of other libraries once; errors of our own are raised.

    Args:
        calls: The calls of a case.
        name: The name of the case, for messages.
        setting: Device, dtype and batch.

    Returns:
        the largest relative difference of output and gradients of each rival, and the problems.
        Rivals that do not support the dtype are in neither.
    """
    differences, problems, expected = {}, [], {}
    for rival in (rival for rival in calls if rival.name in OTHERS):
        if rival.layout not in expected:
            expected[rival.layout] = ours(calls, rival.layout).run("forward+backward")
        message, differs = "", False
        try:
            found = calls[rival].run(calls[rival].directions[-1])
            # The output is the first, and the only one without a backward pass.
            differences[rival] = difference(found, expected[rival.layout][: len(found)])
        except Exception as error:  # whatever another library raises, the others are timed
            if UNSUPPORTED.search(str(error)):
                continue
            message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            differs = not differences[rival] <= LIMITS[setting.dtype]  # also if it is NaN
            message = f"differs from {OURS} by {differences[rival]:.1e}" if differs else ""
        if message:
            line = f"{rival.name}, {rival.layout}: {message} ({title(name, setting)})"
            problems.append(Problem(rival, differs, line))
    return differences, problems


def ours(calls: Mapping[Rival, Call], layout: str) -> Call:
    """Returns our call that computes the same as the other libraries."""
    same = calls.get(Rival(NO_OFFSETS, layout))
    return calls[Rival(OURS, layout)] if same is None else same


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Returns the largest relative difference of corresponding tensors, in the Euclidean norm."""
    pairs = [(f.double(), e.double()) for f, e in zip(found, expected, strict=True)]
    ratios = [((f - e).norm() / e.norm()).item() for f, e in pairs]
    return float("nan") if any(ratio != ratio for ratio in ratios) else max(ratios)
