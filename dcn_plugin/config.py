# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Config keys of this package, in addition to Detectron2's."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_dcn_config(cfg: CfgNode) -> None:
    """Adds the config keys of this package, whose defaults leave every model plain.

    Args:
        cfg: made by `detectron2.config.get_cfg()`; changed in place.
    """
    # Number of blocks at the end of res2, res3, res4 and res5 whose 3x3 convolution is deformable,
    # from 0 to the blocks of the stage. The paper's three layers are [0, 0, 0, 3]. Detectron2's
    # DEFORM_MODULATED and DEFORM_NUM_GROUPS apply; DEFORM_ON_PER_STAGE means all blocks of a stage.
    cfg.MODEL.RESNETS.DEFORM_LAST = [0, 0, 0, 0]
    # Number of blocks in res2, res3, res4 and res5. Empty: those of DEPTH, or of
    # Aligned-Inception-ResNet.
    cfg.MODEL.RESNETS.BLOCKS = []
    # Channels of the feature "reduced": a 1x1 convolution and ReLU on res5, computed if
    # MODEL.RESNETS.OUT_FEATURES names it. The paper has 1024, and 256 in Faster R-CNN.
    cfg.MODEL.RESNETS.REDUCED_CHANNELS = 1024
    # Norm of "reduced", a name as in MODEL.RESNETS.NORM. Empty: none, as in the paper. Models
    # trained from scratch need one.
    cfg.MODEL.RESNETS.REDUCED_NORM = ""

    # Deformable RoI pooling in DeformROIHeads and RFCNROIHeads.
    cfg.MODEL.ROI_BOX_HEAD.DEFORM = False
    # Factor of the predicted offsets, which are relative to the size of the RoI.
    cfg.MODEL.ROI_BOX_HEAD.DEFORM_GAMMA = 0.1
    # Sampling mode of a bin: "align", "bin" or "msra", see docs/ops.md. DeformROIHeads use it with
    # POOLER_TYPE ROIAlignV2; other types are Detectron2's poolers.
    cfg.MODEL.ROI_BOX_HEAD.POOLER_MODE = "align"
    # Online hard example mining in RFCNROIHeads: number of RoIs per image, those with the highest
    # losses, on which the losses are computed. 0: those that Detectron2 samples
    # (BATCH_SIZE_PER_IMAGE, POSITIVE_FRACTION).
    cfg.MODEL.ROI_HEADS.OHEM = 128

    # Load MODEL.WEIGHTS even if the file has no weight of the backbone; an error otherwise.
    cfg.MODEL.ALLOW_UNMATCHED_WEIGHTS = False

    # Train in the channels_last memory format, faster on CPUs and on GPUs in half precision.
    cfg.MODEL.CHANNELS_LAST = False

    # Whether DeepLabHead returns probabilities at inference instead of logits.
    cfg.MODEL.SEM_SEG_HEAD.PROBABILITIES = False

    # Whether semantic segmentation is evaluated at the size of the model's input, as the authors
    # did on VOC, instead of the size of the original image.
    cfg.TEST.SEM_SEG_AT_NETWORK_SIZE = False

    # Iterative bounding-box averaging at test time, with or without TEST.AUG.
    cfg.TEST.BOX_AVERAGING = type(cfg)()
    cfg.TEST.BOX_AVERAGING.ENABLED = False
    # Number of times that boxes are scored and refined, at least 1.
    cfg.TEST.BOX_AVERAGING.ROUNDS = 2
    # Maximum number of boxes kept per round and augmented image.
    cfg.TEST.BOX_AVERAGING.CANDIDATES = 1000
    # Minimum IoU of a box with the detection to whose average it contributes, in (0, 1].
    cfg.TEST.BOX_AVERAGING.VOTE_THRESH = 0.5

    # Whether the files of a data set may be outside its folder, such as ../other/image.jpg. Links
    # inside the folder may always lead out of it.
    cfg.DATASETS.ALLOW_FILES_OUTSIDE = False

    # "SGD" or "AdamW". The latter ignores MOMENTUM and NESTEROV.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Learning-rate factor of the offset branches of convolutions, relative to BASE_LR.
    cfg.SOLVER.OFFSET_LR_FACTOR = 1.0
    # Learning-rate factor of the offset branches of RoI pooling, relative to BASE_LR (section 2.3).
    cfg.SOLVER.ROI_OFFSET_LR_FACTOR = 0.01

    # Iterations between two records of OffsetMonitor; 0: none.
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
