# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Trained networks, ready to be tested."""

from __future__ import annotations

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from .checkpoint import Checkpointer


def lay_out(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Lays a network out in memory as MODEL.CHANNELS_LAST says.

    Args:
        cfg: of the network.
        model: it.

    Returns:
        the same network.
    """
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST else model


def load_network(cfg: CfgNode) -> nn.Module:
    """Builds a network for testing, with its weights.

    Args:
        cfg: with MODEL.WEIGHTS, which may be empty.
    """
    model = lay_out(cfg, build_model(cfg)).eval()
    Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model
