# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Objects are deformed within the limits of their settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dcn_plugin.data.shapes import NAMES, SETS
from dcn_plugin.data.shapes.geometry import JOINTS, SAMPLES, bent_spine, object_outlines

RIGID = replace(SETS["demo"], bend=0, articulation=0, rotation=0, aspect=1, shear=0, perspective=0)
seeds = st.integers(0, 2**32)


@given(seeds, st.sampled_from(NAMES), st.sampled_from(["demo", "hard"]))
def test_the_bounding_box_is_normalized(seed: int, name: str, level: str) -> None:
    outlines = object_outlines(name, SETS[level], np.random.default_rng(seed))
    points = np.concatenate(outlines)
    assert np.isfinite(points).all()
    assert np.ptp(points, axis=0).max() == pytest.approx(1)
    assert points.min(axis=0) + points.max(axis=0) == pytest.approx(0, abs=1e-9)


@given(seeds, st.floats(0, 90))
def test_a_spine_has_length_one_and_bends_within_limits(seed: int, bend: float) -> None:
    points, headings = bent_spine(bend, np.random.default_rng(seed))
    assert np.linalg.norm(np.diff(points, axis=0), axis=1).sum() == pytest.approx(1)
    assert np.abs(headings).max() <= np.radians(bend) * JOINTS + 1e-9
    # Between joints the direction changes linearly.
    share = JOINTS / (len(points) - 1)
    assert np.abs(np.diff(headings)).max() <= np.radians(bend) * share + 1e-9


def arrangement(name: str, seed: int) -> np.ndarray:
    """Returns the distances between all parts of a rigid object, relative to its spine."""
    parts = object_outlines(name, RIGID, np.random.default_rng(seed))
    middles = np.stack([(part.min(axis=0) + part.max(axis=0)) / 2 for part in parts])
    length = np.linalg.norm(parts[0][SAMPLES - 1] - parts[0][0])
    return np.sort(np.linalg.norm(middles[:, None] - middles, axis=-1), axis=None) / length


def test_classes_differ_in_the_arrangement_of_parts() -> None:
    for name in NAMES:
        own = arrangement(name, 0)
        assert arrangement(name, 1) == pytest.approx(own, abs=0.06), name
        for other in NAMES:
            there = arrangement(other, 0)
            same = len(there) == len(own) and np.abs(there - own).max() < 0.1
            assert same == (other == name), (name, other)


@given(seeds, st.sampled_from(NAMES), st.floats(0, 90))
def test_rotation_stays_within_the_settings(seed: int, name: str, rotation: float) -> None:
    rules = replace(RIGID, rotation=rotation)
    spine = object_outlines(name, rules, np.random.default_rng(seed))[0]
    ahead = spine[SAMPLES - 1] - spine[0]
    turned = np.degrees(np.arctan2(ahead[1], ahead[0]))
    assert abs(turned) <= rotation + 1e-6
