# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Invalid inputs, which must raise, and extreme values, which must not crash.

`python -m tests.ops.bad_inputs DEVICE NAME...` runs those with these names, or all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dcn_plugin.ops import deform_conv2d
from tests.ops.conv_cases import ASYMMETRIC, cast, gradients

NAN, INF = float("nan"), float("inf")
Change = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Invalid:
    """A change of a valid call, and the expected error: its message has every fragment."""

    change: Change
    error: type[Exception]
    fragments: tuple[str, ...]


def invalid(error: type[Exception], *fragments: str, **changes: Any) -> Invalid:
    """Describes an invalid call; a callable is applied to the argument with its name."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        new = {k: v(call[k]) if callable(v) else v for k, v in changes.items()}
        return {**call, **new}

    return Invalid(change, error, fragments)


# The valid call: input (2, 6, 7, 6), weight (4, 3, 3, 2), offset (2, 36, 3, 5), mask (2, 18, 3, 5),
# stride (2, 1), padding (1, 0), dilation (2, 1), 6 taps, 2 groups, 3 offset groups.
INVALID = {
    "input-3d": invalid(ValueError, "input", "4", "[6, 7, 6]", input=lambda t: t[0]),
    "offset-3d": invalid(ValueError, "offset", "4", "[36, 3, 5]", offset=lambda t: t[0]),
    "weight-2d": invalid(ValueError, "weight", "4", "[12, 6]", weight=lambda t: t.view(12, 6)),
    "bias-2d": invalid(ValueError, "bias", "1", "[1, 4]", bias=lambda t: t[None]),
    "mask-5d": invalid(ValueError, "mask", "4", "[1, 2, 18, 3, 5]", mask=lambda t: t[None]),
    "input-scalar": invalid(ValueError, "input", "[]", input=lambda t: t.sum()),
    "offset-batch": invalid(
        ValueError, "offset", "(2,", "[3, 36, 3, 5]", offset=lambda t: t.new_zeros(3, 36, 3, 5)
    ),
    "offset-height-width-swapped": invalid(
        ValueError, "offset", "3, 5", "[2, 36, 5, 3]", offset=lambda t: t.transpose(2, 3)
    ),
    "offset-one-channel-short": invalid(
        ValueError, "offset", "multiple of 12", "35", offset=lambda t: t[:, 1:]
    ),
    "offset-without-channels": invalid(
        ValueError, "offset", "multiple of 12", "0", offset=lambda t: t[:, :0]
    ),
    "offset-groups-do-not-divide": invalid(
        ValueError, "offset groups", "= 4", "6", offset=lambda t: t.new_zeros(2, 48, 3, 5)
    ),
    "mask-channels": invalid(
        ValueError, "mask", "[2, 18, 3, 5]", "[2, 17, 3, 5]", mask=lambda t: t[:, 1:]
    ),
    "mask-batch": invalid(
        ValueError, "mask", "[2, 18, 3, 5]", "[1, 18, 3, 5]", mask=lambda t: t[:1]
    ),
    "mask-size": invalid(
        ValueError, "mask", "[2, 18, 3, 5]", "[2, 18, 5, 3]", mask=lambda t: t.transpose(2, 3)
    ),
    "bias-size": invalid(ValueError, "bias", "4", "3", bias=lambda t: t[1:]),
    "groups-do-not-divide": invalid(
        ValueError, "channels", "6", "4", weight=lambda t: t.new_zeros(4, 4, 3, 2)
    ),
    "groups-do-not-divide-output": invalid(
        ValueError, "groups", "2", "3", weight=lambda t: t[1:], bias=None
    ),
    "weight-without-inputs": invalid(ValueError, "weight.size(1)", "0", weight=lambda t: t[:, :0]),
    "weight-without-outputs": invalid(
        ValueError, "weight.size(0)", "0", weight=lambda t: t[:0], bias=None
    ),
    "input-without-channels": invalid(ValueError, "channels", "0", input=lambda t: t[:, :0]),
    "input-without-rows": invalid(ValueError, "input size", "[0, 6]", input=lambda t: t[:, :, :0]),
    "kernel-without-columns": invalid(
        ValueError, "kernel size", "[3, 0]", weight=lambda t: t[..., :0]
    ),
    "input-int": invalid(TypeError, "input", "Long", input=lambda t: t.long()),
    "input-complex": invalid(TypeError, "input", "ComplexDouble", input=lambda t: t + 0j),
    "offset-int": invalid(TypeError, "offset", "Int", offset=lambda t: t.int()),
    "mask-bool": invalid(TypeError, "mask", "Bool", mask=lambda t: t > 0.5),
    "weight-dtype": invalid(TypeError, "weight", "Double", "Float", weight=lambda t: t.float()),
    "bias-dtype": invalid(TypeError, "bias", "Double", "Half", bias=lambda t: t.half()),
    "stride-0": invalid(ValueError, "stride", "[2, 0]", stride=(2, 0)),
    "stride-negative": invalid(ValueError, "stride", "[-1, 1]", stride=(-1, 1)),
    "stride-of-three": invalid(ValueError, "stride", "[1, 1, 1]", stride=(1, 1, 1)),
    "stride-huge": invalid(ValueError, "stride", str(2**40), stride=2**40),
    "padding-negative": invalid(ValueError, "padding", "[0, -2]", padding=(0, -2)),
    "padding-huge": invalid(ValueError, "padding", str(2**31), padding=2**31),
    "dilation-0": invalid(ValueError, "dilation", "[0, 1]", dilation=(0, 1)),
    "output-height-below-1": invalid(
        ValueError, "output height", "0", "spans 11", " of 7", dilation=(5, 1)
    ),
    "output-width-below-1": invalid(
        ValueError, "output width", "0", "spans 7", " of 6", dilation=(2, 6)
    ),
    "output-too-large": invalid(
        ValueError, "output height", "4294967297", stride=1, padding=(2**31 - 1, 0)
    ),
    "offset-on-meta": invalid(
        ValueError, "offset", "device", "meta", offset=lambda t: t.to("meta")
    ),
    "weight-on-meta": invalid(
        ValueError, "weight", "device", "meta", weight=lambda t: t.to("meta")
    ),
    "mask-on-meta": invalid(ValueError, "mask", "device", "meta", mask=lambda t: t.to("meta")),
}


def fill(name: str, value: float) -> Change:
    # Through float64: infinity in dtypes that cannot represent 1e30.
    return lambda call: {**call, name: torch.full_like(call[name].double(), value).to(call[name])}


def fill_some(name: str, value: float) -> Change:
    """Fills every seventh element of an argument."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        changed = call[name].double().flatten()
        changed[::7] = value
        return {**call, name: changed.view_as(call[name]).to(call[name])}

    return change


