# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""How far apart deformable filters sample, by what they are centred on (Table 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recording import Recording, Sampled, record, require_deformable

AREAS = (96**2, 224**2)  # where the paper splits small, medium and large objects
KINDS = ("small", "medium", "large", "background")


@dataclass(frozen=True)
class AnnotatedImage:
    """What a network is run on, and what is in it."""

    inputs: Any  # the network is called with them
    boxes: Tensor  # (M, 4), left, top, right, bottom, in pixels of the image as the network sees it
    size: tuple[int, int]  # height and width of it, without padding


@dataclass(frozen=True)
class Dilation:
    """Of the filters of a layer that are centred on one kind of thing."""

    mean: float  # cells of the layer's input; not a number where there were no filters
    std: float
    filters: int


def effective_dilation(
    model: nn.Module, images: Iterable[AnnotatedImage], *, areas: Sequence[float] = AREAS
) -> dict[str, dict[str, Dilation]]:
    """Measures the effective dilation of every deformable layer.

    That of a filter is the mean of the distances between all pairs of taps that are neighbours in
    its grid; a plain convolution's is its dilation. A filter is centred on the smallest box around
    the middle of its cell, or on the background where there is none.

    Args:
        model: any network with deformable convolutions; it is run as it is, so call eval() before.
        images: what to run it on.
        areas: of boxes in pixels; from the first on an object is medium, from the second on large.

    Returns:
        by layer, in the order in which they run, and by kind: small, medium, large, background.

    Raises:
        ValueError: if the network has no deformable convolutions, or areas do not ascend.
    """
    if len(areas) != 2 or not 0 < areas[0] < areas[1]:
        raise ValueError(f"areas must be two ascending numbers above 0, got {tuple(areas)}")
    require_deformable(model)
    sums: dict[str, Tensor] = {}
    for image in images:
        with record(model) as recording, torch.no_grad():
            model(image.inputs)
        for name, layer in recording.layers.items():
            if layer.taps == 1:  # which has no neighbours
                continue
            found = _sums_of(recording, layer, image, areas)
            sums[name] = sums[name] + found if name in sums else found
    return {name: _dilations(found) for name, found in sums.items()}


def dilation_of_filters(layer: Sampled, image: int = 0) -> Tensor:
    """Measures each filter of a layer, which has more than one tap.

    Args:
        layer: what it sampled.
        image: of the batch.

    Returns:
        Tensor[H', W'] of effective dilations, means over the offset groups.
    """
    grid = layer.positions(image).unflatten(3, layer.kernel_size)  # H', W', G, kh, kw, 2
    across = (grid[..., :, 1:, :] - grid[..., :, :-1, :]).norm(dim=-1).flatten(3)
    down = (grid[..., 1:, :, :] - grid[..., :-1, :, :]).norm(dim=-1).flatten(3)
    return torch.cat([across, down], dim=3).mean(dim=(2, 3))


def kinds_of_cells(
    recording: Recording, layer: Sampled, image: AnnotatedImage, areas: Sequence[float]
) -> Tensor:
    """Says what each output cell of a layer is centred on.

    Args:
        recording: of the forward pass.
        layer: of it.
        image: with boxes.
        areas: as in `effective_dilation`.

    Returns:
        Tensor[H', W'] of places in KINDS, -1 for cells beyond the image, on its padding.
    """
    device = layer.offset.device
    stride = recording.stride_of(layer.out_size)
    ys, xs = (torch.arange(count, device=device) * stride for count in layer.out_size)
    boxes = image.boxes.to(device)
    sizes = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kinds = torch.full(layer.out_size, KINDS.index("background"), device=device)
    for box, area in sorted(zip(boxes, sizes, strict=True), key=lambda pair: -float(pair[1])):
        rows, columns = (ys >= box[1]) & (ys < box[3]), (xs >= box[0]) & (xs < box[2])
        kinds[rows[:, None] & columns] = int(area >= areas[0]) + int(area >= areas[1])
    kinds[ys >= image.size[0]] = -1
    kinds[:, xs >= image.size[1]] = -1
    return kinds


def _sums_of(
    recording: Recording, layer: Sampled, image: AnnotatedImage, areas: Sequence[float]
) -> Tensor:
    """Returns Tensor[3, kinds]: count, sum and sum of squares."""
    kinds = kinds_of_cells(recording, layer, image, areas).flatten().cpu()
    values = dilation_of_filters(layer).flatten().double().cpu()
    kept = kinds >= 0
    rows = torch.stack([torch.ones_like(values), values, values**2])[:, kept]
    sums = torch.zeros(3, len(KINDS), dtype=torch.float64)
    return sums.index_add_(1, kinds[kept], rows)


def _dilations(sums: Tensor) -> dict[str, Dilation]:
    found = {}
    for kind, (count, total, squares) in zip(KINDS, sums.T.tolist(), strict=True):
        mean = total / count if count else float("nan")
        spread = max(squares / count - mean**2, 0.0) ** 0.5 if count else float("nan")
        found[kind] = Dilation(mean, spread, int(count))
    return found
