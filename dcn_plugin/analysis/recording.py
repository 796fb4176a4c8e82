# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What the deformable convolutions of a network sampled in a forward pass."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dcn_plugin.layers import OffsetConv2d
from dcn_plugin.layers.offset_branch import resting_taps
from dcn_plugin.messages import got

from .flow import Flow, Layers
from .grid import Grid, pair

"""
Shape shorthand in this module:

    N: images, G: offset groups, K: taps
    H', W': output size of the deformable convolution
"""

SPACING = ("kernel_size", "stride", "padding", "dilation")
BRANCHES = ("_offset", ".offset_conv")  # what names of branches have more than their convolutions


@dataclass(frozen=True)
class Sampled:
    """Where one deformable convolution sampled, in one of its runs."""

    layer: str  # the module's name, and from its second run in a pass on "#2", "#3", …
    module: str
    offset: Tensor  # (N, 2*G*K, H', W'), (dy, dx) per tap
    mask: Tensor | None  # (N, G*K, H', W')
    map_size: tuple[int, int]  # of its input
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    behind: Layers  # the deformable layers that its input was made with
    map_grid: Grid | None  # where the cells of its input lie on the image; None: nowhere
    out_grid: Grid | None  # and those of its output

    @property
    def on_image(self) -> bool:
        """Returns whether its cells have places on the image: those of RoIs have none."""
        return self.map_grid is not None and self.out_grid is not None

    @property
    def taps(self) -> int:
        """Returns K."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def out_size(self) -> tuple[int, int]:
        """Returns H' and W'."""
        return self.offset.shape[-2], self.offset.shape[-1]

    def positions(self, image: int = 0) -> Tensor:
        """Returns where the taps of every output cell lie.

        Args:
            image: of the batch.

        Returns:
            Tensor[H', W', G, K, 2], rows and columns in cells of the input.
        """
        moved = self.offset[image].unflatten(0, (-1, self.taps, 2)).permute(3, 4, 0, 1, 2)
        rows, columns = (  # (H', kh), (W', kw)
            resting_taps(self, axis, self.out_size[axis], self.offset) for axis in (0, 1)
        )
        (height, tall), (width, wide) = rows.shape, columns.shape
        grid = torch.stack(
            [
                rows[:, None, :, None].expand(height, width, tall, wide),
                columns[None, :, None, :].expand(height, width, tall, wide),
            ],
            dim=-1,
        )
        return grid.reshape(height, width, 1, self.taps, 2) + moved

    def weights(self, image: int = 0) -> Tensor:
        """Returns Tensor[H', W', G, K], what modulation weighs each tap with: 1 without."""
        if self.mask is None:
            channels = self.offset.shape[1] // 2
            return self.offset.new_ones(*self.out_size, channels // self.taps, self.taps)
        return self.mask[image].unflatten(0, (-1, self.taps)).permute(2, 3, 0, 1)


@dataclass
class Recording:
    """The deformable convolutions of a network, in the order in which they ran."""

    image_size: tuple[int, int] = (0, 0)  # as the network saw it, with its padding
    layers: dict[str, Sampled] = field(default_factory=dict)

    def choose(self, names: list[str] | None = None) -> list[Sampled]:
        """Returns layers whose cells lie on the image, the last first.

        Args:
            names: of layers; None: all.

        Raises:
            ValueError: if there is no such layer.
        """
        for name in names or ():
            if name not in self.layers:
                known = ", ".join(self.layers)
                raise ValueError(
                    f"a layer must be one of the deformable ones that ran, {known}; "
                    f"{got(name, self.layers)}"
                )
            if not self.layers[name].on_image:
                raise ValueError(
                    f"where the cells of {name} lie on the image is not known: it runs on RoIs, or "
                    "behind an op that may move them; choose other layers"
                )
        wanted = self.layers if names is None else names
        found = [layer for name, layer in reversed(self.layers.items()) if name in wanted]
        unknown = [layer.layer for layer in found if not layer.on_image]
        if unknown:
            warnings.warn(
                f"left out, since it is not known where on the image their cells lie: "
                f"{', '.join(unknown)}",
                stacklevel=2,
            )
        return [layer for layer in found if layer.on_image]


def deformable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the deformable convolutions of a network.

    These are what this package makes, and any module with a kernel that is called with an input
    and offsets, as torchvision's and Detectron2's are.

    Args:
        model: any network.

    Returns:
        what to look at for each: the branch that predicts the offsets, or the convolution. There
        may be none.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, OffsetConv2d):
            for branch in BRANCHES:
                name = name.removesuffix(branch)
            found[name] = module
        elif _takes_offsets(module) and not any(
            isinstance(child, OffsetConv2d) for child in module.children()
        ):
            found[name] = module
    return found


def require_deformable(model: nn.Module) -> None:
    """Checks that a network has deformable convolutions.

    Args:
        model: any network.

    Raises:
        ValueError: if it has none.
    """
    if not deformable_layers(model):
        raise ValueError(
            f"a {type(model).__name__} without deformable convolutions has nothing to show: "
            "make_deformable, or MODEL.RESNETS.DEFORM_LAST of a config, makes some"
        )


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Records what the deformable convolutions of a network sample while it runs.

    Args:
        model: any network with deformable convolutions.

    Yields:
        a recording, which is empty until the network has run, and begins anew each time that it is
        called, not a part of it.

    Raises:
        ValueError: if there are none.
    """
    require_deformable(model)
    recording, flow = Recording(), Flow()
    handles = [model.register_forward_pre_hook(_begin(recording, flow), with_kwargs=True)]
    for name, module in deformable_layers(model).items():
        if isinstance(module, OffsetConv2d):
            handles.append(module.register_forward_hook(_of_branch(recording, flow, name)))
        else:
            hook = _of_convolution(recording, flow, name)
            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with flow:
            yield recording
    finally:
        for handle in handles:
            handle.remove()


