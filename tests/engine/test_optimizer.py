# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Optimizers and their learning rates for offset branches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detectron2.config import get_cfg

from dcn_plugin import add_dcn_config
from dcn_plugin.engine import build_optimizer
from dcn_plugin.engine.optimizer import check_state, match_memory_format
from dcn_plugin.layers import DeformConv2dPack, DeformPSRoIPool, DeformRoIPool
from dcn_plugin.messages import UserError


def build_model() -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "plain": nn.Conv2d(3, 4, 3),
            "norm": nn.BatchNorm2d(4),
            "pack": DeformConv2dPack(4, 4, 3),
            "pool": DeformRoIPool(4, 2, 1.0),
            "ps": DeformPSRoIPool(4, 3, 2, 1.0),
        }
    )


def learning_rates(model: nn.Module, **solver: float) -> dict[str, tuple[float, float]]:
    """Returns learning rate and weight decay of each parameter, read from the optimizer."""
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.SOLVER.BASE_LR = 0.5
    for key, value in solver.items():
        setattr(cfg.SOLVER, key, value)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(cfg, model).param_groups
    found = {names[p]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found) == len(names)
    return found


def test_default_factors() -> None:
    for name, (lr, _) in learning_rates(build_model()).items():
        assert lr == pytest.approx(0.005 if "offset_fc" in name else 0.5), name


def test_factors_of_the_config() -> None:
    found = learning_rates(
        build_model(), OFFSET_LR_FACTOR=0.1, ROI_OFFSET_LR_FACTOR=0.2, BIAS_LR_FACTOR=2.0
    )
    for name, (lr, _) in found.items():
        factor = 0.1 if "offset_conv" in name else 0.2 if "offset_fc" in name else 1
        bias = 2 if name.endswith("bias") else 1
        assert lr == pytest.approx(0.5 * factor * bias), name


def test_weight_decay_is_detectron2s() -> None:
    found = learning_rates(build_model(), WEIGHT_DECAY=0.3, WEIGHT_DECAY_NORM=0.0)
    for name, (_, decay) in found.items():
        assert decay == (0.0 if name.startswith("norm") else 0.3), name


def test_adamw_has_the_groups_of_sgd() -> None:
    model = build_model()
    cfg = get_cfg()
    add_dcn_config(cfg)
    groups = {}
    for name in ("SGD", "AdamW"):
        cfg.SOLVER.OPTIMIZER = name
        optimizer = build_optimizer(cfg, model)
        assert isinstance(optimizer, getattr(torch.optim, name))
        groups[name] = [(g["lr"], g["weight_decay"], g["params"]) for g in optimizer.param_groups]
    for group, other in zip(*groups.values(), strict=True):
        assert group[:2] == other[:2]
        assert all(p is twin for p, twin in zip(group[2], other[2], strict=True))
    layer = nn.Linear(3, 1)
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = 0.1, 0.0
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 3)).sum().backward()
    build_optimizer(cfg, layer).step()
    # Adam's first step is as long as the learning rate, whatever the gradient.
    torch.testing.assert_close(layer.weight.detach(), before - 0.1)


def test_gradients_are_unscaled_before_clipping() -> None:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.SOLVER.OPTIMIZER = "AdamW"
    for amp in (False, True):
        for clipping in (False, True):
            cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.CLIP_GRADIENTS.ENABLED = amp, clipping
            optimizer = build_optimizer(cfg, nn.Linear(2, 1))
            # GradScaler leaves the gradients of an optimizer of this kind scaled.
            assert getattr(optimizer, "_step_supports_amp_scaling", False) != (amp and clipping)


@pytest.mark.parametrize("before", [torch.contiguous_format, torch.channels_last])
def test_resumes_in_another_memory_format(before: torch.memory_format) -> None:
    after = {torch.contiguous_format: torch.channels_last}.get(before, torch.contiguous_format)
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = "AdamW", 0.1
    layers = [nn.Conv2d(8, 4, 3).to(memory_format=before) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [build_optimizer(cfg, layer) for layer in layers]
    image = torch.randn(2, 8, 5, 5)

    def step(layer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        layer(image).square().sum().backward()
        optimizer.step()

    for layer, optimizer in zip(layers, optimizers, strict=True):
        step(layer, optimizer)
    layers[1] = layers[1].to(memory_format=after)
    resumed = build_optimizer(cfg, layers[1])
    resumed.load_state_dict(optimizers[1].state_dict())
    match_memory_format(resumed)
    step(layers[0], optimizers[0])
    step(layers[1], resumed)
    torch.testing.assert_close(layers[1].weight, layers[0].weight, atol=1e-5, rtol=1e-5)


def test_an_unknown_optimizer_is_an_error() -> None:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.SOLVER.OPTIMIZER = "AdmaW"
    with pytest.raises(ValueError, match=r"OPTIMIZER must be SGD or AdamW, got 'AdmaW'.*AdamW"):
        build_optimizer(cfg, build_model())


def test_gradient_clipping() -> None:
    cfg = get_cfg()
    add_dcn_config(cfg)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 0.25
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = 1.0, 0.0, 0.0
    layer = nn.Linear(1, 1)
    before = layer.bias.item()
    optimizer = build_optimizer(cfg, layer)
    layer.weight.grad, layer.bias.grad = torch.zeros(1, 1), torch.full((1,), 9.0)
    optimizer.step()
    assert layer.bias.item() == pytest.approx(before - 0.25)


def trained(kind: type[torch.optim.Optimizer], *sizes: int, **options: object) -> tuple:
    """Returns a model of linear layers and its optimizer after a step, with a group per layer."""
    model = nn.Sequential(*(nn.Linear(2, size) for size in sizes))
    groups = [{"params": list(layer.parameters())} for layer in model]
    optimizer = kind(groups, lr=0.1, **options)
    sum(layer(torch.ones(2)).sum() for layer in model).backward()
    optimizer.step()
    return model, optimizer


SGD, ADAMW = (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {"fused": True})


@pytest.mark.parametrize("kind, options", [SGD, ADAMW])
def test_the_state_of_the_same_model_fits(kind, options) -> None:
    model, optimizer = trained(kind, 3, 4, **options)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:  # as of an earlier PyTorch
        for flag in ("fused", "foreach", "maximize", "decoupled_weight_decay"):
            group.pop(flag, None)
    check_state(optimizer, saved, model)
    optimizer.load_state_dict(saved)
    optimizer.step()


@pytest.mark.parametrize(
    "saved, message",
    [
        ((*ADAMW, (3, 5)), r"1.weight has the shape \(5, 2\) there and \(4, 2\) in the model"),
        ((*ADAMW, (3,)), r"2 parameters in groups of \[2\], this one 4 in groups of \[2, 2\]"),
        ((*SGD, (3, 4)), "no betas and eps, which AdamW needs"),
    ],
)
def test_the_state_of_another_run_is_refused(saved, message) -> None:
    kind, options, sizes = saved
    _, other = trained(kind, *sizes, **options)
    model, optimizer = trained(ADAMW[0], 3, 4, **ADAMW[1])
    with pytest.raises(UserError, match=message):
        check_state(optimizer, other.state_dict(), model)
