# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Configs from a command line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
import yaml

from detectron2.config import CfgNode, get_cfg

from dcn_plugin.config import add_dcn_config
from dcn_plugin.data import use_custom_data
from dcn_plugin.messages import nearest

from .config_checks import check_device, check_no_precomputed_proposals, check_weights


def read_config(args: argparse.Namespace) -> CfgNode:
    """Reads the config of a command line; without a GPU, cuda in the config file becomes cpu.

    Args:
        args: `config_file` and `opts` of Detectron2's parser; optionally `train_data` and
            `test_data`, a file of annotations and a folder of images each.

    Returns:
        the config, not frozen.

    Raises:
        OSError: if a base config, or a file of `train_data` or `test_data`, does not exist.
        ValueError: if the config file does not exist, a key is unknown (with the nearest known
            ones), or a value has another type.
    """
    if not args.config_file:
        raise ValueError("--config-file is required, for example one of configs/")
    if args.config_file.endswith(".py"):
        raise ValueError(
            f"{args.config_file} is a LazyConfig: run it by Detectron2's lazyconfig_train_net.py"
        )
    cfg = get_cfg()
    add_dcn_config(cfg)
    options = args.opts or []
    try:
        cfg.merge_from_file(args.config_file)
        if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
            cfg.MODEL.DEVICE = "cpu"
        cfg.merge_from_list(options)
    except (KeyError, AssertionError) as error:  # of an unknown key, which its message ends with
        message = " ".join(str(part) for part in error.args)
        hint = nearest(message.rpartition(" ")[2], _keys(cfg))
        raise ValueError(f"config: {message}{hint}") from error
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(f"config: {' '.join(str(error).split())}") from error
    data = getattr(args, "train_data", None), getattr(args, "test_data", None)
    if any(data):
        use_custom_data(cfg, *data)
        cfg.merge_from_list(options)  # keys on the command line override those that it has set
    return cfg


def read_trained_config(args: argparse.Namespace) -> CfgNode:
    """Reads the config of a trained model, for programs that run it on other images.

    Args:
        args: as for `read_config`, and `weights`, for MODEL.WEIGHTS.

    Raises:
        OSError: if a file does not exist.
        ValueError: if a key or a value is wrong, or the model needs precomputed proposals.
    """
    cfg = read_config(args)
    if not args.weights:
        raise ValueError("--weights must name the weights of a trained model, got none")
    check_weights("--weights", args.weights)
    cfg.MODEL.WEIGHTS = args.weights
    check_no_precomputed_proposals(cfg)
    check_device(cfg.MODEL.DEVICE)
    return cfg


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yields all dotted keys."""
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
