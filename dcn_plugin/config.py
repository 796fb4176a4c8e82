# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""The config keys that this package adds to Detectron2's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_dcn_config(cfg: CfgNode) -> None:
    """Adds the keys to a config made by `detectron2.config.get_cfg()`.

    Args:
        cfg: changed in place; every key's default leaves the networks plain.
    """
    # How many blocks at the end of res2, res3, res4 and res5 have a deformable 3x3 convolution.
    # The paper's three layers are [0, 0, 0, 3]. Detectron2's MODEL.RESNETS.DEFORM_MODULATED and
    # DEFORM_NUM_GROUPS (offset groups) apply to them; so does DEFORM_ON_PER_STAGE, which stands
    # for all blocks of a stage.
    cfg.MODEL.RESNETS.DEFORM_LAST = [0, 0, 0, 0]
