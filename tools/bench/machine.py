# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The environment of a benchmark: versions, processors and the GEMM peak."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

from dcn_plugin import env

from .cases import DEFORMOPS, MMCV, Setting
from .timing import measure

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class GemmSize:
    """Sizes for measuring the peak: side of a square matrix, channels and side of a feature map."""

    side: int
    channels: int
    map: int
    batch: int = 1


SIZES = {"cpu": GemmSize(2048, 512, 64), "cuda": GemmSize(8192, 1024, 64, batch=16)}
QUICK_SIZE = GemmSize(128, 16, 16)


@dataclass(frozen=True)
class Peak:
    """The fastest GEMM that was measured."""

    dtype: str
    threads: int
    gflops: float
    by: str


def environment() -> dict[str, str]:
    """Returns versions, processors and the compiled ops by name."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.M)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "PyTorch": f"{torch.__version__}, torchvision {torchvision.__version__}",
        "Rivals": ", ".join(f"{name} {version}" for name, version in rivals()) or "none installed",
        "CPU": f"{model[1] if model else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}",
        "Threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "GPU": ", ".join(gpus) or "none",
        **dict(env.compiled()),
        "Commit": commit() or "unknown",
    }


def rivals() -> Iterator[tuple[str, str]]:
    """Yields the other libraries of deformable convolution that are installed."""
    for name in (MMCV, DEFORMOPS, "onnxruntime"):
        with suppress(metadata.PackageNotFoundError):
            yield name, metadata.version(name)


def commit() -> str | None:
    """Returns the commit of the sources, with "-dirty" if modified; None without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gemm_peak(setting: Setting, p: GemmSize, seconds: float) -> Peak | None:
    """Times large GEMMs and convolutions; returns None if none supports the dtype.

    Args:
        setting: The device, dtype and threads.
        p: The sizes.
        seconds: The time for each.
    """
    setting.apply()
    a, b = setting.randn(p.side, p.side), setting.randn(p.side, p.side)
    x = setting.randn(p.batch, p.channels, p.map, p.map, layout="nhwc")
    point = setting.randn(p.channels, p.channels, 1, 1, layout="nhwc")
    square = setting.randn(p.channels, p.channels, 3, 3, layout="nhwc")
    functions = {
        "torch.mm": lambda: torch.mm(a, b),
        "1x1 conv": lambda: F.conv2d(x, point),
        "3x3 conv": lambda: F.conv2d(x, square, padding=1),
    }
    pixel = 2 * p.batch * p.map**2 * p.channels**2
    flop = {"torch.mm": 2 * p.side**3, "1x1 conv": pixel, "3x3 conv": 9 * pixel}
    times = measure(functions, setting.device, seconds)
    peaks = [
        Peak(setting.dtype, setting.threads, flop[name] / min(measured.wall) / 1e6, name)
        for name, measured in times.items()
        if measured is not None
    ]
    return max(peaks, key=lambda peak: peak.gflops, default=None)
