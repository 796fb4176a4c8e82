# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Optimizers with separate learning rates for offset branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from dcn_plugin.config import with_dcn_defaults
from dcn_plugin.layers import OffsetBranch, OffsetLinear
from dcn_plugin.messages import UserError, got

from .checkpoint_files import other_run

OPTIMIZERS = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}
# Tensors in their states that have the shape of the parameter.
MOMENTS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Builds SGD or AdamW, with separate learning rates for offset branches.

    Args:
        cfg: SOLVER.OPTIMIZER, OFFSET_LR_FACTOR and ROI_OFFSET_LR_FACTOR (default: those of
            `add_dcn_config`), and the keys of Detectron2's `build_optimizer`.
        model: its parameters are optimized.
    """
    solver = with_dcn_defaults(cfg).SOLVER
    if solver.OPTIMIZER not in OPTIMIZERS:
        known = " or ".join(OPTIMIZERS)
        raise UserError(f"SOLVER.OPTIMIZER must be {known}, {got(solver.OPTIMIZER, OPTIMIZERS)}")
    arguments = {
        "SGD": {"momentum": solver.MOMENTUM, "nesterov": solver.NESTEROV},
        # Fused: several times as fast with many small tensors. It unscales the gradients of mixed
        # precision itself, too late for clipping.
        "AdamW": {"fused": not (solver.AMP.ENABLED and solver.CLIP_GRADIENTS.ENABLED)},
    }
    params = get_offset_optimizer_params(
        model,
        solver.BASE_LR,
        offset_lr_factor=solver.OFFSET_LR_FACTOR,
        roi_offset_lr_factor=solver.ROI_OFFSET_LR_FACTOR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    return maybe_add_gradient_clipping(cfg, OPTIMIZERS[solver.OPTIMIZER])(
        params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, **arguments[solver.OPTIMIZER]
    )


def get_offset_optimizer_params(
    model: nn.Module,
    base_lr: float,
    *,
    offset_lr_factor: float = 1.0,
    roi_offset_lr_factor: float = 0.01,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """Returns Detectron2's parameter groups, with separate groups for offset branches.

    Args:
        model: its parameters are optimized.
        base_lr: learning rate of all other parameters.
        offset_lr_factor: learning rate of offset convolutions, relative to `base_lr`.
        roi_offset_lr_factor: of the fully connected layers of deformable RoI pooling, likewise.
        **arguments: of Detectron2's `get_default_optimizer_params`.
    """
    kinds: dict[nn.Parameter, type[OffsetBranch]] = {}
    for module in model.modules():
        if isinstance(module, OffsetBranch):
            kind = OffsetLinear if isinstance(module, OffsetLinear) else OffsetBranch
            kinds |= dict.fromkeys(module.parameters(), kind)
    factors = {None: 1.0, OffsetBranch: offset_lr_factor, OffsetLinear: roi_offset_lr_factor}
    split = []
    for group in get_default_optimizer_params(model, base_lr=base_lr, **arguments):
        # Also where a factor is 1, so that a run can be resumed with any factors.
        by_kind: dict[type[OffsetBranch] | None, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_kind.setdefault(kinds.get(parameter), []).append(parameter)
        for kind, params in by_kind.items():
            lr = group.get("lr", base_lr) * factors[kind]
            split.append({**group, "params": params, "lr": lr})
    return split


def check_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any], model: nn.Module) -> None:
    """Checks that the state of a checkpoint fits, since fused optimizers crash if it does not.

    Args:
        optimizer: that shall load the state.
        saved: the state.
        model: for the names of parameters.

    Raises:
        UserError: if the groups have other numbers of parameters or lack an option, or a tensor
            has another shape than its parameter.
    """
    groups = optimizer.param_groups, saved["param_groups"]
    ours, theirs = ([len(group["params"]) for group in part] for part in groups)
    if ours != theirs:
        raise other_run(
            f"its optimizer has {sum(theirs)} parameters in groups of {theirs}, this one "
            f"{sum(ours)} in groups of {ours}"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group, other in zip(*groups, strict=True):
        # PyTorch adds flags that its earlier versions have not saved.
        numbers = {k for k, v in optimizer.defaults.items() if not isinstance(v, bool | None)}
        if missing := sorted(numbers - other.keys()):
            raise other_run(
                f"its optimizer has no {' and '.join(missing)}, which {type(optimizer).__name__} "
                "needs"
            )
        for parameter, index in zip(group["params"], other["params"], strict=True):
            state = saved["state"].get(index, {})
            for shape in (state[key].shape for key in MOMENTS if state.get(key) is not None):
                if shape != parameter.shape:
                    raise other_run(
                        f"{names.get(parameter, 'a parameter')} has the shape {tuple(shape)} there "
                        f"and {tuple(parameter.shape)} in the model"
                    )


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Gives the loaded state of an optimizer the memory format of its parameters.

    The state may be of a run with another MODEL.CHANNELS_LAST; fused optimizers assume that both
    have the same strides.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
