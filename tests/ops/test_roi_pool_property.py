# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Random shapes, dtypes and layouts, compared with the reference in float64."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.ops.conv_cases import cast
from tests.ops.roi_cases import MODES, TENSORS, RoiCase, gradients, on_cpu_in_float64
from tests.ops.test_deform_conv2d_property import FORMATS, laid_out
from tests.tolerances import DTYPES, assert_near, tolerance

EXAMPLES = int(os.environ.get("DCN_EXAMPLES", "120"))
small = st.integers(1, 4)
pairs = st.tuples(small, small)


@st.composite
def roi_cases(draw: st.DrawFn) -> RoiCase:
    """Draws valid sizes of a RoI pooling, and boxes inside, across and outside the map."""
    size = (draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    scale = draw(st.sampled_from([1.0, 0.5, 1 / 16]))
    position_sensitive = draw(st.booleans())
    classes = draw(st.integers(0, 3))
    # Odd multiples of 1/64: no sample is at integer coordinates, except in "msra" and "bin",
    # which round boxes.
    corner = st.integers(-8 * 32, 20 * 32).map(lambda n: (2 * n + 1) / 64 / scale)
    box = st.tuples(corner, corner, corner, corner)
    return RoiCase(
        mode=draw(st.sampled_from(MODES)),
        classes=classes,
        channels=max(classes, 1) * draw(st.sampled_from([1, 2, 5, 8, 9])),
        batch=draw(small),
        size=size,
        output=draw(pairs),
        part=draw(pairs) if position_sensitive else None,
        group=draw(pairs) if position_sensitive else None,
        ratio=draw(st.integers(0, 3)),
        scale=scale,
        gamma=draw(st.sampled_from([0.117, 0.993])),
        spread=draw(st.sampled_from([0.3, 1.0, 10.0])),
        boxes=tuple(draw(st.lists(box, max_size=5))),
    )


ARGUMENTS = {
    "case": roi_cases(),
    "dtype": st.sampled_from(DTYPES),
    "coordinates": st.sampled_from(DTYPES),
    "layouts": st.lists(st.sampled_from(FORMATS), min_size=4, max_size=4),
    "seed": st.integers(0, 2**31),
}


@given(**ARGUMENTS)
@settings(
    max_examples=EXAMPLES,  # DCN_EXAMPLES=10000 runs more
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_equals_the_reference_in_float64(device, case, dtype, coordinates, layouts, seed):
    torch.manual_seed(seed)
    call = cast(cast(case.draw(device), dtype, TENSORS), coordinates, ["boxes", "offset"])
    for name, layout in zip(TENSORS, layouts, strict=False):
        if call[name] is not None:
            call[name] = laid_out(call[name], layout)
    grad_output = laid_out(torch.randn(case.output_shape, device=device).to(dtype), layouts[3])
    output, found = gradients(case.function, call, grad_output)
    there = on_cpu_in_float64(call)
    expected, expected_gradients = gradients(case.reference, there, grad_output.double().cpu())
    if case.classes:
        expected_gradients["offset"] = case.reference_offset_gradient(
            grad_output.double().cpu(), there
        )
    # Coordinates of up to 200 pixels lose 8 bits at each of four roundings.
    computed_in = torch.float64 if dtype == torch.float64 else torch.float32
    exact = max(1024 * torch.finfo(computed_in).eps, tolerance(dtype, device))
    assert output.dtype == dtype
    assert_near(output, expected, "output", exact)
    for name, gradient in expected_gradients.items():
        assert found[name].dtype == call[name].dtype
        allowed = max(exact, tolerance(found[name].dtype, device))
        assert_near(found[name], gradient, name, allowed)


def test_examples_are_not_degenerate():
    """The strategy must draw sizes that do not divide each other, and so on."""
    drawn = []

    # Many: Hypothesis takes constants of the modules that are loaded, so that runs differ.
    @settings(max_examples=1000)
    @given(roi_cases())
    def collect(case):
        drawn.append(case)

    collect()
    scores = [c for c in drawn if c.part is not None]
    assert any(c.output[0] % c.group[0] and c.output[1] % c.part[1] for c in scores)
    assert any(c.part[0] > c.output[0] and c.classes > 1 for c in scores)
    assert any(not c.boxes for c in drawn) and any(len(c.boxes) > 2 for c in drawn)
    assert {c.mode for c in drawn if c.classes} == set(MODES)
