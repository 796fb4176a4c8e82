# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks the reference of RoI pooling: against torchvision, autograd and values by hand."""

from __future__ import annotations

import pytest

from tests import roi_reference
from tests.ops.roi_cases import (
    ASYMMETRIC,
    BOXES,
    MODES,
    NONEMPTY_BOXES,
    RoiCase,
    gradients,
    standard_grad_output,
)
from tests.tolerances import assert_near


@pytest.mark.parametrize("ratio", [0, 2])
def test_align_equals_roi_align(torchvision, ratio):
    boxes = BOXES if ratio else NONEMPTY_BOXES
    case = RoiCase(classes=0, ratio=ratio, boxes=tuple(boxes.values()))
    call = case.draw()
    output, found = gradients(case.reference, call)

    def roi_align(input, boxes, output_size, spatial_scale, sampling_ratio, **others):
        return torchvision.ops.roi_align(
            input, boxes, output_size, spatial_scale, sampling_ratio, aligned=True
        )

    expected, expected_gradients = gradients(roi_align, call)
    assert_near(output, expected, "output")
    assert_near(found["input"], expected_gradients["input"], "input")


@pytest.mark.parametrize("mode", MODES)
def test_equation_8_is_the_derivative_of_equation_6(mode):
    case = ASYMMETRIC[mode]
    call = case.draw()
    output, found = gradients(case.reference, call)
    grad_output = standard_grad_output(output.shape)
    assert_near(case.reference_offset_gradient(grad_output, call), found["offset"])


@pytest.mark.parametrize(
    "value, expected",
    [(0.5, 1), (1.5, 2), (2.5, 3), (-0.5, -1), (-1.5, -2), (0.49999999999999994, 0), (-0.4, 0)],
)
def test_halves_are_rounded_away_from_zero(value, expected):
    assert roi_reference.round_half_away(value) == expected


@pytest.mark.parametrize(
    "mode, low, high, scale, expected",
    [
        ("align", 3.0, 9.0, 0.5, (1.0, 3.0)),
        ("align", 9.0, 3.0, 0.5, (4.0, -3.0)),
        ("bin", 1.0, 7.0, 0.5, (1, 3)),  # 0.5 -> 1, 3.5 -> 4
        ("bin", -3.0, 1.0, 0.5, (-1, 2)),  # -1.5 -> -1, 0.5 -> 1
        ("bin", 7.0, 1.0, 0.5, (4, 1)),
        ("msra", 0.5, 2.5, 0.5, (0.0, 1.5)),  # 1 and 3 of the image
        ("msra", -0.5, 2.5, 1.0, (-1.5, 5.0)),
        ("msra", 7.0, 1.0, 1.0, (6.5, 0.1)),
    ],
)
def test_sides_on_the_map_by_hand(mode, low, high, scale, expected):
    assert roi_reference.side_on_map(mode, low, high, scale) == expected


@pytest.mark.parametrize(
    "mode, start, size, j, ratio, expected",
    [
        ("align", 0.0, 6.0, 1, 0, [3.5, 4.5, 5.5]),
        ("align", 0.0, 6.0, 1, 2, [3.75, 5.25]),
        ("align", 0.0, 5.0, 0, 0, [5 / 12, 15 / 12, 25 / 12]),
        ("align", 0.0, 0.0, 0, 0, []),
        ("align", 4.0, -4.0, 1, 0, []),
        ("align", 4.0, -4.0, 1, 2, [1.5, 0.5]),
        ("bin", 2, 5, 0, 0, [2, 3, 4]),
        ("bin", 2, 5, 1, 9, [4, 5, 6]),
        ("msra", 1.5, 8.0, 0, 0, [1.5, 2.5, 3.5, 4.5]),
        ("msra", 1.5, 8.0, 1, 2, [5.5, 7.5]),
    ],
)
def test_positions_of_two_bins_by_hand(mode, start, size, j, ratio, expected):
    assert roi_reference.positions(mode, start, size, j, 2, ratio).tolist() == pytest.approx(
        expected
    )
