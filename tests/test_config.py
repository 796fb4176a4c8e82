# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Config keys."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import get_cfg

from dcn_plugin import add_dcn_config

# Every key that version 0.1 added, with another value than its default.
VERSION_0_1 = """
MODEL:
  CHANNELS_LAST: True
  RESNETS:
    {DEFORM_LAST: [0, 0, 0, 3], BLOCKS: [1, 1, 1, 3], REDUCED_CHANNELS: 8, REDUCED_NORM: "GN"}
  ROI_BOX_HEAD: {DEFORM: True, DEFORM_GAMMA: 0.2, POOLER_MODE: "msra"}
  ROI_HEADS: {OHEM: 16}
  SEM_SEG_HEAD: {PROBABILITIES: True}
SOLVER: {OPTIMIZER: "AdamW", OFFSET_LR_FACTOR: 0.1, ROI_OFFSET_LR_FACTOR: 0.1}
TEST:
  SEM_SEG_AT_NETWORK_SIZE: True
  BOX_AVERAGING: {ENABLED: True, ROUNDS: 3, CANDIDATES: 10, VOTE_THRESH: 0.7}
OFFSET_MONITOR_PERIOD: 5
"""


def test_a_config_of_version_0_1_loads(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(VERSION_0_1)
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.RESNETS.BLOCKS == [1, 1, 1, 3] and cfg.MODEL.ROI_HEADS.OHEM == 16
    assert cfg.SOLVER.OPTIMIZER == "AdamW" and cfg.TEST.BOX_AVERAGING.VOTE_THRESH == 0.7
