# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Detectron2's optimizer with learning rates of their own for offset branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from dcn_plugin.layers import OffsetBranch, OffsetLinear


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds Detectron2's SGD; offset branches learn at their own pace.

    Args:
        cfg: with SOLVER.OFFSET_LR_FACTOR and ROI_OFFSET_LR_FACTOR, and Detectron2's keys of SOLVER.
        model: what is trained.

    Returns:
        the optimizer, with gradient clipping if the config asks for it.
    """
    solver = cfg.SOLVER
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    sgd = maybe_add_gradient_clipping(cfg, torch.optim.SGD)
    return sgd(
        scale_learning_rates(groups, offset_factors(cfg, model), solver.BASE_LR),
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
    )


def offset_factors(cfg: CfgNode, model: nn.Module) -> dict[nn.Parameter, float]:
    """Returns the factor of every parameter of an offset branch."""
    factors = {}
    for module in model.modules():
        if isinstance(module, OffsetBranch):
            of_rois = isinstance(module, OffsetLinear)
            solver = cfg.SOLVER
            factor = solver.ROI_OFFSET_LR_FACTOR if of_rois else solver.OFFSET_LR_FACTOR
            factors |= dict.fromkeys(module.parameters(), factor)
    return factors


def scale_learning_rates(
    groups: list[dict[str, Any]], factors: dict[nn.Parameter, float], base_lr: float
) -> list[dict[str, Any]]:
    """Splits parameter groups so that each parameter has its factor.

    Args:
        groups: of an optimizer.
        factors: by parameter; 1 for those without.
        base_lr: of groups without a learning rate.

    Returns:
        groups with the same parameters and other settings.
    """
    split = []
    for group in groups:
        by_factor: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        for factor, parameters in by_factor.items():
            lr = group.get("lr", base_lr) * factor
            split.append({**group, "params": parameters, "lr": lr})
    return split
