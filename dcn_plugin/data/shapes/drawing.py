# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Draws an image: a cluttered background, distractors, and objects that occlude each other."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .classes import NAMES
from .geometry import Points, object_outlines
from .sets import Settings

SUBPIXEL_BITS = 4  # fractional bits of the coordinates given to OpenCV
MAX_TRIES = 30  # random positions of an object before it is left out
MIN_PIXELS = 12  # of an object within the image
OCTAVES = ((2, 1.0), (4, 0.8), (9, 0.6), (20, 0.45), (44, 0.3))  # cells along a side, contrast


@dataclass
class Drawing:
    """An image and its ground truth."""

    image: np.ndarray  # (side, side, 3) uint8, BGR
    instance_ids: np.ndarray  # (side, side) uint8, 0 for background, else 1 + index of the object
    classes: list[int]  # of each object


@dataclass
class Patch:
    """An anti-aliased mask at a position that may lie partly outside the image."""

    mask: np.ndarray  # (height, width) uint8, 255 inside
    left: int
    top: int

    def area(self) -> int:
        """Returns the number of pixels, including those outside the image."""
        return int((self.mask > 127).sum())

    def area_inside(self, side: int) -> int:
        """Returns the number of pixels within the image."""
        return int((self.inside(side)[1] > 127).sum())

    def inside(self, side: int) -> tuple[tuple[slice, slice], np.ndarray]:
        """Returns the rows and columns of the image that it overlaps, and the mask there."""
        height, width = self.mask.shape
        top, left = max(self.top, 0), max(self.left, 0)
        bottom = max(min(self.top + height, side), top)
        right = max(min(self.left + width, side), left)
        mask = self.mask[top - self.top : bottom - self.top, left - self.left : right - self.left]
        return (slice(top, bottom), slice(left, right)), mask


def draw_image(settings: Settings, rng: np.random.Generator) -> Drawing:
    """Draws an image; the same state of `rng` gives the same image."""
    side = settings.side
    image = background(settings, rng)
    instance_ids = np.zeros((side, side), np.uint8)
    for _ in range(rng.integers(settings.distractors[0], settings.distractors[1] + 1)):
        paint(image, rasterize(distractor(side, rng)), rng)
    classes: list[int] = []
    min_visible: list[float] = []  # pixels of each object that must stay visible
    for _ in range(rng.integers(settings.objects[0], settings.objects[1] + 1)):
        kind = int(rng.integers(len(NAMES)))
        patch = place_object(NAMES[kind], settings, instance_ids, min_visible, rng)
        if patch is not None:
            paint(image, patch, rng)
            classes.append(kind)
            max_occluded = settings.overlap * patch.area()
            min_visible.append(max(patch.area_inside(side) - max_occluded, 1))
            assign(instance_ids, patch, len(classes))
    if rng.random() < 0.3:  # a thin distractor in the foreground
        stroke = rasterize(distractor(side, rng, thin=True))
        if leaves_visible(stroke, instance_ids, min_visible):
            paint(image, stroke, rng)
            assign(instance_ids, stroke, 0)
    return Drawing(image.clip(0, 255).astype(np.uint8), instance_ids, classes)


def place_object(
    name: str,
    settings: Settings,
    instance_ids: np.ndarray,
    min_visible: list[float],
    rng: np.random.Generator,
) -> Patch | None:
    """Finds a position where the object and those that it occludes remain visible enough.

    Args:
        name: class of the object.
        settings: of the set.
        instance_ids: of the objects drawn so far.
        min_visible: pixels of each of them that must stay visible.
        rng: source of random numbers.

    Returns:
        the object's mask, or None if MAX_TRIES positions did not fit.
    """
    side = settings.side
    low, high = settings.size
    for _ in range(MAX_TRIES):
        extent = side * np.exp(rng.uniform(np.log(low), np.log(high)))
        centre = rng.uniform(0, side, 2)
        outlines = object_outlines(name, settings, rng)
        patch = rasterize([points * extent + centre for points in outlines])
        needed = max((1 - settings.truncation) * patch.area(), MIN_PIXELS)
        if patch.area_inside(side) >= needed and leaves_visible(patch, instance_ids, min_visible):
            return patch
    return None


