# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of a config before training starts, for errors that would otherwise surface hours later.

Only what would crash or could not train is an error. Custom architectures and data sets pass.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

import torch

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN, PanopticFPN, SemanticSegmentor
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils.file_io import PathManager

from dcn_plugin.data.coco_checks import NO_IMAGE_LEFT
from dcn_plugin.data.dataset_checks import (
    IGNORED_ONLY,
    find_faults,
    is_builtin,
    is_voc,
)
from dcn_plugin.data.file_checks import describe_missing, is_missing
from dcn_plugin.evaluation.sem_seg import LABEL_MAPS
from dcn_plugin.files import can_write
from dcn_plugin.messages import MissingFileError, UserError, got

from .checkpoint_files import checkpoint_names
from .config_values import STOCK, check_values
from .restricted_pickle import load as load_pickle

# Attributes of Detectron2's metadata that are paths: of images, of ground truth, and of what only
# evaluation needs.
IMAGES = ("image_root", "image_dir", "list_file", "dirname")
GROUND_TRUTH = ("json_file", "gt_dir", "sem_seg_root")
EVALUATION = ("panoptic_root", "panoptic_json")
# Packages that Detectron2's evaluators need, by evaluator_type.
EVALUATOR_PACKAGES = {
    "lvis": "lvis",
    "coco_panoptic_seg": "panopticapi",
    "cityscapes_instance": "cityscapesscripts",
}
# Values of evaluator_type whose evaluation counts the pixels of each class.
COUNTS_PIXELS = (*LABEL_MAPS, "coco_panoptic_seg")
# Architectures, their section of the config, and the metadata that names their classes.
SEM_SEG = (SemanticSegmentor, PanopticFPN)
CLASSES = (
    (GeneralizedRCNN, "ROI_HEADS", "thing_classes"),
    (RetinaNet, "RETINANET", "thing_classes"),
    (SEM_SEG, "SEM_SEG_HEAD", "stuff_classes"),
)
# Keys of a file of precomputed proposals, and Detectron's names of them.
PROPOSALS = (("ids", "indexes"), ("boxes",), ("objectness_logits", "scores"))


