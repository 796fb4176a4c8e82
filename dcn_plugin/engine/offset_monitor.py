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
from dcn_plugin.layers.offset_branch import resting_taps

MEAN, HIGHEST, OUTSIDE = "mean", "max", "outside"
COMPILED = "<compiled>"


class OffsetMonitor(HookBase):
    """Logs how far the taps of every deformable convolution are moved, and warns if too far.

    Every so many iterations it writes three numbers for each layer into Detectron2's event
    storage, and so into TensorBoard and metrics.json: `offsets/<layer>/mean` and `/max`, of the
    absolute offsets in cells of the layer's input, and `/outside`, the share of taps that lie off
    the map. Offsets that run away (a mean of a quarter of the map, or half of the taps moved off
    it) are a sign of a learning rate too high for them, and are reported in the log, each layer
    once. It looks by hooks, which a model that `torch.compile` has compiled already does not run.
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
            name.removeprefix("module.").removeprefix("_orig_mod."): module
            for name, module in model.named_modules()
            if isinstance(module, OffsetConv2d)
        }
        self.found: dict[str, list[Tensor]] = {}
        self.handles: list[Any] = []
        self.warned: set[str] = set()

    def before_step(self) -> None:
        """Starts to look, if it is time."""
        if self.period > 0 and (self.trainer.iter + 1) % self.period == 0:
            for name, branch in self.branches.items():
                self.handles.append(branch.register_forward_hook(self._look(name)))

    def after_step(self) -> None:
        """Writes what was seen."""
        looked = bool(self.handles)
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if looked and not self.found:
            self._warn(
                COMPILED,
                "no offsets were seen in %d layers: a compiled model does not show them",
                len(self.branches),
            )
        for name, row in self._rows().items():
            self._write(name, *row)

    def _rows(self) -> dict[str, list[float]]:
        """Returns the numbers of each layer, and forgets them."""
        found, self.found = self.found, {}
        if not found:
            return {}
        # Of a layer that was called several times: means, the highest, and the smallest map.
        rows = []
        for calls in found.values():
            mean, highest, outside, resting, side = torch.stack(calls).unbind(dim=1)
            of_layer = mean.mean(), highest.amax(), outside.mean(), resting.mean(), side.amin()
            rows.append(torch.stack(of_layer))
        return dict(zip(found, torch.stack(rows).tolist(), strict=True))  # waits for the GPU once

    def _write(
        self, name: str, mean: float, highest: float, outside: float, resting: float, side: float
    ) -> None:
        storage = get_event_storage()
        for kind, value in ((MEAN, mean), (HIGHEST, highest), (OUTSIDE, outside)):
            storage.put_scalar(f"offsets/{name}/{kind}", value, smoothing_hint=False)
        # Padding puts taps off the map too. NaN is not fine either.
        if not (mean <= self.FAR * side and outside - resting <= self.MANY):
            self._warn(
                name,
                "the offsets of %s run away: they move taps by %.1f cells on average (at most "
                "%.1f) on a map whose shorter side has %d, %.0f %% of the taps lie outside; "
                "a lower SOLVER.OFFSET_LR_FACTOR may help",
                name,
                mean,
                highest,
                side,
                100 * outside,
            )

    def _warn(self, about: str, message: str, *values: Any) -> None:
        """Warns once of each thing."""
        if about not in self.warned:
            self.warned.add(about)
            logging.getLogger(__name__).warning(message, *values)

    def _look(self, name: str) -> Any:
        def look(branch: OffsetConv2d, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> None:
            if output[0].numel() > 0:
                with torch.no_grad():
                    row = measure(branch, inputs[0], output[0].float())
                    self.found.setdefault(name, []).append(row)

        return look


def measure(branch: OffsetConv2d, input: Tensor, offset: Tensor) -> Tensor:
    """Measures the offsets of one layer.

    Args:
        branch: which predicted them.
        input: Tensor[N, C, H, W], which is sampled.
        offset: Tensor[N, 2*G*K, H', W'].

    Returns:
        Tensor[5]: mean and maximum of the absolute offsets, share of the taps off the map, that
        share without offsets, and the map's shorter side.
    """
    height, width = input.shape[-2:]
    kernel_h, kernel_w = branch.kernel_size
    moved = offset.unflatten(1, (-1, kernel_h, kernel_w, 2))  # N, G, kh, kw, 2, H', W'
    rows, columns = (resting_taps(branch, i, offset.shape[2 + i], offset).T for i in (0, 1))
    ys, xs = rows[:, None, :, None], columns[None, :, None, :]

    def share_outside(y: Tensor, x: Tensor) -> Tensor:
        outside = (y <= -1) | (y >= height) | (x <= -1) | (x >= width)
        return outside.to(offset.dtype).mean()

    return torch.stack(
        [
            offset.abs().mean(),
            offset.abs().max(),
            share_outside(moved[..., 0, :, :] + ys, moved[..., 1, :, :] + xs),
            share_outside(ys, xs),
            offset.new_tensor(min(height, width)),
        ]
    )
