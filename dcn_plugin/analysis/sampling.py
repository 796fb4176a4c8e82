# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Where an output cell samples, back through any number of deformable layers (Figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .recording import Recording, Sampled

# From here on points that share a cell are followed once, with their weights added: nine taps in
# seven layers would make five million.
MANY = 50_000


@dataclass(frozen=True)
class Trace:
    """Where a cell samples."""

    centre: tuple[float, float]  # of the cell, row and column in pixels of the image
    levels: list[Tensor]  # the last layers first: (P, 2), rows and columns in pixels
    weights: list[Tensor]  # of each level: (P,), products of modulation along the way
    # Points of layers before which there are no others: what the cell sees of the image. Without
    # branches of different lengths those of the last level.
    ends: Tensor
    end_weights: Tensor


def order_levels(layers: Sequence[Sampled]) -> list[dict[str, list[str]]]:
    """Orders layers by how many of them come after.

    Args:
        layers: to follow.

    Returns:
        levels, first the layers that feed no other; of each layer by name those next to it, to be
        followed from it. Branches that run side by side are on the same level.
    """
    behind = {layer.layer: layer.behind & {other.layer for other in layers} for layer in layers}
    nearest = {
        name: [
            other
            for other in behind
            if other in found and not any(other in behind[k] for k in found)
        ]
        for name, found in behind.items()
    }
    last = [name for name in behind if not any(name in found for found in behind.values())]
    levels = []
    while last:
        levels.append({name: nearest[name] for name in last})
        last = list(dict.fromkeys(name for found in levels[-1].values() for name in found))
    return levels


def last_layers(recording: Recording, layers: list[str] | None = None) -> list[Sampled]:
    """Returns the layers that feed no other, whose output cells can be traced.

    Args:
        recording: of a forward pass.
        layers: names of those to follow; None: all.

    Raises:
        ValueError: if none ran, or their outputs differ in size.
    """
    chosen = recording.choose(layers)
    if not chosen:
        raise ValueError("no deformable layer ran on a map of the image: there is nothing to trace")
    last = [recording.layers[name] for name in order_levels(chosen)[0]]
    if len({layer.out_size for layer in last}) > 1:
        sizes = ", ".join(f"{layer.layer} {layer.out_size}" for layer in last)
        raise ValueError(f"layers must end in maps of one size, choose some of them; got {sizes}")
    return last


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
    their level, and are not followed. Where branches run side by side, all are followed.

    Args:
        recording: of a forward pass.
        cell: row and column in the output of the last of the layers.
        layers: names of those to follow; None: all.
        image: of the batch.

    Returns:
        points of every level, in pixels of the image as the network saw it, whose middles are
        whole numbers.

    Raises:
        ValueError: if there is no such cell or layer.
    """
    last = last_layers(recording, layers)
    height, width = last[0].out_size
    if not (0 <= cell[0] < height and 0 <= cell[1] < width):
        raise ValueError(
            f"a cell of {last[0].layer} must have a row below {height} and a column below "
            f"{width}, got {tuple(cell)}"
        )
    device = last[0].offset.device
    start = last[0].out_grid.to_pixels(torch.tensor([cell], dtype=torch.float32, device=device))
    reached = {layer.layer: [(start, torch.ones(1, device=device))] for layer in last}
    levels, products, ends = [], [], []
    for level in order_levels(recording.choose(layers)):
        following: dict[str, list[tuple[Tensor, Tensor]]] = {}
        found = []
        for name, nearest in level.items():
            points, weights = (torch.cat(parts) for parts in zip(*reached[name], strict=True))
            found.append(_step(recording.layers[name], points, weights, image))
            for other in nearest:
                following.setdefault(other, []).append(found[-1])
            if not nearest:
                ends.append(found[-1])
        levels.append(torch.cat([points for points, _ in found]))
        products.append(torch.cat([weights for _, weights in found]))
        reached = following
    centre = float(start[0, 0]), float(start[0, 1])
    points, weights = (torch.cat(parts) for parts in zip(*ends, strict=True))
    return Trace(centre, levels, products, points, weights)


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
        raise ValueError(
            f"a point must have x from 0 to below {width} and y from 0 to below {height}, "
            f"got {x:g},{y:g}"
        )
    last = last_layers(recording, layers)[0]
    nearest = last.out_grid.to_cells(torch.tensor([y, x])).round().long()
    row, column = nearest.clamp(min=0).minimum(torch.tensor(last.out_size) - 1).tolist()
    return row, column


def _step(layer: Sampled, points: Tensor, weights: Tensor, image: int) -> tuple[Tensor, Tensor]:
    """Follows points in pixels through one layer.

    Returns:
        Tensor[P, 2] in pixels and Tensor[P]: the taps of all points that lie on the layer's output.
    """
    height, width = layer.out_size
    cells = layer.out_grid.to_cells(points).round().long()
    on_map = (cells >= 0).all(dim=1) & (cells < cells.new_tensor([height, width])).all(dim=1)
    cells, weights = cells[on_map], weights[on_map]
    if len(cells) * layer.offset.shape[1] // 2 > MANY:
        sums = weights.new_zeros(height * width)
        sums.index_add_(0, cells[:, 0] * width + cells[:, 1], weights)
        cells = cells.unique(dim=0)
        weights = sums[cells[:, 0] * width + cells[:, 1]]
    rows, columns = cells.unbind(dim=1)
    taps = layer.positions(image)[rows, columns]  # (P, G, K, 2)
    factors = layer.weights(image)[rows, columns] * weights[:, None, None]
    return layer.map_grid.to_pixels(taps.flatten(0, 2)), factors.flatten()
