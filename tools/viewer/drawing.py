# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A picture, or a page, of what a network made of an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer

from dcn_plugin.analysis import cell_at, nearest_roi, trace
from dcn_plugin.analysis.page import Shown, save_page
from dcn_plugin.analysis.pictures import Panel, offset_field, save_panels

from .network import Seen
from .points import Point, emptiest_point, innermost_point

OBJECTS = 2  # from whose middles a picture looks
SMALL = 480  # pixels of an image's longer side, below which text on it needs it enlarged


def found_panel(seen: Seen, metadata: Metadata) -> Panel:
    """Returns the detections, or the segmentation."""
    drawing = Visualizer(seen.original, metadata, scale=scale_for_text(seen))
    if seen.instances is not None:
        shown = drawing.draw_instance_predictions(seen.instances)
        count = len(seen.instances)
        return Panel(f"{count} object{'s' if count != 1 else ''} found", shown.get_image())
    if metadata.get("stuff_classes") is None:  # of a data set that is not known here
        count = int(seen.labels.max()) + 1
        drawing.metadata = Metadata(stuff_classes=[str(kind) for kind in range(count)])
    shown = drawing.draw_sem_seg(seen.labels, area_threshold=0, alpha=0.6)
    return Panel("what pixels are", shown.get_image())


def scale_for_text(seen: Seen) -> float:
    """Returns by how much a small image must be enlarged for text on it."""
    return max(1.0, SMALL / max(seen.original.shape[:2]))


def class_name(metadata: Metadata, kind: int, stuff: bool = False) -> str:
    """Returns the name of a class, its number where it has none."""
    names = metadata.get("stuff_classes" if stuff else "thing_classes") or ()
    return names[kind] if kind < len(names) else str(kind)


def points_of_interest(seen: Seen, metadata: Metadata) -> list[tuple[str, Point]]:
    """Returns points of the original to look from, with what is there."""
    size = seen.original.shape[:2]
    if seen.instances is not None:
        boxes = seen.instances.pred_boxes.tensor.numpy()
        found = [
            (
                f"in a {class_name(metadata, int(kind))}",
                ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2),
            )
            for box, kind in zip(boxes[:OBJECTS], seen.instances.pred_classes, strict=False)
        ]
        return [*found, ("on the background", emptiest_point(size, boxes))]
    kinds, counts = seen.labels.unique(return_counts=True)
    largest = kinds[counts.argsort(descending=True)][: OBJECTS + 1].tolist()
    masks = {kind: (seen.labels == kind).numpy() for kind in largest}
    return [
        (f"in {class_name(metadata, kind, True)}", innermost_point(mask))
        for kind, mask in masks.items()
    ]


def sampling_panel(seen: Seen, title: str, point: Point, layers: list[str] | None = None) -> Panel:
    """Returns where the cell at a point of the original samples; layers as in `trace`."""
    cell = cell_at(seen.recording, seen.as_seen(*point), layers)
    return Panel(title, seen.image, trace(seen.recording, cell, layers=layers))


def parts_of_object(seen: Seen, index: int) -> tuple[Tensor, Tensor] | None:
    """Returns the bins of the RoI that overlaps an object the most, in pixels of the image as seen.

    This need not be the very RoI in which it was found, whose box was moved.

    Args:
        seen: by the network.
        index: of the object.

    Returns:
        resting and moved bins; None if nothing was pooled with offsets.
    """
    found = nearest_roi(seen.parts, seen.instances.pred_boxes.tensor[index] * seen.box_scale)
    if found is None:
        return None
    parts, roi = found
    kind = int(seen.instances.pred_classes[index]) if parts.bins.shape[1] > 1 else 0
    return parts.resting[roi].flatten(0, 1).cpu(), parts.bins[roi, kind].flatten(0, 1).cpu()


def save_picture(
    path: Path,
    seen: Seen,
    metadata: Metadata,
    points: Sequence[Point],
    layers: list[str] | None = None,
) -> None:
    """Saves a picture: what was found, where points sample, parts, and fields of offsets.

    Args:
        path: of the PNG.
        seen: by the network.
        metadata: of the data set, with names of classes.
        points: of the original; none: some of interest.
        layers: to follow; None: all.
    """
    first, second = [found_panel(seen, metadata)], []
    if seen.recording.choose(layers):
        named = [(f"from {x:g}, {y:g}", (x, y)) for x, y in points]
        for title, point in named or points_of_interest(seen, metadata):
            first.append(sampling_panel(seen, title, point, layers))
    found_any = seen.instances is not None and len(seen.instances)
    if found_any and (parts := parts_of_object(seen, 0)) is not None:
        kind = class_name(metadata, int(seen.instances.pred_classes[0]))
        title = f"parts of the RoI next to a {kind}"
        second.append(Panel(title, seen.image, resting=parts[0], bins=parts[1]))
    for layer in seen.recording.choose(layers):
        field, longest = offset_field(layer)
        second.append(Panel(f"{layer.layer}, to {longest:.1f} cells", field))
    save_panels(path, [row for row in (first, second) if row])


def save_interactive(
    path: Path,
    title: str,
    seen: Seen,
    metadata: Metadata,
    layers: list[str] | None = None,
) -> None:
    """Saves a page on which one clicks.

    Args:
        path: of the HTML.
        title: of it.
        seen: by the network.
        metadata: as in `save_picture`.
        layers: likewise.
    """
    objects = []
    for index in range(len(seen.instances) if seen.instances is not None else 0):
        instance = seen.instances[index]
        kind = class_name(metadata, int(instance.pred_classes[0]))
        parts = parts_of_object(seen, index)
        resting, bins = (None, None) if parts is None else (part / seen.box_scale for part in parts)
        objects.append(
            Shown(
                f"{kind} {100 * float(instance.scores[0]):.0f} %",
                tuple(instance.pred_boxes.tensor[0].tolist()),
                resting,
                bins,
            )
        )
    size = seen.image.shape[:2]
    # Of a segmentation, which has no objects to choose, the page shows the enlarged drawing.
    shown = seen.original if seen.instances is not None else found_panel(seen, metadata).image
    save_page(path, title, shown, seen.recording, size, objects, layers=layers)
