# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Settings of the sets. They were fixed before plain and deformable models were compared."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

VERSION = 2  # of the drawing code; a new version generates all sets again


@dataclass(frozen=True)
class Settings:
    """Size and difficulty of a set; lengths are relative to the side of the image."""

    side: int  # pixels
    train: int  # images
    val: int
    test: int
    size: tuple[float, float]  # range of the longer side of an object
    objects: tuple[int, int]  # range of their number
    bend: float  # maximum angle at each joint of a spine, degrees
    articulation: float  # maximum rotation of a limb, degrees
    rotation: float  # maximum rotation to either side, degrees
    aspect: float  # maximum stretch in one direction
    shear: float  # maximum
    perspective: float  # maximum change of distance across an object, relative to its distance
    distractors: tuple[int, int]  # range of their number
    clutter: float  # contrast of the background
    overlap: float  # maximum share of an object occluded by others
    truncation: float  # maximum share of an object outside the image
    seed: int

    def __post_init__(self) -> None:
        """Checks the ranges."""
        (low, high), (fewest, most) = self.size, self.objects
        for rule, holds in (
            ("side must be at least 16", self.side >= 16),
            ("size must be two ascending numbers above 0", 0 < low <= high),
            ("objects must be two ascending numbers from 0 to 255", 0 <= fewest <= most <= 255),
            (
                "distractors must be two ascending numbers",
                0 <= min(self.distractors) == self.distractors[0],
            ),
            ("bend must be at least 0", self.bend >= 0),
            ("articulation must be at least 0", self.articulation >= 0),
            ("rotation must be at least 0", self.rotation >= 0),
            ("aspect must be at least 1", self.aspect >= 1),
            ("shear must be at least 0", self.shear >= 0),
            # From 0.5 on, a part could lie behind the camera.
            ("perspective must be from 0 to below 0.5", 0 <= self.perspective < 0.5),
            ("overlap must be from 0 to below 1", 0 <= self.overlap < 1),
            ("truncation must be from 0 to below 1", 0 <= self.truncation < 1),
        ):
            if not holds:
                raise ValueError(f"{rule}, got {getattr(self, rule.split()[0])}")

    def key(self) -> str:
        """Returns a hash of all settings, which names the folder of the set."""
        text = json.dumps([VERSION, asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


MILD = {
    "size": (0.45, 0.9),
    "objects": (1, 2),
    "bend": 15,
    "articulation": 5,
    "rotation": 180,
    "aspect": 1.3,
    "shear": 0.1,
    "perspective": 0.1,
    "distractors": (0, 3),
    "clutter": 0.4,
    "overlap": 0.1,
    "truncation": 0.05,
}
STRONG = {
    "size": (0.12, 0.96),
    "objects": (1, 4),
    "bend": 45,
    "articulation": 15,
    "rotation": 180,
    "aspect": 2.2,
    "shear": 0.3,
    "perspective": 0.2,
    "distractors": (0, 4),
    "clutter": 0.5,
    "overlap": 0.2,
    "truncation": 0.1,
}
SETS = {
    "tiny": Settings(side=64, train=24, val=8, test=8, seed=0, **MILD),
    "demo": Settings(side=128, train=4000, val=250, test=500, seed=1, **MILD),
    "hard": Settings(side=128, train=8000, val=500, test=1000, seed=2, **STRONG),
    "large": Settings(side=512, train=20000, val=1000, test=2000, seed=3, **STRONG),
}
SPLITS = ("train", "val", "test")
IMAGES, LABELS, ANNOTATIONS = "images", "labels", "annotations.json"  # in the folder of a split
