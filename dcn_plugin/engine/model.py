# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Models built from a config, in its memory format and with its weights."""

from __future__ import annotations

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .checkpoint import Checkpointer


def set_memory_format(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Converts a model to channels-last if MODEL.CHANNELS_LAST is set, and returns it."""
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model


def load_model(cfg: CfgNode) -> nn.Module:
    """Builds a model in evaluation mode and loads MODEL.WEIGHTS, which may be empty.

    Args:
        cfg: the config.

    Raises:
        UserError: if the file has no weight of a part of the model, such as the RoI heads.
    """
    model = set_memory_format(cfg, build_model(cfg)).eval()
    allow_unmatched = cfg.MODEL.ALLOW_UNMATCHED_WEIGHTS
    Checkpointer(model, allow_unmatched=allow_unmatched, trained=True).load(cfg.MODEL.WEIGHTS)
    return model
