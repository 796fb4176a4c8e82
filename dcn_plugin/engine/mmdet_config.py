# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What the configs in checkpoints of MMDetection say about the weights."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any


def read_config(text: str) -> dict[str, Any]:
    """Returns the variables of a config that are made of constants; nothing is run.

    Args:
        text: Python code such as `model = dict(type='FasterRCNN', ...)`. Values that are not
            constants, lists, tuples or dicts are None.
    """
    try:
        statements = ast.parse(text).body
    except SyntaxError:
        return {}
    return {
        target.id: _literal(statement.value)
        for statement in statements
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }


def _literal(node: ast.expr | None) -> Any:
    if isinstance(node, ast.List | ast.Tuple):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {_literal(key): _literal(value) for key, value in pairs}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    try:
        return ast.literal_eval(node) if node is not None else None
    except (ValueError, TypeError):
        return None


def part(config: Any, *path: str) -> Any:
    """Returns a value of nested dicts, or None if a key is missing.

    Args:
        config: a dict.
        path: the keys.
    """
    for key in path:
        config = config.get(key) if isinstance(config, Mapping) else None
    return config


def box_stds(config: Mapping[str, Any]) -> list[tuple[float, ...]]:
    """Returns `target_stds` of each box head that names them; one head is no list."""
    heads = part(config, "model", "roi_head", "bbox_head") or part(config, "model", "bbox_head")
    heads = heads if isinstance(heads, list) else [heads]
    found = [part(head, "bbox_coder", "target_stds") or part(head, "target_stds") for head in heads]
    return [tuple(stds) for stds in found if isinstance(stds, list) and len(stds) == 4]


def pixel_statistics(config: Mapping[str, Any]) -> tuple[str, list[float], list[float]] | None:
    """Returns the order of the channels, mean and standard deviation of the images."""
    norm, to_rgb = part(config, "model", "data_preprocessor"), "bgr_to_rgb"  # version 3
    if norm is None:
        norm, to_rgb = part(config, "img_norm_cfg"), "to_rgb"
    mean, std = part(norm, "mean"), part(norm, "std")
    if not mean or not std:
        return None
    return ("RGB" if part(norm, to_rgb) else "BGR"), mean, std


def anchor_scales(config: Mapping[str, Any]) -> int | None:
    """Returns the number of anchor scales of the RPN, or None if it is not stated."""
    rpn = part(config, "model", "rpn_head")
    scales = part(rpn, "anchor_generator", "scales") or part(rpn, "anchor_scales")
    return len(scales) if isinstance(scales, list) else None
