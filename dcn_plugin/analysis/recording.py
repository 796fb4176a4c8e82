# SPDX-License-Identifier: Apache-2.0
# Copyright (c) dcn_plugin contributors
"""Records the offsets and masks of deformable convolutions during a forward pass."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dcn_plugin.layers import OffsetConv2d
from dcn_plugin.messages import UserError, got

from .dataflow import Dataflow, Source, Stride, pair, strided

"""
Shape shorthand in this module:

    N: images, G: offset groups, K: taps, P: positions of the output
    H', W': output size of the deformable convolution
"""

WINDOW = ("kernel_size", "stride", "padding", "dilation")
BRANCHES = ("_offset", ".offset_conv")  # suffixes of the names of offset branches


@dataclass(frozen=True)
class RecordedLayer:
    """Offsets and mask of one deformable convolution in one of its runs."""

    layer: str  # the module's name; "name#2", "name#3", … from its second run in a pass on
    module: str
    offset: Tensor  # (N, 2*G*K, H', W'), (dy, dx) per tap
    mask: Tensor | None  # (N, G*K, H', W')
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    depends_on: frozenset[str]  # the deformable layers that its input was computed with
    # Strides of its input and output relative to the image: position (i, j) of the map is centred
    # on pixel (i * stride[0], j * stride[1]). None where that is unknown.
    input_stride: Stride | None
    output_stride: Stride | None
    unknown: str  # why a stride is None

    @property
    def on_image(self) -> bool:
        """Returns whether its positions are known on the image: those on RoIs are not."""
        return self.output_stride is not None

    @property
    def taps(self) -> int:
        """Returns K."""
        return self.kernel_size[0] * self.kernel_size[1]

    @property
    def output_size(self) -> tuple[int, int]:
        """Returns H' and W'."""
        return self.offset.shape[-2], self.offset.shape[-1]

    def locations_at(self, rows: Tensor, columns: Tensor, image: int = 0) -> Tensor:
        """Returns the sampling locations of some output positions.

        Args:
            rows: Tensor[P] of integers.
            columns: likewise.
            image: index in the batch.

        Returns:
            Tensor[P, G, K, 2], rows and columns of the input map.
        """
        moved = self.offset[image][:, rows, columns].T.unflatten(1, (-1, self.taps, 2))
        grid = (torch.arange(k, device=rows.device) for k in self.kernel_size)
        taps = torch.stack(torch.meshgrid(*grid, indexing="ij"), dim=-1).flatten(0, 1)
        stride, padding, dilation = map(taps.new_tensor, (self.stride, self.padding, self.dilation))
        start = torch.stack([rows, columns], dim=-1) * stride - padding
        return start[:, None, None] + taps * dilation + moved

    def weights_at(self, rows: Tensor, columns: Tensor, image: int = 0) -> Tensor:
        """Returns Tensor[P, G, K], the modulation of the taps; 1 without a mask."""
        if self.mask is None:
            groups = self.offset.shape[1] // (2 * self.taps)
            return self.offset.new_ones(len(rows), groups, self.taps)
        return self.mask[image][:, rows, columns].T.unflatten(1, (-1, self.taps))

    def locations(self, image: int = 0) -> Tensor:
        """Returns Tensor[H', W', G, K, 2], the sampling locations of all output positions."""
        return self.locations_at(*self._positions(), image).unflatten(0, self.output_size)

    def weights(self, image: int = 0) -> Tensor:
        """Returns Tensor[H', W', G, K], the modulation of the taps at all output positions."""
        return self.weights_at(*self._positions(), image).unflatten(0, self.output_size)

    def _positions(self) -> tuple[Tensor, Tensor]:
        axes = (torch.arange(size, device=self.offset.device) for size in self.output_size)
        rows, columns = torch.meshgrid(*axes, indexing="ij")
        return rows.flatten(), columns.flatten()


@dataclass
class Recording:
    """The deformable convolutions of a model in the order in which they ran."""

    image_size: tuple[int, int] = (0, 0)  # of the model's input, with its padding
    layers: dict[str, RecordedLayer] = field(default_factory=dict)

    def choose(self, names: list[str] | None = None) -> list[RecordedLayer]:
        """Returns layers whose positions are known on the image, the last first.

        The others are skipped with a warning that says why.

        Args:
            names: layers to return; None: all.

        Raises:
            ValueError: if there is no such layer, or one named is not known on the image.
        """
        for name in names or ():
            if name not in self.layers:
                raise UserError(
                    "a layer must be one of the deformable layers that ran, "
                    f"{', '.join(self.layers)}; {got(name, self.layers)}"
                )
        wanted = self.layers if names is None else names
        chosen = [layer for name, layer in reversed(self.layers.items()) if name in wanted]
        skipped = "; ".join(f"{x.layer} {x.unknown}" for x in chosen if not x.on_image)
        if skipped and names is not None:
            raise UserError(f"positions on the image are not known: {skipped}; choose others")
        if skipped:
            warnings.warn(f"skipped layers of unknown positions: {skipped}", stacklevel=2)
        return [layer for layer in chosen if layer.on_image]


def deformable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Finds the deformable convolutions of a model.

    These are this package's, and any module with a kernel that is called with an input and offsets,
    such as torchvision's and Detectron2's.

    Returns:
        by name the module to hook: the branch that predicts the offsets, or the convolution.
    """
    modules = {}
    for name, module in model.named_modules():
        if isinstance(module, OffsetConv2d):
            for branch in BRANCHES:
                name = name.removesuffix(branch)
            modules[name] = module
        elif _takes_offsets(module) and not any(
            isinstance(child, OffsetConv2d) for child in module.children()
        ):
            modules[name] = module
    return modules


