# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of keys that several networks read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from detectron2.config import CfgNode


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
