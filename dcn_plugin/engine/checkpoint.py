# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checkpoints of Detectron2 and of other projects, and of models without offset branches."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
import torchvision
from iopath.common.file_io import PathHandler
from torch import nn

from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.layers import CNNBlockBase
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from dcn_plugin.layers import OffsetBranch
from dcn_plugin.messages import MissingFileError, UserError

from .checkpoint_files import (
    checkpoint_names,
    damage,
    iteration_in_name,
    not_finite,
    other_run,
    save_atomically,
)
from .restricted_pickle import RestrictedCheckpointer
from .weight_conversion import Origin, scale_box_deltas, to_detectron2
from .weight_names import Weights, without_backbone_prefix


class Checkpointer(RestrictedCheckpointer):
    """`DetectionCheckpointer` that loads weights of other projects and of plain models.

    It converts those of MMDetection, torchvision and timm, matches backbones saved without a
    prefix, and counts what does not match in one line. Offset branches that a checkpoint lacks keep
    their initial weights, zero.

    In a local folder it writes files atomically, never saves weights that are not finite, and
    resumes from the newest checkpoint that is intact.

    Attributes:
        filename (str): of the weights that were loaded last.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        allow_unmatched: bool = False,
        trained: bool = False,
        **checkpointables: Any,
    ) -> None:
        """Same arguments as `DetectionCheckpointer`, and two more.

        Args:
            model: the model.
            save_dir: folder of the checkpoints.
            allow_unmatched: whether to load a file that has no weight of the backbone
                (MODEL.ALLOW_UNMATCHED_WEIGHTS).
            trained: whether the file must have weights of the other parts of the model too, such as
                the RoI heads, unless `allow_unmatched`.
            checkpointables: as for `DetectionCheckpointer`.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.allow_unmatched = allow_unmatched
        self.trained = trained
        self.filename = ""
        self._resuming = False
        # Such as a mask of -inf: no sign of divergence.
        self._not_finite_at_start = self._not_finite(self.model.state_dict())

    def save(self, name: str, **kwargs: Any) -> None:
        """Saves as `DetectionCheckpointer`; in a local folder the file is written atomically.

        Args:
            name: of the file, without .pth.
            kwargs: more to save.

        Raises:
            CheckpointWriteError: if the disk is full; earlier checkpoints are as they were.
            FloatingPointError: if weights are not finite; `last_checkpoint` stays as it is.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        weights = self.model.state_dict()
        if wrong := self._not_finite(weights) - self._not_finite_at_start:
            raise FloatingPointError(
                f"{name}.pth is not saved, since training has diverged: {len(wrong)} tensors of "
                f"the model are not finite, {names_of(wrong)}"
            )
        if not os.path.isdir(self.save_dir):  # one of PathManager's addresses
            super().save(name, **kwargs)
            return
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = Path(self.save_dir) / f"{name}.pth"
        self.logger.info(f"Saving checkpoint to {path}")
        data = {"model": weights, **states, **kwargs}
        save_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(path.name)

    def _not_finite(self, weights: Mapping[str, Any]) -> set[str]:
        """Returns the names of trained weights and statistics that are not finite."""
        trained = {name for name, _ in self.model.named_parameters()}
        # Other buffers may become infinite by design.
        trained |= {name for name, _ in self.model.named_buffers() if name.endswith(STATISTICS)}
        return set(not_finite(weights, trained))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Writes the name of the checkpoint to resume from; atomically if save_dir is local."""
        if not os.path.isdir(self.save_dir):
            super().tag_last_checkpoint(last_filename_basename)
            return
        name = last_filename_basename.encode()
        save_atomically(Path(self.save_dir) / "last_checkpoint", lambda file: file.write(name))

    def has_checkpoint(self) -> bool:
        """Returns whether there is one to resume from, also if last_checkpoint is lost."""
        if not os.path.isdir(self.save_dir):
            return super().has_checkpoint()
        return bool(self._tag() or checkpoint_names(self.save_dir))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resumes from the newest intact checkpoint, chosen by the main process, or loads a file.

        In a distributed job all processes must call it if `resume` is set.

        Args:
            path: what to load, without the states of a trainer, if there is no checkpoint.
            resume: whether to resume.

        Returns:
            what `load` returns.

        Raises:
            ValueError: if no checkpoint is intact, or the processes do not find the same one.
        """
        if resume and (name := self._agree_on_checkpoint()):
            self._resuming = True
            try:
                return self.load(os.path.join(self.save_dir, name))
            finally:
                self._resuming = False
        return super().resume_or_load(path, resume=False)

    def get_checkpoint_file(self) -> str:
        """Returns the path of the checkpoint that last_checkpoint names, or "".

        Raises:
            UserError: if it is not in the folder of last_checkpoint.
        """
        if not os.path.isdir(self.save_dir):
            return super().get_checkpoint_file()
        name = self._last_name()
        return os.path.join(self.save_dir, name) if name else ""

    def _tag(self) -> str:
        path = Path(self.save_dir) / "last_checkpoint"
        if path.is_dir():
            raise UserError(f"{path} must be a file, but is a folder: remove it")
        return path.read_text(errors="replace").strip() if path.is_file() else ""

    def _last_name(self) -> str:
        name = self._tag()
        if name != os.path.basename(name) or len(name) > 255 or not name.isprintable():
            shown = repr(name) if len(name) <= 100 else f"{name[:100]!r}..."
            raise UserError(
                f"{self.save_dir}/last_checkpoint must name a file of its folder, got {shown}: "
                "write the name of the checkpoint to resume from, such as model_final.pth"
            )
        return name

    def _agree_on_checkpoint(self) -> str:
        """Returns the name of the checkpoint to resume from, the same in all processes, or ""."""
        name = problem = ""
        if comm.is_main_process():
            try:
                name = self._newest_intact_checkpoint()
            except ValueError as error:
                problem = str(error)
        name, problem = comm.all_gather((name, problem))[0]
        if problem:  # one line, not one for each process
            raise UserError(problem) if comm.is_main_process() else SystemExit(1)
        path = os.path.join(self.save_dir, name)
        if not name:
            found: Any = self.has_checkpoint()
        elif os.path.isdir(self.save_dir):
            found = os.path.getsize(path) if os.path.isfile(path) else None
        else:
            found = self.path_manager.exists(path)
        if len(set(comm.all_gather(found))) > 1:
            raise UserError(
                "OUTPUT_DIR must be one folder that all machines share, to resume: not all "
                f"processes find {name or 'no checkpoint'} of the main process there"
            )
        return name

    def _newest_intact_checkpoint(self) -> str:
        if not self.has_checkpoint():
            return ""
        if not os.path.isdir(self.save_dir):
            return os.path.basename(self.get_checkpoint_file())
        last, problems = self._last_name(), []
        for name in chain([last] if last else [], self._older_than(last)):
            path = os.path.join(self.save_dir, name)
            problem = self._problem(path)
            if not problem:
                self._warn_of_newer(name)
                return name
            problems.append(f"{path} cannot be resumed from: {problem}")
            self.logger.warning(problems[-1])
        raise UserError(
            f"{self.save_dir} has no intact checkpoint to resume from: {'; '.join(problems)}. "
            "Write the name of another file to last_checkpoint, or train without --resume"
        )

    def _older_than(self, last: str) -> Iterator[str]:
        """Yields the other checkpoints whose iterations are below, from the newest on."""
        if not last:
            self.logger.warning(f"{self.save_dir}/last_checkpoint is missing or empty")
        limit = iteration_in_name(last)
        iterations = {
            name: self._iteration(name) for name in checkpoint_names(self.save_dir) if name != last
        }
        for name in sorted(iterations, key=lambda name: iterations[name], reverse=True):
            if limit is None or iterations[name] < limit:
                yield name

    def _iteration(self, name: str) -> float:
        iteration = iteration_in_name(name)
        if iteration is not None:
            return iteration
        try:
            return int(self.read(os.path.join(self.save_dir, name))["iteration"])
        except (OSError, ValueError, LookupError, TypeError):
            return math.inf  # tried first, to say what is wrong

    def _problem(self, path: str) -> str:
        """Returns why a file is not one to resume from, or nothing."""
        if problem := damage(path):
            return problem
        try:
            content = self.read(path)
        except (OSError, ValueError) as error:
            return str(error)
        weights = content["model"]
        if not isinstance(weights, Mapping) or not weights:
            return "it has no weights"
        missing = [key for key in self.checkpointables if key not in content]
        if missing and len(missing) == len(self.checkpointables):
            return f"it has no state of the {' or the '.join(missing)}"
        if wrong := self._not_finite(weights) - self._not_finite_at_start:
            return f"{len(wrong)} of its tensors are not finite, {names_of(wrong)}"
        if missing:  # such as an average of the weights that has been added to the run
            self.logger.warning(
                f"{path} has no state of the {' or the '.join(missing)}, which starts anew"
            )
        return ""

    def _warn_of_newer(self, name: str) -> None:
        iteration = iteration_in_name(name)
        newer = [
            other
            for other in checkpoint_names(self.save_dir)
            if iteration is not None and (iteration_in_name(other) or 0) > iteration
        ]
        if newer:
            self.logger.warning(
                f"{self.save_dir} has files of later iterations than {name}, which training "
                f"overwrites when it reaches them: {', '.join(newer)}"
            )

    def read(self, path: str) -> dict[str, Any]:
        """Returns the content of a checkpoint, with the weights in `model`.

        Args:
            path: a file, or an address that PathManager resolves.

        Raises:
            ValueError: if it is not a checkpoint.
        """
        self._parsed_url_during_load = urlparse(path)  # Detectron2's main reads it
        try:
            return self._load_file(self.path_manager.get_local_path(path))
        finally:
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict[str, Any]:
        self.filename = filename
        return super()._load_file(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        keys = set(self.model.state_dict())
        try:
            weights, origin = to_detectron2(checkpoint, keys)
        except ValueError as error:
            raise UserError(f"{self.filename}: {error}") from error
        if origin.project:
            self.logger.info(f"{self.filename} contains {origin.project} weights")
        if origin.project and not any(key.endswith(BATCH_COUNT) for key in keys):
            # FrozenBatchNorm2d has none.
            weights = {k: value for k, value in weights.items() if not k.endswith(BATCH_COUNT)}
        backbone = backbone_parameters(self.model)
        checkpoint["model"] = weights = self._match(checkpoint, weights, backbone)
        if origin.box_stds:
            scale_box_deltas(weights, origin.box_stds, box_reg_weights(self.model))
        incompatible = super()._load_model(checkpoint)
        missing = set(incompatible.missing_keys)
        if self._resuming and incompatible.incorrect_shapes:
            raise other_run(self._other_shape(incompatible))
        if backbone and backbone <= missing and not self.allow_unmatched:
            raise UserError(self._nothing_matches(backbone, weights, incompatible))
        if self.trained and not self.allow_unmatched:
            check_parts(self.model, missing, self.filename)
        for mismatch in mismatches(self.model, origin):
            self.logger.warning(f"{self.filename}: {mismatch}")
        new = offset_parameters(self.model) & missing
        new -= {name for name, *_ in incompatible.incorrect_shapes}
        incompatible.missing_keys[:] = [k for k in incompatible.missing_keys if k not in new]
        if new:
            self.logger.info(
                f"{len(new)} parameters of offset branches keep their initial weights, since no "
                f"key of the file matches them: {count_by_module(new)}"
            )
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
        model = self.model.state_dict()
        try:
            return align_and_update_state_dicts(model, weights, c2_conversion=caffe2)
        except ValueError as error:  # a key that matches several of the model
            if self.allow_unmatched:
                return weights
            raise UserError(f"{self.filename}: {error}") from error

    def _nothing_matches(
        self, backbone: Iterable[str], weights: Iterable[str], incompatible: Any
    ) -> str:
        if incompatible.incorrect_shapes:
            what = self._other_shape(incompatible)
        else:
            theirs, ours = sorted(weights)[:3], sorted(backbone)[:3]
            what = (
                f"its keys are {', '.join([*theirs, '...'])}, the model's "
                f"{', '.join([*ours, '...'])}"
            )
        return (
            f"{self.filename} has no weight that fits the backbone: {what}; name other weights in "
            "MODEL.WEIGHTS, or set MODEL.ALLOW_UNMATCHED_WEIGHTS to True to load what fits"
        )

    def _other_shape(self, incompatible: Any) -> str:
        name, theirs, ours = incompatible.incorrect_shapes[0]
        return f"{name} has the shape {tuple(theirs)} there and {tuple(ours)} in the model"

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Counts in one line what does not match, instead of listing all keys."""
        shapes = incompatible.incorrect_shapes
        wrong = {name for name, *_ in shapes}
        missing = set(incompatible.missing_keys) - wrong
        parts = []
        if missing:
            parts.append(f"{len(missing)} tensors of the model are missing: {names_of(missing)}")
        if shapes:
            name, theirs, ours = shapes[0]
            parts.append(
                f"{len(shapes)} have another shape, such as {name} with {tuple(theirs)} instead of "
                f"{tuple(ours)}"
            )
        if incompatible.unexpected_keys:
            unused = incompatible.unexpected_keys
            parts.append(f"{len(unused)} keys of the file are unused: {names_of(unused)}")
        if parts:
            self.logger.warning(f"Weights of {self.filename}: {'; '.join(parts)}")
        else:
            self.logger.info(
                f"All keys of {self.filename} match the model, and no other weight is missing"
            )