def leaves_visible(patch: Patch, instance_ids: np.ndarray, min_visible: list[float]) -> bool:
    """Returns whether all objects stay visible enough when a patch occludes them."""
    where, mask = patch.inside(instance_ids.shape[0])
    count = len(min_visible) + 1
    visible = np.bincount(instance_ids.ravel(), minlength=count)
    visible -= np.bincount(instance_ids[where][mask > 127], minlength=count)
    return bool((visible[1:] >= np.array(min_visible)).all())


def assign(instance_ids: np.ndarray, patch: Patch, instance_id: int) -> None:
    """Sets the id of the pixels within a patch; 0 is background."""
    where, mask = patch.inside(instance_ids.shape[0])
    instance_ids[where][mask > 127] = instance_id


def rasterize(outlines: list[Points]) -> Patch:
    """Returns the mask of the union of closed outlines."""
    points = np.concatenate(outlines)
    corner = np.floor(points.min(axis=0)).astype(int) - 1
    width, height = np.ceil(points.max(axis=0)).astype(int) + 2 - corner
    mask = np.zeros((height, width), np.uint8)
    for outline in outlines:
        fixed = np.round((outline - corner) * (1 << SUBPIXEL_BITS)).astype(np.int32)
        cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, SUBPIXEL_BITS)
    return Patch(mask, int(corner[0]), int(corner[1]))


def paint(image: np.ndarray, patch: Patch, rng: np.random.Generator) -> None:
    """Fills a patch with a bright colour and a mild texture."""
    colour = rng.uniform(120, 255, 3).astype(np.float32)
    texture = smooth_noise(patch.mask.shape, int(rng.integers(2, 6)), rng) * rng.uniform(4, 18)
    where, mask = patch.inside(image.shape[0])
    height, width = mask.shape
    alpha = (mask.astype(np.float32) / 255)[..., None]
    image[where] += alpha * (colour + texture[:height, :width] - image[where])


def distractor(side: int, rng: np.random.Generator, thin: bool = False) -> list[Points]:
    """Returns the outline of a stroke, a disc or a polygon; `thin` only of a stroke."""
    centre, extent = rng.uniform(0, side, 2), side * rng.uniform(0.03, 0.12)
    kind = 0 if thin else rng.integers(3)
    if kind == 0:
        ahead = rng.normal(size=2)
        ahead *= extent * rng.uniform(1, 3) / np.linalg.norm(ahead)
        across = np.array([-ahead[1], ahead[0]]) * rng.uniform(0.04, 0.12)
        corners = [ahead + across, ahead - across, -ahead - across, across - ahead]
        return [centre + np.stack(corners)]
    count = 20 if kind == 1 else int(rng.integers(3, 6))
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, 2 * np.pi)
    radii = extent / 2 * (1 if kind == 1 else rng.uniform(0.6, 1.4, count))
    return [centre + np.stack([np.cos(angles) * radii, np.sin(angles) * radii], axis=1)]


def background(settings: Settings, rng: np.random.Generator) -> np.ndarray:
    """Returns dark noise of several frequencies."""
    side = settings.side
    image = np.zeros((side, side, 3), np.float32)
    for cells, contrast in OCTAVES:
        image += smooth_noise((side, side), cells, rng) * contrast
    return rng.uniform(25, 60, 3).astype(np.float32) + image * (55 * settings.clutter)


def smooth_noise(shape: tuple[int, ...], cells: int, rng: np.random.Generator) -> np.ndarray:
    """Returns noise, (height, width, 3), with mean 0 and a standard deviation of about 1."""
    grid = rng.standard_normal((cells + 2, cells + 2, 3)).astype(np.float32)
    return cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
