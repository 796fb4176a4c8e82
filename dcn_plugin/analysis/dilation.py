# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""How far apart deformable filters sample, by what they are centred on (Table 2)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .recording import Recording, Sampled, record, require_deformable

logger = logging.getLogger(__name__)
AREAS = (96**2, 224**2)  # where the paper splits small, medium and large objects
KINDS = ("small", "medium", "large", "background")


@dataclass(frozen=True)
class AnnotatedImage:
    """What a network is run on, and what is in it."""

    inputs: Any  # the network is called with them: a batch of this one image
    boxes: Tensor  # (M, 4), left, top, right, bottom, in pixels of the image as the network sees it
    size: tuple[int, int]  # height and width of it, without padding
    crowds: Tensor | None = None  # (C, 4), likewise: neither objects nor background


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
        by layer, in the order in which they run, and by kind: small, medium, large, background. Of
        a layer that runs several times in a pass all its runs count; layers whose cells have no
        place on the image that is known, such as on RoIs, are left out with a warning.

    Raises:
        ValueError: if the network has no deformable convolutions that can be measured, areas do not
            ascend, or a batch has more images.
    """
    check_areas(areas)
    require_deformable(model)
    sums: dict[str, Tensor] = {}
    left_out: set[str] = set()
    for image in images:
        recording = run_once(model, image)
        for layer in recording.layers.values():
            if not _can_be_measured(layer):
                left_out.add(layer.module)
                continue
            found = _sums_of(layer, image, areas)
            sums[layer.module] = sums.get(layer.module, 0) + found
    if left_out:
        logger.warning(
            "left out, since they have one tap, or it is not known where their cells lie: %s",
            ", ".join(sorted(left_out)),
        )
    if not sums:
        raise ValueError("no deformable layer ran that can be measured")
    return {name: _dilations(found) for name, found in sums.items()}


def run_once(model: nn.Module, image: AnnotatedImage) -> Recording:
    """Runs a network on an image.

    Args:
        model: any network with deformable convolutions.
        image: to run it on.

    Returns:
        the recording.

    Raises:
        ValueError: if it is more than one image.
    """
    with record(model) as recording, torch.no_grad():
        model(image.inputs)
    for layer in recording.layers.values():
        if layer.on_image and len(layer.offset) != 1:
            raise ValueError(f"inputs must be a batch of one image, got one of {len(layer.offset)}")
    return recording


def check_areas(areas: Sequence[float]) -> None:
    """Checks what tells small, medium and large objects apart.

    Args:
        areas: of boxes in pixels.

    Raises:
        ValueError: if they do not ascend.
    """
    if len(areas) != 2 or not 0 < areas[0] < areas[1]:
        raise ValueError(f"areas must be two ascending numbers above 0, got {tuple(areas)}")


def kind_of_area(area: float, areas: Sequence[float]) -> int:
    """Returns the place in KINDS of an object of an area."""
    return int(area >= areas[0]) + int(area >= areas[1])


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


def kinds_of_cells(layer: Sampled, image: AnnotatedImage, areas: Sequence[float]) -> Tensor:
    """Says what each output cell of a layer is centred on.

    Args:
        layer: of the forward pass.
        image: with boxes.
        areas: as in `effective_dilation`.

    Returns:
        Tensor[H', W'] of places in KINDS, -1 for cells in crowds alone, and for those beyond the
        image, on its padding.
    """
    device = layer.offset.device
    ys, xs = (
        start + torch.arange(count, device=device) * step
        for count, start, step in zip(
            layer.out_size, layer.out_grid.start, layer.out_grid.step, strict=True
        )
    )
    boxes = image.boxes.to(device)
    sizes = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kinds = torch.full(layer.out_size, KINDS.index("background"), device=device)
    for box in () if image.crowds is None else image.crowds.to(device):
        kinds[_inside(ys, xs, box)] = -1
    for box, area in sorted(zip(boxes, sizes, strict=True), key=lambda pair: -float(pair[1])):
        kinds[_inside(ys, xs, box)] = kind_of_area(float(area), areas)
    kinds[ys >= image.size[0]] = -1
    kinds[:, xs >= image.size[1]] = -1
    return kinds


def _can_be_measured(layer: Sampled) -> bool:
    return layer.taps > 1 and layer.on_image  # one tap has no neighbours


def _inside(ys: Tensor, xs: Tensor, box: Tensor) -> Tensor:
    rows, columns = (ys >= box[1]) & (ys < box[3]), (xs >= box[0]) & (xs < box[2])
    return rows[:, None] & columns


def _sums_of(layer: Sampled, image: AnnotatedImage, areas: Sequence[float]) -> Tensor:
    """Returns Tensor[3, kinds]: count, sum and sum of squares."""
    kinds = kinds_of_cells(layer, image, areas).flatten().cpu()
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
