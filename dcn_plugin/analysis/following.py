# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Whether the points that cells sample follow the objects they are on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .dilation import AREAS, KINDS, AnnotatedImage, check_areas, kind_of_area, run_once
from .recording import Recording
from .sampling import cell_at, trace

OBJECTS = KINDS[:3]
OFFSETS = ("as predicted", "their mean in every cell", "none")


@dataclass(frozen=True)
class Share:
    """Of the points that cells in the middle of objects sample, which lie in the object's box."""

    by_offsets: dict[str, float]  # for each of OFFSETS; not a number where there are no objects
    of_image: float  # the share of the image that the boxes cover: that of points thrown at random
    objects: int


def share_on_objects(
    model: nn.Module,
    images: Iterable[AnnotatedImage],
    *,
    areas: Sequence[float] = AREAS,
    layers: list[str] | None = None,
) -> dict[str, Share]:
    """Measures how many of the points that a cell samples lie on the object it is in the middle of.

    They are counted with the offsets that were predicted, and for comparison with what the network
    would sample if each cell of the image had the mean of its offsets and of its modulation, and
    with neither: what is more than that mean pattern's is particular to the cell. Points weigh what
    modulation gives them; those off the image lie on no object.

    Args:
        model: any network with deformable convolutions; it is run as it is, so call eval() before.
        images: what to run it on.
        areas: of boxes in pixels; from the first on an object is medium, from the second on large.
        layers: to follow, as in `trace`.

    Returns:
        by kind: small, medium, large.

    Raises:
        ValueError: if the network has no deformable convolutions that can be traced, or areas do
            not ascend.
    """
    check_areas(areas)
    shares: dict[str, list[list[float]]] = {kind: [] for kind in OBJECTS}
    for image in images:
        recording = run_once(model, image)
        told = [recording, *(same_everywhere(recording, factor) for factor in (1, 0))]
        whole = image.size[0] * image.size[1]
        for box in image.boxes:
            area = float((box[2] - box[0]) * (box[3] - box[1]))
            found = [_share(each, box, image.size, layers) for each in told]
            shares[KINDS[kind_of_area(area, areas)]].append([*found, area / whole])
    return {kind: _mean(rows) for kind, rows in shares.items()}


def same_everywhere(recording: Recording, factor: float) -> Recording:
    """Returns a recording in which all cells of a layer have the mean of its offsets.

    Args:
        recording: of a forward pass.
        factor: by which that mean is multiplied; with 0 there is no modulation either.
    """
    layers = {}
    for name, layer in recording.layers.items():
        offset = layer.offset.mean(dim=(2, 3), keepdim=True) * factor
        mask = None
        if layer.mask is not None and factor:
            mask = layer.mask.mean(dim=(2, 3), keepdim=True).expand_as(layer.mask)
        told = offset.expand_as(layer.offset)
        layers[name] = dataclasses.replace(layer, offset=told, mask=mask)
    return Recording(recording.image_size, layers)


def _share(
    recording: Recording, box: Tensor, size: tuple[int, int], layers: list[str] | None
) -> float:
    """Returns the share of the points of the cell in the middle of a box that lie in it."""
    left, top, right, bottom = box.tolist()
    # The middle of an object that the image ends in lies on the image, if its box does.
    middle = min((left + right) / 2, size[1] - 1), min((top + bottom) / 2, size[0] - 1)
    found = trace(recording, cell_at(recording, middle, layers), layers=layers)
    rows, columns = found.ends.unbind(dim=1)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    total = float(found.end_weights.sum())  # 0 if all taps of a layer lie off its map
    return float(found.end_weights[inside].sum()) / total if total else 0.0


def _mean(rows: list[list[float]]) -> Share:
    means = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(OFFSETS) + 1).mean(dim=0)
    *found, of_image = means.tolist()
    return Share(dict(zip(OFFSETS, found, strict=True)), of_image, len(rows))
