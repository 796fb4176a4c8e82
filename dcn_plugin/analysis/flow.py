# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What every tensor was made with, and where its cells lie, seen while a network runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .grid import RULES, Given, Grid, carried_on

Layers = frozenset[str]
CONVOLUTION = "aten::convolution"
DEFORMABLE = ("dcn_plugin::deform_conv2d", "torchvision::deform_conv2d")


@dataclass(frozen=True)
class Trail:
    """What is known of a tensor that is made of the image."""

    layers: Layers = frozenset()  # the deformable ones that it was made with
    grid: Grid | None = None  # None: its cells have no place on the image


class Flow(TorchDispatchMode):
    """Follows the image from op to op."""

    def __init__(self) -> None:
        """Begins with nothing known."""
        super().__init__()
        self.clear()

    def clear(self) -> None:
        """Forgets all, before another pass."""
        self.trails = WeakTensorKeyDictionary()
        self.branches = WeakTensorKeyDictionary()  # offsets that were recorded, and of which layer
        self.image_size: tuple[int, int] | None = None

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an op, whose outputs are made with all that its inputs are."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._schema.name not in RULES:
            with self:  # since in this mode ops that are made of others get here
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if func._schema.name == CONVOLUTION:
            self.enter(tensors[0])
        known = [tensor for tensor in tensors if tensor in self.trails]
        if known:
            layers = frozenset().union(*(self.trails[tensor].layers for tensor in known))
            for made in tree_leaves(out):
                if isinstance(made, Tensor):
                    grid = self._grid(func, args, kwargs, known, made)
                    self.mark(made, layers, grid)
                    if func._schema.is_mutable and made._base is not None:  # what it is a view of
                        whole = None if grid is None else carried_on(grid, made, made._base)
                        self.mark(made._base, layers, whole)
        return out

    def enter(self, tensor: Tensor) -> None:
        """Notes what a network or convolution is given: the first that is a map is the image.

        Args:
            tensor: its input; later ones that are made of nothing known have no place on the image.
        """
        if tensor in self.trails or tensor.dim() != 4:
            return
        first = self.image_size is None
        self.image_size = self.image_size or (tensor.shape[2], tensor.shape[3])
        self.mark(tensor, frozenset(), Grid() if first else None)

    def of(self, value: Any) -> Trail:
        """Returns what is known of a tensor: nothing of what is none."""
        return self.trails.get(value, Trail()) if isinstance(value, Tensor) else Trail()

    def mark(self, tensor: Tensor, layers: Layers, grid: Grid | None) -> None:
        """Notes that a tensor was made with layers, too, and where its cells lie."""
        self.trails[tensor] = Trail(self.of(tensor).layers | layers, grid)

    def _grid(
        self,
        func: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        known: list[Tensor],
        made: Tensor,
    ) -> Grid | None:
        """Returns where the cells of an output lie, by the first of the inputs that tells it."""
        name = func._schema.name
        if name in RULES:
            given = by_name(func, args, kwargs)
            x = given.get("input", given.get("self"))
            grid = self.of(x).grid
            return None if grid is None else RULES[name](grid, x, given, made)
        if name in DEFORMABLE:  # whose offsets are a map of the output's cells
            known = [by_name(func, args, kwargs)["offset"]]
        grids = ((tensor, self.of(tensor).grid) for tensor in known)
        carried = (carried_on(grid, tensor, made) for tensor, grid in grids if grid is not None)
        return next((grid for grid in carried if grid is not None), None)


def by_name(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Given:
    """Returns the arguments of an op, those not given too."""
    arguments = func._schema.arguments
    defaults = {each.name: each.default_value for each in arguments if each.has_default_value()}
    names = [each.name for each in arguments]
    return defaults | dict(zip(names, args, strict=False)) | dict(kwargs)
