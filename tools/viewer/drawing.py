# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Draws predictions, sampling locations, RoI bins and offsets as a picture or an HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor

from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer

from dcn_plugin.analysis import nearest_roi, position_at, trace
from dcn_plugin.analysis.figures import Panel, offset_image, save_panels
from dcn_plugin.analysis.html_page import PageObject, save_page

from .predictor import Prediction

Point = tuple[float, float]  # x and y
OBJECTS = 2  # whose centres are traced in a picture
MIN_SIDE = 480  # smaller images are enlarged for the text on them


def prediction_panel(prediction: Prediction, metadata: Metadata) -> Panel:
    """Returns the detections, or the semantic segmentation."""
    drawing = visualizer(prediction, metadata)
    if prediction.instances is not None:
        drawn = drawing.draw_instance_predictions(prediction.instances)
        count = len(prediction.instances)
        return Panel(f"{count} detection{'s' if count != 1 else ''}", drawn.get_image())
    if metadata.get("stuff_classes") is None:  # of a data set that is not registered
        count = int(prediction.labels.max()) + 1
        drawing.metadata = Metadata(stuff_classes=[str(label) for label in range(count)])
    drawn = drawing.draw_sem_seg(prediction.labels, area_threshold=0, alpha=0.6)
    return Panel("semantic segmentation", drawn.get_image())


def visualizer(prediction: Prediction, metadata: Metadata) -> Visualizer:
    """Returns a visualizer of the original image, enlarged if it is too small for text."""
    scale = max(1.0, MIN_SIDE / max(prediction.original.shape[:2]))
    return Visualizer(prediction.original, metadata, scale=scale)


def class_name(metadata: Metadata, label: int, stuff: bool = False) -> str:
    """Returns the name of a class, or its number if the names are not known."""
    names = metadata.get("stuff_classes" if stuff else "thing_classes") or ()
    return names[label] if label < len(names) else str(label)


def points_of_interest(prediction: Prediction, metadata: Metadata) -> list[tuple[str, Point]]:
    """Returns points of the original, with titles, to show the sampling locations of.

    These are the centres of the highest-scoring detections and a point of the background, or
    points in the largest classes of a segmentation.
    """
    instances, labels = prediction.instances, prediction.labels
    if instances is None:
        present, counts = labels.unique(return_counts=True)
        largest = present[counts.argsort(descending=True)][: OBJECTS + 1].tolist()
        names = [class_name(metadata, label, stuff=True) for label in largest]
        points = [innermost_point((labels == label).numpy()) for label in largest]
    else:
        boxes, classes = instances.pred_boxes, instances.pred_classes[:OBJECTS].tolist()
        background = emptiest_point(prediction.original.shape[:2], boxes.tensor.numpy())
        names = [*(class_name(metadata, label) for label in classes), "background"]
        points = [*map(tuple, boxes.get_centers()[:OBJECTS].tolist()), background]
    return [(f"sampling locations: {name}", at) for name, at in zip(names, points, strict=True)]


def emptiest_point(size: tuple[int, int], boxes: np.ndarray) -> Point:
    """Returns the point of an image (height, width) farthest from all boxes, off the border."""
    height, width = size
    ys, xs = np.mgrid[1:16, 1:16] / 16 * np.array([height, width])[:, None, None]
    distance = np.full(xs.shape, np.inf)
    for left, top, right, bottom in boxes:
        dx = np.maximum(np.maximum(left - xs, xs - right), 0)
        dy = np.maximum(np.maximum(top - ys, ys - bottom), 0)
        distance = np.minimum(distance, np.hypot(dx, dy))
    best = np.unravel_index(distance.argmax(), distance.shape)
    return float(xs[best]), float(ys[best])


def innermost_point(mask: np.ndarray) -> Point:
    """Returns the point of a (H, W) mask farthest from its outline and the image border."""
    padded = np.pad(mask.astype(np.uint8), 1)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return float(x), float(y)


def sampling_panel(
    prediction: Prediction, title: str, point: Point, layers: list[str] | None = None
) -> Panel:
    """Returns the sampling locations at a point of the original; layers as in `trace`."""
    recording = prediction.recording
    position = position_at(recording, prediction.to_resized(*point), layers)
    return Panel(title, prediction.resized, trace(recording, position, layers=layers))


def bins_of_object(prediction: Prediction, index: int) -> tuple[Tensor, Tensor] | None:
    """Returns the bins of the RoI with the highest IoU with a detection.

    It need not be the RoI that gave the detection, whose box was regressed.

    Args:
        prediction: of a detector.
        index: of the detection.

    Returns:
        undeformed and moved bins in pixels of the model's input; None without deformable pooling.
    """
    instances = prediction.instances
    box = instances.pred_boxes.tensor[index] * prediction.box_scale
    nearest = nearest_roi(prediction.roi_bins, box)
    if nearest is None:
        return None
    bins, roi = nearest
    label = int(instances.pred_classes[index]) if bins.bins.shape[1] > 1 else 0
    return bins.undeformed[roi].flatten(0, 1).cpu(), bins.bins[roi, label].flatten(0, 1).cpu()


def save_picture(
    path: Path,
    prediction: Prediction,
    metadata: Metadata,
    points: Sequence[Point],
    layers: list[str] | None = None,
) -> None:
    """Saves a picture of the prediction, sampling locations, RoI bins and offsets.

    Args:
        path: of the PNG file.
        prediction: to draw.
        metadata: of the data set, with names of classes.
        points: of the original, whose sampling locations are drawn; none: points of interest.
        layers: to trace through; None: all.
    """
    rows = [[prediction_panel(prediction, metadata)], []]
    chosen = prediction.recording.choose(layers)
    if chosen:
        named = [(f"sampling locations: {x:g}, {y:g}", (x, y)) for x, y in points]
        for title, point in named or points_of_interest(prediction, metadata):
            rows[0].append(sampling_panel(prediction, title, point, layers))
    instances = prediction.instances
    if instances is not None and len(instances) and (bins := bins_of_object(prediction, 0)):
        title = f"RoI bins: {class_name(metadata, int(instances.pred_classes[0]))}"
        rows[1].append(Panel(title, prediction.resized, undeformed=bins[0], bins=bins[1]))
    for layer in chosen:
        image, longest = offset_image(layer)
        rows[1].append(Panel(f"offsets of {layer.layer}, max {longest:.1f}", image))
    save_panels(path, [row for row in rows if row])


def save_interactive(
    path: Path,
    title: str,
    prediction: Prediction,
    metadata: Metadata,
    layers: list[str] | None = None,
) -> None:
    """Saves an HTML page to click on; arguments as in `save_picture`."""
    objects, instances = [], prediction.instances
    for index in range(0 if instances is None else len(instances)):
        name = class_name(metadata, int(instances.pred_classes[index]))
        label = f"{name} {100 * float(instances.scores[index]):.0f} %"
        box = instances.pred_boxes.tensor[index] * prediction.box_scale
        bins = bins_of_object(prediction, index) or (None, None)
        objects.append(PageObject(label, tuple(box.tolist()), *bins))
    # A segmentation has no objects to choose from: the page shows it instead of the image.
    segmented = instances is None
    image = prediction_panel(prediction, metadata).image if segmented else prediction.resized
    size = prediction.resized.shape[:2]
    save_page(path, title, image, prediction.recording, size, objects, layers=layers)