def _takes_offsets(module: nn.Module) -> bool:
    if not hasattr(module, "kernel_size"):
        return False
    names = list(inspect.signature(module.forward).parameters)
    return len(names) > 1 and names[1] == "offset"


def _begin(recording: Recording, flow: Flow) -> Any:
    def hook(model: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        flow.clear()
        recording.image_size = (0, 0)
        recording.layers.clear()
        given = [value for value in (*inputs, *keywords.values()) if isinstance(value, Tensor)]
        if given:  # else it is what the first convolution gets
            flow.enter(given[0])

    return hook


def _of_branch(recording: Recording, flow: Flow, name: str) -> Any:
    def hook(branch: OffsetConv2d, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> None:
        found = _add(recording, flow, name, branch, inputs[0], *output)
        flow.branches[output[0]] = found.layer

    return hook


def _of_convolution(recording: Recording, flow: Flow, name: str) -> Any:
    def hook(
        module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], output: Tensor
    ) -> None:
        bound = inspect.signature(module.forward).bind(*inputs, **keywords).arguments
        input, offset = (bound[key] for key in list(bound)[:2])
        if offset in flow.branches:  # of a branch with a name that does not tell whose it is
            recording.layers.pop(flow.branches[offset], None)
        found = _add(recording, flow, name, module, input, offset, bound.get("mask"))
        # Detectron2's on a GPU call what no dispatcher sees.
        flow.mark(output, frozenset([found.layer]) | flow.of(offset).layers, found.out_grid)

    return hook


def _add(
    recording: Recording,
    flow: Flow,
    name: str,
    module: Any,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
) -> Sampled:
    flow.enter(input)
    recording.image_size = flow.image_size
    runs = 1 + sum(layer.module == name for layer in recording.layers.values())
    spacing = [pair(getattr(module, key)) for key in SPACING]
    map_grid = flow.of(input).grid
    found = Sampled(
        name if runs == 1 else f"{name}#{runs}",
        name,
        offset.detach().float(),
        None if mask is None else mask.detach().float(),
        (input.shape[-2], input.shape[-1]),
        *spacing,
        flow.of(input).layers,
        map_grid,
        None if map_grid is None else map_grid.windows(*spacing),
    )
    recording.layers[found.layer] = found
    # And so all that is made with what it samples.
    flow.mark(offset, frozenset([found.layer]), found.out_grid)
    return found
