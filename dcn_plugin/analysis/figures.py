# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Matplotlib figures of sampling locations, RoI bins and offsets."""

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

from dcn_plugin.files import atomic_write

from .recording import RecordedLayer
from .trace import Trace

LOCATIONS, CENTRE, UNDEFORMED = "#ff2222", "#22ff44", "#ffd700"  # as in the paper
PANEL_WIDTH = 3.0  # inches


@dataclass(frozen=True)
class Panel:
    """An image of a figure, and what is drawn on it, in its pixels."""

    title: str
    image: np.ndarray  # (H, W, 3) uint8 RGB
    trace: Trace | None = None
    undeformed: Tensor | None = None  # (bins, 4), RoI bins without offsets
    bins: Tensor | None = None  # (bins, 4), moved by the offsets


def save_panels(path: Path, panels: Sequence[Sequence[Panel]]) -> None:
    """Saves rows of panels as a PNG file."""
    rows, columns = len(panels), max(len(row) for row in panels)
    height, width = panels[0][0].image.shape[:2]
    size = PANEL_WIDTH * columns, (PANEL_WIDTH * np.clip(height / width, 0.4, 2) + 0.3) * rows
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for row_axes, row in zip(axes, panels, strict=True):
        for axis, panel in zip(row_axes, row, strict=False):
            draw_panel(axis, panel)
    with atomic_write(path) as half:
        figure.savefig(half, dpi=110, format="png")


def draw_panel(axis: Axes, panel: Panel) -> None:
    """Draws a panel into axes of Matplotlib."""
    axis.imshow(panel.image)  # pixel centres are integers
    axis.set_title(panel.title, fontsize=9)
    for boxes, color in ((panel.undeformed, UNDEFORMED), (panel.bins, LOCATIONS)):
        for left, top, right, bottom in () if boxes is None else boxes.tolist():
            corner = left - 0.5, top - 0.5  # boxes are in edges of pixels
            size = right - left, bottom - top
            axis.add_patch(Rectangle(corner, *size, fill=False, color=color, lw=0.8))
    if panel.trace is not None:
        draw_trace(axis, panel.trace)
    height, width = panel.image.shape[:2]
    margin = 0.08 * max(height, width) if panel.trace is not None else 0.5
    axis.set_xlim(-margin, width - 1 + margin)
    axis.set_ylim(height - 1 + margin, -margin)


def draw_trace(axis: Axes, trace: Trace) -> None:
    """Draws the sampling locations on the image of an output position, and its centre."""
    locations, weights = trace.ends.cpu().numpy(), trace.end_weights.cpu().numpy()
    size = 5 if len(locations) > 100 else 20
    # Locations overlap: opacity shows weights, and those below others.
    alpha = np.clip(0.75 * weights / max(weights.max(initial=0), 1e-6), 0, 1)
    if len(locations):  # there are none if all taps of a later layer are off its map
        axis.scatter(*locations.T[::-1], s=size, c=LOCATIONS, alpha=alpha, linewidths=0)
    row, column = trace.centre
    axis.plot(column, row, "o", color=CENTRE, markersize=6, markeredgecolor="black")


def offset_image(layer: RecordedLayer, image: int = 0) -> tuple[np.ndarray, float]:
    """Draws the offsets of a layer as a map per tap, arranged like the kernel.

    Hue is the direction, as on the color wheel in the corner; saturation is the length.

    Args:
        layer: of a recording.
        image: index in the batch.

    Returns:
        (H, W, 3) uint8 RGB, and the length at full saturation, in positions of the layer's input:
        the 99th percentile.
    """
    moved = layer.offset[image].unflatten(0, (-1, *layer.kernel_size, 2)).mean(dim=0)
    length = moved.norm(dim=2).flatten()
    rank = max(round(0.99 * length.numel()), 1)  # torch.quantile rejects maps of large images
    longest = max(float(length.kthvalue(rank).values), 1e-3)
    maps = flow_colors(*moved.movedim(2, 0).cpu().numpy(), longest)  # (kh, kw, H', W', 3)
    zoom = max(1, 60 // max(maps.shape[2:4]))
    maps = np.pad(maps.repeat(zoom, 2).repeat(zoom, 3), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    return with_wheel(np.concatenate(np.concatenate(maps, axis=1), axis=1)), longest


def flow_colors(dy: np.ndarray, dx: np.ndarray, longest: float) -> np.ndarray:
    """Returns (..., 3) uint8 RGB: hue for the direction, saturation for the length."""
    hue = (np.arctan2(dy, dx) / (2 * np.pi)) % 1
    saturation = np.clip(np.hypot(dy, dx) / longest, 0, 1)
    return (hsv_to_rgb(np.stack([hue, saturation, np.ones_like(hue)], -1)) * 255).astype(np.uint8)


def with_wheel(image: np.ndarray) -> np.ndarray:
    """Adds a color wheel to the right of an image."""
    height = len(image)
    side = max(int(0.3 * height), 24)
    ys, xs = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    wheel = flow_colors(ys, xs, 1.0)
    wheel[np.hypot(ys, xs) > 1] = 255
    below = ((0, max(height - side, 0)), (8, 0), (0, 0))
    image = np.pad(image, ((0, max(side - height, 0)), (0, 0), (0, 0)), constant_values=255)
    return np.concatenate([image, np.pad(wheel, below, constant_values=255)], axis=1)
