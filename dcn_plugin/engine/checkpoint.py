# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Weights of others: torchvision's ResNets, and networks without offset branches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torchvision
from iopath.common.file_io import PathHandler

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager

from dcn_plugin.files import whole_file
from dcn_plugin.layers import OffsetBranch

# Names of torchvision's ResNets, and what Detectron2's are called.
RENAMED = (
    (r"^conv1\.", "stem.conv1."),
    (r"^bn1\.", "stem.conv1.norm."),
    (r"^fc\.", "linear."),
    (r"\.bn(\d)\.", r".conv\1.norm."),
    (r"\.downsample\.0\.", ".shortcut."),
    (r"\.downsample\.1\.", ".shortcut.norm."),
)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also knows the names of torchvision's ResNets.

    And it does not warn of offset branches that a plain network's checkpoint cannot have: they
    start at zero, which is said in the log.
    """

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Names the checkpoint to resume from; a kill leaves the old name or the new one."""
        with whole_file(Path(self.save_dir) / "last_checkpoint") as half:
            half.write_text(last_filename_basename)

    def _load_file(self, filename: str) -> Any:
        try:
            return super()._load_file(filename)
        except Exception as error:  # half a file leads an unpickler to anything
            first_sentence = re.split(r"\.\s|\n", str(error), maxsplit=1)[0]  # without advice
            raise ValueError(
                f"{filename} must be a checkpoint, {type(error).__name__}: {first_sentence}"
            ) from error

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if isinstance(checkpoint["model"].get("state_dict"), dict):  # as training scripts save it
            checkpoint["model"] = checkpoint["model"]["state_dict"]
        # What was saved from within DataParallel or DDP has a prefix.
        weights = {k.removeprefix("module."): v for k, v in checkpoint["model"].items()}
        known = self.model.state_dict().keys()
        if is_torchvision_resnet(weights) and not weights.keys() & known:
            self.logger.info("Renaming the weights of torchvision's ResNet")
            counts_batches = any(name.endswith("num_batches_tracked") for name in known)
            checkpoint["model"] = {
                rename(name): value
                for name, value in weights.items()
                if counts_batches or not name.endswith("num_batches_tracked")
            }
            checkpoint["matching_heuristics"] = True  # for the prefix, "backbone." or so
        incompatible = super()._load_model(checkpoint)
        fresh = offset_parameters(self.model) & set(incompatible.missing_keys)
        if fresh:
            incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in fresh]
            self.logger.info(
                "Offset branches start where they were, at zero unless trained: the checkpoint "
                f"has none of {', '.join(sorted(fresh))}"
            )
        return incompatible


def offset_parameters(model: Any) -> set[str]:
    """Returns the names of the parameters of a model's offset branches."""
    return {
        f"{branch}.{name}" if branch else name
        for branch, module in model.named_modules()
        if isinstance(module, OffsetBranch)
        for name, _ in module.named_parameters()
    }


def is_torchvision_resnet(weights: dict[str, Any]) -> bool:
    """Returns whether a state dict is one of a ResNet of torchvision."""
    return {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight"} <= weights.keys()


def rename(name: str) -> str:
    """Returns what Detectron2 calls a weight of torchvision's ResNet."""
    name = re.sub(r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}.", name)
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


class TorchvisionWeights(PathHandler):
    """Finds `torchvision://ResNet50_Weights.IMAGENET1K_V1` and the like."""

    PREFIX = "torchvision://"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, **options: Any) -> str:
        name = path[len(self.PREFIX) :]
        try:
            url = torchvision.models.get_weight(name).url
        except (KeyError, ValueError, AttributeError) as error:
            raise FileNotFoundError(
                f"torchvision has no weights named {name!r}: names look like "
                "ResNet50_Weights.IMAGENET1K_V1"
            ) from error
        return PathManager.get_local_path(url, **options)

    def _open(self, path: str, mode: str = "r", **options: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **options)


PathManager.register_handler(TorchvisionWeights())
