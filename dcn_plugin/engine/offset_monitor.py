# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A look at the offsets while they are learnt."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage

from dcn_plugin.layers import OffsetConv2d

MEAN, HIGHEST, OUTSIDE = "mean", "max", "outside"


class OffsetMonitor(HookBase):
    """Logs how far the taps of every deformable convolution are moved, and warns if too far.

    Every so many iterations it writes three numbers for each layer into Detectron2's event
    storage, and so into TensorBoard and metrics.json: `offsets/<layer>/mean` and `/max`, of the
    absolute offsets in cells of the layer's input, and `/outside`, the share of taps that lie off
    the map. Offsets that run away (a mean of a quarter of the map, or half of the taps outside)
    are a sign of a learning rate too high for them, and are reported in the log, each layer once.
    """

    # Of the map's shorter side, and of the taps.
    FAR = 0.25
    MANY = 0.5

    def __init__(self, model: nn.Module, period: int) -> None:
        """Finds the layers.

        Args:
            model: what is trained, wrapped or not.
            period: iterations from one look to the next.
        """
        self.period = period
        self.branches = {
            name.removeprefix("module."): module
            for name, module in model.named_modules()
            if isinstance(module, OffsetConv2d)
        }
        self.found: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        self.warned: set[str] = set()

    def before_step(self) -> None:
        """Starts to look, if it is time."""
        if self.period > 0 and (self.trainer.iter + 1) % self.period == 0:
            for name, branch in self.branches.items():
                self.handles.append(branch.register_forward_hook(self._look(name)))

    def after_step(self) -> None:
        """Writes what was seen."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if not self.found:
            return
        storage = get_event_storage()
        names = list(self.found)
        rows = torch.stack([self.found[name] for name in names]).tolist()  # waits for the GPU once
        self.found.clear()
        for name, (mean, highest, outside, side) in zip(names, rows, strict=True):
            for kind, value in ((MEAN, mean), (HIGHEST, highest), (OUTSIDE, outside)):
                storage.put_scalar(f"offsets/{name}/{kind}", value, smoothing_hint=False)
            if (mean > self.FAR * side or outside > self.MANY) and name not in self.warned:
                self.warned.add(name)
                logging.getLogger(__name__).warning(
                    "the offsets of %s run away: they move taps by %.1f cells on average (at most "
                    "%.1f) on a map whose shorter side has %d, %.0f %% of the taps lie outside; "
                    "a lower SOLVER.OFFSET_LR_FACTOR may help",
                    name,
                    mean,
                    highest,
                    side,
                    100 * outside,
                )

    def _look(self, name: str) -> Any:
        def look(branch: OffsetConv2d, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> None:
            with torch.no_grad():
                self.found[name] = measure(branch, inputs[0], output[0])

        return look


def measure(branch: OffsetConv2d, input: Tensor, offset: Tensor) -> Tensor:
    """Measures the offsets of one layer.

    Args:
        branch: which predicted them.
        input: Tensor[N, C, H, W], which is sampled.
        offset: Tensor[N, 2*G*K, H', W'].

    Returns:
        Tensor[4]: mean and maximum of the absolute offsets, share of the taps off the map, and
        the map's shorter side.
    """
    height, width = input.shape[-2:]
    kernel_h, kernel_w = branch.kernel_size
    moved = offset.unflatten(1, (-1, kernel_h, kernel_w, 2))  # N, G, kh, kw, 2, H', W'
    ys = moved[..., 0, :, :] + _grid(branch, 0, offset)[:, None, :, None]
    xs = moved[..., 1, :, :] + _grid(branch, 1, offset)[None, :, None, :]
    outside = (ys <= -1) | (ys >= height) | (xs <= -1) | (xs >= width)
    return torch.stack(
        [
            offset.abs().mean(),
            offset.abs().max(),
            outside.to(offset.dtype).mean(),
            offset.new_tensor(min(height, width)),
        ]
    )


def _grid(branch: OffsetConv2d, axis: int, offset: Tensor) -> Tensor:
    """Returns Tensor[kernel, output], where taps lie along an axis before they are moved."""
    taps = torch.arange(branch.kernel_size[axis], device=offset.device) * branch.dilation[axis]
    out = torch.arange(offset.shape[2 + axis], device=offset.device) * branch.stride[axis]
    return (taps[:, None] + out[None, :] - branch.padding[axis]).to(offset.dtype)
