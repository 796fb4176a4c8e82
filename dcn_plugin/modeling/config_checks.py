# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of keys that several networks read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode
from fvcore.common.registry import Registry


def check_features(key: str, names: Sequence[str], known: Iterable[str], only_one: bool) -> None:
    """Checks the names of the features that a part of a network reads.

    Args:
        key: of the config.
        names: its value.
        known: what the backbone computes.
        only_one: whether the part reads one feature.

    Raises:
        ValueError: if there are none, too many, or others.
    """
    if set(names) - set(known) or not names or (only_one and len(names) > 1):
        some = "one" if only_one else "some"
        raise ValueError(
            f"{key} must be {some} of the backbone's features {sorted(known)}, got {list(names)}"
        )


def check_only_boxes(cfg: CfgNode, network: str) -> None:
    """Checks that neither masks nor keypoints are asked of a network that finds boxes.

    Args:
        cfg: of the network.
        network: for the message.

    Raises:
        ValueError: if they are.
    """
    for key in ("MASK_ON", "KEYPOINT_ON"):
        if cfg.MODEL[key]:
            raise ValueError(f"MODEL.{key} must be False for {network}, which finds boxes only")


def check_kind(key: str, name: str, registry: Registry, kind: type, network: str) -> None:
    """Checks that a part of a network is of the kind that it needs.

    Args:
        key: of the config.
        name: its value.
        registry: in which the name is.
        kind: of the part, or a class that it is derived from.
        network: for the message.

    Raises:
        ValueError: if it is not.
    """
    if not issubclass(registry.get(name), kind):
        raise ValueError(f"{key} must be {kind.__name__} for {network}, got {name}")
