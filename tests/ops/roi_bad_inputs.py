# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Every kind of bad input to RoI pooling, by name: what is refused, and what is survived.

`python -m tests.ops.roi_bad_inputs DEVICE NAME...` runs some of them, without names all.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.ops.bad_inputs import Change, Refused
from tests.ops.conv_cases import cast
from tests.ops.roi_cases import BOTH, MODES, RoiCase, gradients

NAN, INF = float("nan"), float("inf")


def _refused(error: type[Exception], *fragments: str, **changes: Any) -> Refused:
    """Describes a refusal; a callable change is applied to the argument it is named after."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        new = {k: v(call[k]) if callable(v) else v for k, v in changes.items()}
        return {**call, **new}

    return Refused(change, error, fragments)


def _with_batch_index(value: float) -> Change:
    def change(call: dict[str, Any]) -> dict[str, Any]:
        boxes = call["boxes"].clone()
        boxes[4, 0] = value
        return {**call, "boxes": boxes}

    return change


# The good call: input (3, 36, 9, 8), boxes (12, 5), offset (12, 6, 4, 5), output size (3, 2),
# part size (4, 5), group size (2, 3), so 6 output channels of 3 classes.
REFUSED = {
    "input-3d": _refused(ValueError, "input", "4", "[36, 9, 8]", input=lambda t: t[0]),
    "input-scalar": _refused(ValueError, "input", "[]", input=lambda t: t.sum()),
    "input-without-channels": _refused(ValueError, "channels", "0", input=lambda t: t[:, :0]),
    "input-without-rows": _refused(ValueError, "input size", "[0, 8]", input=lambda t: t[:, :, :0]),
    "input-channels-not-of-groups": _refused(
        ValueError, "input", "channels", "2 * 3", "35", input=lambda t: t[:, 1:]
    ),
    "boxes-1d": _refused(ValueError, "boxes", "[5]", boxes=lambda t: t[0]),
    "boxes-3d": _refused(ValueError, "boxes", "[1, 12, 5]", boxes=lambda t: t[None]),
    "boxes-of-4-columns": _refused(ValueError, "boxes", "[12, 4]", boxes=lambda t: t[:, 1:]),
    "boxes-of-6-columns": _refused(
        ValueError, "boxes", "[12, 6]", boxes=lambda t: t[:, [0, 1, 2, 3, 4, 4]]
    ),
    "list-of-5-columns": _refused(ValueError, "boxes", "(12, 5)", boxes=lambda t: [t, t, t]),
    "list-of-one-box": _refused(ValueError, "boxes", "(4,)", boxes=lambda t: [t[0, 1:]]),
    "list-longer-than-batch": _refused(
        ValueError, "batch index", "3", boxes=lambda t: [t[:3, 1:]] * 4
    ),
    "offset-3d": _refused(ValueError, "offset", "4", "[6, 4, 5]", offset=lambda t: t[0]),
    "offset-rois": _refused(ValueError, "offset", "12", "[11, 6, 4, 5]", offset=lambda t: t[1:]),
    "offset-odd-planes": _refused(ValueError, "offset", "[12, 5, 4, 5]", offset=lambda t: t[:, 1:]),
    "offset-without-planes": _refused(
        ValueError, "offset", "[12, 0, 4, 5]", offset=lambda t: t[:, :0]
    ),
    "offset-classes-do-not-divide": _refused(
        ValueError, "classes", "4", "6", offset=lambda t: t.new_zeros(12, 8, 4, 5)
    ),
    "offset-more-classes-than-channels": _refused(
        ValueError, "classes", "12", "6", offset=lambda t: t.new_zeros(12, 24, 4, 5)
    ),
    "offset-height-width-swapped": _refused(
        ValueError, "offset", "4, 5", "[12, 6, 5, 4]", offset=lambda t: t.transpose(2, 3)
    ),
    "offset-of-output-size": _refused(
        ValueError, "offset", "4, 5", "[12, 6, 3, 2]", offset=lambda t: t[:, :, :3, :2]
    ),
    "output-size-0": _refused(ValueError, "output_size", "[0, 2]", output_size=(0, 2)),
    "output-size-negative": _refused(ValueError, "output_size", "[3, -1]", output_size=(3, -1)),
    "output-size-of-three": _refused(ValueError, "output_size", "[1, 1, 1]", output_size=(1, 1, 1)),
    "output-size-huge": _refused(ValueError, "output_size", str(2**31), output_size=(3, 2**31)),
    "part-size-0": _refused(ValueError, "part_size", "[4, 0]", part_size=(4, 0)),
    "part-size-of-three": _refused(ValueError, "part_size", "[4, 5, 1]", part_size=(4, 5, 1)),
    "group-size-0": _refused(ValueError, "group_size", "[0, 3]", group_size=(0, 3)),
    "group-size-negative": _refused(ValueError, "group_size", "[-2, -3]", group_size=(-2, -3)),
    "group-size-of-three": _refused(ValueError, "group_size", "[2, 3, 1]", group_size=(2, 3, 1)),
    "group-size-does-not-divide": _refused(ValueError, "36", "5", group_size=5),
    "group-size-huge": _refused(ValueError, "2147483647", "36", group_size=2**31 - 1),
    "mode-unknown": _refused(ValueError, "mode", "'max'", "align", mode="max"),
    "mode-empty": _refused(ValueError, "mode", "''", mode=""),
    "spatial-scale-0": _refused(ValueError, "spatial_scale", "0", spatial_scale=0.0),
    "spatial-scale-nan": _refused(ValueError, "spatial_scale", "nan", spatial_scale=NAN),
    "gamma-infinite": _refused(ValueError, "gamma", "inf", gamma=INF),
    "sampling-ratio-negative": _refused(ValueError, "sampling_ratio", "-2", sampling_ratio=-2),
    "input-int": _refused(TypeError, "input", "Long", input=lambda t: t.long()),
    "input-complex": _refused(TypeError, "input", "ComplexDouble", input=lambda t: t + 0j),
    "boxes-int": _refused(TypeError, "boxes", "Long", boxes=lambda t: t.long()),
    "boxes-bool": _refused(TypeError, "boxes", "Bool", boxes=lambda t: t > 0),
    "offset-int": _refused(TypeError, "offset", "Int", offset=lambda t: t.int()),
    "boxes-on-meta": _refused(ValueError, "boxes", "device", "meta", boxes=lambda t: t.to("meta")),
    "offset-on-meta": _refused(
        ValueError, "offset", "device", "meta", offset=lambda t: t.to("meta")
    ),
}
BATCH_INDICES = {
    "negative": -1.0,
    "of-the-batch": 3.0,
    "fractional": 0.5,
    "nan": NAN,
    "infinite": INF,
    "minus-infinite": -INF,
    "huge": 1e30,
    "beyond-int64": 2.0**63,
}
# An error on the CPU; on CUDA NaN for that RoI, which `survived` shows.
REFUSED_ON_CPU = {
    f"batch-index-{name}": Refused(
        _with_batch_index(value), ValueError, ("batch index", f"{value:g}"[:4])
    )
    for name, value in BATCH_INDICES.items()
}


def _fill(name: str, value: float, column: int | None = None) -> Change:
    """Fills an argument, or of the boxes one column, in every second row."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        # By way of float64: where a dtype does not reach 1e30 it gets infinity.
        changed = call[name].double().clone()
        rows = changed[::2] if column is None else changed[::2, column]
        rows.fill_(value)
        return {**call, name: changed.to(call[name])}

    return change


