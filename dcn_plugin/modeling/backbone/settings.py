# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Checks of the keys below MODEL.RESNETS that all backbones read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode

from .reduced import REDUCED

DILATIONS = (1, 2, 4, 6, 8)
FEATURES = ("stem", "res2", "res3", "res4", "res5", REDUCED)


def blocks_per_stage(resnets: CfgNode, usual: Sequence[int]) -> Sequence[int]:
    """Returns how many blocks res2, res3, res4 and res5 have.

    Args:
        resnets: the keys of MODEL.RESNETS.
        usual: where BLOCKS is empty.

    Raises:
        ValueError: if a number does not fit.
    """
    blocks = resnets.BLOCKS or usual
    if len(blocks) != 4 or any(not isinstance(count, int) or count < 1 for count in blocks):
        raise ValueError(
            "MODEL.RESNETS.BLOCKS must be four numbers above 0, for res2 ... res5, or none for "
            f"those of the network, got {list(blocks)}"
        )
    return blocks


def deformable_blocks(resnets: CfgNode, blocks: Sequence[int], network: str) -> list[int]:
    """Returns how many blocks at the end of each stage are deformable.

    `check_features` has been called.

    Args:
        resnets: the keys of MODEL.RESNETS.
        blocks: of res2, res3, res4 and res5.
        network: whose blocks they are, for the message.

    Raises:
        ValueError: if there are not so many, or the stage is not computed.
    """
    last = list(resnets.DEFORM_LAST)
    if len(last) != 4 or any(not 0 <= k <= n for k, n in zip(last, blocks, strict=True)):
        raise ValueError(
            "MODEL.RESNETS.DEFORM_LAST must be four numbers from 0 to the blocks of res2 ... res5, "
            f"{list(blocks)} in {network}, got {last}"
        )
    whole = resnets.DEFORM_ON_PER_STAGE
    if len(whole) != 4:
        raise ValueError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE must be four booleans, one for each of res2 ... "
            f"res5, got {whole}"
        )
    computed = max(FEATURES.index(name) for name in resnets.OUT_FEATURES)
    for index, count in enumerate(last, start=1):
        if count and index > computed:
            raise ValueError(
                f"MODEL.RESNETS.DEFORM_LAST must be 0 for {FEATURES[index]}, which none of "
                f"OUT_FEATURES {resnets.OUT_FEATURES} needs, got {last}"
            )
    return [n if all_of_it else k for k, n, all_of_it in zip(last, blocks, whole, strict=True)]


def offset_settings(
    resnets: CfgNode, deformable: Sequence[int], channels: Sequence[int]
) -> dict[str, Any]:
    """Returns the arguments of the deformable blocks' offset branches.

    Args:
        resnets: the keys of MODEL.RESNETS.
        deformable: how many blocks of each stage are.
        channels: that the narrowest deformable convolution of each stage reads.

    Raises:
        ValueError: if the offset groups do not divide the channels.
    """
    groups = resnets.DEFORM_NUM_GROUPS
    for index, (count, width) in enumerate(zip(deformable, channels, strict=True)):
        if count and (groups < 1 or width % groups != 0):
            raise ValueError(
                f"MODEL.RESNETS.DEFORM_NUM_GROUPS must be a divisor of the {width} channels "
                f"that the deformable convolutions of res{index + 2} read, got {groups}"
            )
    return {"offset_groups": groups, "modulated": resnets.DEFORM_MODULATED}


def stage_layout(resnets: CfgNode, index: int) -> tuple[int, int]:
    """Returns the stride of a stage's first block, and the dilation of all of its blocks.

    A dilated res5 keeps the stride of res4, as in Detectron2.

    Args:
        resnets: the keys of MODEL.RESNETS.
        index: of the stage, 0 for res2.
    """
    dilation = resnets.RES5_DILATION if index == 3 else 1
    if dilation not in DILATIONS:
        raise ValueError(
            f"MODEL.RESNETS.RES5_DILATION must be one of {DILATIONS} (1: stride 32, more: stride "
            f"16), got {dilation}"
        )
    return (1 if index == 0 or dilation > 1 else 2), dilation


def check_features(resnets: CfgNode) -> None:
    """Checks the names of the features that are asked for, and the channels of `reduced`."""
    unknown = [name for name in resnets.OUT_FEATURES if name not in FEATURES]
    if unknown or not resnets.OUT_FEATURES:
        raise ValueError(
            f"MODEL.RESNETS.OUT_FEATURES must be some of {FEATURES}, got {resnets.OUT_FEATURES}"
        )
    if REDUCED in resnets.OUT_FEATURES and resnets.REDUCED_CHANNELS < 1:
        raise ValueError(
            f"MODEL.RESNETS.REDUCED_CHANNELS must be positive, got {resnets.REDUCED_CHANNELS}"
        )
