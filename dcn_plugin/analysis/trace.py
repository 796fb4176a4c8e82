# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Traces an output position back to its sampling locations on the image (Figures 5 and 6)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dcn_plugin.messages import UserError

from .recording import RecordedLayer, Recording

# From this many sampling locations in a level on, those that round to the same position are merged
# and their weights added: nine taps in seven layers would make five million.
MERGE_ABOVE = 50_000


@dataclass(frozen=True)
class Trace:
    """Sampling locations of one output position."""

    centre: tuple[float, float]  # of the output position, row and column in pixels
    levels: list[
        Tensor
    ]  # from the last layer back to the image: (P, 2), rows and columns in pixels
    weights: list[Tensor]  # of each level: (P,), products of the modulation along the way
    # Sampling locations of the layers with no deformable layer before them: those on the image.
    # They are the last level's unless the model has branches of different lengths.
    ends: Tensor
    end_weights: Tensor


def order_levels(layers: Sequence[RecordedLayer]) -> list[dict[str, list[str]]]:
    """Orders layers by the number of layers after them.

    Args:
        layers: to trace through.

    Returns:
        levels, first that of the layers after which there is no other. Each has by name the next
        layers to trace into. Parallel branches are on the same level.
    """
    before = {layer.layer: layer.depends_on & {x.layer for x in layers} for layer in layers}
    nearest = {
        name: [x for x in before if x in earlier and not any(x in before[y] for y in earlier)]
        for name, earlier in before.items()
    }
    last = [name for name in before if not any(name in names for names in before.values())]
    levels = []
    while last:
        levels.append({name: nearest[name] for name in last})
        last = list(dict.fromkeys(name for names in levels[-1].values() for name in names))
    return levels


def last_layers(recording: Recording, layers: list[str] | None = None) -> list[RecordedLayer]:
    """Returns the deformable layers after which there is no other.

    Args:
        recording: of a forward pass.
        layers: names of the layers to trace through; None: all.

    Raises:
        ValueError: if no layer can be traced, or the sizes of their outputs differ.
    """
    chosen = recording.choose(layers)
    if not chosen:
        raise UserError("no deformable layer with known positions on the image ran")
    last = [recording.layers[name] for name in order_levels(chosen)[0]]
    if len({layer.output_size for layer in last}) > 1:
        sizes = ", ".join(f"{layer.layer} {layer.output_size}" for layer in last)
        raise UserError(
            f"the last layers must have outputs of one size, choose some of them; got {sizes}"
        )
    return last


def trace(
    recording: Recording,
    position: tuple[int, int],
    *,
    layers: list[str] | None = None,
    image: int = 0,
    merge_above: int = MERGE_ABOVE,
) -> Trace:
    """Traces an output position of the last deformable layer back to the image.

    Each sampling location is rounded to the nearest output position of the layer before, and that
    layer's sampling locations are taken in turn: three layers of nine taps give 729. Locations
    outside a map read zeros: they are part of their level, and are not traced further. Parallel
    branches are all traced.

    Args:
        recording: of a forward pass.
        position: row and column in the output of the last layer.
        layers: names of the layers to trace through; None: all.
        image: index in the batch.
        merge_above: above this number of locations in a level, trace those that round to the same
            position only once, with their weights added.

    Returns:
        the sampling locations of every level, in pixels of the model's input; pixel centres are
        integers.

    Raises:
        ValueError: if there is no such position or layer.
    """
    last = last_layers(recording, layers)
    height, width = last[0].output_size
    if not (0 <= position[0] < height and 0 <= position[1] < width):
        raise UserError(
            f"position must be a row below {height} and a column below {width} of the output of "
            f"{last[0].layer}, got {tuple(position)}"
        )
    device = last[0].offset.device
    rows, columns = (i * s for i, s in zip(position, last[0].output_stride, strict=True))
    centre = torch.tensor([[rows, columns]], dtype=torch.float32, device=device)
    reached = {layer.layer: [(centre, torch.ones(1, device=device))] for layer in last}
    levels, ends = [], []
    for level in order_levels(recording.choose(layers)):
        following: dict[str, list[tuple[Tensor, Tensor]]] = {}
        samples = []
        for name, nearest in level.items():
            samples.append(
                _sample(recording.layers[name], *_joined(reached[name]), image, merge_above)
            )
            for other in nearest:
                following.setdefault(other, []).append(samples[-1])
            if not nearest:
                ends.append(samples[-1])
        levels.append(_joined(samples))
        reached = following
    locations, weights = zip(*levels, strict=True)
    return Trace((float(rows), float(columns)), list(locations), list(weights), *_joined(ends))


def position_at(
    recording: Recording, point: Sequence[float], layers: list[str] | None = None
) -> tuple[int, int]:
    """Returns row and column of the last layer's output position nearest to a point.

    Args:
        recording: of a forward pass.
        point: x and y in pixels of the model's input.
        layers: as in `trace`.

    Raises:
        ValueError: if the point is outside the image.
    """
    height, width = recording.image_size
    x, y = point
    if not (0 <= x < width and 0 <= y < height):
        raise UserError(
            f"a point must have x from 0 to below {width} and y from 0 to below {height}, "
            f"got {x:g},{y:g}"
        )
    last = last_layers(recording, layers)[0]
    row, column = (
        min(round(at / stride), size - 1)
        for at, stride, size in zip((y, x), last.output_stride, last.output_size, strict=True)
    )
    return row, column


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    locations, weights = zip(*parts, strict=True)
    return torch.cat(locations), torch.cat(weights)


def _sample(
    layer: RecordedLayer, points: Tensor, weights: Tensor, image: int, merge_above: int
) -> tuple[Tensor, Tensor]:
    """Returns the sampling locations, in pixels, of the output positions nearest to points."""
    height, width = layer.output_size
    positions = (points / points.new_tensor(layer.output_stride)).round().long()
    inside = ((positions >= 0) & (positions < positions.new_tensor([height, width]))).all(dim=1)
    positions, weights = positions[inside], weights[inside]
    if len(positions) * layer.offset.shape[1] // 2 > merge_above:
        sums = weights.new_zeros(height * width)
        sums.index_add_(0, positions[:, 0] * width + positions[:, 1], weights)
        positions = positions.unique(dim=0)
        weights = sums[positions[:, 0] * width + positions[:, 1]]
    rows, columns = positions.unbind(dim=1)
    locations = layer.locations_at(rows, columns, image)  # (P, G, K, 2)
    weights = layer.weights_at(rows, columns, image) * weights[:, None, None]
    return (locations * points.new_tensor(layer.input_stride)).flatten(0, 2), weights.flatten()
