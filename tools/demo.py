#!/usr/bin/env python
# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Shows what a deformable convolution does, on a picture drawn here.

A 3x3 filter that averages its nine taps is told by offsets to turn and grow with the distance
from the middle of the picture. Writes the picture, the result and the taps of some output cells
to one PNG.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from dcn_plugin.ops import deform_conv2d

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SIZE = 160
TAPS = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)], dtype=torch.float32)  # (9, 2)


def draw_picture(size: int) -> Tensor:
    """Returns a checkerboard with a bright ring, Tensor[1, 1, size, size]."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    board = ((y // 10 + x // 10) % 2).float() * 0.6
    radius = torch.hypot(y - size / 2, x - size / 2)
    board[(radius - size / 3).abs() < 3] = 1.0
    return board[None, None]


def swirl_offsets(size: int) -> Tensor:
    """Returns offsets that turn and spread the taps, more so away from the middle.

    Returns:
        Tensor[1, 18, size, size], (dy, dx) per tap.
    """
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    distance = torch.hypot(y - size / 2, x - size / 2) / (size / 2)  # (H, W)
    angle, scale = distance * torch.pi / 2, 1 + 5 * distance
    sin, cos = angle.sin() * scale, angle.cos() * scale
    dy, dx = TAPS[:, 0, None, None], TAPS[:, 1, None, None]  # (9, 1, 1)
    moved = torch.stack([cos * dy - sin * dx, sin * dy + cos * dx], dim=1)  # (9, 2, H, W)
    return (moved - TAPS[:, :, None, None]).reshape(1, 18, size, size)


def save_figure(
    picture: Tensor, plain: Tensor, deformed: Tensor, offset: Tensor, path: Path
) -> None:
    """Draws the three maps side by side, with the taps of nine cells on the first."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
    titles = ("taps of nine output cells", "average of the plain taps", "of the deformed taps")
    for axis, image, title in zip(axes, (picture, plain, deformed), titles, strict=True):
        axis.imshow(image[0, 0], cmap="gray", vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_axis_off()
    for y, x in ((y, x) for y in (20, 80, 140) for x in (20, 80, 140)):
        taps = TAPS + offset[0, :, y, x].reshape(9, 2) + torch.tensor([y, x])
        axes[0].plot(taps[:, 1], taps[:, 0], "r.", markersize=4)
        axes[0].plot(x, y, "g+", markersize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    """Draws, convolves and saves."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder")
    args = parser.parse_args()

    picture, offset = draw_picture(SIZE), swirl_offsets(SIZE)
    weight = torch.full((1, 1, 3, 3), 1 / 9)
    start = time.perf_counter()
    deformed = deform_conv2d(picture, offset, weight, padding=1)
    seconds = time.perf_counter() - start
    plain = deform_conv2d(picture, torch.zeros_like(offset), weight, padding=1)

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "deform_conv2d.png"
    save_figure(picture, plain, deformed, offset, path)
    spread = offset[0].reshape(9, 2, SIZE, SIZE).norm(dim=1).mean()
    print(f"deform_conv2d moved {offset.numel() // 2} taps by {spread:.1f} pixels on average")
    print(f"in {seconds * 1e3:.1f} ms; the picture is {path}")


if __name__ == "__main__":
    main()
