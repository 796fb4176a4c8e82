# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The outlines of an object: its parts, bent, articulated, and seen from anywhere."""

from __future__ import annotations

import numpy as np

from .classes import CLASSES, Bar, Part
from .sets import Settings

Points = np.ndarray  # (n, 2), x and y

JOINTS = 3
SAMPLES = 25  # of a spine
THICK = 0.12  # a spine or limb, of the spine's length
CIRCLE = np.linspace(0, 2 * np.pi, 24, endpoint=False)


def object_outlines(name: str, settings: Settings, rng: np.random.Generator) -> list[Points]:
    """Draws an object's shape.

    Args:
        name: of its class.
        settings: how far it may be deformed.
        rng: of its random numbers.

    Returns:
        closed outlines, whose union is the object, around the origin; the longer side of the box
        around them is 1.
    """
    spine, headings = bent_spine(settings.bend, rng)
    outlines = [ribbon(spine, headings)]
    for part in CLASSES[name]:
        outlines.append(part_outline(part, spine, headings, settings.articulation, rng))
    return random_view(outlines, settings, rng)


def bent_spine(bend: float, rng: np.random.Generator) -> tuple[Points, np.ndarray]:
    """Returns points along a spine of length 1, and its direction at each, in radians."""
    turns = np.radians(rng.uniform(-bend, bend, JOINTS))
    knots = np.concatenate([[0.0], np.cumsum(turns)])
    along = np.linspace(0, 1, SAMPLES)
    headings = np.interp(along, np.linspace(0, 1, JOINTS + 1), knots)
    steps = np.stack([np.cos(headings), np.sin(headings)], axis=1) / (SAMPLES - 1)
    points = np.concatenate([[[0.0, 0.0]], np.cumsum(steps[:-1], axis=0)])
    return points, headings


def ribbon(points: Points, headings: np.ndarray) -> Points:
    """Returns the outline of a line of constant thickness."""
    across = np.stack([-np.sin(headings), np.cos(headings)], axis=1) * THICK / 2
    return np.concatenate([points + across, (points - across)[::-1]])


def part_outline(
    part: Part,
    spine: Points,
    headings: np.ndarray,
    articulation: float,
    rng: np.random.Generator,
) -> Points:
    """Returns the outline of a part where it sits on the spine."""
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
    """Flips, stretches, shears, turns and tilts outlines; their box gets a longer side of 1."""
    stretch = np.exp(rng.uniform(0, np.log(settings.aspect)))
    shear = rng.uniform(-settings.shear, settings.shear)
    along = rotation(rng.uniform(-180, 180))  # the direction in which it is stretched and sheared
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
    """Returns the matrix of a rotation."""
    angle = np.radians(degrees)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
