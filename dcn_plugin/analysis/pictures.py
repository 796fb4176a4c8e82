# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Pictures of what a network samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from dcn_plugin.files import whole_file

from .recording import Sampled
from .sampling import Trace

POINTS, CENTRE, RESTING = "#ff2222", "#22ff44", "#ffd700"  # as in the paper
COLUMN = 3.0  # inches
WHEEL = 0.3  # of a field's height, in its corner


@dataclass(frozen=True)
class Panel:
    """An image of a picture, and what is drawn on it."""

    title: str
    image: np.ndarray  # (height, width, 3) bytes, red, green, blue
    trace: Trace | None = None  # in pixels of this image, like the next
    resting: Tensor | None = None  # (bins, 4), parts without offsets
    bins: Tensor | None = None  # (bins, 4), and with them


def save_panels(path: Path, panels: Sequence[Sequence[Panel]]) -> None:
    """Saves rows of panels.

    Args:
        path: of the PNG.
        panels: row by row.
    """
    rows, columns = len(panels), max(len(row) for row in panels)
    first = panels[0][0].image.shape
    height = COLUMN * min(max(first[0] / first[1], 0.4), 2.0) + 0.3
    size = (COLUMN * columns, height * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for of_row, row in zip(axes, panels, strict=True):
        for axis in of_row:
            axis.set_axis_off()
        for axis, panel in zip(of_row, row, strict=False):
            draw_panel(axis, panel)
    with whole_file(path) as half:
        figure.savefig(half, dpi=110, format="png")


def draw_panel(axis: Axes, panel: Panel) -> None:
    """Draws a panel.

    Args:
        axis: of matplotlib.
        panel: to draw.
    """
    axis.imshow(panel.image)  # the middles of pixels lie at whole numbers
    axis.set_title(panel.title, fontsize=9)
    for boxes, colour in ((panel.resting, RESTING), (panel.bins, POINTS)):
        for left, top, right, bottom in () if boxes is None else boxes.tolist():
            corner = left - 0.5, top - 0.5  # of pixels, whose edges boxes are in
            axis.add_patch(
                Rectangle(corner, right - left, bottom - top, fill=False, color=colour, lw=0.8)
            )
    if panel.trace is not None:
        draw_trace(axis, panel.trace)
    height, width = panel.image.shape[:2]
    margin = 0.08 * max(height, width) if panel.trace is not None else 0.5
    axis.set_xlim(-margin, width - 1 + margin)
    axis.set_ylim(height - 1 + margin, -margin)


def draw_trace(axis: Axes, trace: Trace) -> None:
    """Draws the points of the image that a cell samples, and the cell.

    Args:
        axis: of matplotlib.
        trace: in pixels.
    """
    points, weights = trace.ends.cpu().numpy(), trace.end_weights.cpu().numpy()
    size = 5 if len(points) > 100 else 20
    # Points may share a place: those that weigh more, and those below others, show through.
    alpha = np.clip(0.75 * weights / max(weights.max(initial=0), 1e-6), 0, 1)
    if len(points):  # else all taps lie off the map
        axis.scatter(points[:, 1], points[:, 0], s=size, c=POINTS, alpha=alpha, linewidths=0)
    row, column = trace.centre
    axis.plot(column, row, "o", color=CENTRE, markersize=6, markeredgecolor="black")


def offset_field(layer: Sampled, image: int = 0) -> tuple[np.ndarray, float]:
    """Paints the offsets of a layer: of each tap a map, laid out as the taps are.

    Colour is direction, as on the wheel in the corner; saturation is length.

    Args:
        layer: what it sampled.
        image: of the batch.

    Returns:
        (height, width, 3) bytes, red, green, blue, and the length at full saturation in cells of
        the layer's input: 99 of 100 offsets are shorter.
    """
    moved = layer.offset[image].unflatten(0, (-1, *layer.kernel_size, 2)).mean(dim=0)
    length = moved.norm(dim=2)
    rank = max(round(0.99 * length.numel()), 1)  # torch.quantile refuses maps of large images
    longest = max(float(length.flatten().kthvalue(rank).values), 1e-3)
    tiles = colours(moved[:, :, 0].cpu().numpy(), moved[:, :, 1].cpu().numpy(), longest)
    tall, wide, height, width = tiles.shape[:4]
    scale = max(1, 60 // max(height, width))
    tiles = tiles.repeat(scale, axis=2).repeat(scale, axis=3)
    framed = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    whole = framed.transpose(0, 2, 1, 3, 4).reshape(
        tall * (height * scale + 2), wide * (width * scale + 2), 3
    )
    return with_wheel(whole), longest


def colours(dy: np.ndarray, dx: np.ndarray, longest: float) -> np.ndarray:
    """Returns (..., 3) bytes: hue for the direction, saturation for the length."""
    hue = (np.arctan2(dy, dx) / (2 * np.pi)) % 1
    saturation = np.clip(np.hypot(dy, dx) / longest, 0, 1)
    return (hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], -1)) * 255).astype(np.uint8)


def with_wheel(field: np.ndarray) -> np.ndarray:
    """Returns a field with the wheel of colours to its right."""
    side = max(int(field.shape[0] * WHEEL), 24)
    missing = max(side - field.shape[0], 0)
    field = np.pad(field, ((0, missing), (0, 0), (0, 0)), constant_values=255)
    ys, xs = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    wheel = colours(ys, xs, 1.0)
    wheel[np.hypot(ys, xs) > 1] = 255
    strip = np.full((field.shape[0], side + 8, 3), 255, np.uint8)
    strip[:side, 8:] = wheel
    return np.concatenate([field, strip], axis=1)
