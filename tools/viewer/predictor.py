# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Runs a trained model on an image and records its sampling locations and RoI bins."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.structures import Instances

from dcn_plugin.analysis import Recording, RoIBins, deformable_pools, record, record_roi_bins
from dcn_plugin.analysis.recording import deformable_layers
from dcn_plugin.compat import ignore_known_warnings
from dcn_plugin.engine import load_model
from dcn_plugin.messages import UserError


@dataclass(frozen=True)
class Prediction:
    """Output of a model for an image, and what was recorded."""

    resized: np.ndarray  # (H, W, 3) uint8 RGB, the model's input
    original: np.ndarray  # likewise, in the original size
    recording: Recording  # empty without deformable convolutions
    roi_bins: dict[str, RoIBins]  # empty without deformable RoI pooling
    instances: Instances | None  # by descending score, in pixels of the original; of detectors
    labels: Tensor | None  # (H, W) of the original; of semantic segmentation

    @property
    def box_scale(self) -> Tensor:
        """Returns Tensor[4], by which boxes of the original are multiplied to be on `resized`."""
        (height, width), (old_height, old_width) = self.resized.shape[:2], self.original.shape[:2]
        return torch.tensor([width / old_width, height / old_height]).repeat(2)

    def to_resized(self, x: float, y: float) -> tuple[float, float]:
        """Converts a pixel of the original into one of `resized`."""
        return tuple((torch.tensor([x, y]) * self.box_scale[:2]).tolist())


class RecordingPredictor:
    """Like Detectron2's DefaultPredictor, and records deformable layers."""

    def __init__(self, cfg: CfgNode, score: float) -> None:
        """Builds the model and loads MODEL.WEIGHTS.

        Args:
            cfg: of the model.
            score: minimum score of the detections that are kept.
        """
        ignore_known_warnings()
        self.cfg, self.score = cfg, score
        self.model = load_model(cfg)
        self.has_layers = bool(deformable_layers(self.model))
        self.is_deformable = self.has_layers or bool(deformable_pools(self.model))
        self.resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)

    def require_deformable(self) -> None:
        """Raises ValueError if the model has nothing deformable."""
        if not self.is_deformable:
            raise UserError(
                f"{type(self.model).__name__} has neither deformable convolutions nor deformable "
                "RoI pooling; set MODEL.RESNETS.DEFORM_LAST or MODEL.ROI_BOX_HEAD.DEFORM"
            )

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Prediction:
        """Runs the model.

        Args:
            image: (H, W, 3) uint8 BGR.

        Raises:
            ValueError: if the model returns neither instances nor a semantic segmentation.
        """
        height, width = image.shape[:2]
        resized = np.ascontiguousarray(self.resize.get_transform(image).apply_image(image))
        rgb = np.ascontiguousarray(resized[..., ::-1])
        channels = (rgb if self.cfg.INPUT.FORMAT == "RGB" else resized).transpose(2, 0, 1)
        inputs = {"image": torch.as_tensor(channels.copy()), "height": height, "width": width}
        recorder = record(self.model) if self.has_layers else nullcontext(Recording())
        with recorder as recording, record_roi_bins(self.model) as roi_bins:
            (output,) = self.model([inputs])
        instances, labels = output.get("instances"), output.get("sem_seg")
        if instances is None and labels is None:
            raise UserError(
                "the model must return instances or sem_seg, this "
                f"{type(self.model).__name__} returns {', '.join(output)}"
            )
        if instances is not None:
            instances = instances.to("cpu")
            instances = instances[instances.scores >= self.score]
            instances = instances[instances.scores.argsort(descending=True)]
        labels = None if labels is None else labels.argmax(dim=0).cpu()
        original = np.ascontiguousarray(image[..., ::-1])
        return Prediction(rgb, original, recording, roi_bins, instances, labels)