BATCH_COUNT = ".num_batches_tracked"
STATISTICS = ("running_mean", "running_var")  # of batch normalization


def offset_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of all offset branches."""
    return {
        f"{branch}.{name}".removeprefix(".")
        for branch, module in model.named_modules()
        if isinstance(module, OffsetBranch)
        for name, _ in module.named_parameters()
    }


def backbone_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the backbone's parameters, without an FPN; all if it has no backbone."""
    names = {name for name, _ in model.named_parameters()}
    for prefix in ("backbone.bottom_up.", "backbone."):
        if backbone := {name for name in names if name.startswith(prefix)}:
            return backbone
    return names


def check_parts(model: nn.Module, missing: Collection[str], filename: str) -> None:
    """Raises UserError if a file has no weight of a part of a model, such as the RoI heads.

    Args:
        model: that has loaded the file.
        missing: names of its parameters that were not loaded.
        filename: for the message.
    """
    for part, module in model.named_children():
        names = {f"{part}.{name}" for name, _ in module.named_parameters()}
        if names and names <= set(missing):
            raise UserError(
                f"{filename} has no weight that fits {part} of the {type(model).__name__}, so it "
                "is of another model or of a backbone alone: name the weights of this model after "
                "training, or set MODEL.ALLOW_UNMATCHED_WEIGHTS to True to run it as it is"
            )


