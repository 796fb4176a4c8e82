# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Replaces the convolutions of a model by deformable ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from .deform_conv import DeformConv2d, DeformConv2dPack
from .offset_branch import OffsetBranch

Predicate = Callable[[str, nn.Conv2d], bool]


def make_deformable(
    model: nn.Module,
    last: int | None = None,
    *,
    names: Sequence[str] | None = None,
    predicate: Predicate | None = None,
    offset_groups: int = 1,
    modulated: bool = False,
) -> list[str]:
    """Replaces convolutions of a model by deformable ones, in place.

    Each becomes a `DeformConv2dPack` with the same weight and bias under the same names. So
    checkpoints of the plain model still load (with `strict=False`, for the new offset branches),
    and the output is unchanged until the offsets are trained (except with `modulated`, where
    masks start at 0.5). Exactly one of `last`, `names` and `predicate` must be given.

    Args:
        model: any model. The replaced modules must be `nn.Conv2d`.
        last: the number of convolutions to replace, counted from the last one with a kernel larger
            than 1x1, in registration order. 3 is the paper's choice for a ResNet.
        names: of convolutions, as in `model.named_modules()`.
        predicate: called with the name and module of each convolution.
        offset_groups: number of blocks of input channels with separate offsets.
        modulated: whether to predict a mask too (DCNv2).

    Returns:
        the names of the replaced convolutions, in registration order.

    Raises:
        ValueError: if the arguments are not valid, or a convolution cannot be replaced. Then
            none has been replaced.

    Example:
        >>> model = torchvision.models.resnet50()
        >>> make_deformable(model, last=3)
        ['layer4.0.conv2', 'layer4.1.conv2', 'layer4.2.conv2']
    """
    if sum(choice is not None for choice in (last, names, predicate)) != 1:
        raise ValueError("make_deformable: exactly one of last, names and predicate must be given")
    convs = _convolutions(model)
    if names is not None:
        chosen = _named(model, convs, names)
    elif predicate is not None:
        chosen = [name for name, conv in convs.items() if predicate(name, conv)]
    else:
        chosen = _last(convs, last)
    if "" in chosen:
        raise ValueError(
            "make_deformable: the model itself is a convolution: "
            "use DeformConv2dPack.from_conv(model)"
        )
    packs = {convs[name]: _pack(name, convs[name], offset_groups, modulated) for name in chosen}
    # With duplicates: a module may be used more than once.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in packs:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, packs[module])
    return chosen


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """Returns the plain convolutions by name, without offset branches."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and not isinstance(module, (DeformConv2d, OffsetBranch))
    }


def _named(model: nn.Module, convs: dict[str, nn.Conv2d], names: Sequence[str]) -> list[str]:
    if isinstance(names, str):
        raise ValueError(f"make_deformable: names must be a list of names, got {names!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    first_name = {conv: name for name, conv in convs.items()}
    for name in names:
        if name not in modules:
            raise ValueError(f"make_deformable: the model has no module named {name!r}")
        if modules[name] not in first_name:
            kind = type(modules[name]).__name__
            raise ValueError(f"make_deformable: {name} must be a plain nn.Conv2d, got a {kind}")
    wanted = {first_name[modules[name]] for name in names}
    return [name for name in convs if name in wanted]


def _last(convs: dict[str, nn.Conv2d], last: int) -> list[str]:
    spatial = [name for name, conv in convs.items() if max(conv.kernel_size) > 1]
    if not (isinstance(last, int) and 0 < last <= len(spatial)):
        raise ValueError(
            f"make_deformable: last must be from 1 to {len(spatial)}, the model's convolutions "
            f"larger than 1x1, got {last!r}"
        )
    return spatial[-last:]


def _pack(name: str, conv: nn.Conv2d, offset_groups: int, modulated: bool) -> DeformConv2dPack:
    try:
        return DeformConv2dPack.from_conv(conv, offset_groups=offset_groups, modulated=modulated)
    except ValueError as error:
        raise ValueError(f"make_deformable: {name}: {error}") from None