# Values for which forward and backward must neither crash nor hang.
EXTREME: dict[str, Change] = {
    f"{name}-{how.__name__}-{value}": how(name, value)
    for name in ("input", "offset", "weight", "bias", "mask")
    for value in (NAN, INF, -INF, 1e30, -1e30)
    for how in (fill, fill_some)
    if how is fill_some or name in ("offset", "mask")
}


def check_invalid(name: str, device: str) -> None:
    """Raises AssertionError unless the call raises the expected error."""
    bad = INVALID[name]
    call = bad.change(ASYMMETRIC.draw(device))
    try:
        deform_conv2d(**call)
    except bad.error as error:
        message = str(error)
    else:
        raise AssertionError(f"{name}: no error")
    for fragment in ("deform_conv2d: ", *bad.fragments):
        assert fragment in message, f"{name}: {fragment!r} is not in {message!r}"


def check_extreme(name: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Runs forward and backward with extreme values."""
    call = EXTREME[name](cast(ASYMMETRIC.draw(device), dtype))
    output, found = gradients(deform_conv2d, call)
    assert output.shape == (2, 4, 3, 5)
    assert found.keys() == {"input", "offset", "weight", "bias", "mask"}
    for tensor in found.values():
        tensor.cpu()  # synchronizes: errors of the device are reported late


def main(device: str, *names: str) -> None:
    for name in names or (*INVALID, *EXTREME):
        (check_invalid if name in INVALID else check_extreme)(name, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