def box_reg_weights(model: nn.Module) -> list[Sequence[float]]:
    """Returns BBOX_REG_WEIGHTS of each box head of a model; none if it has no box heads."""
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    predictors = predictor if isinstance(predictor, nn.ModuleList) else [predictor]
    transforms = [getattr(predictor, "box2box_transform", None) for predictor in predictors]
    return [t.weights for t in transforms if type(t) is Box2BoxTransform]


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
    """Yields config keys that do not fit the weights, with the values that do.

    Args:
        model: the model that loads them.
        origin: of the weights.
    """
    found, wanted = stride_in_1x1(model), origin.stride_in_1x1
    if None not in (found, wanted) and found != wanted:
        yield (
            f"MODEL.RESNETS.STRIDE_IN_1X1 is {found}, but {origin.project} weights of this kind "
            f"need {wanted}"
        )
    mean, std = getattr(model, "pixel_mean", None), getattr(model, "pixel_std", None)
    if not isinstance(mean, torch.Tensor) or not origin.input_format:
        return
    fits = all(
        np.allclose(values.flatten().tolist(), others, rtol=0.02)
        for values, others in ((mean, origin.pixel_mean), (std, origin.pixel_std))
    )
    if not fits or getattr(model, "input_format", None) not in (None, origin.input_format):
        yield f"{origin.project} weights of this kind need {input_config(origin)}"


def input_config(origin: Origin) -> str:
    """Returns the config keys of the images that weights were trained with."""
    return (
        f"INPUT.FORMAT {origin.input_format}, MODEL.PIXEL_MEAN {list(origin.pixel_mean)} and "
        f"MODEL.PIXEL_STD {list(origin.pixel_std)}"
    )


def names_of(keys: Collection[str]) -> str:
    """Returns a few keys themselves, or how many belong to each module."""
    return ", ".join(sorted(keys)) if len(keys) <= 4 else count_by_module(keys)


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
            raise MissingFileError(
                f"torchvision has no weights named {name!r}: use for example "
                "ResNet50_Weights.IMAGENET1K_V1"
            ) from error
        return PathManager.get_local_path(url, **options)

    def _open(self, path: str, mode: str = "r", **options: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **options)


PathManager.register_handler(TorchvisionWeights())
