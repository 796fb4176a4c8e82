# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The eight classes: a spine and parts, which differ only in their arrangement."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A straight limb that starts at the spine."""

    at: float  # along the spine, 0 to 1
    angle: float  # degrees from the direction of the spine
    length: float = 0.32  # relative to the spine's


@dataclass(frozen=True)
class Disc:
    """A round part on the spine."""

    at: float
    radius: float = 0.17


Part = Bar | Disc


def cross(at: float, length: float = 0.32) -> tuple[Bar, Bar]:
    """Returns a limb on each side of the spine."""
    return Bar(at, 90, length), Bar(at, -90, length)


# In the order of the category ids. Size, colour and texture of an object are independent of its
# class.
CLASSES: dict[str, tuple[Part, ...]] = {
    "pin": (Disc(0.0),),
    "dumbbell": (Disc(0.0), Disc(1.0)),
    "bead": (Disc(0.5),),
    "comb": (Bar(0.04, 90), Bar(0.5, 90), Bar(0.96, 90)),
    "fishbone": (*cross(0.2), *cross(0.5), *cross(0.8)),
    "fork": (Bar(0.0, 145, 0.42), Bar(0.0, -145, 0.42)),
    "girder": (*cross(0.04), *cross(0.96)),
    "zigzag": (Bar(0.04, 90), Bar(0.5, -90), Bar(0.96, 90)),
}
NAMES = tuple(CLASSES)
