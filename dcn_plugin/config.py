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
    # Blocks of res2, res3, res4 and res5; empty: those of DEPTH, or of Aligned-Inception-ResNet.
    cfg.MODEL.RESNETS.BLOCKS = []
    # Channels of the feature `reduced`: res5 through a 1x1 convolution and ReLU. It is there if
    # MODEL.RESNETS.OUT_FEATURES names it. R-FCN and DeepLab have 1024, Faster R-CNN 256.
    cfg.MODEL.RESNETS.REDUCED_CHANNELS = 1024
    # Its norm, as MODEL.RESNETS.NORM; the paper's has none. Helps networks that learn from scratch.
    cfg.MODEL.RESNETS.REDUCED_NORM = ""

    # Whether the bins of DeformROIHeads and RFCNROIHeads move, by how much of an offset, and how a
    # bin samples ("align", "bin" or "msra": see docs/ops.md).
    cfg.MODEL.ROI_BOX_HEAD.DEFORM = False
    cfg.MODEL.ROI_BOX_HEAD.DEFORM_GAMMA = 0.1
    cfg.MODEL.ROI_BOX_HEAD.POOLER_MODE = "align"
    # From how many RoIs of an image RFCNROIHeads learns: those with the highest losses. 0: from
    # those that Detectron2 samples (BATCH_SIZE_PER_IMAGE, POSITIVE_FRACTION).
    cfg.MODEL.ROI_HEADS.OHEM = 128

    # Whether images and features lie in memory with their channels together, which is faster on
    # CPUs, and on GPUs in half precision.
    cfg.MODEL.CHANNELS_LAST = False

    # Whether DeepLabHead returns probabilities; Detectron2's heads return logits.
    cfg.MODEL.SEM_SEG_HEAD.PROBABILITIES = False

    # Whether labels are compared at the size that the network saw, as the authors did on VOC, and
    # not at that of the image.
    cfg.TEST.SEM_SEG_AT_NETWORK_SIZE = False

    # Iterative bounding-box averaging at test time, with TEST.AUG or without: how often boxes are
    # scored, how many are kept of each time and version of the image, and from which IoU on a box
    # votes on another.
    cfg.TEST.BOX_AVERAGING = type(cfg)()
    cfg.TEST.BOX_AVERAGING.ENABLED = False
    cfg.TEST.BOX_AVERAGING.ROUNDS = 2
    cfg.TEST.BOX_AVERAGING.CANDIDATES = 1000
    cfg.TEST.BOX_AVERAGING.VOTE_THRESH = 0.5

    # SGD, or AdamW, which reads BASE_LR, WEIGHT_DECAY and the like, but not MOMENTUM and NESTEROV.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning rates of offset branches relative to SOLVER.BASE_LR: of convolutions, and of the
    # fully connected layer of deformable RoI pooling (section 2.3).
    cfg.SOLVER.OFFSET_LR_FACTOR = 1.0
    cfg.SOLVER.ROI_OFFSET_LR_FACTOR = 0.01

    # Iterations between two looks of the OffsetMonitor at the offsets; 0: never.
    cfg.OFFSET_MONITOR_PERIOD = 100


def with_dcn_defaults(cfg: CfgNode) -> CfgNode:
    """Returns a copy of a config in which missing keys of this package have their defaults.

    The registered components read their config through this function, so they also work in a
    training script that does not call `add_dcn_config`.

    Args:
        cfg: not changed.
    """
    from detectron2.config import get_cfg  # dcn_plugin is importable without Detectron2

    defaults = get_cfg()
    add_dcn_config(defaults)
    full = cfg.clone()
    full.defrost()
    _add_missing(full, defaults)
    return full


def _add_missing(cfg: CfgNode, defaults: CfgNode) -> None:
    for key, value in defaults.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, type(defaults)) and isinstance(cfg[key], type(defaults)):
            _add_missing(cfg[key], value)
