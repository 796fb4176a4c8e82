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
from dcn_plugin.messages import got

OPTIMIZERS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
CONV, ROI = "offsets of taps or maps", "offsets of RoIs by a fully connected layer"


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds Detectron2's SGD, or AdamW; offset branches learn at their own pace.

    Args:
        cfg: with SOLVER.OPTIMIZER, OFFSET_LR_FACTOR and ROI_OFFSET_LR_FACTOR, and Detectron2's
            keys of SOLVER.
        model: what is trained.

    Returns:
        the optimizer, with gradient clipping if the config asks for it.
    """
    solver = cfg.SOLVER
    factors = {CONV: solver.OFFSET_LR_FACTOR, ROI: solver.ROI_OFFSET_LR_FACTOR}
    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    check_optimizer(solver.OPTIMIZER)
    own = {
        "SGD": {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV},
        # Several times as fast for networks of many small tensors. It takes scaled gradients, which
        # clipping would see as they are.
        "AdamW": {"fused": not (solver.AMP.ENABLED and solver.CLIP_GRADIENTS.ENABLED)},
    }
    return maybe_add_gradient_clipping(cfg, OPTIMIZERS[solver.OPTIMIZER])(
        split_groups(groups, offset_kinds(model), factors, solver.BASE_LR),
        lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        **own[solver.OPTIMIZER],
    )


def lay_out_state(optimizer: torch.optim.Optimizer) -> None:
    """Lays what an optimizer remembers of its parameters out in memory as these are.

    Args:
        optimizer: that has loaded its state, perhaps of a training with another
            MODEL.CHANNELS_LAST; fused ones go through memory side by side.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def check_optimizer(name: str) -> None:
    """Checks SOLVER.OPTIMIZER.

    Args:
        name: its value.

    Raises:
        ValueError: if there is no such optimizer.
    """
    if name not in OPTIMIZERS:
        raise ValueError(
            f"SOLVER.OPTIMIZER must be {' or '.join(OPTIMIZERS)}, {got(name, OPTIMIZERS)}"
        )


def offset_kinds(model: nn.Module) -> dict[nn.Parameter, str]:
    """Returns what kind of offset branch each of their parameters belongs to."""
    kinds = {}
    for module in model.modules():
        if isinstance(module, OffsetBranch):
            kind = ROI if isinstance(module, OffsetLinear) else CONV
            kinds |= dict.fromkeys(module.parameters(), kind)
    return kinds


def split_groups(
    groups: list[dict[str, Any]],
    kinds: dict[nn.Parameter, str],
    factors: dict[str, float],
    base_lr: float,
) -> list[dict[str, Any]]:
    """Splits parameter groups by kind: also at a factor of 1, so that any factor can be resumed.

    Args:
        groups: of an optimizer.
        kinds: by parameter.
        factors: of the learning rate, by kind; 1 for parameters without.
        base_lr: of groups without a learning rate.

    Returns:
        groups with the same parameters and other settings.
    """
    split = []
    for group in groups:
        by_kind: dict[str | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_kind.setdefault(kinds.get(parameter), []).append(parameter)
        for kind, parameters in by_kind.items():
            lr = group.get("lr", base_lr) * factors.get(kind, 1.0)
            split.append({**group, "params": parameters, "lr": lr})
    return split
