# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Images contain what the settings of their set allow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dcn_plugin.data.shapes import NAMES, SETS, drawing
from dcn_plugin.data.shapes.drawing import (
    MIN_PIXELS,
    Patch,
    assign,
    draw_image,
    leaves_visible,
    rasterize,
)

levels = st.sampled_from(["tiny", "demo", "hard"])


@settings(max_examples=40)
@given(st.integers(0, 2**32), levels)
def test_objects_are_visible(seed: int, level: str) -> None:
    rules = SETS[level]
    drawn = draw_image(rules, np.random.default_rng(seed))
    assert drawn.image.shape == (rules.side, rules.side, 3) and drawn.image.dtype == np.uint8
    assert len(drawn.classes) <= rules.objects[1]
    assert set(drawn.classes) <= set(range(len(NAMES)))
    for number in range(len(drawn.classes)):
        assert (drawn.instance_ids == number + 1).sum() >= MIN_PIXELS * (1 - rules.overlap) - 1
    assert drawn.instance_ids.max(initial=0) <= len(drawn.classes)


@settings(max_examples=20)
@given(st.integers(0, 2**32), levels)
def test_drawing_is_deterministic(seed: int, level: str) -> None:
    first, second = (draw_image(SETS[level], np.random.default_rng(seed)) for _ in range(2))
    assert np.array_equal(first.image, second.image)
    assert (
        np.array_equal(first.instance_ids, second.instance_ids) and first.classes == second.classes
    )


def test_objects_have_the_sizes_of_the_settings() -> None:
    """The longer sides of objects, over many images, span the range of the settings."""
    sides = []
    for seed in range(120):
        drawn = draw_image(SETS["hard"], np.random.default_rng(seed))
        for number in range(len(drawn.classes)):
            rows, columns = np.nonzero(drawn.instance_ids == number + 1)
            sides.append(max(np.ptp(rows), np.ptp(columns)) + 1)
    shares = np.array(sides) / SETS["hard"].side
    assert shares.min() < 0.13 and shares.max() > 0.9


def square(left: int, top: int, side: int) -> Patch:
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float) * (side - 1)
    return rasterize([corners + np.array([left, top])])


def test_a_patch_is_cropped_to_the_image() -> None:
    instance_ids = np.zeros((20, 20), np.uint8)
    patch = square(-3, 15, 10)
    assert patch.area() == 100
    assign(instance_ids, patch, 1)
    assert (instance_ids == 1).sum() == 7 * 5 and instance_ids[15:, :7].all()
    assign(instance_ids, square(30, 30, 5), 2)  # entirely outside
    assert instance_ids.max() == 1


@settings(max_examples=30)
@given(st.integers(0, 10))
def test_a_patch_may_occlude_up_to_the_limit(columns: int) -> None:
    rules = SETS["demo"]
    instance_ids = np.zeros((rules.side, rules.side), np.uint8)
    assign(instance_ids, square(50, 50, 10), 1)
    patch = square(50 + 10 - columns, 50, 10)
    min_visible = [100 - rules.overlap * 100]
    assert leaves_visible(patch, instance_ids, min_visible) == (columns / 10 <= rules.overlap)


def test_occlusion_and_truncation_stay_within_the_settings(monkeypatch) -> None:
    """The pixels of each object are counted when it is drawn, and when the image is finished."""
    rules, worst, drawn_first = SETS["hard"], [], []

    def counting_assign(instance_ids: np.ndarray, patch: Patch, instance_id: int) -> None:
        assign(instance_ids, patch, instance_id)
        if instance_id:
            drawn_first.append((int((instance_ids == instance_id).sum()), patch.area()))

    monkeypatch.setattr(drawing, "assign", counting_assign)
    for seed in range(100):
        drawn_first.clear()
        instance_ids = draw_image(rules, np.random.default_rng(seed)).instance_ids
        for number, (at_first, whole) in enumerate(drawn_first, start=1):
            worst.append((at_first - int((instance_ids == number).sum())) / whole)
            assert at_first >= (1 - rules.truncation) * whole
    assert 0.1 < max(worst) <= rules.overlap


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (0.5, 0.2)}, r"size must be two ascending numbers above 0, got \(0.5, 0.2\)"),
        ({"objects": (1, 300)}, r"objects must be two ascending numbers from 0 to 255, got"),
        ({"overlap": 1.0}, r"overlap must be from 0 to below 1, got 1.0"),
        ({"truncation": -0.5}, r"truncation must be from 0 to below 1, got -0.5"),
        ({"bend": -1.0}, r"bend must be at least 0, got -1.0"),
        ({"perspective": 0.5}, r"perspective must be from 0 to below 0.5, got 0.5"),
        ({"aspect": 0.5}, r"aspect must be at least 1, got 0.5"),
    ],
)
def test_impossible_settings_are_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETS["demo"], **changes)
