#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Times the ops beside torchvision's and beside the plain convolution.

    python tools/benchmark.py [--device cpu] [--threads 1 2] [--repeat 7] [--json FILE]

The rivals of a row take turns in one run, so that a machine whose speed drifts slows them all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from dcn_plugin import env
from dcn_plugin.ops import deform_conv2d

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Shape:
    """A 3x3 convolution that keeps size and channels."""

    name: str
    channels: int
    height: int
    width: int
    dilation: int
    batch: int = 1


SHAPES = (
    Shape("res5 of R-101, 600x1000", 512, 38, 63, 2),
    Shape("res4", 256, 38, 63, 1),
    Shape("res3 at stride 8", 128, 75, 125, 1),
)


@dataclass(frozen=True)
class Row:
    """Times of one rival, in milliseconds."""

    shape: str
    threads: int
    rival: str
    direction: str
    least: float
    median: float


def rivals_of(shape: Shape, device: str) -> dict[str, tuple[Function, tuple]]:
    """Returns the functions to time on a shape, each with its arguments."""
    size = (shape.batch, shape.channels, shape.height, shape.width)
    input = torch.randn(size, device=device, requires_grad=True)
    weight = torch.randn(shape.channels, shape.channels, 3, 3, device=device, requires_grad=True)
    offset = torch.randn(shape.batch, 18, *size[2:], device=device, requires_grad=True)
    place = (1, shape.dilation, shape.dilation)
    deformable = (input, offset, weight, None, *place)
    return {
        "dcn_plugin": (deform_conv2d, deformable),
        "torchvision": (torchvision.ops.deform_conv2d, deformable),
        "plain conv": (F.conv2d, (input, weight, None, *place)),
    }


def seconds_of(function: Function, args: tuple, backward: bool, device: str) -> float:
    """Times one call, and its backward pass with a random output gradient."""
    for argument in args:
        if isinstance(argument, Tensor):
            argument.grad = None
    with torch.set_grad_enabled(backward):
        synchronize(device)
        start = time.perf_counter()
        output = function(*args)
        synchronize(device)
        seconds = time.perf_counter() - start
        if backward:
            gradient = torch.randn_like(output)
            synchronize(device)
            start = time.perf_counter()
            output.backward(gradient)
            synchronize(device)
            seconds += time.perf_counter() - start
    return seconds


def synchronize(device: str) -> None:
    """Waits for the GPU."""
    if device != "cpu":
        torch.cuda.synchronize()


def measure(shape: Shape, threads: int, device: str, repeat: int) -> list[Row]:
    """Times all rivals on one shape, in turns, after one call that is not counted."""
    rows = []
    rivals = rivals_of(shape, device)
    for backward in (False, True):
        times: dict[str, list[float]] = {name: [] for name in rivals}
        for turn in range(repeat + 1):
            for name, (function, args) in rivals.items():
                milliseconds = 1e3 * seconds_of(function, args, backward, device)
                if turn > 0:
                    times[name].append(milliseconds)
        direction = "forward+backward" if backward else "forward"
        rows += [
            Row(shape.name, threads, name, direction, min(found), statistics.median(found))
            for name, found in times.items()
        ]
    return rows


def print_rows(rows: list[Row]) -> None:
    """Prints one shape's rows with each rival's median as a multiple of the plain convolution."""
    plain = {row.direction: row.median for row in rows if row.rival == "plain conv"}
    for row in rows:
        ratio = row.median / plain[row.direction]
        print(
            f"{row.shape:24} {row.threads:7} {row.direction:17} {row.rival:12}"
            f"{row.least:10.1f}{row.median:10.1f}{ratio:9.2f}",
            flush=True,
        )


def main() -> None:
    """Measures every shape and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()

    print(env.report())
    heads = f"{'least':>10}{'median':>10}{'x plain':>9}"
    print(f"\n{'float32, ms':24} {'threads':>7} {'':17} {'':12}{heads}")
    rows: list[Row] = []
    for threads in sorted(set(args.threads)):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            found = measure(shape, threads, args.device, args.repeat)
            print_rows(found)
            rows += found
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
