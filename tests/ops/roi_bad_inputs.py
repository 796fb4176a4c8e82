# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Invalid inputs of RoI pooling, which must raise, and extreme values, which must not crash.

`python -m tests.ops.roi_bad_inputs DEVICE NAME...` runs those with these names, or all.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from tests.devices import kernels_of
from tests.ops.bad_inputs import Change, Invalid, fill_some, invalid
from tests.ops.conv_cases import cast
from tests.ops.roi_cases import BOTH, MODES, RoiCase, gradients

NAN, INF = float("nan"), float("inf")


def _with_batch_index(value: float) -> Change:
    def change(call: dict[str, Any]) -> dict[str, Any]:
        boxes = call["boxes"].clone()
        boxes[4, 0] = value
        return {**call, "boxes": boxes}

    return change


# The valid call: input (3, 36, 9, 8), boxes (12, 5), offset (12, 6, 4, 5), output size (3, 2),
# part size (4, 5), group size (2, 3), so 6 output channels of 3 classes.
INVALID = {
    "input-3d": invalid(ValueError, "input", "4", "[36, 9, 8]", input=lambda t: t[0]),
    "input-scalar": invalid(ValueError, "input", "[]", input=lambda t: t.sum()),
    "input-without-channels": invalid(ValueError, "channels", "0", input=lambda t: t[:, :0]),
    "input-without-rows": invalid(ValueError, "input size", "[0, 8]", input=lambda t: t[:, :, :0]),
    "input-channels-not-of-groups": invalid(
        ValueError, "input", "channels", "2 * 3", "35", input=lambda t: t[:, 1:]
    ),
    "boxes-1d": invalid(ValueError, "boxes", "[5]", boxes=lambda t: t[0]),
    "boxes-3d": invalid(ValueError, "boxes", "[1, 12, 5]", boxes=lambda t: t[None]),
    "boxes-of-4-columns": invalid(ValueError, "boxes", "[12, 4]", boxes=lambda t: t[:, 1:]),
    "boxes-of-6-columns": invalid(
        ValueError, "boxes", "[12, 6]", boxes=lambda t: t[:, [0, 1, 2, 3, 4, 4]]
    ),
    "list-of-5-columns": invalid(ValueError, "boxes", "(12, 5)", boxes=lambda t: [t, t, t]),
    "list-of-one-box": invalid(ValueError, "boxes", "(4,)", boxes=lambda t: [t[0, 1:]]),
    "list-longer-than-batch": invalid(
        ValueError, "batch index", "3", boxes=lambda t: [t[:3, 1:]] * 4
    ),
    "offset-3d": invalid(ValueError, "offset", "4", "[6, 4, 5]", offset=lambda t: t[0]),
    "offset-rois": invalid(ValueError, "offset", "12", "[11, 6, 4, 5]", offset=lambda t: t[1:]),
    "offset-odd-planes": invalid(ValueError, "offset", "[12, 5, 4, 5]", offset=lambda t: t[:, 1:]),
    "offset-without-planes": invalid(
        ValueError, "offset", "[12, 0, 4, 5]", offset=lambda t: t[:, :0]
    ),
    "offset-classes-do-not-divide": invalid(
        ValueError, "classes", "4", "6", offset=lambda t: t.new_zeros(12, 8, 4, 5)
    ),
    "offset-more-classes-than-channels": invalid(
        ValueError, "classes", "12", "6", offset=lambda t: t.new_zeros(12, 24, 4, 5)
    ),
    "offset-height-width-swapped": invalid(
        ValueError, "offset", "4, 5", "[12, 6, 5, 4]", offset=lambda t: t.transpose(2, 3)
    ),
    "offset-of-output-size": invalid(
        ValueError, "offset", "4, 5", "[12, 6, 3, 2]", offset=lambda t: t[:, :, :3, :2]
    ),
    "output-size-0": invalid(ValueError, "output_size", "[0, 2]", output_size=(0, 2)),
    "output-size-negative": invalid(ValueError, "output_size", "[3, -1]", output_size=(3, -1)),
    "output-size-of-three": invalid(ValueError, "output_size", "[1, 1, 1]", output_size=(1, 1, 1)),
    "output-size-huge": invalid(ValueError, "output_size", str(2**31), output_size=(3, 2**31)),
    "part-size-0": invalid(ValueError, "part_size", "[4, 0]", part_size=(4, 0)),
    "part-size-of-three": invalid(ValueError, "part_size", "[4, 5, 1]", part_size=(4, 5, 1)),
    "group-size-0": invalid(ValueError, "group_size", "[0, 3]", group_size=(0, 3)),
    "group-size-negative": invalid(ValueError, "group_size", "[-2, -3]", group_size=(-2, -3)),
    "group-size-of-three": invalid(ValueError, "group_size", "[2, 3, 1]", group_size=(2, 3, 1)),
    "group-size-does-not-divide": invalid(ValueError, "36", "5", group_size=5),
    "group-size-huge": invalid(ValueError, "2147483647", "36", group_size=2**31 - 1),
    "mode-unknown": invalid(ValueError, "mode", "'max'", "align", mode="max"),
    "mode-empty": invalid(ValueError, "mode", "''", mode=""),
    "spatial-scale-0": invalid(ValueError, "spatial_scale", "0", spatial_scale=0.0),
    "spatial-scale-nan": invalid(ValueError, "spatial_scale", "nan", spatial_scale=NAN),
    "gamma-infinite": invalid(ValueError, "gamma", "inf", gamma=INF),
    "sampling-ratio-negative": invalid(ValueError, "sampling_ratio", "-2", sampling_ratio=-2),
    "input-int": invalid(TypeError, "input", "Long", input=lambda t: t.long()),
    "input-complex": invalid(TypeError, "input", "ComplexDouble", input=lambda t: t + 0j),
    "boxes-int": invalid(TypeError, "boxes", "Long", boxes=lambda t: t.long()),
    "boxes-bool": invalid(TypeError, "boxes", "Bool", boxes=lambda t: t > 0),
    "offset-int": invalid(TypeError, "offset", "Int", offset=lambda t: t.int()),
    "boxes-on-meta": invalid(ValueError, "boxes", "device", "meta", boxes=lambda t: t.to("meta")),
    "offset-on-meta": invalid(
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
# An error on the CPU. On CUDA the output is NaN for that RoI; see `main`.
INVALID_ON_CPU = {
    f"batch-index-{name}": Invalid(
        _with_batch_index(value), ValueError, ("batch index", f"{value:g}"[:4])
    )
    for name, value in BATCH_INDICES.items()
}


def _fill(name: str, value: float, column: int | None = None) -> Change:
    """Fills every second row of an argument, or one column of it."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        # Through float64: infinity in dtypes that cannot represent 1e30.
        changed = call[name].double().clone()
        rows = changed[::2] if column is None else changed[::2, column]
        rows.fill_(value)
        return {**call, name: changed.to(call[name])}

    return change


def _replace(**settings: Any) -> Change:
    return lambda call: {**call, **settings}


_VALUES = (NAN, INF, -INF, 1e30, -1e30, 3e9)
# Values for which forward and backward must neither crash nor hang.
EXTREME: dict[str, Change] = {
    **{f"input-{v}": fill_some("input", v) for v in _VALUES},
    **{f"offset-{v}": _fill("offset", v) for v in _VALUES},
    **{f"offset-some-{v}": fill_some("offset", v) for v in _VALUES},
    **{f"boxes-{c}-{v}": _fill("boxes", v, c) for v in _VALUES for c in (1, 4)},
    "sampling-ratio-large": _replace(sampling_ratio=10_000),
    "spatial-scale-huge": _replace(spatial_scale=1e30),
    "spatial-scale-tiny": _replace(spatial_scale=1e-30),
    "gamma-huge": _replace(gamma=1e30),
    "gamma-negative": _replace(gamma=-3.0),
}


def valid_call(device: str) -> tuple[RoiCase, dict[str, Any]]:
    return BOTH["ps-align"], BOTH["ps-align"].draw(device)


def check_invalid(name: str, device: str) -> None:
    """Raises AssertionError unless the call raises the expected error."""
    bad = {**INVALID, **INVALID_ON_CPU}[name]
    case, call = valid_call(device)
    try:
        case.function(**bad.change(call))
    except bad.error as error:
        message = str(error)
    else:
        raise AssertionError(f"{name}: no error")
    for fragment in ("roi_pool: ", *bad.fragments):
        assert fragment in message, f"{name}: {fragment!r} is not in {message!r}"


def check_extreme(name: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Runs forward and backward with extreme values, in every mode, plain and PS."""
    change = _with_batch_index(BATCH_INDICES[name]) if name in BATCH_INDICES else EXTREME[name]
    for case in BOTH.values():
        call = change(cast(case.draw(device), dtype, ("input", "boxes", "offset")))
        output, found = gradients(case.function, call)
        assert output.shape == case.output_shape
        for tensor in found.values():
            tensor.cpu()  # synchronizes: errors of the device are reported late


def main(device: str, *names: str) -> None:
    invalid_names = INVALID | (INVALID_ON_CPU if kernels_of(device) == "cpu" else {})
    extreme_names = EXTREME | ({} if kernels_of(device) == "cpu" else BATCH_INDICES)
    for name in names or (*invalid_names, *extreme_names):
        (check_invalid if name in invalid_names else check_extreme)(name, device)


assert len(BOTH) == 2 * len(MODES) + 1

if __name__ == "__main__":
    main(*sys.argv[1:])