def check_config(
    cfg: CfgNode,
    training: bool,
    resume: bool = False,
    processes: int = 1,
    *,
    stock_trainer: bool = False,
) -> None:
    """Checks values, data sets, proposals, weights and device; `add_dcn_config` is not needed.

    Args:
        cfg: the config.
        training: whether DATASETS.TRAIN is used, or only DATASETS.TEST.
        resume: whether MODEL.WEIGHTS is not needed if OUTPUT_DIR has a checkpoint.
        processes: number of processes that train.
        stock_trainer: whether mappers, samplers, schedulers and clipping are built as by
            `DefaultTrainer`, which knows no other names of them.

    Raises:
        UserError: if a value is wrong, or a file does not exist (then a FileNotFoundError too).
    """
    check_device(cfg.MODEL.DEVICE)
    check_values(cfg, training, stock_trainer=stock_trainer)
    if training:
        _check_training(cfg, processes)
    output = cfg.OUTPUT_DIR
    if not output or ("://" not in output and not can_write(Path(output))):
        raise UserError(f"OUTPUT_DIR must be a folder that can be written to, got {output!r}")
    check_datasets(cfg, training, stock_trainer=stock_trainer)
    _check_backbone(cfg)
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if not resume or not (PathManager.isfile(last) or checkpoint_names(cfg.OUTPUT_DIR)):
        check_weights("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
        if not training and not cfg.MODEL.WEIGHTS:
            raise UserError(
                "MODEL.WEIGHTS must name the weights to evaluate, got none: add MODEL.WEIGHTS and "
                "a file at the end of the command line"
            )


def _check_training(cfg: CfgNode, processes: int) -> None:
    batch = cfg.SOLVER.IMS_PER_BATCH
    if not cfg.SOLVER.REFERENCE_WORLD_SIZE and batch % processes:  # else it is scaled
        raise UserError(
            f"SOLVER.IMS_PER_BATCH must be a multiple of the {processes} processes, got {batch}"
        )


def check_datasets(cfg: CfgNode, training: bool, *, stock_trainer: bool = False) -> None:
    """Checks that the files of data sets and proposals exist, and the numbers of classes.

    Args:
        cfg: with DATASETS.
        training: whether DATASETS.TRAIN is used, or only DATASETS.TEST.
        stock_trainer: whether `DatasetMapper` reads images and label maps, so that they can be
            checked, and evaluators are those of the data sets.

    Raises:
        UserError: if a name is unknown, a file does not exist (then it is a FileNotFoundError too),
            the package of an evaluator is not installed, or the data set has labels that the model
            lacks.
    """
    parts = ("TRAIN", "TEST") if training else ("TEST",)
    if not cfg.DATASETS[parts[0]]:
        raise UserError(f"DATASETS.{parts[0]} must name a data set")
    for part in parts:
        key, names = f"DATASETS.{part}", cfg.DATASETS[part]
        for name in names:
            if name not in DatasetCatalog.list():
                raise UserError(f"{key} must be registered, {got(name, DatasetCatalog.list())}")
            _check_files(name, key)
            if part == "TEST" and stock_trainer:
                _check_evaluator(name, key)
        _check_contents(cfg, names, part.lower(), stock_trainer)
        for name in names:
            _check_task(cfg, name, key)
            _check_classes(cfg, name, key, stock_trainer)
        if cfg.MODEL.LOAD_PROPOSALS:
            files = cfg.DATASETS[f"PROPOSAL_FILES_{part}"]
            if len(files) != len(names):
                raise UserError(
                    f"DATASETS.PROPOSAL_FILES_{part} must have a file for each of the "
                    f"{len(names)} data sets in {key}, got {len(files)}"
                )
            for file in files:
                check_proposals(f"DATASETS.PROPOSAL_FILES_{part}", file)


def _check_files(name: str, key: str) -> None:
    metadata = MetadataCatalog.get(name)
    if metadata.get("generated_in"):  # a folder where it is generated on first use
        folder = Path(metadata.json_file).parents[1]
        if not PathManager.exists(metadata.json_file) and not can_write(folder):
            raise UserError(f"{key}: {name} is generated in {folder}, which is not writable")
        return
    attributes = EVALUATION if key == "DATASETS.TEST" else ()
    if is_builtin(name):  # other loaders may use these names otherwise
        attributes += IMAGES + GROUND_TRUTH
    paths = [metadata.get(attribute) for attribute in attributes]
    if is_voc(name):
        paths.append(os.path.join(metadata.dirname, f"ImageSets/Main/{metadata.split}.txt"))
    missing = [str(path) for path in paths if path and is_missing(path)]
    if missing:
        raise MissingFileError(f"{key}: {name} is incomplete, {describe_missing(missing)}")


def _check_contents(cfg: CfgNode, names: Sequence[str], split: str, stock_mapper: bool) -> None:
    model, required = cfg.MODEL, ["bbox"]
    read = ["segmentation"] * model.MASK_ON + ["keypoints"] * model.KEYPOINT_ON
    if split == "train" and _has_architecture(cfg, GeneralizedRCNN):  # others ignore both
        required += read
    found = [
        find_faults(
            name,
            split,
            required=required,
            read=read,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=(
                model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE if model.KEYPOINT_ON else 0
            ),
            mask_format=cfg.INPUT.MASK_FORMAT,
            outside=cfg.DATASETS.get("ALLOW_FILES_OUTSIDE", False),
            stock_mapper=stock_mapper,
            labels=_labels(cfg, name, split) if stock_mapper else None,
        )
        for name in names
    ]
    # Detectron2 joins the data sets before it leaves out images.
    for kind in (NO_IMAGE_LEFT, IGNORED_ONLY):
        if not all(kind in faults.errors for faults in found):
            for faults in found:
                faults.make_warning(kind)
    for name, faults in zip(names, found, strict=True):
        for kind, places in faults.warnings.items():
            logging.getLogger(__name__).warning("%s: %s", name, faults.describe(kind, places))
        faults.raise_error(f"DATASETS.{split.upper()}: {name}")


def _labels(cfg: CfgNode, name: str, split: str) -> tuple[int | None, int] | None:
    """Returns number of classes and ignored label, if the label maps of a data set are read."""
    if split == "train":
        head = cfg.MODEL.SEM_SEG_HEAD
        return (head.NUM_CLASSES, head.IGNORE_VALUE) if is_sem_seg(cfg) else None
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") not in COUNTS_PIXELS:
        return None
    return len(metadata.get("stuff_classes", ())) or None, metadata.get("ignore_label", 255)


def _check_evaluator(name: str, key: str) -> None:
    evaluator_type = MetadataCatalog.get(name).get("evaluator_type")
    package = EVALUATOR_PACKAGES.get(evaluator_type)
    if package and package not in sys.modules and find_spec(package) is None:
        raise UserError(
            f"{key}: the {evaluator_type} evaluator of {name} needs the package {package}: install "
            f"it, or train without evaluation, {key} '()'"
        )


def _check_task(cfg: CfgNode, name: str, key: str) -> None:
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type")
    architecture = modeling.META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    detects = _has_architecture(cfg, (GeneralizedRCNN, RetinaNet)) and not is_sem_seg(cfg)
    if not detects or not architecture.__module__.startswith(STOCK):
        return
    if key == "DATASETS.TRAIN":
        classes = metadata.get("thing_classes")
        without = kind in LABEL_MAPS and (is_builtin(name) or classes is None)
    else:
        without = kind in COUNTS_PIXELS
    if without:
        raise UserError(
            f"{key}: {name} has labels of pixels, which {cfg.MODEL.META_ARCHITECTURE} neither "
            "learns nor predicts: name a data set with boxes"
        )


def _check_classes(cfg: CfgNode, name: str, key: str, stock_mapper: bool) -> None:
    metadata, training = MetadataCatalog.get(name), key == "DATASETS.TRAIN"
    for base, section, attribute in CLASSES:
        if not _has_architecture(cfg, base):
            continue
        classes, number = metadata.get(attribute), cfg.MODEL[section].NUM_CLASSES
        message = f"MODEL.{section}.NUM_CLASSES is {number}, {name} in {key} has "
        if classes is None:
            if training and attribute == "stuff_classes" and metadata.get("thing_classes"):
                raise UserError(f"{message}no stuff_classes, and so no labels of pixels")
        elif training and number < len(classes) and stock_mapper:
            raise UserError(f"{message}{len(classes)} classes: it must be at least as many")
        elif (
            number > len(classes)
            and not training
            and attribute == "stuff_classes"
            and metadata.get("evaluator_type") in COUNTS_PIXELS
        ):
            raise UserError(
                f"{message}{len(classes)} classes, and its evaluation fails on predictions of "
                f"others: set it to {len(classes)}, or train without evaluation, {key} '()'"
            )
        elif number != len(classes):
            # Evaluation fails on predictions of unknown classes, if the model makes any.
            logging.getLogger(__name__).warning("%s%d classes", message, len(classes))


def is_sem_seg(cfg: CfgNode) -> bool:
    """Returns whether a model is trained on label maps by one of Detectron2's architectures."""
    return _has_architecture(cfg, SEM_SEG)


def _has_architecture(cfg: CfgNode, base: type | tuple[type, ...]) -> bool:
    architecture = modeling.META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    return isinstance(architecture, type) and issubclass(architecture, base)


def _check_backbone(cfg: CfgNode) -> None:
    # Others are checked once they are built, by `check_deformable`.
    name, last = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.get("DEFORM_LAST", ())
    backbone = modeling.BACKBONE_REGISTRY.get(name)
    if any(last) and backbone.__module__.startswith("detectron2."):
        raise UserError(
            f"MODEL.RESNETS.DEFORM_LAST is {last}, but Detectron2's backbone {name} ignores it: "
            "MODEL.BACKBONE.NAME must be build_deform_resnet_backbone or similar"
        )


def check_weights(key: str, path: str) -> None:
    """Raises MissingFileError if a path is neither empty, nor a file, nor an address."""
    # Detectron2's main accepts model.pth?matching_heuristics=True.
    file = urlparse(path)._replace(query="").geturl()
    if path and (is_missing(file) or os.path.isdir(file)):
        raise MissingFileError(f"{key} must be a file or an address, got {path!r}")


def check_proposals(key: str, path: str) -> None:
    """Checks that a file has precomputed proposals; addresses are not looked up.

    Args:
        key: of the config.
        path: the file.

    Raises:
        FileNotFoundError: if it does not exist.
        UserError: if it is in another format, or contains anything but data.
    """
    check_weights(key, path)
    if "://" in path:
        return
    with PathManager.open(path, "rb") as file:
        proposals = load_pickle(file)
    columns = []
    for names in PROPOSALS:
        found = [name for name in names if isinstance(proposals, dict) and name in proposals]
        if not found:
            raise UserError(f"{key}: {path} must be a dict with {' or '.join(names)}")
        columns.append(proposals[found[0]])
    if len({len(column) for column in columns}) > 1:
        raise UserError(
            f"{key}: {path} must have ids, boxes and scores of the same number of images, got "
            f"{', '.join(str(len(column)) for column in columns)}"
        )


def check_no_precomputed_proposals(cfg: CfgNode) -> None:
    """Raises ValueError if a model needs precomputed proposals, for programs that have none."""
    if cfg.MODEL.LOAD_PROPOSALS:
        raise UserError(
            "MODEL.LOAD_PROPOSALS must be False, and MODEL.PROPOSAL_GENERATOR.NAME RPN: there are "
            "no precomputed proposals for these images"
        )


def check_device(name: str, key: str = "MODEL.DEVICE") -> None:
    """Raises UserError if PyTorch cannot use the device that a key or an option names."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{key} must be cpu, cuda or cuda:<n>, got {name!r}") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise UserError(f"{key} must be cpu, since PyTorch finds no GPU, got {name!r}")
        if (device.index or 0) >= count:
            raise UserError(f"{key} must be cuda:{count - 1} or below, got {name!r}")
        return
    try:
        torch.ones(1, device=device).cpu()  # not possible on meta
    except (AssertionError, ImportError, RuntimeError) as error:
        raise UserError(
            f"{key} must be a device that PyTorch can use here, such as cpu, got {name!r}"
        ) from error
