# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Every kind of bad input, by name: what must be refused, and what must be survived.

`python -m tests.ops.bad_inputs DEVICE NAME...` runs some of them, without names all.
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
class Refused:
    """A change of a good call, and how it must be refused: the message has every fragment."""

    change: Change
    error: type[Exception]
    fragments: tuple[str, ...]


def _refused(error: type[Exception], *fragments: str, **changes: Any) -> Refused:
    """Describes a refusal; a callable change is applied to the argument it is named after."""

    def change(call: dict[str, Any]) -> dict[str, Any]:
        new = {k: v(call[k]) if callable(v) else v for k, v in changes.items()}
        return {**call, **new}

    return Refused(change, error, fragments)


# The good call: input (2, 6, 7, 6), weight (4, 3, 3, 2), offset (2, 36, 3, 5), mask (2, 18, 3, 5),
# stride (2, 1), padding (1, 0), dilation (2, 1), 6 taps, 2 groups, 3 offset groups.
REFUSED = {
    "input-3d": _refused(ValueError, "input", "4", "[6, 7, 6]", input=lambda t: t[0]),
    "offset-3d": _refused(ValueError, "offset", "4", "[36, 3, 5]", offset=lambda t: t[0]),
    "weight-2d": _refused(ValueError, "weight", "4", "[12, 6]", weight=lambda t: t.view(12, 6)),
    "bias-2d": _refused(ValueError, "bias", "1", "[1, 4]", bias=lambda t: t[None]),
    "mask-5d": _refused(ValueError, "mask", "4", "[1, 2, 18, 3, 5]", mask=lambda t: t[None]),
    "input-scalar": _refused(ValueError, "input", "[]", input=lambda t: t.sum()),
    "offset-batch": _refused(
        ValueError, "offset", "(2,", "[3, 36, 3, 5]", offset=lambda t: t.new_zeros(3, 36, 3, 5)
    ),
    "offset-height-width-swapped": _refused(
        ValueError, "offset", "3, 5", "[2, 36, 5, 3]", offset=lambda t: t.transpose(2, 3)
    ),
    "offset-one-channel-short": _refused(
        ValueError, "offset", "multiple of 12", "35", offset=lambda t: t[:, 1:]
    ),
    "offset-without-channels": _refused(
        ValueError, "offset", "multiple of 12", "0", offset=lambda t: t[:, :0]
    ),
    "offset-groups-do-not-divide": _refused(
        ValueError, "offset groups", "= 4", "6", offset=lambda t: t.new_zeros(2, 48, 3, 5)
    ),
    "mask-channels": _refused(
        ValueError, "mask", "[2, 18, 3, 5]", "[2, 17, 3, 5]", mask=lambda t: t[:, 1:]
    ),
    "mask-batch": _refused(
        ValueError, "mask", "[2, 18, 3, 5]", "[1, 18, 3, 5]", mask=lambda t: t[:1]
    ),
    "mask-size": _refused(
        ValueError, "mask", "[2, 18, 3, 5]", "[2, 18, 5, 3]", mask=lambda t: t.transpose(2, 3)
    ),
    "bias-size": _refused(ValueError, "bias", "4", "3", bias=lambda t: t[1:]),
    "groups-do-not-divide": _refused(
        ValueError, "channels", "6", "4", weight=lambda t: t.new_zeros(4, 4, 3, 2)
    ),
    "groups-do-not-divide-output": _refused(
        ValueError, "groups", "2", "3", weight=lambda t: t[1:], bias=None
    ),
    "weight-without-inputs": _refused(ValueError, "weight.size(1)", "0", weight=lambda t: t[:, :0]),
    "weight-without-outputs": _refused(
        ValueError, "weight.size(0)", "0", weight=lambda t: t[:0], bias=None
    ),
    "input-without-channels": _refused(ValueError, "channels", "0", input=lambda t: t[:, :0]),
    "input-without-rows": _refused(ValueError, "input size", "[0, 6]", input=lambda t: t[:, :, :0]),
    "kernel-without-columns": _refused(
        ValueError, "kernel size", "[3, 0]", weight=lambda t: t[..., :0]
    ),
    "input-int": _refused(TypeError, "input", "Long", input=lambda t: t.long()),
    "input-complex": _refused(TypeError, "input", "ComplexDouble", input=lambda t: t + 0j),
    "offset-int": _refused(TypeError, "offset", "Int", offset=lambda t: t.int()),
    "mask-bool": _refused(TypeError, "mask", "Bool", mask=lambda t: t > 0.5),
    "weight-dtype": _refused(TypeError, "weight", "Double", "Float", weight=lambda t: t.float()),
    "bias-dtype": _refused(TypeError, "bias", "Double", "Half", bias=lambda t: t.half()),
    "stride-0": _refused(ValueError, "stride", "[2, 0]", stride=(2, 0)),
    "stride-negative": _refused(ValueError, "stride", "[-1, 1]", stride=(-1, 1)),
    "stride-of-three": _refused(ValueError, "stride", "[1, 1, 1]", stride=(1, 1, 1)),
    "stride-huge": _refused(ValueError, "stride", str(2**40), stride=2**40),
    "padding-negative": _refused(ValueError, "padding", "[0, -2]", padding=(0, -2)),
    "padding-huge": _refused(ValueError, "padding", str(2**31), padding=2**31),
    "dilation-0": _refused(ValueError, "dilation", "[0, 1]", dilation=(0, 1)),
    "output-height-below-1": _refused(
        ValueError, "output height", "0", "spans 11", " of 7", dilation=(5, 1)
    ),
    "output-width-below-1": _refused(
        ValueError, "output width", "0", "spans 7", " of 6", dilation=(2, 6)
    ),
    "output-too-large": _refused(
        ValueError, "output height", "4294967297", stride=1, padding=(2**31 - 1, 0)
    ),
    "offset-on-meta": _refused(
        ValueError, "offset", "device", "meta", offset=lambda t: t.to("meta")
    ),
    "weight-on-meta": _refused(
        ValueError, "weight", "device", "meta", weight=lambda t: t.to("meta")
    ),
    "mask-on-meta": _refused(ValueError, "mask", "device", "meta", mask=lambda t: t.to("meta")),
}


