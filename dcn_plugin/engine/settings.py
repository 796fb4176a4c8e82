# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""A config from a command line, checked before anything is built from it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)
from detectron2.utils.file_io import PathManager

from dcn_plugin.config import add_dcn_config
from dcn_plugin.data import check_datasets, share_of_batch, use_custom_data
from dcn_plugin.messages import got

from .optimizer import check_optimizer

REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": ROI_KEYPOINT_HEAD_REGISTRY,
    "MODEL.SEM_SEG_HEAD.NAME": SEM_SEG_HEADS_REGISTRY,
}
WITHOUT_REGISTRY = ("PrecomputedProposals", "")  # a generator, and a box head that is not needed


def read_config(args: argparse.Namespace) -> CfgNode:
    """Reads the config of a command line; without a GPU it is for the CPU.

    Args:
        args: `config_file` and `opts` of Detectron2's parser; `train_data` and `test_data`, if
            given, are files of annotations and folders of images.

    Returns:
        the config, not frozen.

    Raises:
        OSError: if a file is not there.
        ValueError: if a key or value can not be, with the nearest that can.
    """
    cfg = get_cfg()
    add_dcn_config(cfg)
    _merge_file(cfg, args.config_file)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    _merge_words(cfg, args.opts or [])
    for key, registry in REGISTRIES.items():
        name = value_of(cfg, key)
        if name not in registry and name not in WITHOUT_REGISTRY:
            known = [known for known, _ in registry]
            raise ValueError(f"{key} must be a name that is registered, {got(name, known)}")
    own = getattr(args, "train_data", None), getattr(args, "test_data", None)
    if any(own):
        use_custom_data(cfg, *own)
    return cfg


def read_trained_config(args: argparse.Namespace) -> CfgNode:
    """Reads the config of a trained network, for programs that run it on images of their own.

    Args:
        args: as of `read_config`, and `weights` of the network.

    Returns:
        the config, whose MODEL.WEIGHTS are there.

    Raises:
        OSError: if a file is not there.
        ValueError: if a key or value can not be, or the network needs proposals.
    """
    cfg = read_config(args)
    if not args.weights:
        raise ValueError("--weights must name the weights of a trained network, got none")
    check_weights("--weights", args.weights)
    cfg.MODEL.WEIGHTS = args.weights
    refuse_proposals(cfg)
    check_device(cfg.MODEL.DEVICE)
    return cfg


def check_config(cfg: CfgNode, training: bool, processes: int = 1, resume: bool = False) -> None:
    """Stops before hours are lost: looks for data, weights, proposals and the device.

    Args:
        cfg: as `read_config` returns it.
        training: whether it is to be trained, or only evaluated.
        processes: which share a batch.
        resume: whether to go on from a checkpoint in OUTPUT_DIR, if there is one.

    Raises:
        OSError: if a file is not there.
        ValueError: if settings do not fit each other.
    """
    check_datasets(cfg, training)
    if not (resume and PathManager.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))):
        check_weights("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS)
    if training:
        check_optimizer(cfg.SOLVER.OPTIMIZER)
        share_of_batch(cfg.SOLVER.IMS_PER_BATCH, processes)
    check_device(cfg.MODEL.DEVICE)


def check_weights(key: str, weights: str) -> None:
    """Checks that weights are there.

    Args:
        key: who names them.
        weights: a file, an address, which is not looked at, or nothing.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if weights and "://" not in weights and not PathManager.isfile(weights):
        raise FileNotFoundError(f"{key} must be a file, or an address, got {weights!r}")


def refuse_proposals(cfg: CfgNode) -> None:
    """Checks that a network makes its proposals itself, for programs that have none.

    Args:
        cfg: of the network.

    Raises:
        ValueError: if it takes them from a file.
    """
    if cfg.MODEL.LOAD_PROPOSALS:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS must be False, and MODEL.PROPOSAL_GENERATOR.NAME RPN: images "
            "come without proposals here"
        )


def check_device(name: str) -> None:
    """Checks MODEL.DEVICE.

    Args:
        name: its value.

    Raises:
        ValueError: if there is no such device.
    """
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE must be cpu, cuda or cuda:<n>, got {name!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"MODEL.DEVICE must be cpu, since PyTorch finds no GPU, got {name!r}")


def value_of(cfg: CfgNode, key: str) -> object:
    """Returns the value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def keys_of(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yields all dotted keys."""
    for name, value in cfg.items():
        if isinstance(value, CfgNode):
            yield from keys_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def _merge_file(cfg: CfgNode, name: str) -> None:
    path = Path(name)
    if not name:
        raise ValueError("--config-file must name a config, for example one of configs/")
    if "://" not in name and not path.is_file():
        known = [str(p) for p in Path("configs").rglob("*.yaml")]
        raise FileNotFoundError(f"--config-file must be a file, {got(name, known)}")
    try:
        cfg.merge_from_file(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: there is no {error.filename}") from error
    except KeyError as error:
        raise ValueError(f"{name}: {_unknown(cfg, error)}") from error
    except (ValueError, TypeError, AssertionError, yaml.YAMLError) as error:
        raise ValueError(f"{name}: {' '.join(str(error).split())}") from error


def _merge_words(cfg: CfgNode, words: list[str]) -> None:
    if len(words) % 2:
        raise ValueError(f"keys and values must come in pairs at the end, got {' '.join(words)}")
    known = list(keys_of(cfg))
    for key, value in zip(words[::2], words[1::2], strict=True):
        if key not in known:
            raise ValueError(f"a key of the config must come before its value, {got(key, known)}")
        try:
            cfg.merge_from_list([key, value])
        except (ValueError, SyntaxError) as error:
            kind = type(value_of(cfg, key)).__name__
            raise ValueError(f"{key} must be a {kind}, got {value!r}") from error


def _unknown(cfg: CfgNode, error: KeyError) -> str:
    key = str(error.args[0]).rpartition(" ")[2]
    return f"a key must be one of Detectron2's or of docs/, {got(key, keys_of(cfg))}"
