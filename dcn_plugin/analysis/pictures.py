# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Pictures of what a network samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from dcn_plugin.files import whole_file

from .sampling import Trace

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

POINTS, CENTRE = "#ff2222", "#22ff44"  # as in the paper
COLUMN = 3.0  # inches

Panel = tuple[str, np.ndarray, "Trace | None"]  # title, image and, if there is one, trace


def draw_trace(axis: Axes, image: np.ndarray, trace: Trace) -> None:
    """Draws the points of the first layer that a cell samples, and the cell.

    Args:
        axis: of matplotlib.
        image: (height, width, 3) bytes, red, green, blue.
        trace: in pixels of this image.
    """
    show_image(axis, image)
    points, weights = trace.levels[-1].cpu().numpy(), trace.weights[-1].cpu().numpy()
    height, width = image.shape[:2]
    size = 5 if len(points) > 100 else 20
    # Points may share a place: those that weigh more, and those below others, show through.
    alpha = np.clip(0.75 * weights / max(weights.max(initial=0), 1e-6), 0, 1)
    axis.scatter(points[:, 1], points[:, 0], s=size, c=POINTS, alpha=alpha, linewidths=0)
    row, column = trace.centre
    axis.plot(column, row, "o", color=CENTRE, markersize=6, markeredgecolor="black")
    margin = 0.08 * max(height, width)
    axis.set_xlim(-margin, width + margin)
    axis.set_ylim(height + margin, -margin)


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Shows an image whose pixels' middles lie at whole numbers."""
    axis.imshow(image)
    axis.set_axis_off()


def save_panels(path: Path, panels: Sequence[Sequence[Panel]]) -> None:
    """Saves rows of images with titles, and with traces where there are some.

    Args:
        path: of the PNG.
        panels: row by row.
    """
    rows, columns = len(panels), max(len(row) for row in panels)
    size = (COLUMN * columns, (COLUMN + 0.3) * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for of_row, row in zip(axes, panels, strict=True):
        for axis in of_row[len(row) :]:
            axis.set_axis_off()
        for axis, (title, image, trace) in zip(of_row, row, strict=False):
            if trace is None:
                show_image(axis, image)
            else:
                draw_trace(axis, image, trace)
            axis.set_title(title, fontsize=9)
    with whole_file(path) as half:
        figure.savefig(half, dpi=110, format="png")
    plt.close(figure)