def require_deformable(model: nn.Module) -> None:
    """Raises ValueError if a model has no deformable convolutions."""
    if not deformable_layers(model):
        raise UserError(
            f"{type(model).__name__} has no deformable convolutions; add some with "
            "make_deformable() or MODEL.RESNETS.DEFORM_LAST"
        )


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Records the deformable convolutions of a model while it runs.

    Args:
        model: any model with deformable convolutions.

    Yields:
        the recording, empty until the model has run. Every call of the model starts it anew.

    Raises:
        ValueError: if there are no deformable convolutions.
    """
    require_deformable(model)
    recorder = _Recorder()
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(recorder.start, with_kwargs=True))
        for name, module in deformable_layers(model).items():
            hook = recorder.branch if isinstance(module, OffsetConv2d) else recorder.convolution
            handle = module.register_forward_hook(partial(hook, name), with_kwargs=True)
            hooks.enter_context(handle)
        with recorder.flow:
            yield recorder.recording


def _takes_offsets(module: nn.Module) -> bool:
    if not hasattr(module, "kernel_size"):
        return False
    names = list(inspect.signature(module.forward).parameters)
    return len(names) > 1 and names[1] == "offset"


class _Recorder:
    """The hooks of `record`."""

    def __init__(self) -> None:
        self.recording, self.flow = Recording(), Dataflow()
        self.branches: dict[int, tuple[Tensor, str]] = {}  # recorded offsets by id, and their layer

    def start(self, model: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.flow.clear()
        self.branches.clear()
        self.recording.image_size = (0, 0)
        self.recording.layers.clear()
        given = [value for value in (*inputs, *kwargs.values()) if isinstance(value, Tensor)]
        if given:  # else the input of the first convolution is the image
            self.flow.enter(given[0])

    def branch(
        self, name: str, branch: Any, inputs: tuple[Tensor], _: Any, output: tuple[Tensor, Any]
    ) -> None:
        recorded = self.add(name, branch, inputs[0], *output)
        self.branches[id(output[0])] = output[0], recorded.layer

    def convolution(
        self, name: str, module: Any, inputs: tuple[Any, ...], kwargs: Any, output: Tensor
    ) -> None:
        given = inspect.signature(module.forward).bind(*inputs, **kwargs).arguments
        input, offset = list(given.values())[:2]
        if id(offset) in self.branches:  # of a branch whose name does not tell its convolution
            self.recording.layers.pop(self.branches[id(offset)][1], None)
        recorded = self.add(name, module, input, offset, given.get("mask"))
        # Detectron2's own op does not go through the dispatcher.
        made = Source(frozenset([recorded.layer]), recorded.output_stride, recorded.unknown)
        self.flow.mark(output, [input, offset], made)

    def add(
        self, name: str, module: Any, input: Tensor, offset: Tensor, mask: Tensor | None
    ) -> RecordedLayer:
        self.flow.enter(input)
        self.recording.image_size = self.flow.image_size
        runs = 1 + sum(layer.module == name for layer in self.recording.layers.values())
        spacing = [pair(getattr(module, key)) for key in WINDOW]
        source = self.flow.of(input)
        made = strided(source, *spacing)
        recorded = RecordedLayer(
            name if runs == 1 else f"{name}#{runs}",
            name,
            offset.detach().float(),
            None if mask is None else mask.detach().float(),
            *spacing,
            source.layers,
            source.stride,
            made.stride,
            made.unknown,
        )
        self.recording.layers[recorded.layer] = recorded
        self.flow.mark(offset, [], Source(frozenset([recorded.layer]), made.stride, made.unknown))
        return recorded
