# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Configs from a command line."""

from __future__ import annotations

import argparse
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from detectron2 import model_zoo
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from dcn_plugin.config import add_dcn_config
from dcn_plugin.data import use_custom_data
from dcn_plugin.messages import UserError, nearest, one_line

from .config_checks import check_device, check_no_precomputed_proposals, check_weights
from .config_values import check_values

# What reading a file that is no config raises, and why.
NOT_A_CONFIG = {
    UnicodeDecodeError: "it is not a text file in UTF-8",
    RecursionError: "a _BASE_ leads back to the file, or it is nested too deep",
    NotImplementedError: "it has a value of a type that configs do not have",
    AttributeError: "it is empty, or a list or a single value",
    TypeError: "it is empty, or a list or a single value",
}

# Configs of Detectron2, which is trusted as any installed package is.
INSTALLED = Path(model_zoo.__file__).with_name("configs")


class SafeCfgNode(CfgNode):
    """`CfgNode` that reads files by `yaml.safe_load`, except those installed with Detectron2.

    Detectron2 reads all by `yaml.unsafe_load` if they have a tag such as `!!python/object/apply`,
    which calls any function. Its own RetinaNet configs have one.
    """

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> dict[str, Any]:
        """Loads a file and its `_BASE_`, each of which may be installed with Detectron2 or not.

        Args:
            filename: anything that PathManager opens.
            allow_unsafe: has no effect.
        """
        _warn_of_repeated_keys(filename)
        path = Path(filename)
        installed = path.is_file() and path.resolve().is_relative_to(INSTALLED.resolve())
        try:
            return super().load_yaml_with_base(filename, allow_unsafe=installed)
        except yaml.constructor.ConstructorError as error:
            tag = re.search(r"tag '([^']*)'", str(error))
            if tag is None:
                raise
            name = tag[1].replace("tag:yaml.org,2002:", "!!")
            raise UserError(
                f"{filename}, line {error.problem_mark.line + 1}: {name} is not loaded, since YAML "
                "tags can run code: write the value itself, a tuple as (1, 2)"
            ) from error


def _warn_of_repeated_keys(filename: str) -> None:
    with PathManager.open(filename) as file:
        root = yaml.compose(file, Loader=yaml.SafeLoader)
    nodes = [root] if isinstance(root, yaml.MappingNode) else []
    for node in nodes:  # which grows
        lines: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                logging.getLogger(__name__).warning(
                    "%s: %s in line %d has no effect, since line %d has it again",
                    *(filename, name, lines[name], line),
                )
            lines[name] = line
            if isinstance(value, yaml.MappingNode) and value not in nodes:  # it may be an alias
                nodes.append(value)


def read_config(args: argparse.Namespace) -> CfgNode:
    """Reads the config of a command line; without a GPU, cuda in the config file becomes cpu.

    Args:
        args: `config_file` and `opts` of Detectron2's parser; optionally `train_data` and
            `test_data`, a file of annotations and a folder of images each.

    Returns:
        the config, not frozen.

    Raises:
        OSError: if a base config, or a file of `train_data` or `test_data`, does not exist.
        UserError: if the config file does not exist or cannot be read, a key is unknown (with the
            nearest known ones), or a value has another type.
    """
    if not args.config_file:
        raise UserError("--config-file is required, for example one of configs/")
    if args.config_file.endswith(".py"):
        raise UserError(
            f"{args.config_file} is a LazyConfig: run it by Detectron2's lazyconfig_train_net.py"
        )
    if os.path.isdir(args.config_file):
        raise UserError(f"--config-file must be a file, got the folder {args.config_file}")
    cfg = SafeCfgNode(get_cfg())
    add_dcn_config(cfg)
    options = args.opts or []
    if late := [word for word in options if str(word).startswith("--")]:
        raise UserError(f"options must stand before the config keys and be known, got {late[0]}")
    if len(options) % 2:
        joined = next((word for word in options if "=" in str(word)), "")
        hint = f": write {joined.replace('=', ' ', 1)} instead of {joined}" if joined else ""
        raise UserError(
            f"config keys must each have a value, got {len(options)} words, the last one "
            f"{options[-1]}{hint}"
        )
    with _naming(args.config_file, cfg):
        cfg.merge_from_file(args.config_file)
    if str(cfg.MODEL.DEVICE).startswith("cuda") and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    with _naming("command line", cfg):
        try:
            cfg.merge_from_list(options)
        except TypeError as error:  # of a key below one that has a value
            known = {*_keys(cfg)}
            unknown = [key for key in options[::2] if key not in known]
            raise (KeyError(f"Non-existent key: {unknown[0]}") if unknown else error) from error
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
        UserError: if a file does not exist, a key or a value is wrong, or the model needs
            precomputed proposals.
    """
    cfg = read_config(args)
    if not args.weights:
        raise UserError("--weights must name the weights of a trained model, got none")
    check_weights("--weights", args.weights)
    cfg.MODEL.WEIGHTS = args.weights
    check_no_precomputed_proposals(cfg)
    check_device(cfg.MODEL.DEVICE)
    check_values(cfg, training=False, stock_trainer=True)
    return cfg


@contextmanager
def _naming(source: str, cfg: CfgNode) -> Iterator[None]:
    """Turns errors of Detectron2's CfgNode into a `UserError` that names the source of a value."""
    try:
        yield
    except UserError:
        raise
    except tuple(NOT_A_CONFIG) as error:
        reason = next(text for kind, text in NOT_A_CONFIG.items() if isinstance(error, kind))
        raise UserError(
            f"{source} must have sections and keys in YAML, such as MODEL: {{DEVICE: cpu}}, but "
            f"{reason}"
        ) from error
    except (KeyError, AssertionError, ValueError, yaml.YAMLError) as error:
        message = _shortened(error)
        # That of an unknown key ends with the key.
        hint = (
            "" if isinstance(error, ValueError) else nearest(message.rpartition(" ")[2], _keys(cfg))
        )
        if message.startswith("Type mismatch"):
            hint = "; the second is the type found: write 1.0 for a float, ('name',) for a tuple"
            if "CfgNode" in message:
                message = re.sub(r" with values \(.*\) for config key", " for config key", message)
                hint = "; it is a section, whose keys are set one by one, as SOLVER.BASE_LR 0.01"
        raise UserError(f"{source}: {message}{hint}") from error


def _shortened(error: Exception) -> str:
    """Returns the message of an error, without the middle of the value of a whole section."""
    words = (
        " ".join(str(part) for part in error.args) if isinstance(error, KeyError) else str(error)
    )
    message = one_line(words)
    return message if len(message) < 500 else f"{message[:200]} ... {message[-200:]}"


def _keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """Yields all dotted keys."""
    for name, value in cfg.items():
        yield prefix + name
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{name}.")
