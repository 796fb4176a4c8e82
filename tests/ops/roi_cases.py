# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""RoI poolings to test: asymmetric in all sizes, with boxes across every border."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dcn_plugin import ops
from tests import roi_reference

MODES = ("align", "bin", "msra")
TENSORS = ("input", "boxes", "offset")

# (x1, y1, x2, y2) on an image of 18 rows and 16 columns, twice the map's.
BOXES = {
    "inside": (2.3, 3.1, 11.2, 14.9),
    "over the left": (-7.3, 2.2, 6.1, 8.4),
    "over the top": (3.7, -5.2, 9.4, 8.9),
    "over the right": (9.2, 1.7, 23.9, 13.3),
    "over the bottom": (1.3, 10.7, 12.6, 27.3),
    "over all": (-6.2, -9.1, 22.7, 25.4),
    "outside": (-41.3, 33.3, -30.1, 49.4),
    "empty": (5.3, 6.2, 5.3, 6.2),
    "inverted": (11.7, 12.3, 3.2, 4.9),
    "inverted in one axis": (2.2, 13.3, 12.9, 6.4),
    "tiny": (7.31, 8.22, 7.33, 8.25),
    "huge": (-311.3, -407.9, 523.2, 611.7),
}
# With adaptive sampling torchvision supports these boxes only.
NONEMPTY_BOXES = {k: b for k, b in BOXES.items() if b[2] > b[0] and b[3] > b[1]}
# Corners, and most bins, are at multiples of half a pixel of the map: exact in every dtype.
HALF_PIXEL_BOXES = {
    "inside": (1.0, 3.0, 9.0, 15.0),
    "over the top left": (-5.0, -3.0, 7.0, 5.0),
    "over the bottom right": (9.0, 7.0, 21.0, 23.0),
    "half an image pixel": (-2.5, 0.5, 5.5, 12.5),
    "touching the border from outside": (-8.0, 18.0, 0.0, 26.0),
    "empty": (5.0, 7.0, 5.0, 7.0),
}


@dataclass(frozen=True)
class RoiCase:
    """The sizes of a call. None of output, part and group size divides another."""

    mode: str = "align"
    classes: int = 3  # 0: no offset
    channels: int = 6  # of the output
    batch: int = 3  # the second image has no RoI
    size: tuple[int, int] = (9, 8)
    output: tuple[int, int] = (3, 2)
    part: tuple[int, int] | None = None  # None: plain RoI pooling
    group: tuple[int, int] | None = None
    ratio: int = 0
    scale: float = 0.5
    gamma: float = 0.117  # no sample is at integer coordinates
    spread: float = 4.3  # largest offset; 1 / gamma is the size of a RoI
    boxes: tuple[tuple[float, ...], ...] = tuple(BOXES.values())

    @property
    def function(self) -> Callable[..., Tensor]:
        return ops.deform_roi_pool if self.part is None else ops.deform_ps_roi_pool

    def reference(self, *arguments: Any, **options: Any) -> Tensor:
        return roi_reference.deform_ps_roi_pool(*arguments, **self.to_ps(options))

    def reference_offset_gradient(self, grad_output: Tensor, call: dict[str, Any]) -> Tensor:
        return roi_reference.offset_gradient(grad_output, **self.to_ps(call))

    def to_ps(self, call: dict[str, Any]) -> dict[str, Any]:
        """Returns the equivalent call of PS RoI pooling."""
        return {**call, "group_size": self.group or (1, 1), "part_size": self.part or self.output}

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        group = self.group or (1, 1)
        return (self.batch, self.channels * group[0] * group[1], *self.size)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        return (len(self.boxes), self.channels, *self.output)

    def draw(self, device: str = "cpu", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        """Returns random arguments: drawn in float64 and converted to `dtype`."""
        images = [(2 * k) % (self.batch + 1) for k in range(len(self.boxes))]  # 0, 2, 0, 2 ...
        rows = [(min(n, self.batch - 1), *box) for n, box in zip(images, self.boxes, strict=True)]
        boxes = torch.tensor(rows, dtype=torch.float64).reshape(-1, 5)
        shape = (len(self.boxes), 2 * self.classes, *(self.part or self.output))
        offset = self.spread * (2 * torch.rand(shape, dtype=torch.float64) - 1)
        call = {
            "input": torch.randn(self.input_shape, dtype=torch.float64).to(device, dtype),
            "boxes": boxes.to(device, dtype),
            "offset": offset.to(device, dtype) if self.classes else None,
            "output_size": self.output,
            "spatial_scale": self.scale,
            "sampling_ratio": self.ratio,
            "gamma": self.gamma,
            "mode": self.mode,
        }
        if self.part is not None:
            call.update(part_size=self.part, group_size=self.group)
        return call


_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ps-group-1": {"part": (2, 3), "group": (1, 1)},
    "ps-group-of-output": {"part": (3, 2), "group": (3, 2)},
    "ps-group-other": {"part": (4, 5), "group": (2, 3)},
}
_CLASSES = {"no-offset": 0, "agnostic": 1, "per-class": 3}
CASES = {
    f"{mode}-{kind}-{offsets}-{ratio or 'any'}": RoiCase(
        mode=mode, classes=_CLASSES[offsets], ratio=ratio, **_KINDS[kind]
    )
    for mode, kind, offsets, ratio in itertools.product(MODES, _KINDS, _CLASSES, (0, 3))
    if mode != "bin" or ratio == 0
}
# One case per mode, asymmetric in all sizes.
ASYMMETRIC = {mode: RoiCase(mode=mode, **_KINDS["ps-group-other"]) for mode in MODES}
PLAIN = {mode: RoiCase(mode=mode) for mode in MODES}
# Enough channels per class for vector code over channels on the CPU.
WIDE = {mode: replace(ASYMMETRIC[mode], channels=24) for mode in MODES}
# More RoIs than the CPU pools in one batch, on alternating images.
MANY = {mode: replace(ASYMMETRIC[mode], boxes=tuple(BOXES.values()) * 4) for mode in MODES}
BOTH = {f"{k}-{m}": c[m] for m in MODES for k, c in (("plain", PLAIN), ("ps", ASYMMETRIC))}
BOTH["wide"] = WIDE["align"]
CASES |= {f"wide-{m}": WIDE[m] for m in MODES} | {f"many-{m}": MANY[m] for m in MODES}


def standard_grad_output(shape: tuple[int, ...]) -> Tensor:
    """Returns a random tensor that depends on the shape only."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def gradients(
    function: Callable[..., Tensor], call: dict[str, Any], grad_output: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Runs a function forward and backward.

    Returns:
        its output, and the gradients of `input` and, if there is one, `offset` by name.
    """
    names = [k for k in ("input", "offset") if isinstance(call.get(k), Tensor)]
    leaves = {k: call[k].detach().requires_grad_() for k in names}
    output = function(**{**call, **leaves})
    if grad_output is None:
        grad_output = standard_grad_output(tuple(output.shape)).to(output.device, output.dtype)
    found = torch.autograd.grad(output, list(leaves.values()), grad_output)
    return output.detach(), dict(zip(names, found, strict=True))


def on_cpu_in_float64(call: dict[str, Any]) -> dict[str, Any]:
    """Returns the same values in float64 on the CPU, the reference of all dtypes and devices."""
    return {k: v.cpu().double() if isinstance(v, Tensor) else v for k, v in call.items()}
