# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A small fixed set of calls that reach all kernels, for compute-sanitizer.

`python -m tests.ops.sanitizer_calls DEVICE [MATCH]` runs them, or those whose name contains MATCH,
and prints the name of each when it is done.
Set PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is an allocation of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dcn_plugin.ops import deform_conv2d
from tests.deterministic import deterministic_algorithms
from tests.ops import bad_inputs, conv_cases, roi_bad_inputs, roi_cases

CONVOLUTIONS = {
    "asymmetric": conv_cases.ASYMMETRIC,
    "no-mask": conv_cases.CASES["no-mask"],
    "1x1": conv_cases.CASES["1x1"],
    "empty": conv_cases.EMPTY,
    # Channels for 16-byte accesses.
    "wide": replace(conv_cases.ASYMMETRIC, in_channels=96, out_channels=16),
}
ROIS = {
    **roi_cases.BOTH,
    # One channel per class: never accessed two at a time.
    "odd": replace(roi_cases.ASYMMETRIC["align"], channels=3),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
# Calls that reach the deterministic kernels, with and without 16-byte accesses.
DETERMINISTIC = ("conv-asymmetric", "conv-wide", "roi-odd", "roi-wide")
# Of the extreme values, those that move sampling locations to nowhere and far away.
EXTREME = ("nan", "1e+30")


def run(gradients: Callable, function: Callable, call: dict[str, Any], layout: str) -> None:
    """Runs forward and backward, and waits for the results."""
    call = {**call, "input": call["input"].contiguous(memory_format=LAYOUTS[layout])}
    _, found = gradients(function, call)
    for tensor in found.values():
        tensor.cpu()


def regular(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields names and calls with regular values."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for name, case in CONVOLUTIONS.items():
                call = case.draw(device, dtype)
                job = partial(run, conv_cases.gradients, deform_conv2d, call, layout)
                yield f"conv-{name}-{dtype}-{layout}", job
            for name, case in ROIS.items():
                call = case.draw(device, dtype)
                job = partial(run, roi_cases.gradients, case.function, call, layout)
                yield f"roi-{name}-{dtype}-{layout}", job


def deterministic(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields some of the regular calls, to run with PyTorch's deterministic algorithms."""

    def job(call: Callable[[], None]) -> None:
        with deterministic_algorithms():
            call()

    for name, call in regular(device):
        if name.startswith(DETERMINISTIC) or "float32" in name:
            yield f"{name}-deterministic", partial(job, call)


def extreme(device: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields names and calls with NaN and huge values."""
    for name in (name for name in bad_inputs.EXTREME if name.endswith(EXTREME)):
        yield f"conv-{name}", partial(bad_inputs.check_extreme, name, device)
    names = [name for name in roi_bad_inputs.EXTREME if name.endswith(EXTREME)]
    names += roi_bad_inputs.BATCH_INDICES if device == "cuda" else []  # errors on the CPU
    for name in names:
        yield f"roi-{name}", partial(roi_bad_inputs.check_extreme, name, device)


def main(device: str, match: str = "") -> None:
    torch.manual_seed(0)
    for name, call in (*regular(device), *deterministic(device), *extreme(device)):
        if match in name:
            call()
            print(f"done: {name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
