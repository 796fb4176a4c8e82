# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Outlines of objects under non-rigid, affine and perspective deformation."""

from __future__ import annotations

import numpy as np

from .classes import CLASSES, Bar, Part
from .sets import Settings

Points = np.ndarray  # (n, 2), x and y

JOINTS = 3
SAMPLES = 25  # points along a spine
THICK = 0.12  # width of spine and limbs, relative to the spine's length
CIRCLE = np.linspace(0, 2 * np.pi, 24, endpoint=False)


def object_outlines(name: str, settings: Settings, rng: np.random.Generator) -> list[Points]:
    """Returns closed outlines whose union is a randomly deformed object.

    Their bounding box is centred at the origin, and its longer side is 1.

    Args:
        name: class of the object.
        settings: limits of the deformation.
        rng: source of random numbers.
    """
    spine, headings = bent_spine(settings.bend, rng)
    outlines = [ribbon(spine, headings)]
    for part in CLASSES[name]:
        outlines.append(part_outline(part, spine, headings, settings.articulation, rng))
    return random_view(outlines, settings, rng)


def bent_spine(bend: float, rng: np.random.Generator) -> tuple[Points, np.ndarray]:
    """Returns points along a spine of length 1, and the direction at each in radians."""
    turns = np.radians(rng.uniform(-bend, bend, JOINTS))
    knots = np.concatenate([[0.0], np.cumsum(turns)])
    along = np.linspace(0, 1, SAMPLES)
    headings = np.interp(along, np.linspace(0, 1, JOINTS + 1), knots)
    steps = np.stack([np.cos(headings), np.sin(headings)], axis=1) / (SAMPLES - 1)
    points = np.concatenate([[[0.0, 0.0]], np.cumsum(steps[:-1], axis=0)])
    return points, headings


def ribbon(points: Points, headings: np.ndarray) -> Points:
    """Returns the outline of a curve of constant width."""
    across = np.stack([-np.sin(headings), np.cos(headings)], axis=1) * THICK / 2
    return np.concatenate([points + across, (points - across)[::-1]])


def part_outline(
    part: Part, spine: Points, headings: np.ndarray, articulation: float, rng: np.random.Generator
) -> Points:
    """Returns the outline of a part at its position on the spine."""
    row = round(part.at * (SAMPLES - 1))
    where, heading = spine[row], headings[row]
    if not isinstance(part, Bar):
        radius = part.radius * rng.uniform(0.9, 1.1)
        return where + radius * np.stack([np.cos(CIRCLE), np.sin(CIRCLE)], axis=1)
    turned = heading + np.radians(part.angle + rng.uniform(-articulation, articulation))
    length = part.length * rng.uniform(0.9, 1.1)
    ahead = np.array([np.cos(turned), np.sin(turned)])
    across = np.array([-ahead[1], ahead[0]]) * THICK / 2
    tip = where + ahead * (length + THICK / 2)
    return np.stack([where + across, tip + across, tip - across, where - across])


def random_view(
    outlines: list[Points], settings: Settings, rng: np.random.Generator
) -> list[Points]:
    """Applies a random affine and perspective transform, and normalizes the bounding box."""
    stretch = np.exp(rng.uniform(0, np.log(settings.aspect)))
    shear = rng.uniform(-settings.shear, settings.shear)
    along = rotation(rng.uniform(-180, 180))  # direction of stretch and shear
    shape = along @ np.array([[stretch, shear], [0.0, 1.0]]) @ along.T
    shape = rotation(rng.uniform(-settings.rotation, settings.rotation)) @ shape
    if rng.random() < 0.5:
        shape = shape @ np.diag([1.0, -1.0])
    sizes = [len(points) for points in outlines]
    points = np.concatenate(outlines) @ shape.T
    points = (points - points.mean(axis=0)) / np.ptp(points, axis=0).max()
    tilt = rng.uniform(-1, 1, 2) * settings.perspective
    points = points / (1 + points @ tilt)[:, None]
    low, high = points.min(axis=0), points.max(axis=0)
    points = (points - (low + high) / 2) / (high - low).max()
    return np.split(points, np.cumsum(sizes)[:-1])


def rotation(degrees: float) -> np.ndarray:
    """Returns a rotation matrix."""
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
