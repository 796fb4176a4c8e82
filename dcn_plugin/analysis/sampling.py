# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Where an output cell samples, back through any number of deformable layers (Figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recording import Recording, Sampled


@dataclass(frozen=True)
class Trace:
    """Where a cell samples."""

    centre: tuple[float, float]  # of the cell, row and column in pixels of the image
    levels: list[Tensor]  # of each layer, the last first: (P, 2), rows and columns in pixels
    weights: list[Tensor]  # of each layer: (P,), products of modulation along the way


def trace(
    recording: Recording,
    cell: tuple[int, int],
    *,
    layers: list[str] | None = None,
    image: int = 0,
) -> Trace:
    """Follows an output cell of the last deformable layer back to the image.

    Each of its taps is rounded to a cell of the layer before, whose taps are followed in turn:
    with three layers of nine taps 729 points. Taps outside of a map read zeros: they are points of
    their level, and are not followed.

    Args:
        recording: of a forward pass.
        cell: row and column in the output of the last of the layers.
        layers: names of those to follow; None: all.
        image: of the batch.

    Returns:
        points of every level, in pixels of the image as the network saw it; pixel (y, x) is the
        middle of cell (y / stride, x / stride).

    Raises:
        ValueError: if there is no such cell or layer.
    """
    chosen = recording.choose(layers)
    height, width = chosen[0].out_size
    if not (0 <= cell[0] < height and 0 <= cell[1] < width):
        raise ValueError(
            f"a cell of {chosen[0].layer} must have a row below {height} and a column below "
            f"{width}, got {tuple(cell)}"
        )
    stride = recording.stride_of(chosen[0].out_size)
    device = chosen[0].offset.device
    points = torch.tensor([cell], dtype=torch.float32, device=device) * stride
    centre = (float(points[0, 0]), float(points[0, 1]))
    weights = torch.ones(1, device=device)
    levels, products = [], []
    for layer in chosen:
        points, weights = _step(recording, layer, points, weights, image)
        levels.append(points)
        products.append(weights)
    return Trace(centre, levels, products)


def cell_at(
    recording: Recording, point: Sequence[float], layers: list[str] | None = None
) -> tuple[int, int]:
    """Returns the output cell of the last layer whose middle is next to a point.

    Args:
        recording: of a forward pass.
        point: x and y in pixels of the image as the network saw it.
        layers: as in `trace`.

    Raises:
        ValueError: if the point lies outside.
    """
    height, width = recording.image_size
    x, y = point
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"a point must have x below {width} and y below {height}, got {x:g},{y:g}")
    rows, columns = (size := recording.choose(layers)[0].out_size)
    stride = recording.stride_of(size)
    return min(round(y / stride), rows - 1), min(round(x / stride), columns - 1)


def _step(
    recording: Recording, layer: Sampled, points: Tensor, weights: Tensor, image: int
) -> tuple[Tensor, Tensor]:
    """Follows points in pixels through one layer.

    Returns:
        Tensor[P, 2] in pixels and Tensor[P]: the taps of all points that lie on the layer's output.
    """
    height, width = layer.out_size
    cells = (points / recording.stride_of(layer.out_size)).round().long()
    on_map = (cells >= 0).all(dim=1) & (cells < cells.new_tensor([height, width])).all(dim=1)
    rows, columns = cells[on_map].unbind(dim=1)
    taps = layer.positions(image)[rows, columns]  # (P, G, K, 2)
    factors = layer.weights(image)[rows, columns] * weights[on_map][:, None, None]
    return taps.flatten(0, 2) * recording.stride_of(layer.map_size), factors.flatten()
