# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""What the deformable convolutions of a network sampled in a forward pass."""

from __future__ import annotations

import inspect
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

"""
Shape shorthand in this module:

    N: images, G: offset groups, K: taps
    H', W': output size of the deformable convolution
"""

BRANCHES = ("_offset", ".offset_conv")  # what names of branches have more than their convolutions


@dataclass(frozen=True)
class Sampled:
    """Where one deformable convolution sampled."""

    layer: str
    offset: Tensor  # (N, 2*G*K, H', W'), (dy, dx) per tap
    mask: Tensor | None  # (N, G*K, H', W')
    map_size: tuple[int, int]  # of its input
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    behind: Layers = frozenset()  # the deformable layers that its input was made with

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

    def stride_of(self, size: tuple[int, int]) -> int:
        """Returns pixels of the image to a cell of a map, a power of two.

        Args:
            size: of the map, which is rounded up wherever it is halved.

        Raises:
            ValueError: if the map is not one of the image, halved some times.
        """
        halved, stride = self.image_size, 1
        while halved != tuple(size) and max(halved) > 1:
            halved = (halved[0] + 1) // 2, (halved[1] + 1) // 2
            stride *= 2
        if halved != tuple(size):
            raise ValueError(
                f"a map of {size[0]} x {size[1]} must be the image's {self.image_size[0]} x "
                f"{self.image_size[1]} halved some times: it cannot be told where its cells lie"
            )
        return stride

    def choose(self, names: list[str] | None = None) -> list[Sampled]:
        """Returns layers, the last first.

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
        wanted = self.layers if names is None else names
        return [found for name, found in reversed(self.layers.items()) if name in wanted]


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
        a recording, which is empty until the network has run, and begins anew each time. Of a
        layer that ran several times in a pass it has the last.

    Raises:
        ValueError: if there are none.
    """
    require_deformable(model)
    recording, flow = Recording(), Flow()
    handles = [model.register_forward_pre_hook(_begin(recording))]
    for name, module in deformable_layers(model).items():
        if isinstance(module, OffsetConv2d):
            handles.append(module.register_forward_hook(_of_branch(recording, flow, name)))
        else:
            hook = _of_convolution(recording, flow, name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_pre_hook(_image_size(recording)))
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


def _begin(recording: Recording) -> Any:
    def hook(model: nn.Module, inputs: tuple[Any, ...]) -> None:
        recording.image_size = (0, 0)
        recording.layers.clear()

    return hook


def _of_branch(recording: Recording, flow: Flow, name: str) -> Any:
    def hook(branch: OffsetConv2d, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> None:
        _add(recording, flow, name, branch, inputs[0], *output)

    return hook


def _of_convolution(recording: Recording, flow: Flow, name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*inputs, **keywords).arguments
        input, offset = (bound[key] for key in list(bound)[:2])
        _add(recording, flow, name, module, input, offset, bound.get("mask"))

    return hook


def _add(
    recording: Recording,
    flow: Flow,
    name: str,
    module: Any,
    input: Tensor,
    offset: Tensor,
    mask: Tensor | None,
) -> None:
    recording.layers.pop(name, None)  # to be last again
    recording.layers[name] = Sampled(
        name,
        offset.detach().float(),
        None if mask is None else mask.detach().float(),
        (input.shape[-2], input.shape[-1]),
        *(_pair(getattr(module, key)) for key in ("kernel_size", "stride", "padding", "dilation")),
        flow.behind(input),
    )
    flow.mark(offset, frozenset([name]))  # and so all that is made with what it samples


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _image_size(recording: Recording) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs:
            size = (inputs[0].shape[-2], inputs[0].shape[-1])
            recording.image_size = max(recording.image_size, size, key=lambda s: s[0] * s[1])

    return hook
