# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checkpoints of Detectron2 and of other projects, and of models without offset branches."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from iopath.common.file_io import PathHandler
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.layers import CNNBlockBase
from detectron2.utils.file_io import PathManager

from dcn_plugin.files import atomic_write
from dcn_plugin.layers import OffsetBranch

from .inert_pickle import load_inert
from .weight_conversion import (
    Origin,
    Weights,
    scale_box_deltas,
    to_detectron2,
    without_backbone_prefix,
)

# Normalization of the images that weights were trained with, by INPUT.FORMAT.
PIXELS = {
    "RGB": "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53] and MODEL.PIXEL_STD [58.395, 57.12, 57.375]",
    "BGR": "MODEL.PIXEL_MEAN [103.53, 116.28, 123.675] and MODEL.PIXEL_STD [1.0, 1.0, 1.0]",
}


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that loads weights of other projects and of plain models.

    It converts those of MMDetection, torchvision and timm, finds the prefix of a bare backbone, and
    counts what does not match in one line. Offset branches that a checkpoint lacks keep their
    initial weights, zero.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_unmatched: bool = False,
        **checkpointables: Any,
    ) -> None:
        """Same arguments as `DetectionCheckpointer`, and one more.

        Args:
            model: the model.
            save_dir: folder of the checkpoints.
            allow_unmatched: whether to load a file that has no weight of the backbone
                (MODEL.ALLOW_UNMATCHED_WEIGHTS).
            checkpointables: as for `DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.allow_unmatched = allow_unmatched
        self._filename = ""  # of the weights that are being loaded

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Writes the name of the checkpoint to resume from; atomically if save_dir is local."""
        if not os.path.isdir(self.save_dir):  # one of PathManager's addresses
            super().tag_last_checkpoint(last_filename_basename)
            return
        with atomic_write(Path(self.save_dir) / "last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def read(self, path: str) -> dict[str, Any]:
        """Returns the content of a checkpoint, with the weights in `model`.

        Args:
            path: a file, or an address that PathManager resolves.

        Raises:
            ValueError: if it is not a checkpoint.
        """
        return self._load_file(self.path_manager.get_local_path(path))

    def _load_file(self, filename: str) -> dict[str, Any]:
        self._filename = filename
        try:
            return self._read_file(filename)
        except (EOFError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
            message = " ".join(str(error).split())  # torch.load's has several lines
            raise ValueError(
                f"{filename} must be a checkpoint, {type(error).__name__}: {message}"
            ) from error

    def _read_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except pickle.UnpicklingError:
            if filename.endswith((".pkl", ".pyth")):
                raise
        loaded = load_inert(filename)  # with objects beside the weights, such as MMEngine's
        return loaded if "model" in loaded else {"model": loaded}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        keys = set(self.model.state_dict())
        parameters = {name for name, _ in self.model.named_parameters()}
        weights, origin = to_detectron2(checkpoint, keys)
        for name, value in weights.items():
            if not isinstance(value, (np.ndarray, torch.Tensor)):
                kind = f"{type(value).__module__}.{type(value).__name__}"
                raise ValueError(f"{self._filename}: {name} must be a tensor, got a {kind}")
        if origin.project:
            self.logger.info(f"{self._filename} has weights of {origin.project}")
        if not any(key.endswith(BATCH_COUNT) for key in keys):  # FrozenBatchNorm2d has none
            weights = {k: value for k, value in weights.items() if not k.endswith(BATCH_COUNT)}
        backbone = {name for name in parameters if name.startswith("backbone.")} or parameters
        weights = self._match(checkpoint, weights, backbone)
        scale_box_deltas(weights, origin.box_stds, box_reg_weights(self.model))
        checkpoint["model"] = dict(weights)
        incompatible = super()._load_model(checkpoint)
        # FrozenBatchNorm2d sets buffers that a checkpoint lacks.
        missing = set(incompatible.missing_keys) | (keys - parameters - weights.keys())
        if backbone <= missing and not self.allow_unmatched:
            raise ValueError(self._nothing_matches(backbone, weights))
        for mismatch in mismatches(self.model, origin):
            self.logger.warning(f"{self._filename}: {mismatch}")
        new = offset_parameters(self.model) & missing
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in new]
        if new:
            self.logger.info(
                f"{len(new)} parameters of offset branches keep their initial weights, since no "
                f"key of the file matches them: {count_by_module(new)}"
            )
        self._log_counts(len(keys) - len(new), missing - new, incompatible.unexpected_keys)
        return incompatible

    def _match(self, checkpoint: dict[str, Any], weights: Weights, backbone: set[str]) -> Weights:
        """Renames keys by Detectron2's heuristics if the file asks for it, or nothing matches."""
        heuristics = checkpoint.pop("matching_heuristics", False)
        if weights and backbone.isdisjoint(weights):
            weights, heuristics = without_backbone_prefix(weights), True
        if not heuristics:
            return weights
        self._convert_ndarray_to_tensor(weights)
        caffe2 = checkpoint.get("__author__") == "Caffe2"
        return align_and_update_state_dicts(self.model.state_dict(), weights, c2_conversion=caffe2)

    def _nothing_matches(self, backbone: Iterable[str], weights: Iterable[str]) -> str:
        ours, theirs = sorted(backbone), sorted(weights)
        return (
            f"{self._filename} has no weight of the backbone: its keys are "
            f"{', '.join([*theirs[:3], '...'])}, the model's {', '.join([*ours[:3], '...'])}; name "
            "other weights in MODEL.WEIGHTS, or set MODEL.ALLOW_UNMATCHED_WEIGHTS to True to load "
            "what matches"
        )

    def _log_counts(self, total: int, missing: set[str], unexpected: Sequence[str]) -> None:
        """Logs in one line how many tensors were loaded, and what was not, by module."""
        parts = [f"Loaded {total - len(missing)} of {total} tensors of the model"]
        if missing:
            parts.append(f"not in the file, or of another shape: {count_by_module(missing)}")
        if unexpected:
            parts.append(f"not used of the file: {count_by_module(unexpected)}")
        log = self.logger.warning if missing or unexpected else self.logger.info
        log("; ".join(parts))


BATCH_COUNT = ".num_batches_tracked"


def offset_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of all offset branches."""
    return {
        f"{branch}.{name}".removeprefix(".")
        for branch, module in model.named_modules()
        if isinstance(module, OffsetBranch)
        for name, _ in module.named_parameters()
    }


def box_reg_weights(model: nn.Module) -> list[Sequence[float]]:
    """Returns BBOX_REG_WEIGHTS of each box head of a model; none if it has no box heads."""
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    predictors = predictor if isinstance(predictor, nn.ModuleList) else [predictor]
    return [p.box2box_transform.weights for p in predictors if hasattr(p, "box2box_transform")]


def stride_in_1x1(model: nn.Module) -> bool | None:
    """Returns whether the first convolution of the bottleneck blocks has their stride.

    Args:
        model: any model; None is returned if it has no bottleneck block with a stride.
    """
    for block in model.modules():
        if isinstance(block, CNNBlockBase) and hasattr(block, "conv3") and block.stride > 1:
            return block.conv1.stride[0] > 1
    return None


def mismatches(model: nn.Module, origin: Origin) -> Iterator[str]:
    """Yields what a model does differently from the one whose weights it loads.

    Args:
        model: the model.
        origin: of the weights.
    """
    found, wanted = stride_in_1x1(model), origin.stride_in_1x1
    if None not in (found, wanted) and found != wanted:
        yield (
            f"MODEL.RESNETS.STRIDE_IN_1X1 is {found}, but the weights are of a {origin.project} "
            f"model with the stride in the {'1x1' if wanted else '3x3'} convolution: set it to "
            f"{wanted}"
        )
    image_format = getattr(model, "input_format", None)
    if image_format in PIXELS and origin.input_format not in (None, image_format):
        yield (
            f"INPUT.FORMAT is {image_format}, but the weights are of a {origin.project} model for "
            f"{origin.input_format} images: set it to {origin.input_format}, with "
            f"{PIXELS[origin.input_format]}"
        )


def count_by_module(keys: Iterable[str]) -> str:
    """Returns how many keys belong to each module, such as "4 of roi_heads.box_predictor"."""
    counts = Counter(".".join(key.split(".")[:-1][:2]) or key for key in sorted(keys))
    parts = [f"{count} of {name}" for name, count in counts.most_common(8)]
    if len(counts) > 8:
        parts.append(f"and of {len(counts) - 8} more modules")
    return ", ".join(parts)


class TorchvisionWeights(PathHandler):
    """Resolves `torchvision://ResNet50_Weights.IMAGENET1K_V1` and other names of weights."""

    PREFIX = "torchvision://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **options: Any) -> str:
        name = path[len(self.PREFIX) :]
        try:
            url = torchvision.models.get_weight(name).url
        except (KeyError, ValueError, AttributeError) as error:
            raise FileNotFoundError(
                f"torchvision has no weights named {name!r}: use for example "
                "ResNet50_Weights.IMAGENET1K_V1"
            ) from error
        return PathManager.get_local_path(url, **options)

    def _open(self, path: str, mode: str = "r", **options: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **options)


PathManager.register_handler(TorchvisionWeights())