def _fill(name: str, value: float) -> Change:
    # By way of float64: where a dtype does not reach 1e30 it gets infinity.
    return lambda call: {**call, name: torch.full_like(call[name].double(), value).to(call[name])}


def _fill_some(name: str, value: float) -> Change:
    def change(call: dict[str, Any]) -> dict[str, Any]:
        changed = call[name].double().flatten()
        changed[::7] = value
        return {**call, name: changed.view_as(call[name]).to(call[name])}

    return change


# Values that must neither crash nor hang, forward and backward.
SURVIVED: dict[str, Change] = {
    f"{name}-{how.__name__[1:]}-{value}": how(name, value)
    for name in ("input", "offset", "weight", "bias", "mask")
    for value in (NAN, INF, -INF, 1e30, -1e30)
    for how in (_fill, _fill_some)
    if how is _fill_some or name in ("offset", "mask")
}


def check_refused(name: str, device: str) -> None:
    """Raises AssertionError unless the call is refused as the table says."""
    bad = REFUSED[name]
    call = bad.change(ASYMMETRIC.draw(device))
    try:
        deform_conv2d(**call)
    except bad.error as error:
        message = str(error)
    else:
        raise AssertionError(f"{name}: not refused")
    for fragment in ("deform_conv2d: ", *bad.fragments):
        assert fragment in message, f"{name}: {fragment!r} is not in {message!r}"


def check_survived(name: str, device: str, dtype: torch.dtype = torch.float32) -> None:
    """Runs forward and backward on strange values."""
    call = SURVIVED[name](cast(ASYMMETRIC.draw(device), dtype))
    output, found = gradients(deform_conv2d, call)
    assert output.shape == (2, 4, 3, 5)
    assert found.keys() == {"input", "offset", "weight", "bias", "mask"}
    for tensor in found.values():
        tensor.cpu()  # waits for the device, whose errors come late


def main(device: str, *names: str) -> None:
    for name in names or (*REFUSED, *SURVIVED):
        (check_refused if name in REFUSED else check_survived)(name, device)


if __name__ == "__main__":
    main(*sys.argv[1:])
