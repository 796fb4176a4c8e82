# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Statistics of offsets during training."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage

from dcn_plugin.layers import OffsetConv2d
from dcn_plugin.layers.offset_branch import resting_taps


class OffsetMonitor(HookBase):
    """Logs how far the taps of every deformable convolution move, and warns if they diverge.

    Every `period` iterations it writes three numbers per layer to Detectron2's event storage, and
    so to TensorBoard and metrics.json: `offsets/<layer>/mean` and `/max`, of the absolute offsets
    in pixels of the layer's input, and `/outside`, the share of taps outside the feature map. A
    mean of a quarter of the map, or half of the taps moved off it, is a sign of too high a learning
    rate, and logs a warning, once per layer. Models compiled by `torch.compile` before training do
    not run the forward hooks that it needs.
    """

    MAX_MEAN = 0.25  # of the map's shorter side
    MAX_OUTSIDE = 0.5  # of the taps, those that padding alone puts outside not counted

    def __init__(self, model: nn.Module, period: int) -> None:
        """Finds the offset branches.

        Args:
            model: the trained model, with or without DistributedDataParallel.
            period: in iterations; 0: never.
        """
        self.period = period
        self.branches = {
            name.removeprefix("module.").removeprefix("_orig_mod."): module
            for name, module in model.named_modules()
            if isinstance(module, OffsetConv2d)
        }
        self.measured: dict[str, list[Tensor]] = {}
        self.handles: list[Any] = []
        self.warned: set[str] = set()

    def before_step(self) -> None:
        if self.period > 0 and (self.trainer.iter + 1) % self.period == 0:
            self.start()

    def start(self) -> None:
        """Measures all forward passes from now on."""
        for name, branch in self.branches.items():
            hook = partial(self._measure, name)
            self.handles.append(branch.register_forward_hook(hook))

    def _measure(
        self, name: str, branch: OffsetConv2d, inputs: tuple[Tensor], output: tuple[Tensor, Any]
    ) -> None:
        if output[0].numel() > 0:
            with torch.no_grad():
                row = measure(branch, inputs[0], output[0].float())
            self.measured.setdefault(name, []).append(row)

    def after_step(self) -> None:
        if not self.handles:
            return
        rows = self.stop()
        if not rows:
            message = "no offsets were measured in %d layers: a compiled model runs no hooks"
            self._warn_once("", message, len(self.branches))
        for name, row in rows.items():
            self._write(name, *row)

    def stop(self) -> dict[str, list[float]]:
        """Ends measuring; returns what `measure` returns, for each layer that has run."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if not self.measured:
            return {}
        # Of several calls of a layer: means, the maximum, and the smallest map.
        calls = [torch.stack(rows) for rows in self.measured.values()]
        rows = [torch.cat([c.mean(0)[:3], c.amax(0)[3:4], c.amin(0)[4:]]) for c in calls]
        names = list(self.measured)
        self.measured.clear()
        # One synchronization with the GPU.
        return dict(zip(names, torch.stack(rows).tolist(), strict=True))

    def _write(
        self, name: str, mean: float, outside: float, padded: float, maximum: float, side: float
    ) -> None:
        numbers = {"mean": mean, "max": maximum, "outside": outside}
        for kind, value in numbers.items():
            get_event_storage().put_scalar(f"offsets/{name}/{kind}", value, smoothing_hint=False)
        # Written so that NaN warns too.
        if not (mean <= self.MAX_MEAN * side and outside - padded <= self.MAX_OUTSIDE):
            message = (
                "the offsets of %s diverge: they move taps by %.1f pixels on average (at most "
                "%.1f) on a feature map whose shorter side has %d, and %.0f %% of the taps are "
                "outside; a lower SOLVER.OFFSET_LR_FACTOR may help"
            )
            self._warn_once(name, message, name, mean, maximum, side, 100 * outside)

    def _warn_once(self, key: str, message: str, *values: Any) -> None:
        if key not in self.warned:
            self.warned.add(key)
            logging.getLogger(__name__).warning(message, *values)


def measure(branch: OffsetConv2d, input: Tensor, offset: Tensor) -> Tensor:
    """Measures the offsets of one layer.

    Args:
        branch: which predicted them.
        input: Tensor[N, C, H, W], the layer's input.
        offset: Tensor[N, 2*G*K, H', W'].

    Returns:
        Tensor[5]: the mean of the absolute offsets, the share of taps outside the map, that share
        without offsets, the maximum of the absolute offsets, and the map's shorter side.
    """
    height, width = input.shape[-2:]
    kernel_h, kernel_w = branch.kernel_size
    # (N, 2*G*K, H', W') -> (N, G, kh, kw, 2, H', W')
    dy, dx = offset.unflatten(1, (-1, kernel_h, kernel_w, 2)).unbind(4)
    rows, columns = (resting_taps(branch, i, offset.shape[2 + i], offset).T for i in (0, 1))
    ys, xs = rows[:, None, :, None], columns[None, :, None, :]  # (kh, kw, H', W') by broadcasting

    def share_outside(y: Tensor, x: Tensor) -> Tensor:
        outside = (y <= -1) | (y >= height) | (x <= -1) | (x >= width)
        return outside.to(offset.dtype).mean()

    size = offset.abs()
    outside, padded = share_outside(dy + ys, dx + xs), share_outside(ys, xs)
    side = offset.new_tensor(min(height, width))
    return torch.stack([size.mean(), outside, padded, size.max(), side])
