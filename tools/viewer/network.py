# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A trained network on an image, and all that it sampled."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Instances

from dcn_plugin.analysis import (
    Parts,
    Recording,
    deformable_layers,
    deformable_pools,
    record,
    record_parts,
)
from dcn_plugin.compat import ignore_known_warnings
from dcn_plugin.engine import load_network

MODES = {"RGB": (2, 1, 0), "BGR": (0, 1, 2)}


@dataclass(frozen=True)
class Seen:
    """What a network made of an image."""

    image: np.ndarray  # (height, width, 3) bytes as it saw it, red, green, blue
    original: np.ndarray  # likewise, in its own size
    recording: Recording  # empty where no convolution is deformable
    parts: dict[str, Parts]  # empty where no pooling is
    instances: Instances | None  # in pixels of the original, the surest first; None: no detector
    labels: Tensor | None  # (height, width) of the original; None: no segmentation

    @property
    def scale(self) -> tuple[float, float]:
        """Returns pixels of the image as seen to one of the original, vertical and horizontal."""
        return (
            self.image.shape[0] / self.original.shape[0],
            self.image.shape[1] / self.original.shape[1],
        )

    @property
    def box_scale(self) -> Tensor:
        """Returns Tensor[4], what turns a box of the original into one of the image as seen."""
        vertical, horizontal = self.scale
        return torch.tensor([horizontal, vertical, horizontal, vertical])

    def as_seen(self, x: float, y: float) -> tuple[float, float]:
        """Turns a point of the original into one of the image as seen."""
        return x * self.scale[1], y * self.scale[0]


class Viewer:
    """A trained network to look into."""

    def __init__(self, cfg: CfgNode, score: float) -> None:
        """Builds the network and loads its weights.

        Args:
            cfg: with MODEL.WEIGHTS.
            score: of detections that are kept.
        """
        ignore_known_warnings()
        self.cfg = cfg
        self.score = score
        self.model: nn.Module = load_network(cfg)
        self.has_layers = bool(deformable_layers(self.model))
        self.is_deformable = self.has_layers or bool(deformable_pools(self.model))
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def require_deformable(self) -> None:
        """Checks that the network has something to show.

        Raises:
            ValueError: if nothing in it is deformable.
        """
        if not self.is_deformable:
            raise ValueError(
                f"this {type(self.model).__name__} has neither deformable convolutions nor "
                "deformable RoI pooling, and so nothing to show: MODEL.RESNETS.DEFORM_LAST and "
                "MODEL.ROI_BOX_HEAD.DEFORM make some"
            )

    @torch.no_grad()
    def look(self, pixels: np.ndarray) -> Seen:
        """Runs the network.

        Args:
            pixels: (height, width, 3) bytes, blue, green, red.

        Raises:
            ValueError: if the network finds neither objects nor labels of pixels.
        """
        height, width = pixels.shape[:2]
        resized = self.resize.get_transform(pixels).apply_image(pixels)
        image = np.ascontiguousarray(resized[..., MODES[self.cfg.INPUT.FORMAT]].transpose(2, 0, 1))
        inputs = {"image": torch.from_numpy(image), "height": height, "width": width}
        recorder = record(self.model) if self.has_layers else nullcontext(Recording())
        with (
            recorder as recording,
            record_parts(self.model) as parts,
        ):
            (output,) = self.model([inputs])
        instances, labels = output.get("instances"), output.get("sem_seg")
        if instances is None and labels is None:
            raise ValueError(
                "the network must find objects or label pixels, this "
                f"{type(self.model).__name__} gives {', '.join(output)}"
            )
        if instances is not None:
            instances = instances.to("cpu")
            instances = instances[instances.scores >= self.score]
            instances = instances[instances.scores.argsort(descending=True)]
        return Seen(
            np.ascontiguousarray(resized[..., ::-1]),
            np.ascontiguousarray(pixels[..., ::-1]),
            recording,
            parts,
            instances,
            None if labels is None else labels.argmax(dim=0).cpu(),
        )
