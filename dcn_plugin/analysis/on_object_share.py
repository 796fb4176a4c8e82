# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Share of sampling locations that are on the object they are traced from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .effective_dilation import (
    AREAS,
    CATEGORIES,
    AnnotatedImage,
    category_of_area,
    check_areas,
    run_once,
)
from .recording import Recording
from .trace import position_at, trace

SIZES = CATEGORIES[:3]
OFFSETS = ("predicted", "mean of the image", "zero")


@dataclass(frozen=True)
class OnObjectShare:
    """Mean share of sampling locations inside the object's box."""

    by_offsets: dict[str, float]  # for each of OFFSETS; NaN without objects
    of_image: float  # the share of the image that the boxes cover: that of random locations
    objects: int


def on_object_share(
    model: nn.Module,
    images: Iterable[AnnotatedImage],
    *,
    areas: Sequence[float] = AREAS,
    layers: list[str] | None = None,
) -> dict[str, OnObjectShare]:
    """Traces the centre of each object and measures which share of the locations is inside its box.

    That is done with the predicted offsets and, for comparison, with offsets and modulation
    averaged over all positions of the image, and with neither: what exceeds the share of the mean
    offsets is particular to the position. Locations are weighted by their modulation; those off
    the image are on no object.

    Args:
        model: any model with deformable convolutions, in eval mode.
        images: to run it on.
        areas: box areas in pixels, from which on objects are medium and large.
        layers: to trace through, as in `trace`.

    Returns:
        by size: small, medium, large.

    Raises:
        ValueError: if no deformable convolution can be traced, or areas do not ascend.
    """
    check_areas(areas)
    shares: dict[str, list[list[float]]] = {size: [] for size in SIZES}
    for image in images:
        predicted = run_once(model, image)
        recordings = [predicted, *(averaged(predicted, factor) for factor in (1, 0))]
        image_area = image.size[0] * image.size[1]
        for box in image.boxes:
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            values = [_share(each, box, image.size, layers) for each in recordings]
            shares[CATEGORIES[category_of_area(area, areas)]].append([*values, area / image_area])
    return {size: _mean(rows) for size, rows in shares.items()}


def averaged(recording: Recording, factor: float) -> Recording:
    """Returns a recording in which all positions of a layer have the mean of its offsets.

    Args:
        recording: of a forward pass.
        factor: the mean is multiplied by it; with 0 there is no modulation either.
    """
    layers = {}
    for name, layer in recording.layers.items():
        offset, mask = layer.offset, layer.mask if factor else None
        if mask is not None:
            mask = mask.mean(dim=(2, 3), keepdim=True).expand_as(mask)
        mean = offset.mean(dim=(2, 3), keepdim=True).expand_as(offset) * factor
        layers[name] = replace(layer, offset=mean, mask=mask)
    return Recording(recording.image_size, layers)


def _share(
    recording: Recording, box: Tensor, size: tuple[int, int], layers: list[str] | None
) -> float:
    """Returns the share of the sampling locations traced from a box's centre that are inside it."""
    left, top, right, bottom = box.tolist()
    # The centre of an object that is cut off by the border, clipped to the image.
    centre = min((left + right) / 2, size[1] - 1), min((top + bottom) / 2, size[0] - 1)
    traced = trace(recording, position_at(recording, centre, layers), layers=layers)
    rows, columns = traced.ends.unbind(dim=1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    total = float(traced.end_weights.sum())  # 0 if all taps of a layer are off its map
    return float(traced.end_weights[inside].sum()) / total if total else 0.0


def _mean(rows: list[list[float]]) -> OnObjectShare:
    means = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(OFFSETS) + 1).mean(dim=0)
    *by_offsets, of_image = means.tolist()
    return OnObjectShare(dict(zip(OFFSETS, by_offsets, strict=True)), of_image, len(rows))
