# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checkpoints of torchvision's ResNets, and of models without offset branches."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import torchvision
from iopath.common.file_io import PathHandler
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from dcn_plugin.files import atomic_write
from dcn_plugin.layers import OffsetBranch

# Patterns of keys of torchvision's ResNets, and Detectron2's keys.
TORCHVISION_KEYS = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^fc\.", "linear."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


class Checkpointer(DetectionCheckpointer):
    """`DetectionCheckpointer` that loads torchvision's ResNets and weights of plain models.

    Offset branches that a checkpoint lacks keep their initial weights, zero: it logs their names
    instead of a warning about missing keys.
    """

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Writes the name of the checkpoint to resume from; atomically if save_dir is local."""
        if not os.path.isdir(self.save_dir):  # one of PathManager's addresses
            super().tag_last_checkpoint(last_filename_basename)
            return
        with atomic_write(Path(self.save_dir) / "last_checkpoint") as temporary:
            temporary.write_text(last_filename_basename)

    def _load_file(self, filename: str) -> Any:
        try:
            return super()._load_file(filename)
        except (EOFError, LookupError, RuntimeError, pickle.UnpicklingError) as error:
            message = " ".join(str(error).split())  # torch.load's has several lines
            raise ValueError(
                f"{filename} must be a checkpoint, {type(error).__name__}: {message}"
            ) from error

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if isinstance(checkpoint["model"].get("state_dict"), dict):  # of torchvision's references
            checkpoint["model"] = checkpoint["model"]["state_dict"]
        # DataParallel and DistributedDataParallel add a prefix.
        weights = {k.removeprefix("module."): v for k, v in checkpoint["model"].items()}
        keys = self.model.state_dict().keys()
        if is_torchvision_resnet(weights) and not weights.keys() & keys:
            self.logger.info("Renaming the weights of a torchvision ResNet")
            has_counts = any(key.endswith("num_batches_tracked") for key in keys)
            checkpoint["model"] = {
                rename(key): value
                for key, value in weights.items()
                if has_counts or not key.endswith("num_batches_tracked")
            }
            checkpoint["matching_heuristics"] = True  # finds the prefix, such as "backbone."
        incompatible = super()._load_model(checkpoint)
        new = offset_parameters(self.model) & set(incompatible.missing_keys)
        if new:
            incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in new]
            self.logger.info(
                "Offset branches that the checkpoint lacks keep their initial weights: "
                + ", ".join(sorted(new))
            )
        return incompatible


def offset_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of all offset branches."""
    return {
        f"{branch}.{name}".removeprefix(".")
        for branch, module in model.named_modules()
        if isinstance(module, OffsetBranch)
        for name, _ in module.named_parameters()
    }


def is_torchvision_resnet(weights: dict[str, Any]) -> bool:
    """Returns whether a state dict has the keys of torchvision's ResNets."""
    return {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight"} <= weights.keys()


def rename(key: str) -> str:
    """Returns Detectron2's key for a key of torchvision's ResNets."""
    key = re.sub(r"^layer(\d)\.", lambda match: f"res{int(match[1]) + 1}.", key)
    for pattern, replacement in TORCHVISION_KEYS:
        key = re.sub(pattern, replacement, key)
    return key


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
