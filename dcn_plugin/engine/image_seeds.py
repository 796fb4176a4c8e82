# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Samples of anchors and RoIs that depend on the iteration and the image only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from detectron2.engine import HookBase
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import ROIHeads

from dcn_plugin.data import image_seed

SAMPLERS = {RPN: "_subsample_labels", ROIHeads: "_sample_proposals"}


class ImageSeeds(HookBase):
    """Seeds PyTorch before every sample that a network draws of an image's anchors or RoIs.

    Detectron2 draws the images' samples one after the other, so that they depend on which images
    share a process, and on all that was drawn before. With this hook neither the number of
    processes nor a restart changes them.
    """

    def __init__(self, seed: int) -> None:
        """Keeps the seed.

        Args:
            seed: of the training.
        """
        self.seed = seed
        self.records: list[dict[str, Any]] = []
        self.drawn: dict[nn.Module, int] = {}
        self.handles: list[Any] = []

    def before_train(self) -> None:
        """Starts to seed."""
        model = self.trainer.model
        self.handles.append(model.register_forward_pre_hook(self._see_images))
        for module, name in sampling(model):
            setattr(module, name, self._seeding(module, getattr(module, name)))

    def after_train(self) -> None:
        """Puts back what was there."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for module, name in sampling(self.trainer.model):
            delattr(module, name)

    def _see_images(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.records = inputs[0]
        self.drawn.clear()

    def _seeding(self, module: nn.Module, sample: Callable[..., Any]) -> Callable[..., Any]:
        def seed_and_sample(*args: Any) -> Any:
            number = self.drawn.get(module, 0)  # of the image, since they come in order
            self.drawn[module] = number + 1
            record = self.records[number % len(self.records)]
            torch.manual_seed(image_seed(self.seed, self.trainer.iter, record))
            return sample(*args)

        return seed_and_sample


def sampling(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yields the modules that sample, with the name of the method that does it for one image."""
    for module in model.modules():
        for kind, name in SAMPLERS.items():
            if isinstance(module, kind):
                yield module, name