def _fill_some(name: str, value: float) -> Change:
    def change(call: dict[str, Any]) -> dict[str, Any]:
        changed = call[name].double().flatten()
        changed[::7] = value
        return {**call, name: changed.view_as(call[name]).to(call[name])}

    return change


def _large_setting(**settings: Any) -> Change:
    return lambda call: {**call, **settings}


_VALUES = (NAN, INF, -INF, 1e30, -1e30, 3e9)
# Values that must neither crash nor hang, forward and backward.
SURVIVED: dict[str, Change] = {
    **{f"input-{v}": _fill_some("input", v) for v in _VALUES},
    **{f"offset-{v}": _fill("offset", v) for v in _VALUES},
    **{f"offset-some-{v}": _fill_some("offset", v) for v in _VALUES},
    **{f"boxes-{c}-{v}": _fill("boxes", v, c) for v in _VALUES for c in (1, 4)},
    "sampling-ratio-large": _large_setting(sampling_ratio=10_000),
    "spatial-scale-huge": _large_setting(spatial_scale=1e30),
    "spatial-scale-tiny": _large_setting(spatial_scale=1e-30),
    "gamma-huge": _large_setting(gamma=1e30),
    "gamma-negative": _large_setting(gamma=-3.0),
}


def good_call(device: str) -> tuple[RoiCase, dict[str, Any]]:
    return BOTH["ps-align"], BOTH["ps-align"].draw(device)


def check_refused(name: str, device: str) -> None:
    """Raises AssertionError unless the call is refused as the table says."""
    bad = {**REFUSED, **REFUSED_ON_CPU}[name]
    case, call = good_call(device)
    try:
        case.function(**bad.change(call))
    except bad.error as error:
        message = str(error)
    else:
        raise AssertionError(f"{name}: not refused")
    for fragment in ("roi_pool: ", *bad.fragments):
        assert fragment in message, f"{name}: {fragment!r} is not in {message!r}"


def check_survived(name: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Runs forward and backward on strange values, in every mode, plain and PS."""
    change = _with_batch_index(BATCH_INDICES[name]) if name in BATCH_INDICES else SURVIVED[name]
    for case in BOTH.values():
        call = change(cast(case.draw(device), dtype, ("input", "boxes", "offset")))
        output, found = gradients(case.function, call)
        assert output.shape == case.output_shape
        for tensor in found.values():
            tensor.cpu()  # waits for the device, whose errors come late


def main(device: str, *names: str) -> None:
    refused = REFUSED | (REFUSED_ON_CPU if device == "cpu" else {})
    survived = SURVIVED | ({} if device == "cpu" else BATCH_INDICES)
    for name in names or (*refused, *survived):
        (check_refused if name in refused else check_survived)(name, device)


assert len(BOTH) == 2 * len(MODES) + 1

if __name__ == "__main__":
    main(*sys.argv[1:])
